//! Output head and cross-entropy, in chunks of labelled rows: logits, loss, gradient in place, `dx`.

use rayon::prelude::*;

use super::adapter::OuterProduct;
use super::matmul::{
    Linear, LinearBackward, Rows, RowsMut, Weight as MatmulWeight, decode, linear, linear_backward,
};
use super::memory::DisjointParts;
use super::product::Right;
use super::simd::{exp, simd_fn, tanh};
use super::weights::check_ids;
use super::{CpuBackend, CpuBatch};
use crate::backend::{Head, Weight};
use crate::batch::NO_ROW;
use crate::error::{Error, Result};

/// Elements of a chunk of logits (32 MiB).
const CHUNK_ELEMENTS: usize = 8 * 1024 * 1024;
/// Terms summed in f32 before they go into an f64.
const SUM_BLOCK: usize = 1024;

/// Cross-entropy of one row, and whether the target has the highest logit.
struct RowLoss {
    loss: f32,
    correct: bool,
}

simd_fn! {
    /// Caps logits: `cap·tanh(logit/cap)`.
    fn cap_row<V>(simd: Simd, cap: f32, logits: &mut [f32]) -> () {
        let (inverse, cap) = (V::splat(1.0 / cap), V::splat(cap));
        for chunk in logits.chunks_mut(V::LANES) {
            (tanh(V::from_slice(chunk) * inverse) * cap).to_slice(chunk);
        }
    }
}

simd_fn! {
    /// Gradients of logits before they were capped from those after: times `1 − (capped/cap)²`.
    fn cap_row_backward<V>(simd: Simd, cap: f32, capped: &[f32], gradients: &mut [f32]) -> () {
        let (inverse, one) = (V::splat(1.0 / cap), V::splat(1.0));
        for (capped, gradient) in capped.chunks(V::LANES).zip(gradients.chunks_mut(V::LANES)) {
            let tanh = V::from_slice(capped) * inverse;
            (V::from_slice(gradient) * (one - tanh * tanh)).to_slice(gradient);
        }
    }
}

simd_fn! {
    /// `ln Σ e^logit - logit[target]`. With a scale, replaces the logits by `scale · (softmax - one-hot)`.
    fn row_loss<V>(simd: Simd, logits: &mut [f32], target: usize, gradient_scale: Option<f32>) -> RowLoss {
        let mut greatest = V::splat(f32::NEG_INFINITY);
        let whole = logits.chunks_exact(V::LANES);
        let rest = whole.remainder();
        for chunk in whole {
            greatest = greatest.max(V::from_slice(chunk));
        }
        let greatest = rest.iter().fold(greatest.max_lane(), |greatest, &logit| greatest.max(logit));
        let at_target = logits[target];
        let correct = at_target == greatest && logits[..target].iter().all(|&logit| logit < greatest);
        let mut sum = 0.0_f64;
        let shift = V::splat(greatest);
        for block in logits.chunks_mut(SUM_BLOCK) {
            let mut partial = V::splat(0.0);
            let whole = block.len() - block.len() % V::LANES;
            let (whole, rest) = block.split_at_mut(whole);
            for chunk in whole.chunks_exact_mut(V::LANES) {
                let weight = exp(V::from_slice(chunk) - shift);
                partial = partial + weight;
                if gradient_scale.is_some() {
                    weight.to_slice(chunk);
                }
            }
            sum += f64::from(partial.sum());
            let mut weights = [0.0; 16];
            let weights = &mut weights[..rest.len()];
            exp(V::from_slice(rest) - shift).to_slice(weights);
            sum += weights.iter().map(|&weight| f64::from(weight)).sum::<f64>();
            if gradient_scale.is_some() {
                rest.copy_from_slice(weights);
            }
        }
        if let Some(scale) = gradient_scale {
            let factor = V::splat((f64::from(scale) / sum) as f32);
            for chunk in logits.chunks_mut(V::LANES) {
                (V::from_slice(chunk) * factor).to_slice(chunk);
            }
            logits[target] -= scale;
        }
        RowLoss { loss: (f64::from(greatest) + sum.ln() - f64::from(at_target)) as f32, correct }
    }
}

/// Rows whose logits exist at once.
pub(super) fn chunk_rows(vocabulary: usize, rows: usize) -> usize {
    (CHUNK_ELEMENTS / vocabulary).clamp(1, rows.max(1))
}

