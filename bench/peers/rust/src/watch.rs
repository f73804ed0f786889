//! Tokio's watch of 8 or 64 bytes (B): set, get, changed, get-contended (a thread on the other
//! core sets without a pause).

use crate::{black_box, pin, Clock, Figures, Order};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use tokio::sync::watch;

fn sized<const N: usize>(order: &Order) -> Figures {
    let (sender, receiver) = watch::channel([0u64; N]);
    let mut sum = 0u64;
    pin(1);
    match order.item.as_str() {
        "set" => {
            let clock = Clock::start();
            for i in 0..order.count {
                sender.send([i; N]).unwrap();
            }
            clock.stop()
        }
        "get" => {
            let clock = Clock::start();
            for _ in 0..order.count {
                let copy = *black_box(&receiver).borrow();
                sum = sum.wrapping_add(black_box(copy)[0]);
            }
            black_box(sum);
            clock.stop()
        }
        "changed" => {
            let clock = Clock::start();
            for _ in 0..order.count {
                sum += black_box(&receiver).has_changed().unwrap() as u64;
            }
            black_box(sum);
            clock.stop()
        }
        "get-contended" => {
            let stop = Arc::new(AtomicBool::new(false));
            let seen = stop.clone();
            let writer = std::thread::spawn(move || {
                pin(0);
                let mut i = 0;
                while !seen.load(Ordering::Relaxed) {
                    sender.send([i; N]).unwrap();
                    i += 1;
                }
            });
            while !receiver.has_changed().unwrap() {
                std::hint::spin_loop();
            }
            let clock = Clock::start();
            for _ in 0..order.count {
                let copy = *black_box(&receiver).borrow();
                sum = sum.wrapping_add(black_box(copy)[0]);
            }
            black_box(sum);
            let figures = clock.stop();
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap();
            figures
        }
        other => panic!("unknown item {other}"),
    }
}

pub fn work(order: &Order) -> Figures {
    if order.b == 8 {
        sized::<1>(order)
    } else {
        sized::<8>(order)
    }
}
