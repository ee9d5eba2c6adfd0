//! The gradients of a group's adapters: one pass over `dy` for `ds` and `dB` (lora_back.cu), then `dA` (lora.cu).

use super::CudaBackend;
use super::launch::{Shape, int};
use super::linear::{Adapters, ELEMENT_THREADS, Sizes, lora_shape};
use super::memory::{CudaFloats, FLOAT_BYTES, Growing, HALF_BYTES};
use super::weights::WIDTH_MULTIPLE;
use crate::backend::AdapterShape;
use crate::device::{Argument, Device};
use crate::error::Result;

/// Threads, outputs of one block, side of a tile of `dy`, and tiles in flight: as in lora_back.cu.
const THREADS: u32 = 256;
const BLOCK_OUTPUTS: usize = 1024;
const SIDE: usize = 64;
const STAGES: usize = 4;
/// Ranks of a block times tokens of a stretch: what fits its accumulators.
const RANKS_TIMES_TOKENS: usize = 128 * SIDE;

/// Blocks of a product over tokens: enough for every GPU, whatever its size, so that sums do not depend on it.
pub(super) const GRADIENT_BLOCKS: usize = 512;
/// Tokens of one stretch at least.
const STRETCH_TOKENS: usize = 256;

/// Into how many stretches the tokens of `dA [rows, columns]` are cut. A matter of shapes alone: the sum's order must not
/// depend on the GPU.
fn stretch_count(rows: usize, columns: usize, tokens: usize) -> usize {
    let tiles = lora_shape(rows, columns, 1).grid[0];
    GRADIENT_BLOCKS.div_ceil(tiles).min(tokens / STRETCH_TOKENS).max(1)
}

/// Bytes of partial sums that the gradients of a group need.
pub(super) fn partial_bytes(adapters: &[AdapterShape], in_features: usize, tokens: usize) -> usize {
    let rank: usize = adapters.iter().map(|adapter| adapter.rank).sum();
    if rank == 0 {
        return 0;
    }
    let of_a = stretch_count(rank, in_features, tokens) * rank * in_features * FLOAT_BYTES;
    of_a.max(BackPass::new(adapters, tokens).bytes())
}

/// The pass over `dy`: how it is cut, and what it leaves.
#[derive(Clone, Copy, Debug)]
struct BackPass {
    tokens: usize,
    /// Ranks that a block takes: 16, 32 or 64.
    block_ranks: usize,
    /// Blocks for the ranks of the largest adapter.
    rank_blocks: usize,
    /// Blocks for the outputs of all adapters.
    output_blocks: usize,
    /// Blocks for the tokens.
    stretches: usize,
    /// The largest rank.
    rank_width: usize,
    /// Elements of all `B`.
    b_elements: usize,
}

impl BackPass {
    fn new(adapters: &[AdapterShape], tokens: usize) -> Self {
        let mut begin = 0;
        let mut widest = 0;
        for adapter in adapters {
            // Ranks are read from the multiple of 8 at or before the adapter's first.
            widest = widest.max(begin % WIDTH_MULTIPLE + adapter.rank);
            begin += adapter.rank;
        }
        let block_ranks = [16, 32].into_iter().find(|&ranks| widest <= ranks).unwrap_or(64);
        Self {
            tokens,
            block_ranks,
            rank_blocks: widest.div_ceil(block_ranks),
            output_blocks: adapters.iter().map(|adapter| adapter.out_features.div_ceil(BLOCK_OUTPUTS)).sum(),
            stretches: tokens.div_ceil(RANKS_TIMES_TOKENS / block_ranks),
            rank_width: adapters.iter().map(|adapter| adapter.rank).max().unwrap_or(0),
            b_elements: adapters.iter().map(|adapter| adapter.out_features * adapter.rank).sum(),
        }
    }

    fn ds_bytes(&self) -> usize {
        self.output_blocks * self.tokens * self.rank_width * FLOAT_BYTES
    }

    fn b_bytes(&self) -> usize {
        self.stretches * self.b_elements * FLOAT_BYTES
    }

    fn bytes(&self) -> usize {
        self.ds_bytes() + self.b_bytes()
    }

    /// Tiles of `dy`, the stretch of `s`, and as many tiles of `B̂`.
    fn shape(&self) -> Shape {
        let shared = STAGES * SIDE * SIDE + RANKS_TIMES_TOKENS + STAGES * SIDE * self.block_ranks;
        Shape {
            grid: [self.stretches, self.output_blocks, self.rank_blocks],
            threads: THREADS,
            shared_bytes: shared * HALF_BYTES,
        }
    }
}

/// Partial sums of `ds` and `dB`, and how they are to be added.
pub(super) struct BackSums {
    pub ds_partials: Argument,
    pub b_partials: Argument,
    /// Outputs that a partial sum of `ds` covers.
    pub block_outputs: usize,
    /// Elements from one row of them to the next.
    pub rank_width: usize,
    /// Partial sums of `dB`.
    pub stretches: usize,
    /// Elements of all `B`.
    pub b_elements: usize,
}

