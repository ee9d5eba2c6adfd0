//! Gradients of vectors that multiply every row, of their partial sums over stretches of rows (column_sums.cu).

use super::CudaBackend;
use super::launch::{NULL, Shape, int};
use super::memory::FLOAT_BYTES;
use crate::device::{Argument, Device};
use crate::error::Result;

/// Rows of a stretch, columns that a block sums at a time, and its threads: as in column_sums.h.
const STRETCH_ROWS: usize = 64;
pub(super) const STRETCH_COLUMNS: usize = 256;
pub(super) const COLUMN_THREADS: u32 = 256;
/// Columns of a block that adds stretches up.
const ADDED_COLUMNS: usize = 32;

/// Stretches into which rows are cut: a matter of their number alone.
pub(super) fn stretches_of(rows: usize) -> usize {
    rows.div_ceil(STRETCH_ROWS)
}

/// Bytes of the partial sums of `rows` rows of `width`.
pub(super) fn column_bytes(rows: usize, width: usize) -> usize {
    stretches_of(rows) * width * FLOAT_BYTES
}

/// Partial sums `[stretches, leading]` of columns.
pub(super) struct ColumnSums {
    /// The first of the columns.
    pub partials: Argument,
    /// What each is divided by, or [`NULL`].
    pub divisors: Argument,
    pub stretches: usize,
    pub columns: usize,
    pub leading: usize,
}

impl ColumnSums {
    /// Of whole rows.
    pub fn of_rows(partials: Argument, rows: usize, width: usize) -> Self {
        let stretches = stretches_of(rows);
        Self { partials, divisors: NULL, stretches, columns: width, leading: width }
    }
}

impl<D: Device> CudaBackend<D> {
    /// Adds the sums to `gradients`.
    ///
    /// # Safety
    /// The parts are as large as `sums` says.
    pub(super) unsafe fn add_column_sums(&self, sums: ColumnSums, gradients: Argument) -> Result<()> {
        let ColumnSums { partials, divisors, stretches, columns, leading } = sums;
        let arguments = [partials, divisors, gradients, int(stretches)?, int(columns)?, int(leading)?];
        let shape = Shape::blocks(columns.div_ceil(ADDED_COLUMNS), COLUMN_THREADS);
        // SAFETY: the caller's.
        unsafe { self.kernels.launch("add_column_sums", shape, &arguments) }
    }
}
