//! Output head and cross-entropy by chunks of labelled rows (cross_entropy.cu).

use super::launch::{NULL, Shape, int};
use super::memory::{CudaBuffer, CudaFloats, HALF_BYTES};
use super::products::{HeadSizes, TILE};
use super::tiles::Choice;
use super::weights::check_width;
use super::{CudaBackend, CudaBatch};
use crate::backend::{Head, Weight};
use crate::device::{Argument, Device};
use crate::error::Result;

const LOSS_THREADS: u32 = 256;

/// `V̄`: rows of logits start at 16 bytes.
fn vocabulary_leading(vocabulary: usize) -> usize {
    vocabulary.next_multiple_of(8)
}

/// Bytes of the logits of so many rows.
pub(super) fn logits_bytes(vocabulary: usize, rows: usize) -> usize {
    rows * vocabulary_leading(vocabulary) * HALF_BYTES
}

/// Sizes that a chunk of rows is chosen by.
#[derive(Clone, Copy, Debug)]
struct ChunkRule {
    vocabulary: usize,
    width: usize,
    multiprocessors: usize,
    /// Of the device.
    memory_bytes: u64,
}

/// The share of a device's memory that logits may take; on small ones they may take this many bytes.
const MEMORY_SHARE: u64 = 48;
const LEAST_MEMORY_BYTES: u64 = 512 << 20;
/// Rows beyond which more of them gain nothing, in tiles.
const MOST_ROW_TILES: usize = 64;

impl ChunkRule {
    /// Rows whose logits exist at once: as many as make both products, the logits and the gradient of their input, cost the least
    /// for each row, which is where their tiles fill whole waves of the multiprocessors.
    fn rows(self, choices: &[Choice]) -> usize {
        let Self { vocabulary, width, multiprocessors, memory_bytes } = self;
        let bytes = (memory_bytes / MEMORY_SHARE).max(LEAST_MEMORY_BYTES);
        let tile_bytes = logits_bytes(vocabulary, TILE) as u64;
        let most = (bytes / tile_bytes.max(1)).clamp(1, MOST_ROW_TILES as u64) as usize;
        let product = |rows: usize, columns: usize, depth: usize| {
            let guesses = choices.iter().map(|choice| choice.guess(rows, columns, multiprocessors));
            guesses.min().unwrap_or(0) as f64 * depth as f64
        };
        let cost = |tiles: &usize| {
            let rows = tiles * TILE;
            (product(rows, vocabulary, width) + product(rows, width, vocabulary)) / rows as f64
        };
        // Of equals the most: the weights are read once a chunk.
        (1..=most).rev().min_by(|one, other| cost(one).total_cmp(&cost(other))).unwrap_or(1) * TILE
    }
}

/// Where the gradients of a head go, as far as they are wanted.
#[derive(Clone, Copy)]
pub(super) struct HeadGradients<'a, D: Device> {
    /// Of its input; without it there is none of the weight.
    pub dx: Option<&'a CudaBuffer<D>>,
    /// Of a trained weight, added to what stands in its place among the parameters.
    pub of_weight: Option<&'a CudaFloats<D>>,
}

impl<D: Device> CudaBackend<D> {
    /// Rows of `width` whose logits exist at once, at most.
    pub fn head_rows(&self, vocabulary: usize, width: usize) -> usize {
        let limits = self.device().limits();
        let (multiprocessors, memory_bytes) =
            (limits.multiprocessor_count as usize, limits.total_memory_bytes);
        let rule = ChunkRule { vocabulary, width, multiprocessors, memory_bytes };
        rule.rows(if self.has_choice_of_tiles() {
            &Choice::ALL
        } else {
            &[Choice { columns: TILE, cluster_blocks: 1 }]
        })
    }

    pub(super) fn cross_entropy(
        &self,
        head: Head<'_, Self>,
        batch: &CudaBatch<D>,
        x: &CudaBuffer<D>,
        losses: &CudaFloats<D>,
        gradients: HeadGradients<'_, D>,
    ) -> Result<()> {
        let chunk = self.head_rows(head.vocabulary, head.width);
        self.cross_entropy_by(chunk, head, batch, x, losses, gradients)
    }

    /// The same by chunks of so many rows.
    fn cross_entropy_by(
        &self,
        chunk: usize,
        head: Head<'_, Self>,
        batch: &CudaBatch<D>,
        x: &CudaBuffer<D>,
        losses: &CudaFloats<D>,
        HeadGradients { dx, of_weight }: HeadGradients<'_, D>,
    ) -> Result<()> {
        let Head { vocabulary, width, soft_cap, .. } = head;
        let place = |floats: &CudaFloats<D>| floats.at(head.weight.trained_offset()?, vocabulary * width);
        let dweight = of_weight.map(place).transpose()?;
        let (count, leading) = (batch.labelled, vocabulary_leading(vocabulary));
        for first in (0..count).step_by(chunk) {
            let rows = chunk.min(count - first);
            let row_losses = losses.at(first, rows)?;
            let correct = losses.at(count + first, rows)?;
            let targets = batch.targets(first, rows, vocabulary)?;
            let x = x.at(first * width, rows * width)?;
            let z = self.logits(head, rows, x)?;
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
            let sizes = HeadSizes { rows, width, vocabulary, leading };
            // SAFETY: dz [rows, V̄], W and its gradient [V, H], x and dx [rows, H].
            unsafe {
                self.kernels.head_backward_input(z, weight, dx, sizes)?;
                if let Some(dweight) = dweight {
                    self.kernels.head_weight_gradient(z, x, dweight, sizes)?;
                }
            }
        }
        Ok(())
    }

