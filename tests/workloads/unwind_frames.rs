//! Frames of Rust, for a debugger: `int3` with a number in rdi asks it to look at all threads, then
//! after each of so many single steps.
use std::arch::asm;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::panic;
use std::sync::{mpsc, Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

#[inline(always)]
fn look(steps: u64) {
    unsafe { asm!("int3", in("rdi") steps) };
}

#[inline(never)]
fn deep(depth: u32, room: &mut [u8]) -> u32 {
    let mut own = [depth as u8; 48];
    own[depth as usize % 48] = room[0];
    if depth == 0 {
        look(20);
        return black_box(&own)[1] as u32;
    }
    deep(depth - 1, black_box(&mut own)) + 1
}

struct Dropped(u32);

impl Drop for Dropped {
    #[inline(never)]
    fn drop(&mut self) {
        look(5);
        black_box(self.0);
    }
}

#[inline(never)]
fn throws(number: u32) -> u32 {
    let _dropped = Dropped(number);
    if black_box(number) < 10 {
        panic!("as asked");
    }
    number
}

fn main() {
    panic::set_hook(Box::new(|_| look(5)));
    let pair = Arc::new((Mutex::new(false), Condvar::new()));
    let (sender, receiver) = mpsc::channel();
    for number in 0..12 {
        let (pair, sender) = (pair.clone(), sender.clone());
        thread::spawn(move || {
            sender.send(()).unwrap();
            match number % 3 {
                0 => thread::sleep(Duration::from_secs(1000)),
                1 => thread::park(),
                _ => drop(pair.1.wait_while(pair.0.lock().unwrap(), |done| !*done)),
            }
        });
    }
    for _ in 0..12 {
        receiver.recv().unwrap();
    }
    thread::sleep(Duration::from_millis(20));
    look(0);
    black_box(deep(20, &mut [1; 8]));
    let sorted: BTreeMap<u32, String> = (0..50).map(|n| (n * 37 % 101, n.to_string())).collect();
    let mut names: Vec<&String> = sorted.values().collect();
    names.sort_by(|a, b| {
        if a.as_str() == "7" {
            look(10);
        }
        b.cmp(a)
    });
    black_box(panic::catch_unwind(|| throws(3)).is_err());
    look(100);
    black_box(names.len().to_string() + "!");
}
