// SPDX-License-Identifier: MIT
// BullMQ: many jobs, a delayed one, retries, priorities, progress, a flow with children, pausing.
import { FlowProducer, Queue, QueueEvents, Worker } from 'bullmq';
import { port, print, run, sleep, until } from './node.mjs';

const connection = { host: '127.0.0.1', port };

run(async () => {
  const queue = new Queue('jobs', { connection });
  const events = new QueueEvents('jobs', { connection });
  await events.waitUntilReady();
  let progress = 0;
  events.on('progress', () => progress++);
  const worker = new Worker('jobs', async (job) => {
    if (job.name === 'fails' && job.attemptsMade < 1) {
      throw new Error('the first time');
    }
    await job.updateProgress(50);
    return job.data.number * 2;
  }, { connection, concurrency: 5 });

  const jobs = await queue.addBulk(
    Array.from({ length: 50 }, (_, number) => ({ name: 'bulk', data: { number } })));
  const results = await Promise.all(jobs.map((job) => job.waitUntilFinished(events, 10000)));
  print('sum', results.reduce((a, b) => a + b));

  const begun = Date.now();
  const delayed = await queue.add('delayed', { number: 1 }, { delay: 300 });
  print('delayed', await delayed.waitUntilFinished(events, 10000), Date.now() - begun >= 290);
  const fails = await queue.add('fails', { number: 3 }, { attempts: 3, backoff: 50 });
  print('after a failure', await fails.waitUntilFinished(events, 10000));
  const urgent = await queue.add('urgent', { number: 4 }, { priority: 2 });
  print('urgent', await urgent.waitUntilFinished(events, 10000));

  const children = new Worker('children', async (job) => job.data.value, { connection });
  const parents = new Worker('parents', async (job) =>
    Object.values(await job.getChildrenValues()).reduce((a, b) => a + b, 0), { connection });
  const parentEvents = new QueueEvents('parents', { connection });
  await parentEvents.waitUntilReady();
  const flows = new FlowProducer({ connection });
  const flow = await flows.add({
    name: 'parent',
    queueName: 'parents',
    children: Array.from({ length: 5 },
      (_, value) => ({ name: 'child', queueName: 'children', data: { value } })),
  });
  print('flow', await flow.job.waitUntilFinished(parentEvents, 10000));

  await sleep(1500); // the workers block
  const late = await queue.add('late', { number: 9 });
  print('late', await late.waitUntilFinished(events, 10000));
  await until(() => progress >= 54);
  await queue.pause();
  await queue.add('waits', { number: 1 });
  print(await queue.getJobCounts('waiting', 'paused', 'completed', 'failed', 'delayed'));
  await queue.resume();
  await until(async () => (await queue.getCompletedCount()) === 55);
  await queue.obliterate({ force: true });
  for (const each of [worker, children, parents, queue, events, parentEvents, flows]) {
    await each.close();
  }
  print('closed');
});
