//! Work that comes again: recorded once, started as one.

use std::collections::HashMap;

use super::CudaBackend;
use crate::batch::BatchRows;
use crate::device::Device;
use crate::error::Result;

/// What names work: which, and the shape of its batch.
type Key = (&'static str, [u64; 6]);

/// Recordings kept at most: one of a deep model takes a few megabytes of host memory.
const MOST_RECORDINGS: usize = 256;

/// Recorded work of one model.
pub struct CudaRecordings<D: Device> {
    /// None for work that ran once.
    known: HashMap<Key, Option<D::Graph>>,
    /// The device's allocations when the work was recorded: addresses hold until then.
    allocations: u64,
}

impl<D: Device> Default for CudaRecordings<D> {
    fn default() -> Self {
        Self { known: HashMap::new(), allocations: 0 }
    }
}

/// Rounded up to one of at most 32 sizes between two powers of two, in steps of at least `least`.
fn bucket(count: usize, least: usize) -> usize {
    count.next_multiple_of((count.next_power_of_two() / 32).max(least))
}

/// Rows up to which those of a batch are filled: to a multiple of 64, half a tile of the products, and in large batches by
/// less than a sixteenth.
pub(super) fn bucket_of(rows: BatchRows) -> BatchRows {
    BatchRows { tokens: bucket(rows.tokens, 64), labelled: bucket(rows.labelled, 64) }
}

/// The same for the tiles of attention.
pub(super) fn bucket_of_tiles(tiles: usize) -> usize {
    bucket(tiles, 8)
}

impl<D: Device> CudaBackend<D> {
    /// The first time the work runs as it is: it may allocate. The second time it is recorded, and from then on started
    /// from its recording.
    pub(super) fn repeat_work(
        &self,
        recordings: &mut CudaRecordings<D>,
        key: Key,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        // In a profiler's window every launch has its own place and name.
        if self.is_profiled() {
            return work();
        }
        let allocations = self.device().allocation_count();
        if recordings.allocations != allocations || recordings.known.len() > MOST_RECORDINGS {
            recordings.known.clear();
            recordings.allocations = allocations;
        }
        let graph = match recordings.known.get_mut(&key) {
            None => {
                work()?;
                recordings.known.insert(key, None);
                return Ok(());
            }
            Some(graph) => graph,
        };
        if graph.is_none() {
            *graph = Some(self.device().record(work)?);
        }
        let graph = graph.as_ref().expect("just recorded");
        // SAFETY: whoever owns the recordings owns the buffers that the work names, or the backend does, and nothing was
        // allocated in their place since.
        unsafe { self.device().replay(graph) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_few_and_not_much_larger() {
        for count in 1..40_000 {
            let filled = bucket(count, 64);
            assert!(filled >= count && filled - count < (count / 16).max(64), "{count}: {filled}");
        }
        let distinct: std::collections::BTreeSet<usize> = (1..=4096).map(|count| bucket(count, 64)).collect();
        assert_eq!(distinct.len(), 2048 / 64 + 2048 / 128);
        assert_eq!(bucket(0, 64), 0);
    }
}
