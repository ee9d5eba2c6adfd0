//! Root-mean-square norm `y = x · rstd · w`, `rstd = 1/√(mean(x²) + ε)`, `w` being the weight with its offset, and its
//! gradient `dx = rstd · (dy·w − x · rstd² · mean(dy·w·x))` (Zhang & Sennrich 2019). Sums in f32, one lane of the vector each.

use super::CpuBackend;
use super::simd::{Simd, Vector, simd_fn};
use crate::backend::{RmsNorm, Weight};
use crate::error::Result;

#[inline(always)]
fn reciprocal_deviation<V: Vector>(x: &[f32], epsilon: f32) -> f32 {
    let mut squares = V::splat(0.0);
    for chunk in x.chunks(V::LANES) {
        let x = V::from_slice(chunk);
        squares = x.mul_add(x, squares);
    }
    1.0 / (squares.sum() / x.len() as f32 + epsilon).sqrt()
}

simd_fn! {
    /// The norm of each row of `x`, of the width of `weight`.
    fn norm_rows<V>(
        simd: Simd, weight: &[f32], offset: f32, epsilon: f32, x: &[f32], y: &mut [f32],
    ) -> () {
        let (width, offset) = (weight.len(), V::splat(offset));
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let rstd = V::splat(reciprocal_deviation::<V>(x, epsilon));
            let columns = x.chunks(V::LANES).zip(weight.chunks(V::LANES)).zip(y.chunks_mut(V::LANES));
            for ((x, weight), y) in columns {
                (V::from_slice(x) * rstd * (offset + V::from_slice(weight))).to_slice(y);
            }
        }
    }
}

simd_fn! {
    /// Adds to each row of `dx` the gradient through the norm of the row of `x`.
    fn norm_rows_backward<V>(
        simd: Simd, weight: &[f32], offset: f32, epsilon: f32, x: &[f32], dy: &[f32], dx: &mut [f32],
    ) -> () {
        let (width, offset) = (weight.len(), V::splat(offset));
        let rows = x.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, dy), dx) in rows {
            let rstd = reciprocal_deviation::<V>(x, epsilon);
            let mut projection = V::splat(0.0);
            let columns = x.chunks(V::LANES).zip(dy.chunks(V::LANES)).zip(weight.chunks(V::LANES));
            for ((x, dy), weight) in columns.clone() {
                let through_weight = V::from_slice(dy) * (offset + V::from_slice(weight));
                projection = through_weight.mul_add(V::from_slice(x), projection);
            }
            let along_x = V::splat(-rstd * rstd * rstd * (projection.sum() / width as f32));
            let rstd = V::splat(rstd);
            for (((x, dy), weight), dx) in columns.zip(dx.chunks_mut(V::LANES)) {
                let through_weight = V::from_slice(dy) * (offset + V::from_slice(weight));
                let gradient = through_weight.mul_add(rstd, V::from_slice(x) * along_x);
                (V::from_slice(dx) + gradient).to_slice(dx);
            }
        }
    }
}

simd_fn! {
    /// `to += x`.
    pub(super) fn add_row<V>(simd: Simd, x: &[f32], to: &mut [f32]) -> () {
        for (x, to) in x.chunks(V::LANES).zip(to.chunks_mut(V::LANES)) {
            (V::from_slice(to) + V::from_slice(x)).to_slice(to);
        }
    }
}

impl RmsNorm<'_, CpuBackend> {
    /// `y`, the norm of each row of `x`.
    pub(super) fn rows(&self, simd: Simd, x: &[f32], y: &mut [f32]) {
        norm_rows(simd, self.weight(), self.weight_offset, self.epsilon, x, y);
    }

    /// Adds to each row of `dx` the gradient through the norm of the row of `x`.
    pub(super) fn rows_backward(&self, simd: Simd, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        norm_rows_backward(simd, self.weight(), self.weight_offset, self.epsilon, x, dy, dx);
    }
}

simd_fn! {
    /// Adds each row's `dy·x·rstd` to `sums`.
    fn add_weight_gradient<V>(simd: Simd, epsilon: f32, x: &[f32], dy: &[f32], sums: &mut [f32]) -> () {
        let width = sums.len();
        for (x, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
            let rstd = V::splat(reciprocal_deviation::<V>(x, epsilon));
            for ((x, dy), sum) in x.chunks(V::LANES).zip(dy.chunks(V::LANES)).zip(sums.chunks_mut(V::LANES)) {
                (V::from_slice(dy) * rstd).mul_add(V::from_slice(x), V::from_slice(sum)).to_slice(sum);
            }
        }
    }
}

/// Rows of a gradient that are summed in one go.
const SUMMED_ROWS: usize = 128;

impl RmsNorm<'_, CpuBackend> {
    /// The weight `[width]`.
    fn weight(&self) -> &[f32] {
        match self.weight {
            Weight::Frozen(weight) => &weight[..self.width],
            Weight::Trained { parameters, offset } => &parameters[offset..][..self.width],
        }
    }
}

impl CpuBackend {
    pub(super) fn norm_forward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &[f32],
        residual: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let width = norm.width;
        self.threads.for_row_blocks(&mut y[..rows * width], width, |first, y| {
            let part = first * width..first * width + y.len();
            norm.rows(self.simd, &x[part.clone()], y);
            if let Some(residual) = residual {
                add_row(self.simd, &residual[part], y);
            }
        });
    }

    pub(super) fn norm_backward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
    ) {
        let width = norm.width;
        self.threads.for_row_blocks(&mut dx[..rows * width], width, |first, dx| {
            let part = first * width..first * width + dx.len();
            norm.rows_backward(self.simd, &x[part.clone()], &dy[part], dx);
        });
    }

    /// On one thread: it reads two activations, where a block's forward and backward read dozens.
    pub(super) fn norm_weight_gradient(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &[f32],
        dy: &[f32],
        gradients: &mut [f32],
    ) -> Result<()> {
        let RmsNorm { epsilon, width, .. } = norm;
        let gradient = &mut gradients[norm.weight.trained_offset()?..][..width];
        let mut scratch = self.threads.scratch();
        let sums = scratch.at_least(width);
        let blocks = x[..rows * width].chunks(SUMMED_ROWS * width).zip(dy.chunks(SUMMED_ROWS * width));
        for (x, dy) in blocks {
            sums.fill(0.0);
            add_weight_gradient(self.simd, epsilon, x, &dy[..x.len()], sums);
            gradient.iter_mut().zip(&*sums).for_each(|(gradient, sum)| *gradient += sum);
        }
        Ok(())
    }
}
