//! AdamW with decoupled decay, bias correction and clipping by global norm, as in PyTorch
//! (`torch.optim.AdamW`, `torch.nn.utils.clip_grad_norm_`; Loshchilov & Hutter 2019).
//!
//! Scalars are computed in f64; moments and parameters are f32. The norm is summed in f64, block after block.

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

impl CpuBackend {
    pub(super) fn adamw_update(&self, state: OptimizerState<'_, Self>, step: AdamWStep) -> f64 {
        let norm = self.global_norm(state.gradients) / step.loss_scale;
        if !norm.is_finite() {
            return norm;
        }
        let exponent = i32::try_from(step.step).unwrap_or(i32::MAX);
        let factors = Factors {
            clip: ((step.max_grad_norm / (norm + 1e-6)).min(1.0) / step.loss_scale) as f32,
            decay: (1.0 - step.learning_rate * step.weight_decay) as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            second_correction: (1.0 - step.beta2.powi(exponent)).sqrt() as f32,
            epsilon: step.epsilon as f32,
            step_size: (step.learning_rate / (1.0 - step.beta1.powi(exponent))) as f32,
        };
        let update = || {
            let parameters = state.parameters.par_chunks_mut(BLOCK).zip(state.gradients.par_chunks(BLOCK));
            let moments =
                state.first_moment.par_chunks_mut(BLOCK).zip(state.second_moment.par_chunks_mut(BLOCK));
            parameters.zip(moments).for_each(|((parameters, gradients), (first, second))| {
                update_block(self.simd, factors, parameters, gradients, first, second);
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
