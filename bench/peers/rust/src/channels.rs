//! Channels of messages: flow, pair, pong, memory.

use crate::{black_box, heap, pin, runtime, Clock, Figures, Order, Steps};
use std::sync::{mpsc as std_mpsc, Arc, Barrier};
use tokio::sync::mpsc as tokio_mpsc;

const BULK: usize = 256;
const IDLE_CHANNELS: usize = 64;

pub trait Message: Copy + Send + 'static {
    fn from(value: u64) -> Self;
    fn value(&self) -> u64;
}

#[derive(Clone, Copy)]
pub struct Words<const N: usize>([u64; N]);

impl<const N: usize> Message for Words<N> {
    #[inline(always)]
    fn from(value: u64) -> Self {
        Words([value; N])
    }
    #[inline(always)]
    fn value(&self) -> u64 {
        self.0[0]
    }
}

trait Sends<M>: Clone + Send + 'static {
    fn send(&self, message: M);
}

trait Receives<M>: Send + 'static {
    fn receive(&mut self) -> M;
}

/// Which calls of which ends are meant.
#[derive(Clone)]
struct By<E>(E);
struct Trying<E>(E);
struct TryingSender<M>(tokio_mpsc::Sender<M>);

impl<M> Clone for TryingSender<M> {
    fn clone(&self) -> Self {
        TryingSender(self.0.clone())
    }
}

macro_rules! sends {
    ($end:ty, $call:ident) => {
        impl<M: Message> Sends<M> for $end {
            #[inline(always)]
            fn send(&self, message: M) {
                assert!(self.0.$call(message).is_ok());
            }
        }
    };
}

macro_rules! receives {
    ($end:ty, $call:ident) => {
        impl<M: Message> Receives<M> for $end {
            #[inline(always)]
            fn receive(&mut self) -> M {
                self.0.$call().ok().expect("closed")
            }
        }
    };
}

macro_rules! receives_some {
    ($end:ty, $call:ident) => {
        impl<M: Message> Receives<M> for $end {
            #[inline(always)]
            fn receive(&mut self) -> M {
                self.0.$call().expect("closed")
            }
        }
    };
}

sends!(By<std_mpsc::Sender<M>>, send);
sends!(By<std_mpsc::SyncSender<M>>, send);
sends!(By<crossbeam_channel::Sender<M>>, send);
sends!(By<flume::Sender<M>>, send);
sends!(By<async_channel::Sender<M>>, send_blocking);
sends!(By<tokio_mpsc::Sender<M>>, blocking_send);
sends!(By<tokio_mpsc::UnboundedSender<M>>, send);
sends!(TryingSender<M>, try_send);
receives!(By<std_mpsc::Receiver<M>>, recv);
receives!(By<crossbeam_channel::Receiver<M>>, recv);
receives!(By<flume::Receiver<M>>, recv);
receives!(By<async_channel::Receiver<M>>, recv_blocking);
receives_some!(By<tokio_mpsc::Receiver<M>>, blocking_recv);
receives_some!(By<tokio_mpsc::UnboundedReceiver<M>>, blocking_recv);
receives!(Trying<tokio_mpsc::Receiver<M>>, try_recv);
receives!(Trying<tokio_mpsc::UnboundedReceiver<M>>, try_recv);

/// Runs `$what` with the two ends of a fresh channel of the order's kind.
macro_rules! with_channel {
    ($order:expr, $message:ty, |$sender:ident, $receiver:ident| $what:expr) => {{
        macro_rules! run {
            ($ends:expr, $wrap_sender:expr, $wrap_receiver:expr) => {{
                let (sender, receiver) = $ends;
                let ($sender, $receiver) = ($wrap_sender(sender), $wrap_receiver(receiver));
                $what
            }};
        }
        match ($order.kind.as_str(), $order.a) {
            ("std", 0) => run!(std_mpsc::channel::<$message>(), By, By),
            ("std", most) => run!(std_mpsc::sync_channel::<$message>(most), By, By),
            ("crossbeam", 0) => run!(crossbeam_channel::unbounded::<$message>(), By, By),
            ("crossbeam", most) => run!(crossbeam_channel::bounded::<$message>(most), By, By),
            ("flume", 0) => run!(flume::unbounded::<$message>(), By, By),
            ("flume", most) => run!(flume::bounded::<$message>(most), By, By),
            ("async-channel", 0) => run!(async_channel::unbounded::<$message>(), By, By),
            ("async-channel", most) => run!(async_channel::bounded::<$message>(most), By, By),
            ("tokio-threads", 0) => run!(tokio_mpsc::unbounded_channel::<$message>(), By, By),
            ("tokio-threads", most) => run!(tokio_mpsc::channel::<$message>(most), By, By),
            ("tokio-try", 0) => run!(tokio_mpsc::unbounded_channel::<$message>(), By, Trying),
            ("tokio-try", most) => {
                run!(tokio_mpsc::channel::<$message>(most), TryingSender, Trying)
            }
            (other, _) => panic!("unknown kind {other}"),
        }
    }};
}

