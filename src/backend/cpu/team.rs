//! A team of threads that takes up work within a microsecond, for operations as short as those of decoding.
//!
//! A rayon worker without work goes to sleep after a few yields; waking it costs tens of microseconds, as much as a whole
//! product of one row. The helpers here watch a word of memory for a while before they sleep.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Looks at the word before a helper sleeps: about half a millisecond, more than the pauses inside a token.
const LOOKS_BEFORE_SLEEP: usize = 20_000;
/// Looks at the word before the caller yields to a helper that has lost its core.
const LOOKS_BEFORE_YIELD: usize = 10_000;

/// Bits of the state that count the helpers inside the job.
const ENTERED: u64 = 0xFFFF;
/// Whether helpers may still enter the job.
const OPEN: u64 = 1 << 16;
/// One in the bits that number the jobs.
const JOB: u64 = 1 << 17;

/// A job's task, without the lifetime that [`Team::for_each`] guards.
type Task = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Job number, [`OPEN`], and helpers that have [`ENTERED`].
    state: AtomicU64,
    /// What to run and how often. Written by the caller while no helper is inside.
    job: UnsafeCell<(Task, usize)>,
    /// The next task.
    next: AtomicUsize,
    /// Helpers that have left the job.
    left: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Whether each helper sleeps, or is about to.
    asleep: Vec<AtomicBool>,
}

// SAFETY: `job` is written by the one caller that holds the lock of `Team`, while no helper is inside the job; helpers read
// it only after they have entered, which synchronises with that write.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used between `for_each`'s start and end alone.
unsafe impl Send for Shared {}

/// The calling thread and its helpers.
pub struct Team {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One job at a time.
    caller: Mutex<()>,
}

impl Team {
    /// A team of `threads`, the caller included.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let count = threads.saturating_sub(1).min(ENTERED as usize);
        let nothing: &'static (dyn Fn(usize) + Sync) = &|_| {};
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new((nothing, 0)),
            next: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: (0..count).map(|_| AtomicBool::new(false)).collect(),
        });
        let mut team = Self { shared, helpers: Vec::with_capacity(count), caller: Mutex::default() };
        for index in 0..count {
            let shared = Arc::clone(&team.shared);
            let helper = std::thread::Builder::new().name(format!("decode-{}", index + 1));
            team.helpers.push(helper.spawn(move || shared.help(index))?);
        }
        Ok(team)
    }

    /// Runs `task(0)`, … `task(count - 1)`, each once, on whichever thread is free.
    ///
    /// # Panics
    /// When a task does.
    pub fn for_each(&self, count: usize, task: impl Fn(usize) + Sync) {
        if count <= 1 || self.helpers.is_empty() {
            return (0..count).for_each(task);
        }
        let _one_job = self.caller.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes; this function returns after every helper has left the job.
        let task: Task = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Task>(task) };
        // SAFETY: the lock is held, and the job before is closed and left.
        unsafe { *shared.job.get() = (task, count) };
        shared.next.store(0, Relaxed);
        shared.left.store(0, Relaxed);
        let number = shared.state.load(Relaxed) & !(OPEN | ENTERED);
        shared.state.store(number.wrapping_add(JOB) | OPEN, SeqCst);
        fence(SeqCst);
        for (asleep, helper) in shared.asleep.iter().zip(&self.helpers) {
            if asleep.load(Relaxed) {
                helper.thread().unpark();
            }
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| shared.work()));
        let entered = (shared.state.fetch_and(!OPEN, AcqRel) & ENTERED) as usize;
        let mut looks = 0;
        while shared.left.load(Acquire) < entered {
            looks += 1;
            if looks < LOOKS_BEFORE_YIELD { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let helper_panicked = shared.panicked.swap(false, Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
        assert!(!helper_panicked, "a task panicked on another thread");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for helper in self.helpers.drain(..) {
            helper.thread().unpark();
            // A panic of a task was passed on when it happened.
            let _ = helper.join();
        }
    }
}

impl Shared {
    /// Takes tasks until none is left.
    fn work(&self) {
        // SAFETY: the caller of the job, or a helper that has entered it.
        let (task, count) = unsafe { *self.job.get() };
        loop {
            let number = self.next.fetch_add(1, Relaxed);
            if number >= count {
                return;
            }
            // SAFETY: `for_each` keeps the task alive until everyone has left.
            unsafe { (*task)(number) };
        }
    }

    /// A helper's life.
    fn help(&self, index: usize) {
        let mut last = 0;
        let mut looks = 0;
        while !self.stop.load(Relaxed) {
            let state = self.state.load(Acquire);
            let job = state & !(OPEN | ENTERED);
            if state & OPEN != 0 && job != last {
                if self.state.compare_exchange(state, state + 1, AcqRel, Relaxed).is_ok() {
                    last = job;
                    looks = 0;
                    if catch_unwind(AssertUnwindSafe(|| self.work())).is_err() {
                        self.panicked.store(true, Relaxed);
                    }
                    self.left.fetch_add(1, Release);
                }
                continue;
            }
            looks += 1;
            if looks < LOOKS_BEFORE_SLEEP {
                std::hint::spin_loop();
                continue;
            }
            looks = 0;
            self.asleep[index].store(true, SeqCst);
            fence(SeqCst);
            // A job that came meanwhile did not see the flag.
            let state = self.state.load(SeqCst);
            if (state & OPEN == 0 || state & !(OPEN | ENTERED) == last) && !self.stop.load(SeqCst) {
                std::thread::park();
            }
            self.asleep[index].store(false, SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 3, 5] {
            let team = Team::new(threads).unwrap();
            for round in 0..2000 {
                let count = round % 23;
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                team.for_each(count, |task| {
                    runs[task].fetch_add(1, Relaxed);
                });
                assert!(runs.iter().all(|runs| runs.load(Relaxed) == 1), "{threads} threads, round {round}");
            }
        }
    }

    #[test]
    fn helpers_that_sleep_are_woken() {
        let team = Team::new(3).unwrap();
        for _ in 0..5 {
            while !team.shared.asleep.iter().all(|asleep| asleep.load(SeqCst)) {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Each task waits for the other two: they need three threads.
            let started = AtomicUsize::new(0);
            team.for_each(3, |_| {
                started.fetch_add(1, SeqCst);
                while started.load(SeqCst) < 3 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn callers_take_turns() {
        let team = Team::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        team.for_each(7, |task| {
                            sum.fetch_add(task, Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Relaxed), 3 * 500 * 21);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_lives_on() {
        let team = Team::new(2).unwrap();
        for _ in 0..20 {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                team.for_each(8, |task| assert_ne!(task, 3, "on purpose"));
            }));
            assert!(outcome.is_err());
        }
        let runs = AtomicUsize::new(0);
        team.for_each(8, |_| {
            runs.fetch_add(1, Relaxed);
        });
        assert_eq!(runs.load(Relaxed), 8);
    }
}
