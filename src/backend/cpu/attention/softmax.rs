//! Row-wise steps of the running softmax and of its gradient.

use std::ops::Range;

use super::super::simd::{exp, simd_fn, tanh};

/// Running state of one query's softmax: the greatest score so far and the sum of `e^(score - greatest)`.
#[derive(Clone, Copy)]
pub(super) struct Running {
    pub greatest: f32,
    pub sum: f32,
}

impl Running {
    /// Before any key.
    pub const EMPTY: Self = Self { greatest: f32::NEG_INFINITY, sum: 0.0 };

    /// `ln Σ e^score`.
    pub fn log_sum(self) -> f32 {
        self.greatest + self.sum.ln()
    }
}

simd_fn! {
    /// Caps scores: `cap·tanh(scale·score / cap)`, to be read with a scale of 1.
    pub(super) fn cap_scores<V>(simd: Simd, scores: &mut [f32], scale: f32, cap: f32) -> () {
        let (inner, cap) = (V::splat(scale / cap), V::splat(cap));
        for chunk in scores.chunks_mut(V::LANES) {
            (tanh(V::from_slice(chunk) * inner) * cap).to_slice(chunk);
        }
    }
}

simd_fn! {
    /// Replaces the scores at `visible` by `e^(scale·score - greatest)` and the others by zero; returns the running state
    /// with them, and the factor on what was summed before.
    pub(super) fn absorb<V>(
        simd: Simd, scores: &mut [f32], visible: Range<usize>, scale: f32, running: Running,
    ) -> (Running, f32) {
        scores[..visible.start].fill(0.0);
        scores[visible.end..].fill(0.0);
        let scores = &mut scores[visible];
        if scores.is_empty() {
            return (running, 1.0);
        }
        let (whole, rest) = scores.split_at(scores.len() - scores.len() % V::LANES);
        let mut greatest = V::splat(f32::NEG_INFINITY);
        for chunk in whole.chunks_exact(V::LANES) {
            greatest = greatest.max(V::from_slice(chunk));
        }
        let greatest = rest.iter().fold(greatest.max_lane(), |greatest, &score| greatest.max(score));
        let greatest = running.greatest.max(greatest * scale);
        let mut sum = V::splat(0.0);
        let (whole, rest) = scores.split_at_mut(scores.len() - scores.len() % V::LANES);
        let shift = V::splat(-greatest);
        for chunk in whole.chunks_exact_mut(V::LANES) {
            let weight = exp(V::from_slice(chunk).mul_add(V::splat(scale), shift));
            weight.to_slice(chunk);
            sum = sum + weight;
        }
        if !rest.is_empty() {
            exp(V::from_slice(rest).mul_add(V::splat(scale), shift)).to_slice(rest);
            // Lanes past the row count as zero again once they are read back.
            sum = sum + V::from_slice(rest);
        }
        let factor = (running.greatest - greatest).exp();
        (Running { greatest, sum: running.sum * factor + sum.sum() }, factor)
    }
}

simd_fn! {
    /// `x *= factor`.
    pub(super) fn scale_row<V>(simd: Simd, factor: f32, x: &mut [f32]) -> () {
        for chunk in x.chunks_mut(V::LANES) {
            (V::from_slice(chunk) * V::splat(factor)).to_slice(chunk);
        }
    }
}

simd_fn! {
    /// `to = factor · x`.
    pub(super) fn scaled_copy<V>(simd: Simd, factor: f32, x: &[f32], to: &mut [f32]) -> () {
        for (x, to) in x.chunks(V::LANES).zip(to.chunks_mut(V::LANES)) {
            (V::from_slice(x) * V::splat(factor)).to_slice(to);
        }
    }
}

simd_fn! {
    /// `Σ a·b`.
    pub(super) fn dot<V>(simd: Simd, a: &[f32], b: &[f32]) -> f32 {
        let mut sum = V::splat(0.0);
        for (a, b) in a.chunks(V::LANES).zip(b.chunks(V::LANES)) {
            sum = V::from_slice(a).mul_add(V::from_slice(b), sum);
        }
        sum.sum()
    }
}

simd_fn! {
    /// One query's row of the backward: replaces scores by probabilities `P = e^(z - log_sum)`, `z = scale·score` or
    /// `cap·tanh(scale·score / cap)`, and their gradients `dP` by those of the scores, `dz/dscore · P · (dP - delta)`; both
    /// zero outside `visible`.
    pub(super) fn score_gradients<V>(
        simd: Simd, scores: &mut [f32], gradients: &mut [f32], visible: Range<usize>, scale: f32, cap: Option<f32>,
        log_sum: f32, delta: f32,
    ) -> () {
        for row in [&mut *scores, &mut *gradients] {
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
        }
        let (shift, delta, scale) = (V::splat(-log_sum), V::splat(delta), V::splat(scale));
        let columns = scores[visible.clone()].chunks_mut(V::LANES).zip(gradients[visible].chunks_mut(V::LANES));
        match cap {
            None => for (score, gradient) in columns {
                let probability = exp(V::from_slice(score).mul_add(scale, shift));
                probability.to_slice(score);
                (probability * (V::from_slice(gradient) - delta) * scale).to_slice(gradient);
            },
            Some(cap) => {
                let (cap, inner) = (V::splat(cap), scale / V::splat(cap));
                for (score, gradient) in columns {
                    let tanh = tanh(V::from_slice(score) * inner);
                    let slope = (V::splat(0.0) - tanh * tanh).mul_add(scale, scale);
                    let probability = exp(tanh.mul_add(cap, shift));
                    probability.to_slice(score);
                    (probability * (V::from_slice(gradient) - delta) * slope).to_slice(gradient);
                }
            }
        }
    }
}