fn expected(senders: usize, each: u64) -> u64 {
    senders as u64 * (each * (each - 1) / 2)
}

fn flow<M: Message, S: Sends<M>, R: Receives<M>>(
    order: &Order,
    sender: S,
    mut receiver: R,
) -> Figures {
    let senders = order.c;
    let each = order.count / senders as u64;
    let start = Arc::new(Barrier::new(senders + 1));
    let threads: Vec<_> = (0..senders)
        .map(|_| {
            let (sender, start) = (sender.clone(), start.clone());
            std::thread::spawn(move || {
                if senders == 1 {
                    pin(0);
                }
                start.wait();
                for i in 0..each {
                    sender.send(M::from(i));
                }
            })
        })
        .collect();
    drop(sender);
    if senders == 1 {
        pin(1);
    }
    start.wait();
    let clock = Clock::start();
    let mut sum = 0u64;
    for _ in 0..each * senders as u64 {
        sum = sum.wrapping_add(receiver.receive().value());
    }
    let figures = clock.stop();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(sum, expected(senders, each));
    figures
}

fn pair<M: Message, S: Sends<M>, R: Receives<M>>(
    order: &Order,
    sender: S,
    mut receiver: R,
) -> Figures {
    pin(1);
    let mut pass = |count: u64| {
        let clock = Clock::start();
        let mut sum = 0u64;
        for i in 0..count {
            sender.send(M::from(i));
            sum = sum.wrapping_add(receiver.receive().value());
        }
        black_box(sum);
        clock.stop()
    };
    pass(order.count / 10);
    pass(order.count)
}

fn pong<M, S, R, S2, R2>(order: &Order, there: (S, R), back: (S2, R2)) -> Figures
where
    M: Message,
    S: Sends<M>,
    R: Receives<M>,
    S2: Sends<M>,
    R2: Receives<M>,
{
    let (count, warm_up) = (order.count, order.count / 10);
    let (sender, mut there_receiver) = there;
    let (back_sender, mut receiver) = back;
    let thread = std::thread::spawn(move || {
        pin(0);
        for _ in 0..count + warm_up {
            back_sender.send(there_receiver.receive());
        }
    });
    pin(1);
    let mut trip = |i| {
        sender.send(M::from(i));
        assert_eq!(receiver.receive().value(), i);
    };
    (0..warm_up).for_each(&mut trip);
    let clock = Clock::start();
    let mut steps = Steps::new(count);
    for i in 0..count {
        trip(i);
        steps.step();
    }
    let figures = clock.stop();
    thread.join().unwrap();
    figures.with_percentiles(steps.ns)
}

fn memory<M: Message>(order: &Order) -> Figures {
    let mut figures = Clock::start().stop();
    let before = heap();
    let mut kept: Vec<Box<dyn std::any::Any>> = Vec::with_capacity(IDLE_CHANNELS);
    for _ in 0..IDLE_CHANNELS {
        with_channel!(order, M, |sender, receiver| kept
            .push(Box::new((sender, receiver))));
    }
    figures.more[0] = (heap() - before) / IDLE_CHANNELS as f64;
    let messages = if order.a > 0 { order.a } else { 100_000 };
    figures.more[1] = with_channel!(order, M, |sender, receiver| {
        let before = heap();
        for i in 0..messages {
            sender.send(M::from(i as u64));
        }
        let grown = heap() - before;
        drop(receiver);
        grown / messages as f64
    });
    figures
}

