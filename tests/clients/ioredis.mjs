// SPDX-License-Identifier: MIT
// ioredis, or with LIB=iovalkey its fork: databases, pipelines, transactions, pub/sub, blocking
// commands, Lua, scans, MONITOR, large values, users.
import { createRequire } from 'node:module';
import { port, print, run, show, until } from './node.mjs';

const library = createRequire(import.meta.url)(process.env.LIB ?? 'ioredis');
const Redis = library.default ?? library.Redis ?? library;
const open = (options = {}) => new Redis({ port, ...options });

run(async () => {
  const redis = open();
  const one = open({ db: 1, connectionName: 'one' });
  const blocking = open();

  print('## databases');
  await show(redis.set('a', 1, 'EX', 100));
  await show(one.set('a', 2));
  await show(redis.get('a'));
  await show(one.get('a'));
  await show(one.client('GETNAME'));
  await show(one.dbsize());
  await show(redis.hset('hash', { a: 1, b: 2 }));
  await show(redis.hgetall('hash'));

  print('## pipelines and transactions');
  await show(redis.pipeline().set('x', 1).incr('x').get('x').exec());
  await show(redis.multi().set('x', 1).incr('x').get('x').exec());
  await show(one.multi().set('q', 1).select(5).set('q', 5).select(1).get('q').exec());
  await show(redis.watch('x'));
  await show(open().set('x', 9));
  await show(redis.multi().set('x', 3).exec());
  await show(redis.watch('x'));
  await show(redis.multi().set('x', 3).exec());

  print('## messages');
  const subscriber = open();
  const heard = [];
  subscriber.on('message', (channel, text) => heard.push(['message', channel, text]));
  subscriber.on('pmessage', (pattern, channel, text) => heard.push([pattern, channel, text]));
  subscriber.on('smessage', (channel, text) => heard.push(['smessage', channel, text]));
  await show(subscriber.subscribe('c1', 'c2'));
  await show(subscriber.psubscribe('c*'));
  await show(subscriber.ssubscribe('shard'));
  await show(redis.publish('c1', 'hi'));
  await show(redis.spublish('shard', 'there'));
  await until(() => heard.length === 3);
  print(heard.map(String).sort());
  await show(subscriber.unsubscribe('c1', 'c2'));
  await show(subscriber.punsubscribe('c*'));
  await show(subscriber.sunsubscribe('shard'));
  await show(subscriber.get('x'));

  print('## blocking');
  setTimeout(() => redis.rpush('list', 'v'), 100);
  await show(blocking.blpop('list', 10));
  setTimeout(() => redis.xadd('stream', '1-1', 'k', 'v'), 100);
  await show(blocking.xread('BLOCK', 10000, 'STREAMS', 'stream', '$'));
  await show(blocking.brpop('none', 0.1));

  print('## scripts');
  redis.defineCommand('mine', { numberOfKeys: 1, lua: 'return {KEYS[1], ARGV[1]}' });
  await show(redis.mine('k', 'v'));
  await show(redis.script('FLUSH'));
  await show(redis.mine('k', 'v'));

  print('## scans, MONITOR, large values, many commands');
  const keys = [];
  for await (const some of redis.scanStream({ match: '*', count: 10 })) {
    keys.push(...some);
  }
  print(keys.sort());
  const monitor = await open().monitor();
  const seen = [];
  monitor.on('monitor', (time, words, source, db) => {
    if (words[1] === 'seen') {
      seen.push([words, db]);
    }
  });
  await one.set('seen', 1);
  await until(() => seen.length === 1);
  print(seen);
  monitor.disconnect();
  const large = Buffer.alloc(2000000, 'z');
  await show(redis.set('large', large));
  print((await redis.getBuffer('large')).equals(large));
  const counts = await Promise.all(Array.from({ length: 5000 }, () => one.incr('count')));
  print(counts.every((count, i) => count === i + 1));
  const automatic = open({ enableAutoPipelining: true, db: 2 });
  const sets = Array.from({ length: 500 }, (_, i) => automatic.set(`p${i}`, i));
  print((await Promise.all(sets)).length);
  await show(automatic.dbsize());

  print('## users');
  await show(redis.acl('SETUSER', 'bob', 'on', '>pw', '+@all', '~*', '&*'));
  const bob = open({ username: 'bob', password: 'pw', db: 3, lazyConnect: true });
  await show(bob.connect());
  await show(bob.acl('WHOAMI'));
  await show(bob.set('z', 1));
  await show(redis.get('z'));
  bob.disconnect();
  await show(redis.acl('DELUSER', 'bob'));
  await show(redis.quit());
});
