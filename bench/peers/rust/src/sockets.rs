//! Listening Unix sockets by their names; items as in socketed.h, which says what they measure.
//!
//! arc: the reference alone, strong or weak; mutex, rwlock: HashMap<String, Weak<Socket>> behind
//! that lock. A socket's destructor forgets its name and removes its file; no lock file.

use crate::{black_box, heap, pin, Clock, Figures, Order};
use std::collections::HashMap;
use std::mem::size_of;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex, RwLock, Weak};
use std::time::Instant;

const OTHERS: usize = 64;
const BATCH: usize = 64;

type Names = HashMap<String, Weak<Socket>>;

struct Socket {
    name: String,
    registry: Option<Arc<Mutex<Names>>>,
    _listener: Option<UnixListener>, // none where references are counted
}

impl Socket {
    fn pretended(name: &str) -> Arc<Socket> {
        Arc::new(Socket {
            name: name.to_string(),
            registry: None,
            _listener: None,
        })
    }

    fn listening(name: &str, registry: &Arc<Mutex<Names>>) -> Arc<Socket> {
        Arc::new(Socket {
            name: name.to_string(),
            registry: Some(registry.clone()),
            _listener: Some(UnixListener::bind(name).expect("bind")),
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(registry) = &self.registry {
            let mut names = registry.lock().unwrap();
            if names
                .get(&self.name)
                .map_or(false, |found| std::ptr::eq(found.as_ptr(), self))
            {
                names.remove(&self.name);
            }
            drop(names);
            std::fs::remove_file(&self.name).expect("unlink");
        }
    }
}

/// Where the files are; gone with them, whatever happens.
struct Folder(PathBuf);

impl Folder {
    fn enter() -> Folder {
        let parent = std::env::var("VKP_BENCH_FOLDER").unwrap_or_else(|_| "/tmp".to_string());
        let path = PathBuf::from(parent).join(format!("vkp-bench-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder");
        std::env::set_current_dir(&path).expect("a folder");
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn name_of(which: usize) -> String {
    format!("client:{which}:sock")
}

/// All threads at work from the start to the last one's end.
fn run<F: Fn(usize, u64) + Sync>(order: &Order, entry: F) -> Figures {
    let each = order.count / order.b as u64;
    let start = Barrier::new(order.b + 1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..order.b)
            .map(|index| {
                let (entry, start) = (&entry, &start);
                scope.spawn(move || {
                    pin(if index == 0 { 1 } else { 0 });
                    start.wait();
                    entry(index, each);
                })
            })
            .collect();
        start.wait();
        let clock = Clock::start();
        for thread in threads {
            thread.join().unwrap();
        }
        clock.stop()
    })
}

/// `once` takes a reference and gives it back.
fn turns<F: Fn(usize) + Sync>(order: &Order, once: F) -> Figures {
    let one = order.item == "ref";
    let count = order.a as u32;
    run(order, |index, each| {
        let mut state = 12345 + index as u32;
        if one {
            for _ in 0..each {
                once(0);
            }
        } else {
            for _ in 0..each {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                once((state % count) as usize);
            }
        }
    })
}

fn references(order: &Order) -> Figures {
    let names: Vec<String> = (0..order.a).map(name_of).collect();
    let sockets: Vec<Arc<Socket>> = names.iter().map(|name| Socket::pretended(name)).collect();
    let handles: Vec<Weak<Socket>> = sockets.iter().map(Arc::downgrade).collect();
    let table: Names = names.iter().cloned().zip(handles.iter().cloned()).collect();
    let (mutex, rwlock) = (Mutex::new(table.clone()), RwLock::new(table));
    match (order.item.as_str(), order.kind.as_str()) {
        ("ref", "arc") => turns(order, |which| {
            drop(black_box(black_box(&sockets[which]).clone()));
        }),
        ("upgrade", "arc") => turns(order, |which| {
            drop(black_box(handles[which].upgrade().unwrap()));
        }),
        ("upgrade" | "find", "mutex") => turns(order, |which| {
            let found = mutex
                .lock()
                .unwrap()
                .get(&names[which])
                .and_then(Weak::upgrade);
            drop(black_box(found.unwrap()));
        }),
        ("upgrade" | "find", "rwlock") => turns(order, |which| {
            let found = rwlock
                .read()
                .unwrap()
                .get(&names[which])
                .and_then(Weak::upgrade);
            drop(black_box(found.unwrap()));
        }),
        ("obtain", "mutex") => turns(order, |which| {
            let name = &names[which];
            let mut table = mutex.lock().unwrap();
            let found = table.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
                let made = Socket::pretended(name);
                table.insert(name.clone(), Arc::downgrade(&made));
                made
            });
            drop(table);
            drop(black_box(found));
        }),
        ("obtain", "rwlock") => turns(order, |which| {
            let name = &names[which];
            let found = rwlock.read().unwrap().get(name).and_then(Weak::upgrade);
            let found = found.unwrap_or_else(|| {
                let mut table = rwlock.write().unwrap();
                table.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
                    let made = Socket::pretended(name);
                    table.insert(name.clone(), Arc::downgrade(&made));
                    made
                })
            });
            drop(black_box(found));
        }),
        other => panic!("unknown item and kind {other:?}"),
    }
}