    /// The weight in the compute type; of a trained one, the copy.
    fn head_weight(&self, head: Head<'_, Self>) -> Result<Argument> {
        let Head { weight, vocabulary, width, .. } = head;
        match weight {
            Weight::Frozen(weight) => weight.shaped(vocabulary, width),
            Weight::Trained { parameters, offset } => {
                self.trained_weight(parameters, offset, vocabulary * width)
            }
        }
    }

    /// `z [rows, V̄]` of `x [rows, H]`, in scratch memory.
    fn logits(&self, head: Head<'_, Self>, rows: usize, x: Argument) -> Result<Argument> {
        let Head { vocabulary, width, .. } = head;
        check_width("the head's input", width)?;
        let (leading, bytes) = (vocabulary_leading(vocabulary), logits_bytes(vocabulary, rows));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of a chunk on an H100.
    fn on_h100([vocabulary, width]: [usize; 2]) -> usize {
        let rule = ChunkRule { vocabulary, width, multiprocessors: 132, memory_bytes: 79 << 30 };
        rule.rows(&Choice::ALL)
    }

    #[test]
    fn chunks_fill_whole_waves_with_the_tiles_of_both_products() {
        for (name, sizes, columns, expected) in [
            ("Qwen2.5-1.5B", [151_936, 1536], 256, 5632),
            ("SmolLM2-135M", [49_152, 576], 192, 5632),
            ("Llama-3-8B", [128_256, 4096], 256, 4224),
        ] {
            let rows = on_h100(sizes);
            assert_eq!(rows, expected, "{name}");
            let [vocabulary, width] = sizes;
            assert!((width.div_ceil(columns) * rows / TILE).is_multiple_of(132), "{name}");
            // What is left of the last wave of logits, in the mean of rows: under a hundredth.
            let tiles = vocabulary.div_ceil(256) * rows / TILE;
            assert!(tiles.next_multiple_of(132) as f64 / (tiles as f64) < 1.01, "{name}");
        }
    }

    #[test]
    fn chunks_take_a_bounded_share_of_the_memory() {
        for memory_bytes in [8 << 30, 24 << 30, 80 << 30, 141 << 30] {
            for vocabulary in [1, 512, 32_000, 262_144, 1 << 22] {
                let rule = ChunkRule { vocabulary, width: 2048, multiprocessors: 82, memory_bytes };
                let rows = rule.rows(&Choice::ALL);
                assert!(rows >= TILE && rows.is_multiple_of(TILE) && rows <= 8192, "{rule:?}: {rows}");
                let bytes = logits_bytes(vocabulary, rows) as u64;
                assert!(rows == TILE || bytes <= LEAST_MEMORY_BYTES.max(memory_bytes / 48), "{rule:?}");
            }
        }
    }

    /// A row's loss, hit and gradient depend on that row alone, and the weight's gradient on no seam between tiles of rows.
    #[cfg(feature = "emulator")]
    #[test]
    fn chunks_change_no_bit() {
        use super::super::ComputeType;
        use crate::backend::{Backend, PassSettings, Weight};
        use crate::device::emulator::Emulator;
        use crate::selftest::inputs::{batch_of, values};

        let (vocabulary, width) = (264, 72);
        for is_hopper in [false, true] {
            let backend = CudaBackend::new(Emulator::of(is_hopper, false).unwrap(), ComputeType::Bf16);
            let batch = batch_of(&[250, 180], vocabulary as u32);
            let rows = batch.labelled_count();
            let mut resident = backend.new_batch().unwrap();
            let settings = PassSettings { gradient_scale: 0.5, ..PassSettings::default() };
            backend.load_batch(&mut resident, &batch, settings).unwrap();
            let parameters = backend.floats(&values(vocabulary * width, 1)).unwrap();
            let mut x = backend.buffer(rows * width).unwrap();
            backend.write_buffer(&mut x, &values(rows * width, 2)).unwrap();
            let run = |chunk: usize| {
                let losses = backend.floats(&vec![f32::NAN; 2 * rows]).unwrap();
                let dx = backend.buffer(rows * width).unwrap();
                let dweight = backend.floats(&vec![0.25; vocabulary * width]).unwrap();
                let weight = Weight::Trained { parameters: &parameters, offset: 0 };
                let head = Head { weight, vocabulary, width, soft_cap: None };
                let gradients = HeadGradients { dx: Some(&dx), of_weight: Some(&dweight) };
                backend.cross_entropy_by(chunk, head, &resident, &x, &losses, gradients).unwrap();
                let [mut of_rows, mut of_x, mut of_weight] =
                    [2 * rows, rows * width, vocabulary * width].map(|count| vec![f32::NAN; count]);
                backend.read_floats(&losses, &mut of_rows).unwrap();
                backend.read_buffer(&dx, &mut of_x).unwrap();
                backend.read_floats(&dweight, &mut of_weight).unwrap();
                [of_rows, of_x, of_weight]
                    .map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>())
            };
            let whole = run(rows);
            assert!(whole.iter().flatten().all(|&bits| f32::from_bits(bits).is_finite()));
            for chunk in [TILE, 2 * TILE, 100, 1] {
                let [of_rows, of_x, of_weight] = run(chunk);
                assert!([&of_rows, &of_x] == [&whole[0], &whole[1]], "chunks of {chunk} rows differ");
                // Its sum goes over rows, from tile to tile.
                let is_cut_at_tiles = chunk.is_multiple_of(TILE);
                assert!(
                    of_weight == whole[2] || !is_cut_at_tiles,
                    "chunks of {chunk} rows differ in the weight"
                );
            }
        }
    }
}
