//! The gated MLP: its middle in one pass with what the adapters take from it (gated_down.cu, mlp_back.cu).

use super::adapter_gradients::{BackSums, GRADIENT_BLOCKS};
use super::launch::{NULL, Shape, int};
use super::linear::{Sizes, mask_arguments, rank_leading, shapes_of};
use super::magnitudes::magnitudes_of;
use super::memory::{CudaBuffer, CudaFloats, FLOAT_BYTES, HALF_BYTES};
use super::products::{Gated, NO_MASK};
use super::shares_of_s::SharesOfS;
use super::weights::WIDTH_MULTIPLE;
use super::{CudaBackend, CudaBatch, Scratch, lock};
use crate::backend::{
    Activation, AdapterShape, Backend, LinearGradients, LinearGroup, LinearInput, Mlp, MlpGradient, MlpSaved,
    NormedInput, Reach, Work, mlp,
};
use crate::device::{Argument, Device};
use crate::error::Result;
use crate::range;

/// Side of a tile, as in back_tile.h.
const SIDE: usize = 64;
/// Columns of a block at most and at least. Each leaves partial sums of `s` or `ds`: for 16 ranks, written and read, 128
/// bytes a token, as much as 13 to 21 columns take.
const MOST_COLUMNS: usize = 1024;
const FEWEST_COLUMNS: usize = 256;

/// Columns of `F` that a block takes where there are `row_blocks` over the tokens: halved until there are enough blocks.
fn columns_of_blocks(row_blocks: usize, width: usize) -> usize {
    let mut columns = MOST_COLUMNS;
    while columns > FEWEST_COLUMNS && row_blocks * width.div_ceil(columns) < GRADIENT_BLOCKS {
        columns /= 2;
    }
    columns
}

/// The pass over the outputs of gate and up, where their product does not take the activation itself: how it is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct GatePass {
    tokens: usize,
    /// `F`.
    width: usize,
    rank: usize,
    /// Ranks that a block holds: 16, 32 or 64.
    block_ranks: usize,
    block_columns: usize,
}

impl GatePass {
    /// None where down has no adapter, or one of so many ranks that reading its `A` in every block would be most of the
    /// traffic: there the operations run one by one.
    pub fn new(down: &[AdapterShape], width: usize, tokens: usize) -> Option<Self> {
        let [AdapterShape { rank, .. }] = *down else { return None };
        let block_ranks = [16, 32, 64].into_iter().find(|&ranks| rank <= ranks)?;
        let block_columns = columns_of_blocks(tokens.div_ceil(SIDE), width);
        Some(Self { tokens, width, rank, block_ranks, block_columns })
    }

    /// The shares that it leaves.
    pub fn shares(&self) -> SharesOfS {
        let stretches = self.width.div_ceil(self.block_columns);
        SharesOfS { stretches, tokens: self.tokens, rank: self.rank }
    }

    /// Two stages of two tiles and of one of `A`.
    fn shape(&self) -> Shape {
        Shape {
            grid: [self.tokens.div_ceil(SIDE), self.shares().stretches, 1],
            threads: 256,
            shared_bytes: 2 * (2 * SIDE + self.block_ranks) * SIDE * HALF_BYTES,
        }
    }
}

/// Ranks that a block holds, its threads, and the tiles of tokens of its stretch: `MlpCut` in mlp_back.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cut {
    ranks: usize,
    threads: u32,
    token_tiles: usize,
}

const CUTS: [Cut; 3] = [
    Cut { ranks: 16, threads: 256, token_tiles: 7 },
    Cut { ranks: 32, threads: 256, token_tiles: 3 },
    Cut { ranks: 64, threads: 512, token_tiles: 3 },
];

/// The pass over the middle of an MLP: how it is cut, and what it leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct MiddlePass {
    tokens: usize,
    /// `F`.
    width: usize,
    cut: Cut,
    stretches: usize,
    block_columns: usize,
    /// Adapters of gate and up, their ranks together, and the larger rank.
    adapters: usize,
    gate_up_rank: usize,
    rank_width: usize,
    down_rank: usize,
}

