// SPDX-License-Identifier: MIT
// node-redis in RESP2 or RESP3 (RESP=2, 3), and in RESP3 with its clientSideCache: what another
// client writes must not be read from the cache.
import { BasicClientSideCache, createClient, createClientPool } from 'redis';
import { port, print, run, show, until } from './node.mjs';

const RESP = Number(process.env.RESP ?? 2);

async function open(options = {}) {
  const client = createClient({ url: `redis://127.0.0.1:${port}`, RESP, ...options });
  client.on('error', (error) => print('error', error));
  return client.connect();
}

async function cached(redis) {
  const client = await open({ clientSideCache: new BasicClientSideCache({ maxEntries: 100 }) });
  await redis.set('cached', '1');
  await show(client.get('cached'));
  await show(client.get('cached'));
  await redis.set('cached', '2');
  await until(async () => (await client.get('cached')) === '2');
  await show(client.get('cached'));
  await redis.flushAll();
  await until(async () => (await client.get('cached')) === null);
}

run(async () => {
  const redis = await open();
  const one = await open({ database: 1, name: 'one' });
  print('## databases and types');
  await show(redis.set('a', '1', { EX: 100 }));
  await show(one.set('a', '2'));
  await show(redis.get('a'));
  await show(one.clientGetName());
  await show(redis.hSet('hash', { a: 1, b: 2 }));
  await show(redis.hGetAll('hash'));
  await show(redis.zAdd('sorted', [{ score: 1.5, value: 'a' }]));
  await show(redis.zRangeWithScores('sorted', 0, -1));
  await show(redis.sAdd('set', ['a']));
  await show(redis.sMembers('set'));
  await show(redis.configGet('maxmemory'));

  print('## transactions');
  await show(redis.multi().set('x', '1').incr('x').hGetAll('hash').exec());
  await show(one.multi().set('x', '1').get('x').exec());
  await show(redis.watch('x'));
  await show(one.select(0));
  await show(one.set('x', '5'));
  await show(redis.multi().set('x', '6').exec());
  await show(redis.watch('x'));
  await show(redis.multi().set('x', '6').exec());

  print('## messages');
  const subscriber = await open();
  const heard = [];
  await subscriber.subscribe('c1', (text, channel) => heard.push([channel, text]));
  await subscriber.pSubscribe('c*', (text, channel) => heard.push(['c*', channel, text]));
  await subscriber.sSubscribe('shard', (text, channel) => heard.push(['s', channel, text]));
  await show(redis.publish('c1', 'hi'));
  await show(redis.sPublish('shard', 'there'));
  await until(() => heard.length === 3);
  print(heard.map(String).sort());
  await subscriber.unsubscribe('c1');
  await subscriber.pUnsubscribe('c*');
  await subscriber.sUnsubscribe('shard');
  await show(subscriber.get('x'));

  print('## blocking, scripts, pools');
  const blocking = await open();
  setTimeout(() => redis.rPush('list', 'v'), 100);
  await show(blocking.blPop('list', 10));
  await show(blocking.blPop('none', 0.1));
  await show(redis.eval('return {KEYS[1], ARGV[1]}', { keys: ['k'], arguments: ['v'] }));
  const pool = await createClientPool({ url: `redis://127.0.0.1:${port}`, RESP, database: 2 },
    { minimum: 2, maximum: 5 }).connect();
  await show(pool.execute(async (client) => {
    await client.watch('p');
    return client.multi().set('p', '1').get('p').exec();
  }));
  print((await Promise.all(Array.from({ length: 300 }, () => pool.incr('n')))).length);
  await show(pool.get('n'));
  pool.destroy();

  print('## users');
  await show(redis.aclSetUser('bob', ['on', '>pw', '+@all', '~*', '&*']));
  const bob = await open({ username: 'bob', password: 'pw', database: 3 });
  await show(bob.aclWhoAmI());
  await show(bob.set('z', '1'));
  await show(bob.keys('*'));
  bob.destroy();
  await show(redis.aclDelUser('bob'));
  if (RESP === 3) {
    print('## clientSideCache');
    await cached(redis);
  }
  await show(redis.sendCommand(['NOSUCH']));
  await show(redis.quit());
});
