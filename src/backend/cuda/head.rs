//! Output head and cross-entropy by chunks of labelled rows (cross_entropy.cu).

use super::launch::{NULL, Shape, int};
use super::memory::{CudaBuffer, CudaFloats, HALF_BYTES};
use super::products::HeadSizes;
use super::weights::check_width;
use super::{CudaBackend, CudaBatch};
use crate::backend::{Head, Weight};
use crate::device::{Argument, Device};
use crate::error::Result;

/// Logits of one chunk of rows: large enough that its products fill a GPU many times over.
const CHUNK_BYTES: usize = 512 << 20;
/// Rows of a product's tile: chunks hold whole ones.
const TILE_ROWS: usize = 128;
const LOSS_THREADS: u32 = 256;

/// `V̄`: rows of logits start at 16 bytes.
fn vocabulary_leading(vocabulary: usize) -> usize {
    vocabulary.next_multiple_of(8)
}

/// Rows whose logits exist at once.
pub(super) fn chunk_rows(vocabulary: usize, rows: usize) -> usize {
    let fitting = CHUNK_BYTES / (vocabulary_leading(vocabulary) * HALF_BYTES);
    (fitting / TILE_ROWS * TILE_ROWS).max(TILE_ROWS).min(rows)
}

impl<D: Device> CudaBackend<D> {
    /// Rows that a product of the output head has at most.
    pub fn head_rows(&self, vocabulary: usize) -> usize {
        chunk_rows(vocabulary, usize::MAX)
    }

    pub(super) fn cross_entropy(
        &self,
        head: Head<'_, Self>,
        batch: &CudaBatch<D>,
        x: &CudaBuffer<D>,
        losses: &CudaFloats<D>,
        dx: Option<&CudaBuffer<D>>,
    ) -> Result<()> {
        let Head { vocabulary, width, soft_cap, .. } = head;
        let (count, leading) = (batch.labelled, vocabulary_leading(vocabulary));
        let chunk = chunk_rows(vocabulary, count);
        for first in (0..count).step_by(chunk.max(1)) {
            let rows = chunk.min(count - first);
            let row_losses = losses.at(first, rows)?;
            let correct = losses.at(count + first, rows)?;
            let targets = batch.targets(first, rows, vocabulary)?;
            let z = self.logits(head, rows, x.at(first * width, rows * width)?)?;
            let arguments = [
                z,
                targets,
                row_losses,
                correct,
                if dx.is_some() { batch.gradient_scale()? } else { NULL },
                int(vocabulary)?,
                int(leading)?,
                Argument::F32(soft_cap.unwrap_or(0.0)),
            ];
            // SAFETY: z [rows, V̄], one target, loss and hit a row.
            unsafe {
                self.kernels.launch_half("cross_entropy", Shape::blocks(rows, LOSS_THREADS), &arguments)?
            };
            let Some(dx) = dx else { continue };
            let dx = dx.at(first * width, rows * width)?;
            let weight = self.head_weight(head)?;
            // SAFETY: dz [rows, V̄], W [V, H], dx [rows, H].
            unsafe {
                self.kernels.head_backward_input(
                    z,
                    weight,
                    dx,
                    HeadSizes { rows, width, vocabulary, leading },
                )?
            };
        }
        Ok(())
    }

    /// The weight in the compute type; of a trained one, the copy.
    fn head_weight(&self, head: Head<'_, Self>) -> Result<Argument> {
        let Head { weight, vocabulary, width, .. } = head;
        match weight {
            Weight::Frozen(weight) => weight.shaped(vocabulary, width),
            Weight::Trained { parameters, offset } => {
                self.half_copy(parameters)?.at(offset, vocabulary * width)
            }
        }
    }

    /// `z [rows, V̄]` of `x [rows, H]`, in scratch memory.
    fn logits(&self, head: Head<'_, Self>, rows: usize, x: Argument) -> Result<Argument> {
        let Head { vocabulary, width, .. } = head;
        check_width("the head's input", width)?;
        let leading = vocabulary_leading(vocabulary);
        let bytes = rows * leading * HALF_BYTES;
        let z = super::lock(&self.scratch).logits.reserve(self.device(), bytes)?.first(bytes)?;
        let sizes = HeadSizes { rows, width, vocabulary, leading };
        // SAFETY: x [rows, H], W [V, H], z [rows, V̄].
        unsafe { self.kernels.head_logits(x, self.head_weight(head)?, z, sizes)? };
        Ok(z)
    }

    pub(super) fn logits_of_row(
        &self,
        head: Head<'_, Self>,
        x: &CudaBuffer<D>,
        row: usize,
        logits: &mut [f32],
    ) -> Result<()> {
        self.logits(head, 1, x.at(row * head.width, head.width)?)?;
        let scratch = super::lock(&self.scratch);
        let region = scratch.logits.region().expect("the logits were just computed");
        self.download_halves(region, logits)?;
        head.cap(logits);
        Ok(())
    }
}
