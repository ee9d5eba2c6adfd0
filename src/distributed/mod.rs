//! Several processes that compute one thing: they find each other, and add up what each has, over TCP.
//!
//! A LoRA's gradients are small beside a step's work (20 MB in f32 for SmolLM2-135M with r = 16 on all linears, 168 MB for
//! an 8B Llama), so that a ring over plain sockets is enough, and needs no library:
//!
//! | file | content |
//! |---|---|
//! | `rendezvous.rs` | rank 0 listens, the others come; each then has a connection to the next rank and from the one before |
//! | `handshake.rs` | what two processes say first, so that a stranger's connection is no member |
//! | `ring.rs` | one message to the next rank while one comes from the one before; how a lost process is told to all |
//!
//! Nothing is encrypted and nobody proves who they are: a rendezvous is for a network whose members are trusted.

mod handshake;
mod rendezvous;
mod ring;

use std::ops::Range;

use self::ring::Ring;
use crate::error::{Error, Result};

pub use rendezvous::{Host, PATIENCE, join};

/// Bytes of one process's part in a [`gather`](Group::gather) at most.
const MOST_GATHERED: usize = 64 << 20;

/// The processes of one run, seen by one of them. All call the same operations in the same order.
///
/// An operation that fails has told the others: each of them fails in its next operation with the same message, and none
/// waits for a process that is gone.
///
/// ```
/// use std::net::Ipv4Addr;
/// use std::time::Duration;
///
/// use fastlora::distributed::{Host, join};
///
/// // Two processes; here they are threads of one.
/// let (world_size, patience) = (2, Duration::from_secs(20));
/// let host = Host::bind((Ipv4Addr::LOCALHOST, 0), world_size)?;
/// let address = host.address().to_string();
/// let other = std::thread::spawn(move || {
///     let mut group = join(&address, 1, world_size, patience, || Ok(()))?;
///     let mut values = [10.0, 20.0, 30.0];
///     group.sum(&mut values)?;
///     group.gather(b"done")?;
///     Ok::<_, fastlora::error::Error>(values)
/// });
/// let mut group = host.accept(patience, || Ok(()))?;
/// let mut values = [1.0, 2.0, 3.0];
/// group.sum(&mut values)?;
/// assert_eq!(values, [11.0, 22.0, 33.0]);
/// assert_eq!(group.gather(b"ready")?, [b"ready".to_vec(), b"done".to_vec()]);
/// assert_eq!(other.join().unwrap()?, values);
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Debug)]
pub struct Group {
    ring: Ring,
    /// What came last from the rank before.
    incoming: Vec<u8>,
}

impl Group {
    fn new(ring: Ring) -> Self {
        Self { ring, incoming: Vec::new() }
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.ring.rank
    }

    /// Number of processes.
    pub fn world_size(&self) -> usize {
        self.ring.world_size
    }

    /// Replaces the values of every process by their sums over all processes, with the same bits in each.
    ///
    /// A ring all-reduce: the values are cut into one stretch a process; first each stretch goes once around and grows, then
    /// its sum goes around. Each process sends, and receives, 2·(N−1)/N of the buffer in 2·(N−1) messages. A stretch is
    /// added up in the order of the ranks, beginning with its own, so that N processes give the same bits each time.
    ///
    /// # Errors
    /// Processes with other numbers of values, or one that is lost.
    pub fn sum(&mut self, values: &mut [f32]) -> Result<()> {
        let (rank, size, count) = (self.rank(), self.world_size(), values.len());
        let stretch = |number: usize| stretch(count, number % size, size);
        for turn in 0..size - 1 {
            let (out, into) = (stretch(rank + size - turn), stretch(rank + size - turn - 1));
            self.shift(&values[out], 4 * into.len())?;
            for (value, bytes) in values[into].iter_mut().zip(self.incoming.chunks_exact(4)) {
                *value += float(bytes);
            }
        }
        for turn in 0..size - 1 {
            let (out, into) = (stretch(rank + 1 + size - turn), stretch(rank + size - turn));
            self.shift(&values[out], 4 * into.len())?;
            for (value, bytes) in values[into].iter_mut().zip(self.incoming.chunks_exact(4)) {
                *value = float(bytes);
            }
        }
        Ok(())
    }

    /// Replaces the values of every process by those of rank 0.
    ///
    /// # Errors
    /// Processes with other numbers of values, or one that is lost.
    pub fn broadcast(&mut self, values: &mut [f32]) -> Result<()> {
        if self.rank() > 0 {
            self.ring.receive(&mut self.incoming, 4 * values.len()..=4 * values.len())?;
            for (value, bytes) in values.iter_mut().zip(self.incoming.chunks_exact(4)) {
                *value = float(bytes);
            }
        }
        if self.rank() + 1 < self.world_size() {
            self.ring.send(bytemuck::cast_slice(values))?;
        }
        Ok(())
    }

    /// What every process gave, in the order of their ranks.
    ///
    /// # Errors
    /// More than 64 MiB from one process, or a process that is lost.
    pub fn gather(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (rank, size) = (self.rank(), self.world_size());
        if bytes.len() > MOST_GATHERED {
            return Err(self.fail(Error::internal(format!("{} bytes are too many to gather", bytes.len()))));
        }
        let mut gathered = vec![Vec::new(); size];
        gathered[rank] = bytes.to_vec();
        for turn in 0..size - 1 {
            let (out, into) = ((rank + size - turn) % size, (rank + size - turn - 1) % size);
            self.ring.shift(&gathered[out], &mut self.incoming, 0..=MOST_GATHERED)?;
            gathered[into] = self.incoming.clone();
        }
        Ok(gathered)
    }

    /// Tells the other processes why this one ends: their next operation fails with that.
    pub fn abort(&mut self, reason: &Error) {
        self.ring.abort(reason);
    }

    fn fail(&mut self, error: Error) -> Error {
        self.abort(&error);
        error
    }

    /// Sends `values` to the next rank while `bytes` bytes come from the one before.
    fn shift(&mut self, values: &[f32], bytes: usize) -> Result<()> {
        self.ring.shift(bytemuck::cast_slice(values), &mut self.incoming, bytes..=bytes)
    }
}

/// Stretch `number` of `count` values that are cut into `parts`, as evenly as goes.
fn stretch(count: usize, number: usize, parts: usize) -> Range<usize> {
    let start = |number: usize| count / parts * number + number.min(count % parts);
    start(number)..start(number + 1)
}

/// The processes of a group run on machines of one byte order, which the handshake finds out.
fn float(bytes: &[u8]) -> f32 {
    bytemuck::pod_read_unaligned(bytes)
}

#[cfg(test)]
mod tests;
