module vkp.bench/worker

go 1.18
