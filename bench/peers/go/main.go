// Worker: Go's channels; called as the C workers are, and prints the same line (see worker.h).
// Items: flow, pair, pong, memory, and call: A clients, COUNT requests that carry a channel for
// their reply. There are no unbounded ones.
// SPDX-License-Identifier: MIT
package main

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"sort"
	"strconv"
	"sync"
	"syscall"
	"time"
)

type order struct {
	item    string
	a, b, c int
	count   int
}

type clock struct {
	started time.Time
	usage   syscall.Rusage
}

type figures struct {
	seconds, cpuSeconds, sleeps float64
	more                        [2]float64
}

func start() clock {
	var now clock
	syscall.Getrusage(syscall.RUSAGE_SELF, &now.usage)
	now.started = time.Now()
	return now
}

func (since clock) stop() figures {
	seconds := time.Since(since.started).Seconds()
	var now syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &now)
	cpu := now.Utime.Nano() + now.Stime.Nano() - since.usage.Utime.Nano() - since.usage.Stime.Nano()
	nan := math.NaN()
	return figures{seconds, float64(cpu) * 1e-9, float64(now.Nvcsw - since.usage.Nvcsw),
		[2]float64{nan, nan}}
}

func (made figures) withPercentiles(ns []int) figures {
	sort.Ints(ns)
	made.more = [2]float64{float64(ns[len(ns)/2]), float64(ns[len(ns)-1-len(ns)/100])}
	return made
}

type words interface {
	[1]uint64 | [8]uint64
}

func fill[M words](value uint64) M {
	var message M
	for i := 0; i < len(message); i++ {
		message[i] = value
	}
	return message
}

func flow[M words](to order) figures {
	each := uint64(to.count / to.c)
	channel := make(chan M, to.a)
	var done sync.WaitGroup
	done.Add(to.c)
	since := start()
	for i := 0; i < to.c; i++ {
		go func() {
			for k := uint64(0); k < each; k++ {
				channel <- fill[M](k)
			}
			done.Done()
		}()
	}
	var sum uint64
	for k := uint64(0); k < each*uint64(to.c); k++ {
		message := <-channel
		sum += message[0]
	}
	made := since.stop()
	done.Wait()
	if sum != uint64(to.c)*(each*(each-1)/2) {
		panic("flow: messages lost, doubled or changed")
	}
	return made
}

func pair[M words](to order) figures {
	channel := make(chan M, to.a)
	var since clock
	warmUp := to.count / 10
	for i := 0; i < warmUp+to.count; i++ {
		if i == warmUp {
			since = start()
		}
		channel <- fill[M](uint64(i))
		message := <-channel
		if message[0] != uint64(i) {
			panic("pair: another message came out")
		}
	}
	return since.stop()
}

func pong[M words](to order) figures {
	there, back := make(chan M, to.a), make(chan M, to.a)
	go func() {
		for message := range there {
			back <- message
		}
	}()
	warmUp := to.count / 10
	ns := make([]int, to.count)
	var since clock
	var last time.Time
	for i := 0; i < warmUp+to.count; i++ {
		if i == warmUp {
			since = start()
			last = since.started
		}
		there <- fill[M](uint64(i))
		message := <-back
		if message[0] != uint64(i) {
			panic("pong: another message came back")
		}
		if i >= warmUp {
			now := time.Now()
			ns[i-warmUp] = int(now.Sub(last))
			last = now
		}
	}
	return since.stop().withPercentiles(ns)
}

func heap() float64 {
	var now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&now)
	return float64(now.HeapAlloc)
}

func memory[M words](to order) figures {
	const idle = 64
	var kept [idle]chan M
	made := start().stop()
	before := heap()
	for i := range kept {
		kept[i] = make(chan M, to.a)
	}
	made.more[0] = (heap() - before) / idle
	before = heap()
	for i := 0; i < to.a; i++ {
		kept[0] <- fill[M](uint64(i))
	}
	made.more[1] = (heap() - before) / float64(to.a)
	runtime.KeepAlive(kept)
	return made
}

type request struct {
	value uint64
	reply chan uint64
}

func call(to order) figures {
	clients := to.a
	each := to.count / clients
	requests := make(chan request, 1024)
	go func() {
		for asked := range requests {
			asked.reply <- asked.value + 1
		}
	}()
	ns := make([]int, clients*each)
	var done sync.WaitGroup
	done.Add(clients)
	since := start()
	for client := 0; client < clients; client++ {
		go func(mine []int) {
			last := time.Now()
			for i := range mine {
				reply := make(chan uint64, 1)
				requests <- request{uint64(i), reply}
				if <-reply != uint64(i)+1 {
					panic("call: the answer to something else")
				}
				now := time.Now()
				mine[i] = int(now.Sub(last))
				last = now
			}
			done.Done()
		}(ns[client*each : (client+1)*each])
	}
	done.Wait()
	return since.stop().withPercentiles(ns)
}

func sized[M words](to order) figures {
	switch to.item {
	case "flow":
		return flow[M](to)
	case "pair":
		return pair[M](to)
	case "pong":
		return pong[M](to)
	case "memory":
		return memory[M](to)
	}
	return call(to)
}

func main() {
	if len(os.Args) != 7 {
		fmt.Fprintln(os.Stderr, "usage: go ITEM KIND A B C COUNT")
		os.Exit(2)
	}
	number := func(at int) int {
		value, err := strconv.Atoi(os.Args[at])
		if err != nil {
			panic(err)
		}
		return value
	}
	to := order{os.Args[1], number(3), number(4), number(5), number(6)}
	var made figures
	if to.b == 8 {
		made = sized[[1]uint64](to)
	} else {
		made = sized[[8]uint64](to)
	}
	fmt.Printf("%.9f %.9f %.0f nan %.1f %.1f\n", made.seconds, made.cpuSeconds, made.sleeps,
		made.more[0], made.more[1])
}
