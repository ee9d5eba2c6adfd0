//! Rows of a batch: whose they are, packing of the labelled ones, and the opposite.

use super::CpuBackend;
use crate::batch::{Batch, NO_ROW};

/// Whose token a row is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// The sample's index in its data set.
    pub sample: usize,
    /// Position inside the sample.
    pub position: usize,
    /// The sample's tokens.
    pub length: usize,
}

/// The places of the rows from `first` on.
pub(super) fn places(batch: &Batch, first: usize) -> impl Iterator<Item = Place> + '_ {
    let after = batch.sample_starts.partition_point(|&start| start <= first);
    let skipped = first - batch.sample_starts.get(after.wrapping_sub(1)).copied().unwrap_or(first);
    let samples = batch.sample_starts.windows(2).zip(&batch.sample_ids).skip(after.saturating_sub(1));
    samples
        .flat_map(|(bounds, &sample)| {
            let length = bounds[1] - bounds[0];
            (0..length).map(move |position| Place { sample, position, length })
        })
        .skip(skipped)
}

impl CpuBackend {
    pub(super) fn gather_rows(&self, batch: &Batch, width: usize, x: &[f32], packed: &mut [f32]) {
        let packed = &mut packed[..batch.labelled_count() * width];
        self.threads.for_row_blocks(packed, width, |first, packed| {
            for (&row, packed) in batch.labelled_rows[first..].iter().zip(packed.chunks_exact_mut(width)) {
                match row {
                    NO_ROW => packed.fill(0.0),
                    row => packed.copy_from_slice(&x[row as usize * width..][..width]),
                }
            }
        });
    }

    pub(super) fn scatter_rows(&self, batch: &Batch, width: usize, packed: &[f32], dx: &mut [f32]) {
        let dx = &mut dx[..batch.token_count() * width];
        self.threads.for_row_blocks(dx, width, |first, dx| {
            dx.fill(0.0);
            let end = first + dx.len() / width;
            let label = batch.labelled_rows.partition_point(|&row| (row as usize) < first);
            let labelled =
                batch.labelled_rows[label..].iter().zip(packed[label * width..].chunks_exact(width));
            for (&row, packed) in labelled.take_while(|&(&row, _)| (row as usize) < end) {
                dx[(row as usize - first) * width..][..width].copy_from_slice(packed);
            }
        });
    }
}
