//! Broadcast: A receivers, B bytes (0: an Arc of 64), C: 0 one thread, 1 two; COUNT values sent.
//! Nobody may lag: at most a ring of values is under way.

use crate::{black_box, pin, runtime, Clock, Figures, Order};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use tokio::sync::{broadcast, Semaphore};

const RING: usize = 1024;
const WINDOW: u64 = RING as u64 / 2;

trait Value: Clone + Send + Sync + 'static {
    fn from(value: u64) -> Self;
    fn value(&self) -> u64;
}

impl Value for u64 {
    #[inline(always)]
    fn from(value: u64) -> Self {
        value
    }
    #[inline(always)]
    fn value(&self) -> u64 {
        *self
    }
}

impl Value for [u64; 2] {
    #[inline(always)]
    fn from(value: u64) -> Self {
        [value; 2]
    }
    #[inline(always)]
    fn value(&self) -> u64 {
        self[0]
    }
}

impl Value for Arc<[u64; 8]> {
    #[inline(always)]
    fn from(value: u64) -> Self {
        Arc::new([value; 8])
    }
    #[inline(always)]
    fn value(&self) -> u64 {
        self[0]
    }
}

macro_rules! same_thread {
    ($count:expr, $receivers:expr, $send:expr) => {{
        pin(1);
        let clock = Clock::start();
        let mut sum = 0u64;
        let mut sent = 0u64;
        while sent < $count {
            for i in 0..WINDOW {
                $send(sent + i);
            }
            sent += WINDOW;
            for receiver in $receivers.iter_mut() {
                for _ in 0..WINDOW {
                    sum = sum.wrapping_add(receiver.try_recv().unwrap().value());
                }
            }
        }
        black_box(sum);
        clock.stop()
    }};
}

fn receivers<V: Value>(
    order: &Order,
    sender: &broadcast::Sender<V>,
) -> Vec<broadcast::Receiver<V>> {
    (0..order.a).map(|_| sender.subscribe()).collect()
}

fn tokio_same<V: Value>(order: &Order) -> Figures {
    let (sender, _) = broadcast::channel::<V>(RING);
    let mut receivers = receivers(order, &sender);
    same_thread!(order.count, receivers, |i| assert!(sender
        .send(V::from(i))
        .is_ok()))
}

fn async_broadcast_same<V: Value>(order: &Order) -> Figures {
    let (sender, first) = async_broadcast::broadcast::<V>(RING);
    let mut receivers: Vec<_> = (0..order.a).map(|_| first.clone()).collect();
    drop(first);
    same_thread!(order.count, receivers, |i| assert!(sender
        .try_broadcast(V::from(i))
        .is_ok()))
}

/// A task for each receiver, on two workers. Two windows may be under way: the last receiver of a
/// window lets the sender begin the one after the next.
fn tokio_tasks<V: Value>(order: &Order) -> Figures {
    let windows = order.count / WINDOW;
    let crowd = order.a as u64;
    runtime(2).block_on(async {
        let (sender, _) = broadcast::channel::<V>(RING);
        let through = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let room = Arc::new(Semaphore::new(2));
        let clock = Clock::start();
        let mut tasks = Vec::new();
        for mut receiver in receivers(order, &sender) {
            let (through, room) = (through.clone(), room.clone());
            tasks.push(tokio::spawn(async move {
                let mut sum = 0u64;
                for window in 0..windows {
                    for _ in 0..WINDOW {
                        sum = sum.wrapping_add(receiver.recv().await.expect("lagged").value());
                    }
                    let counter = &through[window as usize % 2];
                    if (counter.fetch_add(1, Ordering::AcqRel) + 1) % crowd == 0 {
                        room.add_permits(1);
                    }
                }
                black_box(sum);
            }));
        }
        tasks.push(tokio::spawn(async move {
            for window in 0..windows {
                room.acquire().await.unwrap().forget();
                for i in 0..WINDOW {
                    assert!(sender.send(V::from(window * WINDOW + i)).is_ok());
                }
            }
        }));
        for task in tasks {
            task.await.unwrap();
        }
        clock.stop()
    })
}

/// A sending thread, and one thread that serves all receivers.
fn tokio_threads<V: Value>(order: &Order) -> Figures {
    let count = order.count;
    let (sender, _) = broadcast::channel::<V>(RING);
    let mut receivers = receivers(order, &sender);
    let done = Arc::new(AtomicU64::new(0));
    let seen = done.clone();
    pin(1);
    let clock = Clock::start();
    let thread = std::thread::spawn(move || {
        pin(0);
        for i in 0..count {
            while i - seen.load(Ordering::Acquire) >= RING as u64 {
                std::hint::spin_loop();
            }
            assert!(sender.send(V::from(i)).is_ok());
        }
        sender
    });
    let mut taken = vec![0u64; receivers.len()];
    let mut sum = 0u64;
    while done.load(Ordering::Relaxed) < count {
        for (receiver, taken) in receivers.iter_mut().zip(taken.iter_mut()) {
            while let Ok(value) = receiver.try_recv() {
                sum = sum.wrapping_add(value.value());
                *taken += 1;
            }
        }
        done.store(*taken.iter().min().unwrap(), Ordering::Release);
    }
    black_box(sum);
    let figures = clock.stop();
    drop(thread.join().unwrap());
    figures
}

fn sized<V: Value>(order: &Order) -> Figures {
    match order.kind.as_str() {
        "tokio" if order.c == 0 => tokio_same::<V>(order),
        "tokio-tasks" => tokio_tasks::<V>(order),
        "tokio-threads" => tokio_threads::<V>(order),
        "async-broadcast" => async_broadcast_same::<V>(order),
        other => panic!("unknown kind {other}"),
    }
}

pub fn work(order: &Order) -> Figures {
    match order.b {
        0 => sized::<Arc<[u64; 8]>>(order),
        8 => sized::<u64>(order),
        _ => sized::<[u64; 2]>(order),
    }
}
