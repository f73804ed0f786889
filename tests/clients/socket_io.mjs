// SPDX-License-Identifier: MIT
// socket.io with the adapter that ADAPTER names (pubsub, sharded, streams): two servers that know of
// each other's clients through the server alone.
import { createServer } from 'node:http';
import { createAdapter, createShardedAdapter } from '@socket.io/redis-adapter';
import { createAdapter as createStreamsAdapter } from '@socket.io/redis-streams-adapter';
import { createClient } from 'redis';
import { Server } from 'socket.io';
import { io as connect } from 'socket.io-client';
import { port, print, run, until } from './node.mjs';

async function openAdapter() {
  const client = await createClient({ url: `redis://127.0.0.1:${port}` }).connect();
  if (process.env.ADAPTER === 'streams') {
    return createStreamsAdapter(client);
  }
  const subscriber = await client.duplicate().connect();
  return process.env.ADAPTER === 'sharded' ? createShardedAdapter(client, subscriber)
    : createAdapter(client, subscriber);
}

async function openServer() {
  const http = createServer();
  const io = new Server(http, { adapter: await openAdapter() });
  io.on('connection', (socket) => {
    socket.on('join', (room, done) => {
      socket.join(room);
      done();
    });
    socket.on('everybody', (value) => io.emit('everybody', value));
  });
  io.on('hello', (value, answer) => answer?.(`world ${value}`));
  await new Promise((resolve) => http.listen(0, resolve));
  return { io, port: http.address().port };
}

async function openClient(name, server, heard) {
  const socket = connect(`http://127.0.0.1:${server.port}`);
  socket.on('everybody', (value) => heard.push(`${name} everybody ${value}`));
  socket.on('room', (value) => heard.push(`${name} room ${value}`));
  socket.on('question', (value, answer) => answer(name + value));
  await new Promise((resolve) => socket.on('connect', resolve));
  return socket;
}

run(async () => {
  const heard = [];
  const first = await openServer();
  const second = await openServer();
  const ann = await openClient('ann', first, heard);
  const ben = await openClient('ben', second, heard);
  await until(async () => (await first.io.fetchSockets().catch(() => [])).length === 2);
  await until(async () => (await second.io.fetchSockets().catch(() => [])).length === 2);
  await new Promise((resolve) => ann.emit('join', 'room', resolve));
  await new Promise((resolve) => ben.emit('join', 'room', resolve));
  await until(async () => (await second.io.in('room').fetchSockets()).length === 2);
  ann.emit('everybody', 1);
  second.io.to('room').emit('room', 2);
  await until(() => heard.length === 4);
  print(heard.sort());
  print((await first.io.timeout(5000).emitWithAck('question', '?')).sort());
  print(await first.io.serverSideEmitWithAck('hello', 'x'));
  second.io.in('room').socketsLeave('room');
  await until(async () => (await first.io.in('room').fetchSockets()).length === 0);
  second.io.disconnectSockets();
  await until(() => !ann.connected && !ben.connected);
  print('all gone');
});
