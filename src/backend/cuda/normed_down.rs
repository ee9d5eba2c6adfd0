//! RMSNorm with the `s` of the adapters that read it, in one pass where that reads less (rms_norm_down.cu).

use super::CudaBackend;
use super::launch::{Shape, int};
use super::linear::{LORA_TILE, Sizes, mask_arguments};
use super::magnitudes::magnitudes_of;
use super::memory::{CudaBuffer, CudaFloats, HALF_BYTES};
use super::weights::check_width;
use crate::backend::{Backend, LinearGroup, LinearInput, NormedInput, Work};
use crate::device::{Argument, Device, Limits};
use crate::error::{Error, Result};
use crate::range;

/// Rows that a block may take, and rows of `A` at a time: what rms_norm_down.cu is compiled for.
const BLOCK_ROWS: [usize; 3] = [16, 32, 64];
const BLOCK_RANKS: [usize; 3] = [16, 32, 64];
/// Rows stand in shared memory in tiles of so many columns, beside the ring that `A` passes through.
const TILE_COLUMNS: usize = 64;
const RING_BYTES: usize = 16 << 10;
/// What the system keeps of a multiprocessor's shared memory for each block (CUDA C++ programming guide, "Compute
/// capabilities").
const RESERVED_BYTES: usize = 1 << 10;

/// How the pass is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NormPass {
    block_rows: usize,
    block_ranks: usize,
    shared_bytes: usize,
}

impl NormPass {
    /// None where one kernel after the other is as good. This is counted, not timed.
    ///
    /// Few rows, a block for each multiprocessor at most, are waited for, not moved: the pass saves a launch, and no
    /// multiprocessor reads more than one block of lora.cu does. Blocks are as small as that allows, and there are no more than
    /// [`LORA_TILE`] ranks, which lora.cu would share out among blocks.
    ///
    /// Many rows are moved. In rows of `H`, a token costs the L2 `R / block_rows` in the pass, which reads `A` in every block.
    /// One kernel after the other it costs `ceil(R / 64)` for `y`, and those are the memory's where the L2 does not hold all
    /// rows, and `R / 64` for `A`. The pass must not cost more. While a block multiplies, the memory works for another on
    /// its multiprocessor; a block that is alone there has to have 32 rows at least, as a product takes its time
    /// however few they are.
    pub fn new(limits: Limits, rows: usize, width: usize, rank: usize) -> Option<Self> {
        if rank == 0 {
            return None;
        }
        let shared_bytes =
            |block_rows: usize| block_rows * width.next_multiple_of(TILE_COLUMNS) * HALF_BYTES + RING_BYTES;
        let room = limits.shared_bytes_per_block as usize + RESERVED_BYTES;
        let fits = |block_rows, blocks| blocks * (shared_bytes(block_rows) + RESERVED_BYTES) <= room;
        let is_at_once = |&block_rows: &usize| {
            let blocks = rows.div_ceil(block_rows);
            rank <= LORA_TILE && fits(block_rows, 1) && blocks <= limits.multiprocessor_count as usize
        };
        let reads_no_more =
            |block_rows: usize| rank * LORA_TILE <= block_rows * (rank.next_multiple_of(LORA_TILE) + rank);
        let is_shared = |&block_rows: &usize| fits(block_rows, 2) && reads_no_more(block_rows);
        let is_alone =
            |&block_rows: &usize| block_rows >= 32 && fits(block_rows, 1) && reads_no_more(block_rows);
        let block_rows = (BLOCK_ROWS.into_iter().find(is_at_once))
            .or_else(|| BLOCK_ROWS.into_iter().rev().find(is_shared))
            .or_else(|| BLOCK_ROWS.into_iter().rev().find(is_alone))?;
        let block_ranks = BLOCK_RANKS.into_iter().find(|&ranks| rank <= ranks).unwrap_or(BLOCK_RANKS[2]);
        Some(Self { block_rows, block_ranks, shared_bytes: shared_bytes(block_rows) })
    }

    fn kernel(self) -> String {
        format!("rms_norm_down_{}_{}", self.block_rows, self.block_ranks)
    }

    fn shape(self, rows: usize) -> Shape {
        Shape { grid: [rows.div_ceil(self.block_rows), 1, 1], threads: 256, shared_bytes: self.shared_bytes }
    }
}

impl<D: Device> CudaBackend<D> {
    pub(super) fn normed_linear_forward(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        input: NormedInput<'_, Self>,
        s: &mut CudaBuffer<D>,
        y: &mut CudaBuffer<D>,
    ) -> Result<()> {
        if magnitudes_of(group).is_some() {
            let input = input.normalise(self)?;
            return self.linear(group, parameters, input, None, s, y);
        }
        let input = self.normed_down(group, parameters, input, s)?;
        self.linear_given_s(group, input, None, s, y)
    }