impl MiddlePass {
    /// None where there is no adapter, or one of more ranks than a block's registers hold, or one of gate and up together
    /// (Phi-3): there the operations run one by one.
    pub fn new(gate_up: &[AdapterShape], down: &[AdapterShape], width: usize, tokens: usize) -> Option<Self> {
        if gate_up.iter().any(|adapter| adapter.out_features != width) {
            return None;
        }
        let ranks = |adapters: &[AdapterShape]| adapters.iter().map(|adapter| adapter.rank).sum::<usize>();
        let (gate_up_rank, down_rank) = (ranks(gate_up), ranks(down));
        // The second adapter's are read from the multiple of 8 at or before its first.
        let widest = match gate_up {
            [first, second] => first.rank.max(first.rank % WIDTH_MULTIPLE + second.rank),
            _ => gate_up_rank,
        };
        let widest = widest.max(down_rank);
        let cut = CUTS.into_iter().find(|cut| (1..=cut.ranks).contains(&widest))?;
        let stretches = tokens.div_ceil(cut.token_tiles * SIDE);
        let block_columns = columns_of_blocks(stretches, width);
        Some(Self {
            tokens,
            width,
            cut,
            stretches,
            block_columns,
            adapters: gate_up.len(),
            gate_up_rank,
            rank_width: gate_up.iter().map(|adapter| adapter.rank).max().unwrap_or(0),
            down_rank,
        })
    }

    fn column_blocks(&self) -> usize {
        self.width.div_ceil(self.block_columns)
    }

    fn ds_bytes(&self) -> usize {
        self.adapters * self.column_blocks() * self.tokens * self.rank_width * FLOAT_BYTES
    }

    fn b_bytes(&self) -> usize {
        self.stretches * self.width * self.gate_up_rank * FLOAT_BYTES
    }

    fn a_bytes(&self) -> usize {
        self.stretches * self.width * self.down_rank * FLOAT_BYTES
    }

    /// Bytes of its partial sums.
    pub fn bytes(&self) -> usize {
        self.ds_bytes() + self.b_bytes() + self.a_bytes()
    }

    /// Two stages of `dact`, `g` and `u`, and five narrow matrices.
    fn shape(&self) -> Shape {
        Shape {
            grid: [self.stretches, self.column_blocks(), 1],
            threads: self.cut.threads,
            shared_bytes: (6 * SIDE + 5 * self.cut.ranks) * SIDE * HALF_BYTES,
        }
    }
}

/// Whether an adapter has magnitudes: they come between its product and what reads it, so that nothing is fused.
fn has_magnitudes<D: Device>(mlp: Mlp<'_, CudaBackend<D>>) -> bool {
    magnitudes_of(mlp.gate_up).is_some() || magnitudes_of(mlp.down).is_some()
}

/// Columns of `act` in a tile of the product that takes it, where it takes the shares of down's `s` as well: one width alone, so
/// that no choice of tiles changes a sum.
const GATED_TILE_COLUMNS: usize = 128;

/// The shares of down's `s`; none where it is computed from `act`.
pub(super) fn gated_shares(down: &[AdapterShape], width: usize, tokens: usize) -> Option<SharesOfS> {
    SharesOfS::on_hopper(down, width.div_ceil(GATED_TILE_COLUMNS), tokens)
}

/// The activation in a kernel's name.
fn name_of(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu",
    }
}