fn obtain(registry: &Arc<Mutex<Names>>, name: &str) -> Arc<Socket> {
    let mut names = registry.lock().unwrap();
    names.get(name).and_then(Weak::upgrade).unwrap_or_else(|| {
        let made = Socket::listening(name, registry);
        names.insert(name.to_string(), Arc::downgrade(&made));
        made
    })
}

fn is_there(name: &str) -> bool {
    std::fs::symlink_metadata(name).is_ok()
}

fn end(order: &Order, registry: &Arc<Mutex<Names>>) -> Figures {
    let stop = AtomicBool::new(false);
    let started = Barrier::new(order.b);
    let names: Vec<String> = (0..BATCH).map(name_of).collect();
    let warm_up = order.count as usize / 10;
    let total = warm_up + order.count as usize;
    let mut made = Vec::with_capacity(BATCH);
    let mut ns = Vec::with_capacity(total + BATCH);
    std::thread::scope(|scope| {
        if order.b == 2 {
            scope.spawn(|| {
                let names: Vec<String> = (0..OTHERS).map(|i| format!("other:{i}:sock")).collect();
                pin(0);
                started.wait();
                while !stop.load(Ordering::Relaxed) {
                    for name in &names {
                        drop(obtain(registry, name));
                    }
                }
            });
        }
        pin(1);
        started.wait();
        let clock = Clock::start();
        while ns.len() < total {
            made.extend(names.iter().map(|name| obtain(registry, name)));
            for (name, socket) in names.iter().zip(made.drain(..)) {
                let begun = Instant::now();
                drop(socket);
                while order.c == 1 && is_there(name) {}
                ns.push(begun.elapsed().as_nanos() as u32);
            }
            assert!(!names.iter().any(|name| is_there(name)));
        }
        let figures = clock.stop();
        stop.store(true, Ordering::Relaxed);
        figures
    })
    .with_percentiles(ns.split_off(warm_up))
}

fn crowd(order: &Order, registry: &Arc<Mutex<Names>>) -> Figures {
    let names: Vec<String> = (0..order.a).map(name_of).collect();
    let mut made = Vec::with_capacity(order.a);
    let (mut up, mut down) = (0.0, 0.0);
    let mut left = order.count as usize;
    pin(1);
    let clock = Clock::start();
    while left > 0 {
        let batch = left.min(order.a);
        let begun = Instant::now();
        made.extend(names[..batch].iter().map(|name| obtain(registry, name)));
        up += begun.elapsed().as_secs_f64();
        let turned = Instant::now();
        made.clear();
        down += turned.elapsed().as_secs_f64();
        left -= batch;
    }
    let mut figures = clock.stop();
    figures.more = [up, down];
    figures
}

fn memory(order: &Order, registry: &Arc<Mutex<Names>>) -> Figures {
    let names: Vec<String> = (0..order.a).map(name_of).collect();
    let mut made = Vec::with_capacity(order.a);
    let mut handles: Vec<Weak<Socket>> = Vec::with_capacity(order.a);
    let count = order.a as f64;
    let mut figures = Clock::start().stop();
    let empty = heap();
    made.extend(names.iter().map(|name| obtain(registry, name)));
    let full = heap();
    handles.extend(made.iter().map(Arc::downgrade));
    figures.more = [
        (full - empty) / count,
        (heap() - full) / count + size_of::<Weak<Socket>>() as f64,
    ];
    figures
}

pub fn work(order: &Order) -> Figures {
    let registry = Arc::new(Mutex::new(Names::new()));
    let _folder = Folder::enter();
    match order.item.as_str() {
        "cycle" => run(order, |index, each| {
            let name = name_of(index);
            for _ in 0..each {
                drop(obtain(&registry, &name));
            }
        }),
        "end" => end(order, &registry),
        "crowd" => crowd(order, &registry),
        "memory" => memory(order, &registry),
        _ => references(order),
    }
}