impl<D: Device> CudaBackend<D> {
    /// Writes `ds = dy · B̂ [T, R̄]` and adds `dB = scale · dyᵀ · s`, given `dy [T, O]` and `s [T, R̄]`.
    pub(super) fn back_pass(
        &self,
        adapters: &Adapters<D>,
        sizes: Sizes,
        [dy, s, ds]: [Argument; 3],
        gradients: &CudaFloats<D>,
        partials: &mut Growing<D>,
    ) -> Result<()> {
        let Sizes { tokens, outputs, leading, .. } = sizes;
        let pass = BackPass::new(&adapters.shapes, tokens);
        let partials = partials.reserve(self.device(), pass.bytes())?;
        let sums = BackSums {
            ds_partials: partials.first(pass.ds_bytes())?,
            b_partials: partials.at(pass.ds_bytes(), pass.b_bytes())?,
            block_outputs: BLOCK_OUTPUTS,
            rank_width: pass.rank_width,
            stretches: pass.stretches,
            b_elements: pass.b_elements,
        };
        let [slots, ..] = adapters.tables()?;
        let mut arguments = vec![dy, adapters.b_hat.first(outputs * leading)?, s, slots];
        arguments.extend([sums.ds_partials, sums.b_partials, int(tokens)?, int(outputs)?]);
        arguments.extend([int(adapters.shapes.len())?, int(leading)?, int(pass.rank_width)?]);
        arguments.push(Argument::I64(pass.b_elements as i64));
        let kernel = format!("lora_back_{}", pass.block_ranks);
        // SAFETY: dy [T, O], B̂ [O, R̄], s [T, R̄]; the partial sums are as large as the pass says.
        unsafe { self.kernels.launch_half(&kernel, pass.shape(), &arguments)? };
        self.add_back_sums(adapters, sizes, &sums, ds, gradients)
    }

    /// Writes `ds [T, R̄]` and adds `dB`, of their partial sums.
    pub(super) fn add_back_sums(
        &self,
        adapters: &Adapters<D>,
        Sizes { tokens, rank, leading, .. }: Sizes,
        sums: &BackSums,
        ds: Argument,
        gradients: &CudaFloats<D>,
    ) -> Result<()> {
        let [slots, b_offsets, scales] = adapters.tables()?;
        let count = int(adapters.shapes.len())?;
        let mut arguments = vec![sums.ds_partials, slots, ds, int(tokens)?, count];
        arguments.extend([int(rank)?, int(leading)?, int(sums.rank_width)?, int(sums.block_outputs)?]);
        let shape = Shape::blocks((tokens * rank).div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32);
        // SAFETY: ds [T, R̄]; the partial sums are as large as `sums` says.
        unsafe { self.kernels.launch_half("lora_sum_ds", shape, &arguments)? };

        let target = gradients.first(gradients.elements())?;
        let (stretches, elements) = (int(sums.stretches)?, Argument::I64(sums.b_elements as i64));
        let arguments = [sums.b_partials, slots, b_offsets, scales, target, stretches, count, elements];
        let shape = Shape::blocks(sums.b_elements.div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32);
        // SAFETY: the layout places every B inside the flat buffer.
        unsafe { self.kernels.launch("lora_add_b_gradient", shape, &arguments) }
    }

    /// Adds `dA = dsᵀ · x̃`, given `ds [T, R̄]` and `x̃ [T, I]`.
    pub(super) fn a_gradient(
        &self,
        adapters: &Adapters<D>,
        Sizes { tokens, inputs: width, rank, leading, .. }: Sizes,
        [ds, x]: [Argument; 2],
        gradients: &CudaFloats<D>,
        partials: &mut Growing<D>,
    ) -> Result<()> {
        let stretches = stretch_count(rank, width, tokens);
        let bytes = stretches * rank * width * FLOAT_BYTES;
        let partials = partials.reserve(self.device(), bytes)?.first(bytes)?;
        let mut arguments = vec![ds, x, partials];
        arguments.extend([int(tokens)?, int(rank)?, int(width)?, int(leading)?, int(width)?]);
        // SAFETY: ds [T, R̄] and x̃ [T, I].
        unsafe { self.kernels.launch_half("lora_gradient", lora_shape(rank, width, stretches), &arguments)? };
        self.add_a_sums(adapters, rank * width, partials, stretches, gradients)
    }

    /// Adds the `elements` of `dA` of their partial sums.
    pub(super) fn add_a_sums(
        &self,
        adapters: &Adapters<D>,
        elements: usize,
        partials: Argument,
        stretches: usize,
        gradients: &CudaFloats<D>,
    ) -> Result<()> {
        let target = gradients.at(adapters.a_offset, elements)?;
        let arguments = [partials, target, int(stretches)?, Argument::I64(elements as i64)];
        let shape = Shape::blocks(elements.div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32);
        // SAFETY: the target holds A's gradient, and there are as many partial sums of it.
        unsafe { self.kernels.launch("lora_add_a_gradient", shape, &arguments) }
    }
}
