//! The threads of the CPU backend, and how work is cut for them.
//!
//! Work is cut by its shape, never by the number of threads, and no two tasks write the same element: results have
//! the same bits on any number of threads.

use std::num::NonZero;
use std::sync::{Mutex, MutexGuard};

use rayon::ThreadPool;
use rayon::prelude::*;

use super::memory::AlignedFloats;
use super::team::Team;
use crate::error::{Error, Result};

/// Elements that one task of a row-wise operation works on, about: large beside the cost of a task, small beside a
/// core's cache.
const BLOCK_ELEMENTS: usize = 16 * 1024;

/// A pool of threads with scratch memory for each.
pub(super) struct Threads {
    pool: ThreadPool,
    team: Team,
    scratch: Vec<Mutex<AlignedFloats>>,
}

impl Threads {
    /// `count` threads; without a count one for each core that the process may use.
    pub fn new(count: Option<usize>) -> Result<Self> {
        let count = count.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, NonZero::get));
        if count == 0 {
            return Err(Error::config("0 threads; at least 1 is needed").at("threads"));
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|index| format!("compute-{index}"))
            .build()
            .map_err(|error| Error::device(format!("cannot start {count} threads")).caused_by(error))?;
        let team = Team::new(count)
            .map_err(|error| Error::device(format!("cannot start {count} threads")).caused_by(error))?;
        Ok(Self { pool, team, scratch: (0..count).map(|_| Mutex::default()).collect() })
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The pool.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// As many threads for the shortest operations; they use no [`scratch`](Self::scratch).
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// Scratch of the calling thread (which is one of the pool, or any thread that runs a task alone). Tasks take it
    /// once, and start no tasks while they hold it.
    pub fn scratch(&self) -> MutexGuard<'_, AlignedFloats> {
        let index = self.pool.current_thread_index().unwrap_or(0);
        // Scratch has no invariant that a panic could break.
        self.scratch[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Runs `task(0)`, … `task(count - 1)`, in parallel.
    pub fn for_each(&self, count: usize, task: impl Fn(usize) + Send + Sync) {
        match count {
            0 => {}
            1 => task(0),
            _ => self.pool.install(|| (0..count).into_par_iter().with_max_len(1).for_each(task)),
        }
    }

    /// Cuts `output [rows, width]` into blocks of whole rows and runs `task(first row, block)` for each, in parallel
    /// where there are several.
    pub fn for_row_blocks(
        &self,
        output: &mut [f32],
        width: usize,
        task: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) {
        let rows_per_block = (BLOCK_ELEMENTS / width.max(1)).max(1);
        let block = rows_per_block * width.max(1);
        if output.len() <= block {
            task(0, output);
        } else {
            self.pool.install(|| {
                output
                    .par_chunks_mut(block)
                    .with_max_len(1)
                    .enumerate()
                    .for_each(|(index, rows)| task(index * rows_per_block, rows));
            });
        }
    }
}