    /// `norm(x)` and the `s` of the group that reads it; without adapters the norm alone. The bits do not depend on the pass.
    pub(super) fn normed_down<'a>(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        input: NormedInput<'a, Self>,
        s: &CudaBuffer<D>,
    ) -> Result<LinearInput<'a, Self>> {
        let NormedInput { norm, x, rows, batch, normed } = input;
        let sizes = Sizes::of(group, rows);
        if norm.width != sizes.inputs {
            let message = format!("a norm of {} in front of a linear of {}", norm.width, sizes.inputs);
            return Err(Error::internal(message));
        }
        let input = LinearInput { x: normed, rows, batch };
        let _range = range!("rms_norm"; Work::of_rms_norm_with_s(rows, norm.width, sizes.rank, HALF_BYTES));
        let Some(pass) = NormPass::new(self.device().limits(), rows, norm.width, sizes.rank) else {
            self.norm_forward(norm, rows, x, None, input.x)?;
            self.adapter_down(group, parameters, &input, s)?;
            return Ok(input);
        };
        check_width("a norm", norm.width)?;
        let Sizes { inputs: width, rank, leading, .. } = sizes;
        let mut arguments = vec![
            x.first(rows * width)?,
            self.norm_weight(norm)?,
            self.adapter_a(group, parameters)?,
            input.x.first(rows * width)?,
            s.first(rows * leading)?,
        ];
        arguments.extend([int(rows)?, int(width)?]);
        arguments.extend([Argument::F32(norm.weight_offset), Argument::F32(norm.epsilon)]);
        arguments.extend([int(rank)?, int(leading)?]);
        arguments.extend(mask_arguments(batch, group.input_index)?);
        // SAFETY: x and y [T, H], the weight [H], A [R, H], s [T, R̄], and the batch has T tokens.
        unsafe { self.kernels.launch_half(&pass.kernel(), pass.shape(rows), &arguments)? };
        Ok(input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(multiprocessor_count: u32, shared_kib: u32) -> Limits {
        let shared_bytes_per_block = shared_kib << 10;
        Limits {
            compute_capability: (8, 0),
            multiprocessor_count,
            shared_bytes_per_block,
            total_memory_bytes: 0,
        }
    }

    /// Rows of a block on an H100, an A100 and an RTX 4090.
    fn block_rows(rows: usize, width: usize, rank: usize) -> [Option<usize>; 3] {
        [limits(132, 227), limits(108, 163), limits(128, 99)]
            .map(|limits| NormPass::new(limits, rows, width, rank).map(|pass| pass.block_rows))
    }

    #[test]
    fn many_rows_are_fused_where_their_blocks_read_a_seldom_enough() {
        // Of q, k and v, and of gate and up, with r = 16.
        for rank in [48, 32] {
            assert_eq!(block_rows(16_384, 1536, rank), [Some(32), Some(32), None], "Qwen2.5-1.5B");
            assert_eq!(block_rows(16_384, 576, rank), [Some(64), Some(32), Some(64)], "SmolLM2-135M");
            assert_eq!(block_rows(16_384, 4096, rank), [None; 3], "Llama-3-8B");
        }
        assert_eq!(block_rows(16_384, 576, 0), [None; 3]);
    }

    #[test]
    fn few_rows_are_fused_where_they_fit() {
        for (rows, expected) in [(1, 16), (16 * 132, 16), (16 * 132 + 1, 32), (64 * 132, 64)] {
            assert_eq!(block_rows(rows, 1536, 48)[0], Some(expected), "{rows}");
        }
        assert_eq!(block_rows(1, 4096, 48), [Some(16), Some(16), None]);
        // Two blocks of lora.cu share 96 ranks.
        assert_eq!(block_rows(1, 4096, 96), [None; 3]);
    }

    #[test]
    fn two_blocks_fit_with_what_is_reserved_for_each() {
        // Twice 32 rows of 3 KiB, a ring of 16 and one reserved make 226, of which a block may have 225.
        let block_rows =
            |shared_kib| NormPass::new(limits(132, shared_kib), 16_384, 1536, 48).map(|pass| pass.block_rows);
        assert_eq!(block_rows(225), Some(32));
        // Then 64 rows in a block that is alone.
        assert_eq!(block_rows(224), Some(64));
        assert_eq!(block_rows(100), None);
    }
}
