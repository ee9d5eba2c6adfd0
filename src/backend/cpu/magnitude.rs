//! Adapters with magnitudes (DoRA, Liu et al. 2024): `y = residual + bias + x·Wᵀ + g∘v − x̃·Wᵀ` with `v = x̃·Vᵀ`,
//! `V = W + scale·B·A`, `x̃ = dropout(x)` and `g = m/‖V‖` for each row of `V`. As in PEFT and in the paper (§4.3) the norms are
//! constants of the backward: `dm = Σ_t dy·v/‖V‖`, and what `V` sees is `g∘dy`.
//!
//! `V` never exists: `‖V‖² = ‖W‖² + 2·scale·B·(A·Wᵀ) + scale²·B·(A·Aᵀ)·Bᵀ`, row by row, once for each update of the adapters.

use std::sync::Mutex;

use rayon::prelude::*;

use super::linear::a_range;
use super::matmul::{Linear, Rows, RowsMut, Start, Weight, linear};
use super::memory::{AlignedFloats, DisjointParts};
use super::simd::simd_fn;
use super::{CpuBackend, lock};
use crate::backend::{LinearGroup, PlacedAdapter, Projection, placed_adapters};
use crate::error::{Error, Result};

/// Columns of a task of the magnitudes' gradients.
const TASK_COLUMNS: usize = 64;

/// What a group keeps for its adapters.
pub struct CpuGroup {
    /// None without magnitudes.
    norms: Option<Mutex<RowNorms>>,
}

/// Norms of the rows of `W + scale·B·A`.
#[derive(Default)]
struct RowNorms {
    /// `‖W‖² [O]`; empty until it is asked for.
    squares: Vec<f64>,
    /// `‖V‖ [O]`, of the adapters as they were when it was last asked for.
    norms: Vec<f32>,
    /// `A·Wᵀ [R, O]`, then `A·Aᵀ [R, R]`.
    products: AlignedFloats,
}

impl CpuGroup {
    pub(super) fn new(projections: &[Projection]) -> Self {
        let has_magnitudes =
            placed_adapters(projections).any(|adapter| adapter.slot.magnitude_offset.is_some());
        Self { norms: has_magnitudes.then(Mutex::default) }
    }

    /// Whether its outputs have magnitudes.
    pub(super) fn has_magnitudes(&self) -> bool {
        self.norms.is_some()
    }
}

impl CpuBackend {
    /// Computes the norms for `adapters` as they are now.
    pub(super) fn renew_norms(&self, group: &LinearGroup<Self>, adapters: &[f32]) -> Result<()> {
        let Some(norms) = &group.prepared.norms else { return Ok(()) };
        let a = &adapters[a_range(group)?];
        let RowNorms { squares, norms, products } = &mut *lock(norms);
        let (width, outputs, rank) = (group.in_features, group.out_features(), group.total_rank());
        if squares.is_empty() {
            squares.resize(outputs, 0.0);
            let row_square = |(row, square): (usize, &mut f64)| {
                let mut values = vec![0.0; width];
                group.weight.read_row(row, &mut values);
                *square = values.iter().map(|&value| f64::from(value) * f64::from(value)).sum();
            };
            self.threads.pool().install(|| squares.par_iter_mut().enumerate().for_each(row_square));
            norms.resize(outputs, 0.0);
        }
        let (with_weight, gram) = products.at_least(rank * (outputs + rank)).split_at_mut(rank * outputs);
        let a_rows = Rows { values: a, stride: width };
        self.threads.pool().install(|| {
            let product = Linear::new(rank, a_rows, group.weight.weight());
            linear(product, RowsMut { values: &mut *with_weight, stride: outputs });
            let product = Linear::new(rank, a_rows, Weight::f32(width, a));
            linear(product, RowsMut { values: &mut *gram, stride: rank });
        });
        for PlacedAdapter { slot, out_column, out_features, rank_column } in group.adapters() {
            let b = &adapters[slot.b_offset..][..out_features * slot.rank];
            let scale = f64::from(slot.scale);
            let rows = norms[out_column..][..out_features].par_iter_mut().enumerate();
            let row_norm = |(row, norm): (usize, &mut f32)| {
                let b = &b[row * slot.rank..][..slot.rank];
                let (mut along, mut square) = (0.0, 0.0);
                for (r, &b_r) in b.iter().enumerate() {
                    let b_r = f64::from(b_r);
                    let place = rank_column + r;
                    along += b_r * f64::from(with_weight[place * outputs + out_column + row]);
                    let of_r = &gram[place * rank + rank_column..][..slot.rank];
                    let sum: f64 = b.iter().zip(of_r).map(|(&b, &g)| f64::from(b) * f64::from(g)).sum();
                    square += b_r * sum;
                }
                // Rounding may leave less than nothing of a row that the adapter takes away.
                let whole = squares[out_column + row] + 2.0 * scale * along + scale * scale * square;
                *norm = whole.max(0.0).sqrt() as f32;
            };
            self.threads.pool().install(|| rows.for_each(row_norm));
        }
        Ok(())
    }

