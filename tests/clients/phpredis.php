<?php
// SPDX-License-Identifier: MIT
// phpredis: a database, pipelines, transactions with WATCH, scans, blocking pops, persistent
// connections.
$port = (int) getenv('PORT');

function open(int $port): Redis
{
    $redis = new Redis();
    $redis->connect('127.0.0.1', $port);
    return $redis;
}

function show($value): void
{
    echo json_encode($value), "\n";
}

$redis = open($port);
$other = open($port);
show($redis->select(2));
show($redis->set('k', 'two'));
show($other->get('k'));
show($redis->get('k'));
show($redis->hMSet('hash', ['a' => 1, 'b' => 2]));
show($redis->hGetAll('hash'));
show($redis->multi(Redis::PIPELINE)->set('x', 1)->incr('x')->get('x')->exec());
show($redis->multi()->set('x', 1)->incr('x')->get('x')->exec());
$redis->watch('x');
$other->select(2);
$other->set('x', 9);
show($redis->multi()->set('x', 3)->exec());
$redis->watch('x');
show($redis->multi()->set('x', 3)->exec());
show($redis->blPop(['none'], 1));
$redis->rPush('list', 'v');
show($redis->blPop(['none', 'list'], 5));
for ($i = 0; $i < 100; $i++) {
    $redis->set("scan:$i", $i);
}
$redis->setOption(Redis::OPT_SCAN, Redis::SCAN_RETRY);
$cursor = null;
$found = [];
while (($keys = $redis->scan($cursor, 'scan:*')) !== false) {
    $found = array_merge($found, $keys);
}
show(count(array_unique($found)));
show($redis->eval('return {KEYS[1], ARGV[1]}', ['k', 'v'], 1));
show($redis->rawCommand('NOSUCH'));
show($redis->getLastError());
$redis->setOption(Redis::OPT_SERIALIZER, Redis::SERIALIZER_PHP);
$redis->set('object', ['a' => [1, 2]]);
show($redis->get('object'));
for ($i = 0; $i < 3; $i++) { // the connection of a request before, in the database of this one
    $persistent = new Redis();
    $persistent->pconnect('127.0.0.1', $port, 0, 'pool');
    show($persistent->select($i));
    show($persistent->set("in$i", $i));
    $persistent->close();
}
show($other->select(1));
show($other->keys('in*'));