impl<D: Device> CudaBackend<D> {
    /// On Hopper the product of gate and up takes the activation before it leaves, and, without dropout, the `s` of down.
    pub(super) fn mlp_forward(
        &self,
        mlp: Mlp<'_, Self>,
        parameters: &CudaFloats<D>,
        input: NormedInput<'_, Self>,
        residual: Option<&CudaBuffer<D>>,
        saved: MlpSaved<'_, Self>,
        y: &mut CudaBuffer<D>,
    ) -> Result<()> {
        let (rows, batch) = (input.rows, input.batch);
        if has_magnitudes(mlp) {
            return mlp::forward(self, mlp, parameters, input, residual, saved, y);
        }
        if rows == 0 || !self.kernels.uses_hopper {
            return match GatePass::new(shapes_of(mlp.down), mlp.width(), rows) {
                Some(pass) if rows > 0 => {
                    self.mlp_forward_by_pass(mlp, pass, parameters, input, residual, saved, y)
                }
                _ => mlp::forward(self, mlp, parameters, input, residual, saved, y),
            };
        }
        let MlpSaved { gate_up, gate_up_s, act, down_s } = saved;
        let shares = match batch.dropout {
            None => gated_shares(shapes_of(mlp.down), mlp.width(), rows),
            Some(_) => None,
        };
        let input = self.normed_down(mlp.gate_up, parameters, input, gate_up_s)?;
        {
            let shape = || mlp.gate_up.shape(rows, mlp.gate_up.weight.bytes());
            let rank = shares.map_or(0, |shares| shares.rank);
            let _range = range!("linear gated"; Work::of_gated_linear(shape(), rank, HALF_BYTES));
            let product = self.forward_product(mlp.gate_up, rows, input.x, None, gate_up_s, gate_up)?;
            let (elements, width) = (rows * mlp.width(), mlp.width());
            let mut scratch = lock(&self.scratch);
            let operands = |shares| self.share_operands(shares, mlp.down, parameters, &mut scratch);
            let down = shares.map(operands).transpose()?;
            let up = gate_up.at(width, 2 * elements - width)?;
            let gated = Gated { activation: mlp.activation, up, act: act.first(elements)?, down };
            // SAFETY: every stretch was asked for by its shape.
            unsafe { self.kernels.gated_forward(&product, &gated)? };
            if let Some(down) = &gated.down {
                self.sum_shares(down, down_s)?;
            }
        }
        let input = LinearInput { x: act, rows, batch };
        match shares {
            None => self.linear(mlp.down, parameters, input, residual, down_s, y),
            Some(_) => self.linear_given_s(mlp.down, input, residual, down_s, y),
        }
    }

    /// The forward of kernels that every GPU runs: the activation with the `s` of down.
    #[allow(clippy::too_many_arguments)]
    fn mlp_forward_by_pass(
        &self,
        mlp: Mlp<'_, Self>,
        pass: GatePass,
        parameters: &CudaFloats<D>,
        input: NormedInput<'_, Self>,
        residual: Option<&CudaBuffer<D>>,
        saved: MlpSaved<'_, Self>,
        y: &mut CudaBuffer<D>,
    ) -> Result<()> {
        let GatePass { tokens, width, rank, .. } = pass;
        let MlpSaved { gate_up, gate_up_s, act, down_s } = saved;
        let batch = input.batch;
        let mask = mask_arguments(batch, mlp.down.input_index)?;
        self.normed_linear(mlp.gate_up, parameters, input, gate_up_s, gate_up)?;
        {
            let _range = range!("gated"; Work::of_gated_with_s(tokens, width, rank, HALF_BYTES));
            let mut scratch = lock(&self.scratch);
            let down = self.share_operands(pass.shares(), mlp.down, parameters, &mut scratch)?;
            let mut arguments = vec![gate_up.first(tokens * 2 * width)?, act.first(tokens * width)?];
            arguments.extend([down.a, down.partials, int(tokens)?, int(width)?]);
            arguments.extend([int(pass.block_columns)?, int(rank)?, int(rank_leading(rank))?]);
            arguments.extend(mask);
            let kernel = format!("gated_down_{}_{}", name_of(mlp.activation), pass.block_ranks);
            // SAFETY: gate_up [T, 2F], act [T, F], A [r, F]; the shares are cut as the pass says.
            unsafe { self.kernels.launch_half(&kernel, pass.shape(), &arguments)? };
            self.sum_shares(&down, down_s)?;
        }
        let input = LinearInput { x: act, rows: tokens, batch };
        self.linear_given_s(mlp.down, input, residual, down_s, y)
    }

