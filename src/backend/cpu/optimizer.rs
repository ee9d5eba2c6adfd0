//! AdamW with decoupled decay, bias correction and clipping by global norm, as in PyTorch
//! (`torch.optim.AdamW`, `torch.nn.utils.clip_grad_norm_`; Loshchilov & Hutter 2019).
//!
//! Scalars are computed in f64; moments and parameters are f32. The norm is summed in f64, block after block.

use std::ops::Range;

use rayon::prelude::*;

use super::simd::simd_fn;
use super::{CpuBackend, lock};
use crate::backend::{AdamWStep, OptimizerState};

/// Elements of one task.
const BLOCK: usize = 16 * 1024;

/// The factors of one step, in the order of PyTorch's single-tensor update.
#[derive(Clone, Copy)]
struct Factors {
    clip: f32,
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// `√(1 − β₂ᵗ)`.
    second_correction: f32,
    epsilon: f32,
    /// `rate / (1 − β₁ᵗ)`.
    step_size: f32,
}

simd_fn! {
    fn update_block<V>(
        simd: Simd, factors: Factors, parameters: &mut [f32], gradients: &[f32], first_moment: &mut [f32],
        second_moment: &mut [f32],
    ) -> () {
        let columns = parameters.chunks_mut(V::LANES).zip(gradients.chunks(V::LANES));
        let moments = first_moment.chunks_mut(V::LANES).zip(second_moment.chunks_mut(V::LANES));
        for ((parameter, gradient), (first, second)) in columns.zip(moments) {
            let gradient = V::from_slice(gradient) * V::splat(factors.clip);
            let decayed = V::from_slice(parameter) * V::splat(factors.decay);
            let old = V::from_slice(first);
            let mean = (gradient - old).mul_add(V::splat(factors.one_minus_beta1), old);
            let square = (gradient * V::splat(factors.one_minus_beta2))
                .mul_add(gradient, V::from_slice(second) * V::splat(factors.beta2));
            let denominator = square.sqrt() / V::splat(factors.second_correction) + V::splat(factors.epsilon);
            mean.to_slice(first);
            square.to_slice(second);
            (decayed - V::splat(factors.step_size) * (mean / denominator)).to_slice(parameter);
        }
    }
}

/// Cuts a block of the flat buffer where a run ends: each piece from the block's start on, and whether it is of `B`s. Behind
/// the last end, and where there is none, everything is of one kind.
fn pieces(ends: &[usize], block: Range<usize>) -> impl Iterator<Item = (Range<usize>, bool)> + '_ {
    let first = ends.partition_point(|&end| end <= block.start);
    let mut at = block.start;
    (first..).map_while(move |run| {
        let start = at;
        at = ends.get(run).copied().unwrap_or(block.end).min(block.end);
        (start < block.end).then(|| (start - block.start..at - block.start, run % 2 == 1))
    })
}

impl CpuBackend {
    pub(super) fn adamw_update(&self, state: OptimizerState<'_, Self>, step: AdamWStep) -> f64 {
        let norm = self.global_norm(state.gradients) / step.loss_scale;
        if !norm.is_finite() {
            return norm;
        }
        let exponent = i32::try_from(step.step).unwrap_or(i32::MAX);
        let factors = |learning_rate: f64| Factors {
            clip: ((step.max_grad_norm / (norm + 1e-6)).min(1.0) / step.loss_scale) as f32,
            decay: (1.0 - learning_rate * step.weight_decay) as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            second_correction: (1.0 - step.beta2.powi(exponent)).sqrt() as f32,
            epsilon: step.epsilon as f32,
            step_size: (learning_rate / (1.0 - step.beta1.powi(exponent))) as f32,
        };
        let (ratio, ends) = state.b_rate.map_or((1.0, &[][..]), |rate| (rate.ratio, &rate.runs[..]));
        let factors = [step.learning_rate, step.learning_rate * ratio].map(factors);
        let update = || {
            let parameters = state.parameters.par_chunks_mut(BLOCK).zip(state.gradients.par_chunks(BLOCK));
            let moments =
                state.first_moment.par_chunks_mut(BLOCK).zip(state.second_moment.par_chunks_mut(BLOCK));
            let blocks = parameters.zip(moments).enumerate();
            blocks.for_each(|(block, ((parameters, gradients), (first, second)))| {
                let start = block * BLOCK;
                for (piece, is_b) in pieces(ends, start..start + parameters.len()) {
                    update_block(
                        self.simd,
                        factors[usize::from(is_b)],
                        &mut parameters[piece.clone()],
                        &gradients[piece.clone()],
                        &mut first[piece.clone()],
                        &mut second[piece],
                    );
                }
            });
        };
        self.threads.pool().install(update);
        norm
    }

    fn global_norm(&self, gradients: &[f32]) -> f64 {
        let mut sums = lock(&self.block_sums);
        let sums = &mut *sums;
        sums.resize(gradients.len().div_ceil(BLOCK), 0.0);
        self.threads.pool().install(|| {
            sums.par_iter_mut().zip(gradients.par_chunks(BLOCK)).for_each(|(sum, block)| {
                *sum = block.iter().map(|&gradient| f64::from(gradient) * f64::from(gradient)).sum();
            });
        });
        sums.iter().sum::<f64>().sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_cut_where_runs_end() {
        let found = |block| pieces(&[4, 10, 12], block).collect::<Vec<_>>();
        assert_eq!(found(0..4), [(0..4, false)]);
        assert_eq!(found(4..8), [(0..4, true)]);
        assert_eq!(found(8..12), [(0..2, true), (2..4, false)]);
        assert_eq!(found(0..12), [(0..4, false), (4..10, true), (10..12, false)]);
        assert_eq!(found(12..15), [(0..3, true)]);
        assert_eq!(pieces(&[], 3..5).collect::<Vec<_>>(), [(0..2, false)]);
    }
}
