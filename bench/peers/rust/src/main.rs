//! Worker: the channels of Rust, and its sockets by name; called as the C workers are, and prints
//! the same line (see worker.h). Here COUNT is of all senders or clients together.
//! SPDX-License-Identifier: MIT

mod cast;
mod channels;
mod requests;
mod sockets;
mod watch;

use std::mem::{size_of, zeroed};
use std::time::Instant;

pub struct Order {
    pub item: String,
    pub kind: String,
    pub a: usize,
    pub b: usize,
    pub c: usize,
    pub count: u64,
}

pub struct Figures {
    pub seconds: f64,
    pub cpu_seconds: f64,
    pub sleeps: f64,
    pub more: [f64; 2],
}

pub struct Clock {
    started: Instant,
    cpu_seconds: f64,
    sleeps: f64,
}

fn cpu_seconds() -> f64 {
    unsafe {
        let mut time: libc::timespec = zeroed();
        libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time);
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    }
}

fn sleeps() -> f64 {
    unsafe {
        let mut usage: libc::rusage = zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage.ru_nvcsw as f64
    }
}

impl Clock {
    pub fn start() -> Clock {
        let (sleeps, cpu_seconds) = (sleeps(), cpu_seconds());
        Clock {
            started: Instant::now(),
            cpu_seconds,
            sleeps,
        }
    }

    pub fn stop(&self) -> Figures {
        let seconds = self.started.elapsed().as_secs_f64();
        Figures {
            seconds,
            cpu_seconds: cpu_seconds() - self.cpu_seconds,
            sleeps: sleeps() - self.sleeps,
            more: [f64::NAN; 2],
        }
    }
}

impl Figures {
    pub fn with_percentiles(mut self, mut ns: Vec<u32>) -> Figures {
        ns.sort_unstable();
        self.more = [
            ns[ns.len() / 2] as f64,
            ns[ns.len() - 1 - ns.len() / 100] as f64,
        ];
        self
    }
}

/// The nanoseconds of each step of a loop, one after the other.
pub struct Steps {
    last: Instant,
    pub ns: Vec<u32>,
}

impl Steps {
    pub fn new(count: u64) -> Steps {
        let ns = Vec::with_capacity(count as usize);
        Steps {
            last: Instant::now(),
            ns,
        }
    }

    pub fn step(&mut self) {
        let now = Instant::now();
        self.ns.push((now - self.last).as_nanos() as u32);
        self.last = now;
    }
}

pub fn pin(core: usize) {
    unsafe {
        if libc::sysconf(libc::_SC_NPROCESSORS_ONLN) > core as i64 {
            let mut set: libc::cpu_set_t = zeroed();
            libc::CPU_SET(core, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
        }
    }
}

/// The value, of which the optimizer knows nothing (std's needs a newer compiler than Debian's).
#[inline(always)]
pub fn black_box<T>(value: T) -> T {
    unsafe {
        std::arch::asm!("/* {0} */", in(reg) &value, options(nostack, preserves_flags));
    }
    value
}

/// Bytes in use of the C library's heap, which Rust's is here.
pub fn heap() -> f64 {
    let info = unsafe { libc::mallinfo2() };
    info.uordblks as f64 + info.hblkhd as f64
}

pub fn runtime(workers: usize) -> tokio::runtime::Runtime {
    let made = if workers == 0 {
        tokio::runtime::Builder::new_current_thread().build()
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .build()
    };
    made.expect("no runtime")
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if words.len() != 7 {
        eprintln!("usage: {} ITEM KIND A B C COUNT", words[0]);
        std::process::exit(2);
    }
    let number = |at: usize| words[at].parse::<u64>().expect("a number");
    let order = Order {
        item: words[1].clone(),
        kind: words[2].clone(),
        a: number(3) as usize,
        b: number(4) as usize,
        c: number(5) as usize,
        count: number(6),
    };
    let figures = match order.item.as_str() {
        "memory" if order.kind == "mutex" => sockets::work(&order),
        "flow" | "pair" | "pong" | "memory" => channels::work(&order),
        "call" => requests::call(&order),
        "once" => requests::once(&order),
        "cast" => cast::work(&order),
        "ref" | "upgrade" | "find" | "obtain" | "cycle" | "end" | "crowd" => sockets::work(&order),
        _ => watch::work(&order),
    };
    println!(
        "{:.9} {:.9} {:.0} nan {:.6} {:.6}",
        figures.seconds, figures.cpu_seconds, figures.sleeps, figures.more[0], figures.more[1]
    );
}