    pub(super) fn mlp_gradient(
        &self,
        mlp: Mlp<'_, Self>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        saved: MlpSaved<'_, Self>,
        gradient: MlpGradient<'_, Self>,
        gradients: &mut CudaFloats<D>,
    ) -> Result<()> {
        let LinearInput { rows, batch, .. } = input;
        let pass = match mlp.gate_up.projections[..] {
            [_, _] if !has_magnitudes(mlp) => {
                MiddlePass::new(shapes_of(mlp.gate_up), shapes_of(mlp.down), mlp.width(), rows)
            }
            _ => None,
        };
        let (Some(pass), Reach::First | Reach::Input(_)) = (pass, &gradient.reach) else {
            return mlp::backward(self, mlp, parameters, input, saved, gradient, gradients);
        };
        let MlpSaved { gate_up, gate_up_s, down_s, .. } = saved;
        let MlpGradient { dy, dact, reach, .. } = gradient;
        let mut scratch = lock(&self.scratch);
        let down_ds = {
            let _range = linear_range(mlp.down, rows, LinearGradients { a: false, b: true, dx: true });
            let ds = self.output_gradient(mlp.down, rows, down_s, dy, gradients, &mut scratch)?;
            self.input_gradient(mlp.down, parameters, rows, batch, [dy, dact], ds)?;
            ds
        };
        let ds = {
            let ranks = [pass.gate_up_rank, pass.down_rank];
            let _range =
                range!("gated backward"; Work::of_mlp_middle_backward(rows, pass.width, ranks, HALF_BYTES));
            let buffers = MiddleBuffers { dact, gate_up, gate_up_s, down_ds };
            self.middle_gradient(mlp, pass, batch, buffers, gradients, &mut scratch)?
        };
        let dx = match reach {
            Reach::Input(dx) => Some(&*dx),
            Reach::Second | Reach::First => None,
        };
        let wanted = LinearGradients { a: true, b: false, dx: dx.is_some() };
        let _range = linear_range(mlp.gate_up, rows, wanted);
        self.adapter_input_gradient(mlp.gate_up, &input, ds, gradients, &mut scratch)?;
        match dx {
            Some(dx) => self.input_gradient(mlp.gate_up, parameters, rows, batch, [gate_up, dx], ds),
            None => Ok(()),
        }
    }

