//! One value, once; and requests that carry the sender of their reply.
//!
//! call: A clients, COUNT requests; once: COUNT times create, send, receive on one thread.

use crate::{black_box, pin, runtime, Clock, Figures, Order, Steps};
use std::sync::mpsc as std_mpsc;
use tokio::sync::{mpsc, oneshot};

const QUEUED: usize = 1024;

/// A server thread and client threads, of the given calls.
macro_rules! call_threads {
    ($order:expr, $requests:expr, $next:expr, $answer:expr, $ask:expr) => {{
        let clients = $order.a;
        let each = $order.count / clients as u64;
        let (requests, mut queue) = $requests;
        let server = std::thread::spawn(move || {
            if clients == 1 {
                pin(0);
            }
            while let Some((value, reply)) = $next(&mut queue) {
                $answer(reply, value + 1);
            }
        });
        let clock = Clock::start();
        let threads: Vec<_> = (0..clients)
            .map(|_| {
                let requests = requests.clone();
                std::thread::spawn(move || {
                    if clients == 1 {
                        pin(1);
                    }
                    let mut steps = Steps::new(each);
                    for i in 0..each {
                        assert_eq!($ask(&requests, i), i + 1);
                        steps.step();
                    }
                    steps.ns
                })
            })
            .collect();
        drop(requests);
        let ns: Vec<u32> = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect();
        let figures = clock.stop();
        server.join().unwrap();
        figures.with_percentiles(ns)
    }};
}

fn call_tasks(order: &Order, workers: usize) -> Figures {
    let clients = order.a;
    let each = order.count / clients as u64;
    runtime(workers).block_on(async move {
        let (requests, mut queue) = mpsc::channel::<(u64, oneshot::Sender<u64>)>(QUEUED);
        tokio::spawn(async move {
            while let Some((value, reply)) = queue.recv().await {
                assert!(reply.send(value + 1).is_ok());
            }
        });
        let clock = Clock::start();
        let tasks: Vec<_> = (0..clients)
            .map(|_| {
                let requests = requests.clone();
                tokio::spawn(async move {
                    let mut steps = Steps::new(each);
                    for i in 0..each {
                        let (reply, answer) = oneshot::channel();
                        assert!(requests.send((i, reply)).await.is_ok());
                        assert_eq!(answer.await, Ok(i + 1));
                        steps.step();
                    }
                    steps.ns
                })
            })
            .collect();
        let mut ns = Vec::new();
        for task in tasks {
            ns.extend(task.await.unwrap());
        }
        clock.stop().with_percentiles(ns)
    })
}

pub fn call(order: &Order) -> Figures {
    match order.kind.as_str() {
        "tokio-tasks" => call_tasks(order, 2),
        "tokio-current" => call_tasks(order, 0),
        "tokio-threads" => call_threads!(
            order,
            mpsc::channel::<(u64, oneshot::Sender<u64>)>(QUEUED),
            |queue: &mut mpsc::Receiver<_>| queue.blocking_recv(),
            |reply: oneshot::Sender<u64>, value| reply.send(value).unwrap(),
            |requests: &mpsc::Sender<_>, i| {
                let (reply, answer) = oneshot::channel();
                assert!(requests.blocking_send((i, reply)).is_ok());
                answer.blocking_recv().unwrap()
            }
        ),
        "std" => call_threads!(
            order,
            std_mpsc::sync_channel::<(u64, std_mpsc::SyncSender<u64>)>(QUEUED),
            |queue: &mut std_mpsc::Receiver<_>| queue.recv().ok(),
            |reply: std_mpsc::SyncSender<u64>, value| reply.send(value).unwrap(),
            |requests: &std_mpsc::SyncSender<_>, i| {
                let (reply, answer) = std_mpsc::sync_channel(1);
                assert!(requests.send((i, reply)).is_ok());
                answer.recv().unwrap()
            }
        ),
        "crossbeam" => call_threads!(
            order,
            crossbeam_channel::bounded::<(u64, crossbeam_channel::Sender<u64>)>(QUEUED),
            |queue: &mut crossbeam_channel::Receiver<_>| queue.recv().ok(),
            |reply: crossbeam_channel::Sender<u64>, value| reply.send(value).unwrap(),
            |requests: &crossbeam_channel::Sender<_>, i| {
                let (reply, answer) = crossbeam_channel::bounded(1);
                assert!(requests.send((i, reply)).is_ok());
                answer.recv().unwrap()
            }
        ),
        other => panic!("unknown kind {other}"),
    }
}

macro_rules! once_of {
    ($count:expr, $create:expr, $receive:expr) => {{
        let clock = Clock::start();
        let mut sum = 0u64;
        for i in 0..$count {
            let (sender, receiver) = $create;
            sender.send(black_box(i)).unwrap();
            sum = sum.wrapping_add($receive(receiver));
        }
        black_box(sum);
        clock.stop()
    }};
}

fn once_pass(order: &Order, count: u64) -> Figures {
    match order.kind.as_str() {
        "tokio" => once_of!(count, oneshot::channel(), |mut end: oneshot::Receiver<
            u64,
        >| end
            .try_recv()
            .unwrap()),
        "std" => {
            once_of!(
                count,
                std_mpsc::sync_channel(1),
                |end: std_mpsc::Receiver<u64>| end.recv().unwrap()
            )
        }
        "crossbeam" => once_of!(
            count,
            crossbeam_channel::bounded(1),
            |end: crossbeam_channel::Receiver<u64>| end.recv().unwrap()
        ),
        "flume" => {
            once_of!(count, flume::bounded(1), |end: flume::Receiver<u64>| end
                .recv()
                .unwrap())
        }
        other => panic!("unknown kind {other}"),
    }
}

pub fn once(order: &Order) -> Figures {
    pin(1);
    once_pass(order, order.count / 10);
    once_pass(order, order.count)
}