    /// `g [O]`: 1 where there is no magnitude, and for a row of zeros, whose output is 0 anyway.
    pub(super) fn gains(
        &self,
        group: &LinearGroup<Self>,
        adapters: &[f32],
        gains: &mut Vec<f32>,
    ) -> Result<()> {
        gains.clear();
        gains.resize(group.out_features(), 1.0);
        let known = group.prepared.norms.as_ref().map(lock);
        let norms = known.as_ref().map_or(&[][..], |known| &known.norms);
        for PlacedAdapter { slot, out_column, out_features, .. } in group.adapters() {
            let Some(offset) = slot.magnitude_offset else { continue };
            if norms.is_empty() {
                return Err(Error::internal("adapters with magnitudes were not prepared"));
            }
            let magnitudes = &adapters[offset..][..out_features];
            let gains = gains[out_column..].iter_mut().zip(&norms[out_column..]);
            for ((gain, &norm), magnitude) in gains.zip(magnitudes) {
                *gain = if norm > 0.0 { magnitude / norm } else { 1.0 };
            }
        }
        Ok(())
    }

    /// Adds `dm = Σ_t dy·v/‖V‖` of every adapter to `gradients`.
    pub(super) fn magnitude_gradients(
        &self,
        group: &LinearGroup<Self>,
        rows: usize,
        dy: &[f32],
        v: &[f32],
        gradients: &mut [f32],
    ) {
        let Some(known) = &group.prepared.norms else { return };
        let (norms, outputs) = (&lock(known).norms, group.out_features());
        let gradients = DisjointParts::new(gradients);
        for PlacedAdapter { slot, out_column, out_features, .. } in group.adapters() {
            let Some(offset) = slot.magnitude_offset else { continue };
            self.threads.for_each(out_features.div_ceil(TASK_COLUMNS), |task| {
                let first = task * TASK_COLUMNS;
                let columns = TASK_COLUMNS.min(out_features - first);
                let mut sums = [0.0f64; TASK_COLUMNS];
                for row in 0..rows {
                    let place = row * outputs + out_column + first;
                    let pairs = dy[place..][..columns].iter().zip(&v[place..][..columns]);
                    for (sum, (&dy, &v)) in sums.iter_mut().zip(pairs) {
                        *sum += f64::from(dy) * f64::from(v);
                    }
                }
                // SAFETY: one part for each adapter and task.
                let gradient = unsafe { gradients.part(offset + first..offset + first + columns) };
                let norms = &norms[out_column + first..];
                for ((gradient, sum), &norm) in gradient.iter_mut().zip(sums).zip(norms) {
                    if norm > 0.0 {
                        *gradient += (sum / f64::from(norm)) as f32;
                    }
                }
            });
        }
    }

    /// `to = start + bias + gains∘v`, rows of the width of `gains` without gaps.
    pub(super) fn add_gained(
        &self,
        start: Start<'_>,
        bias: Option<&[f32]>,
        gains: &[f32],
        v: &[f32],
        to: &mut [f32],
    ) {
        let width = gains.len();
        self.threads.for_row_blocks(to, width, |first, to| {
            let part = first * width..first * width + to.len();
            match start {
                Start::Zero => to.fill(0.0),
                Start::Output => {}
                Start::Residual(rows) => to.copy_from_slice(&rows.values[part.clone()]),
            }
            for (v, to) in v[part].chunks_exact(width).zip(to.chunks_exact_mut(width)) {
                add_row(self.simd, gains, v, to);
                if let Some(bias) = bias {
                    to.iter_mut().zip(bias).for_each(|(to, bias)| *to += bias);
                }
            }
        });
    }
}

simd_fn! {
    /// `to += gains∘v`.
    fn add_row<V>(simd: Simd, gains: &[f32], v: &[f32], to: &mut [f32]) -> () {
        for ((gains, v), to) in gains.chunks(V::LANES).zip(v.chunks(V::LANES)).zip(to.chunks_mut(V::LANES)) {
            V::from_slice(gains).mul_add(V::from_slice(v), V::from_slice(to)).to_slice(to);
        }
    }
}