    /// Replaces `gate_up` by its gradient, adds the gradients of the `B`s of gate and up and of the `A` of down, and returns
    /// `ds` of gate and up.
    fn middle_gradient(
        &self,
        mlp: Mlp<'_, Self>,
        pass: MiddlePass,
        batch: &CudaBatch<D>,
        buffers: MiddleBuffers<'_, D>,
        gradients: &CudaFloats<D>,
        scratch: &mut Scratch<D>,
    ) -> Result<Argument> {
        let MiddleBuffers { dact, gate_up, gate_up_s, down_ds } = buffers;
        let MiddlePass { tokens, width, .. } = pass;
        let (sizes, down_sizes) = (Sizes::of(mlp.gate_up, tokens), Sizes::of(mlp.down, tokens));
        let partials = scratch.partials.reserve(self.device(), pass.bytes())?;
        let ds_partials = partials.first(pass.ds_bytes())?;
        let b_partials = partials.at(pass.ds_bytes(), pass.b_bytes())?;
        let a_partials = partials.at(pass.ds_bytes() + pass.b_bytes(), pass.a_bytes())?;
        let (mut s, mut b_hat) = (NULL, NULL);
        if let Some(adapters) = &mlp.gate_up.prepared.adapters {
            s = gate_up_s.first(tokens * sizes.leading)?;
            b_hat = adapters.b_hat.first(2 * width * sizes.leading)?;
        }
        let mut arguments = vec![dact.first(tokens * width)?, gate_up.first(tokens * 2 * width)?, s, b_hat];
        arguments.extend([down_ds, ds_partials, b_partials, a_partials]);
        arguments.extend([int(tokens)?, int(width)?, int(pass.block_columns)?]);
        // Of gate, up and down.
        for projection in mlp.gate_up.projections.iter().chain(&mlp.down.projections) {
            arguments.push(int(projection.lora.map_or(0, |slot| slot.rank))?);
        }
        arguments.extend([int(sizes.leading)?, int(down_sizes.leading)?, int(pass.rank_width)?]);
        let has_down = mlp.down.prepared.adapters.is_some();
        arguments.extend(if has_down { mask_arguments(batch, mlp.down.input_index)? } else { NO_MASK });
        let kernel = format!("mlp_back_{}_{}", name_of(mlp.activation), pass.cut.ranks);
        // SAFETY: dact [T, F], gate_up [T, 2F], s [T, R̄], B̂ [2F, R̄], ds of down [T, r̄]; the partial sums are as large as the pass
        // says.
        unsafe { self.kernels.launch_half(&kernel, pass.shape(), &arguments)? };
        if let Some(adapters) = &mlp.down.prepared.adapters {
            self.add_a_sums(adapters, width * pass.down_rank, a_partials, pass.stretches, gradients)?;
        }
        let Some(adapters) = &mlp.gate_up.prepared.adapters else { return Ok(NULL) };
        let sums = BackSums {
            ds_partials,
            b_partials,
            block_outputs: pass.block_columns,
            rank_width: pass.rank_width,
            stretches: pass.stretches,
            b_elements: width * pass.gate_up_rank,
        };
        // The pass has read the ds of down that was here.
        let ds = self.ds_scratch(tokens * sizes.leading, scratch)?;
        self.add_back_sums(adapters, sizes, &sums, ds, gradients)?;
        Ok(ds)
    }
}

/// What the pass over the middle reads and writes.
struct MiddleBuffers<'a, D: Device> {
    dact: &'a CudaBuffer<D>,
    gate_up: &'a CudaBuffer<D>,
    gate_up_s: &'a CudaBuffer<D>,
    down_ds: Argument,
}

/// The range of a part of a linear's backward.
fn linear_range<D: Device>(
    group: &LinearGroup<CudaBackend<D>>,
    rows: usize,
    wanted: LinearGradients,
) -> tracing::span::EnteredSpan {
    let shape = || group.shape(rows, group.weight.bytes());
    range!("linear backward"; Work::of_linear_backward(shape(), HALF_BYTES, wanted))
}
#[cfg(test)]
mod tests {
    use super::*;

    fn adapters<const N: usize>(out_features: usize, ranks: [usize; N]) -> Vec<AdapterShape> {
        ranks.map(|rank| AdapterShape { out_features, rank }).into()
    }

    #[test]
    fn a_pass_is_made_where_its_ranks_fit() {
        let pass = |gate_up: &[AdapterShape], down: &[AdapterShape]| {
            MiddlePass::new(gate_up, down, 8960, 16_384).map(|pass| pass.cut.ranks)
        };
        let (gate_up, down) = (adapters(8960, [16, 16]), adapters(1536, [16]));
        assert_eq!(pass(&gate_up, &down), Some(16));
        assert_eq!(pass(&[], &adapters(1536, [64])), Some(64));
        // From the multiple of 8 before its first on, up's take 19.
        assert_eq!(pass(&adapters(8960, [3, 16]), &[]), Some(32));
        assert_eq!(pass(&[], &[]), None);
        assert_eq!(pass(&gate_up, &adapters(1536, [65])), None);
        // One adapter over gate and up.
        assert_eq!(pass(&adapters(2 * 8960, [16]), &down), None);
    }

    #[test]
    fn blocks_are_enough_or_as_small_as_they_get() {
        assert_eq!(columns_of_blocks(16_384 / SIDE, 8960), 1024);
        assert_eq!(columns_of_blocks(16_384_usize.div_ceil(7 * SIDE), 8960), 512);
        assert_eq!(columns_of_blocks(1, 1536), 256);
    }
}