impl Head<'_, CpuBackend> {
    fn weight(&self) -> MatmulWeight<'_> {
        match self.weight {
            Weight::Frozen(weight) => weight.weight(),
            Weight::Trained { parameters, offset } => {
                MatmulWeight::f32(self.width, &parameters[offset..][..self.vocabulary * self.width])
            }
        }
    }
}

impl CpuBackend {
    pub(super) fn cross_entropy(
        &self,
        head: Head<'_, Self>,
        batch: &CpuBatch,
        x: &[f32],
        losses: &mut [f32],
        mut dx: Option<&mut [f32]>,
        mut gradients: Option<&mut [f32]>,
    ) -> Result<()> {
        let Head { vocabulary, width, soft_cap, .. } = head;
        let weight = head.weight();
        let offset = gradients.as_ref().map_or(Ok(0), |_| head.weight.trained_offset())?;
        check_ids("target", batch.targets.iter().filter(|&&target| target != NO_ROW), vocabulary)?;
        let count = batch.labelled_count();
        let rows_per_chunk = chunk_rows(vocabulary, count);
        let (losses, correct) = losses[..2 * count].split_at_mut(count);
        let mut logits = self.logits_scratch();
        let logits = logits.at_least(rows_per_chunk * vocabulary);
        let scale = dx.is_some().then_some(batch.settings.gradient_scale);
        for first in (0..count).step_by(rows_per_chunk) {
            let rows = rows_per_chunk.min(count - first);
            let values = &x[first * width..];
            let x = Rows { values, stride: width };
            let dx = dx.as_deref_mut().map(|dx| RowsMut { values: &mut dx[first * width..], stride: width });
            self.threads.pool().install(|| {
                let product = Linear::new(rows, x, weight);
                linear(product, RowsMut { values: &mut *logits, stride: vocabulary });
                let outcomes =
                    losses[first..first + rows].par_iter_mut().zip(&mut correct[first..first + rows]);
                logits
                    .par_chunks_exact_mut(vocabulary)
                    .zip(&batch.targets[first..first + rows])
                    .zip(outcomes)
                    .for_each(|((logits, &target), (loss, correct))| {
                        if target == NO_ROW {
                            logits.fill(0.0);
                            (*loss, *correct) = (0.0, 0.0);
                            return;
                        }
                        let row = self.capped_loss(soft_cap, logits, target as usize, scale);
                        *loss = row.loss;
                        *correct = if row.correct { 1.0 } else { 0.0 };
                    });
                if let Some(dx) = dx {
                    let dlogits = Rows { values: logits, stride: vocabulary };
                    linear_backward(LinearBackward::new(rows, dlogits, weight), dx);
                }
            });
            if let Some(gradients) = gradients.as_deref_mut() {
                let product = OuterProduct {
                    simd: self.simd,
                    rows,
                    left: Right { values: logits, stride: vocabulary },
                    outputs: vocabulary,
                    right: Right { values, stride: width },
                    columns: width,
                    factor: 1.0,
                };
                let gradients = DisjointParts::new(&mut gradients[offset..][..vocabulary * width]);
                self.threads.for_each(product.task_count(), |task| {
                    product.run(task, &mut self.threads.scratch(), &gradients, 0);
                });
            }
        }
        Ok(())
    }

    /// The loss of one row of logits that are first capped; with a scale, they become their gradients.
    fn capped_loss(
        &self,
        soft_cap: Option<f32>,
        logits: &mut [f32],
        target: usize,
        gradient_scale: Option<f32>,
    ) -> RowLoss {
        let Some(cap) = soft_cap else { return row_loss(self.simd, logits, target, gradient_scale) };
        cap_row(self.simd, cap, logits);
        let mut scratch = self.threads.scratch();
        let capped = scratch.at_least(logits.len());
        capped.copy_from_slice(logits);
        let row = row_loss(self.simd, logits, target, gradient_scale);
        if gradient_scale.is_some() {
            cap_row_backward(self.simd, cap, capped, logits);
        }
        row
    }

    pub(super) fn logits_of_row(
        &self,
        head: Head<'_, Self>,
        x: &[f32],
        row: usize,
        logits: &mut [f32],
    ) -> Result<()> {
        if logits.len() != head.vocabulary {
            return Err(Error::internal(format!("{} logits of {}", logits.len(), head.vocabulary)));
        }
        let x = Rows { values: &x[row * head.width..][..head.width], stride: head.width };
        let product = Linear::new(1, x, head.weight());
        decode(self.threads.team(), product, RowsMut { values: &mut *logits, stride: head.vocabulary });
        head.cap(logits);
        Ok(())
    }
}