/// Either end of Tokio's two kinds of channel, for its tasks.
#[derive(Clone)]
enum TaskSender<M> {
    Bounded(tokio_mpsc::Sender<M>),
    Unbounded(tokio_mpsc::UnboundedSender<M>),
}

async fn produce<M: Message>(sender: TaskSender<M>, each: u64) {
    match sender {
        TaskSender::Bounded(sender) => {
            for i in 0..each {
                assert!(sender.send(M::from(i)).await.is_ok());
            }
        }
        TaskSender::Unbounded(sender) => {
            for i in 0..each {
                assert!(sender.send(M::from(i)).is_ok());
            }
        }
    }
}

macro_rules! consume {
    ($receiver:expr, $many:expr, $total:expr) => {{
        let mut receiver = $receiver;
        let mut sum = 0u64;
        let mut taken = 0u64;
        while taken < $total {
            sum = sum.wrapping_add(receiver.recv().await.expect("closed").value());
            taken += 1;
            if $many {
                // What recv_many does, which this version does not have yet.
                for _ in 1..BULK {
                    match receiver.try_recv() {
                        Ok(message) => {
                            sum = sum.wrapping_add(message.value());
                            taken += 1;
                        }
                        Err(_) => break,
                    }
                }
            }
        }
        sum
    }};
}

fn flow_tasks<M: Message>(order: &Order, many: bool) -> Figures {
    let (capacity, senders) = (order.a, order.c);
    let each = order.count / senders as u64;
    let total = each * senders as u64;
    runtime(2).block_on(async move {
        let clock;
        let consumer;
        let sender;
        if capacity == 0 {
            let (made, receiver) = tokio_mpsc::unbounded_channel::<M>();
            sender = TaskSender::Unbounded(made);
            clock = Clock::start();
            consumer = tokio::spawn(async move { consume!(receiver, many, total) });
        } else {
            let (made, receiver) = tokio_mpsc::channel::<M>(capacity);
            sender = TaskSender::Bounded(made);
            clock = Clock::start();
            consumer = tokio::spawn(async move { consume!(receiver, many, total) });
        }
        for _ in 0..senders {
            tokio::spawn(produce(sender.clone(), each));
        }
        let sum = consumer.await.unwrap();
        let figures = clock.stop();
        assert_eq!(sum, expected(senders, each));
        figures
    })
}

fn pong_tasks(order: &Order) -> Figures {
    let (capacity, count, warm_up) = (order.a, order.count, order.count / 10);
    runtime(2).block_on(async move {
        let (sender, mut there) = tokio_mpsc::channel::<u64>(capacity);
        let (back, mut receiver) = tokio_mpsc::channel::<u64>(capacity);
        tokio::spawn(async move {
            while let Some(message) = there.recv().await {
                assert!(back.send(message).await.is_ok());
            }
        });
        let driver = tokio::spawn(async move {
            for i in 0..warm_up {
                assert!(sender.send(i).await.is_ok());
                assert_eq!(receiver.recv().await, Some(i));
            }
            let clock = Clock::start();
            let mut steps = Steps::new(count);
            for i in 0..count {
                assert!(sender.send(i).await.is_ok());
                assert_eq!(receiver.recv().await, Some(i));
                steps.step();
            }
            clock.stop().with_percentiles(steps.ns)
        });
        driver.await.unwrap()
    })
}

fn sized<M: Message>(order: &Order) -> Figures {
    match (order.item.as_str(), order.kind.as_str()) {
        ("flow", "tokio-tasks") => flow_tasks::<M>(order, false),
        ("flow", "tokio-tasks-many") => flow_tasks::<M>(order, true),
        ("flow", _) => with_channel!(order, M, |sender, receiver| flow(order, sender, receiver)),
        ("pair", _) => with_channel!(order, M, |sender, receiver| pair(order, sender, receiver)),
        ("pong", "tokio-tasks") => pong_tasks(order),
        ("pong", _) => with_channel!(order, M, |sender, receiver| {
            let there = (sender, receiver);
            with_channel!(order, M, |sender, receiver| pong(
                order,
                there,
                (sender, receiver)
            ))
        }),
        _ => memory::<M>(order),
    }
}

pub fn work(order: &Order) -> Figures {
    if order.b == 8 {
        sized::<Words<1>>(order)
    } else {
        sized::<Words<8>>(order)
    }
}
