//! Linear groups with low-rank adapters: `y = residual + bias + x·Wᵀ + scale·s·Bᵀ`, `s = dropout(x)·Aᵀ`
//! (Hu et al. 2021), and their gradients `ds = scale·dy·B`, `dB = scale·dyᵀ·s`, `dA = dsᵀ·dropout(x)`,
//! `dx = dy·W + dropout'(ds·A)`.

use std::array;
use std::ops::Range;

use super::CpuBackend;
use super::adapter::AdapterProducts;
use super::matmul::{
    Linear, LinearBackward, LowRank, LowRankBlock, MAX_DECODE_ROWS, MAX_PARTS, Rows, RowsMut, Start, Weight,
    decode, linear, linear_backward,
};
use super::memory::AlignedFloats;
use super::rows::{Place, places};
use super::simd::simd_fn;
use crate::backend::dropout::{self, FEATURES_PER_CALL};
use crate::backend::{Dropout, LinearGroup, LinearInput};
use crate::error::{Error, Result};

/// Scratch of the linear groups; grows to the largest shape.
#[derive(Default)]
pub(super) struct LinearScratch {
    /// `dropout(x) [T, I]`.
    dropped: AlignedFloats,
    /// `ds [T, R]`.
    ds: AlignedFloats,
    /// `Aᵀ [I, R]`.
    transposed: AlignedFloats,
    /// `dropout'(ds·A) [T, I]`; with magnitudes, in the forward, `x − dropout(x)`.
    low_rank_dx: AlignedFloats,
    /// `g∘dy [T, O]`.
    gained: AlignedFloats,
    /// `g [O]`.
    gains: Vec<f32>,
}

/// `A [R, I]` of all adapters of a group in the flat buffer.
pub(super) fn a_range(group: &LinearGroup<CpuBackend>) -> Result<Range<usize>> {
    let (mut start, mut end) = (None, 0);
    for adapter in group.adapters() {
        let offset = adapter.slot.a_offset;
        if start.is_some() && offset != end {
            let error =
                format!("A matrices of input {} are apart: {offset}, expected {end}", group.input_index);
            return Err(Error::internal(error));
        }
        start = start.or(Some(offset));
        end = offset + adapter.slot.rank * group.in_features;
    }
    Ok(start.unwrap_or(0)..end)
}

fn dense(values: &[f32], stride: usize) -> Rows<'_> {
    Rows { values, stride }
}

/// The low-rank terms of a group's forward.
fn low_rank_blocks<'a>(
    group: &LinearGroup<CpuBackend>,
    adapters: &'a [f32],
) -> Result<([LowRankBlock<'a>; MAX_PARTS], usize)> {
    if group.projections.len() > MAX_PARTS {
        return Err(Error::internal(format!("a group of {} projections", group.projections.len())));
    }
    let mut blocks: [LowRankBlock<'_>; MAX_PARTS] =
        array::from_fn(|_| LowRankBlock { factor: &[], scale: 0.0, columns: 0..0, ranks: 0..0 });
    let mut count = 0;
    for adapter in group.adapters() {
        let slot = adapter.slot;
        blocks[count] = LowRankBlock {
            factor: &adapters[slot.b_offset..][..adapter.out_features * slot.rank],
            scale: slot.scale,
            columns: adapter.out_column..adapter.out_column + adapter.out_features,
            ranks: adapter.rank_column..adapter.rank_column + slot.rank,
        };
        count += 1;
    }
    Ok((blocks, count))
}

impl CpuBackend {
    pub(super) fn linear_forward(
        &self,
        group: &LinearGroup<Self>,
        adapters: &[f32],
        input: LinearInput<'_, Self>,
        residual: Option<&[f32]>,
        s: &mut [f32],
        y: &mut [f32],
    ) -> Result<()> {
        let (width, out_width, rank) = (group.in_features, group.out_features(), group.total_rank());
        let (blocks, count) = low_rank_blocks(group, adapters)?;
        let a = a_range(group)?;
        let rows = input.rows;
        let mut scratch = self.linear_scratch();
        let LinearScratch { dropped, transposed, low_rank_dx: rest, gains, .. } = &mut *scratch;
        let mut seen = &input.x[..];
        let (s, v) = s.split_at_mut(if rank > 0 { rows * rank } else { 0 });
        if let Some(products) = self.adapter_products(group, rows) {
            let x = self.adapter_input(group, &input, dropped);
            seen = x;
            let a = &adapters[a];
            if rows <= MAX_DECODE_ROWS {
                let product = Linear::new(rows, dense(x, width), Weight::f32(width, a));
                decode(self.threads.team(), product, RowsMut { values: &mut *s, stride: rank });
            } else {
                products.down(x, a, transposed, s);
            }
        }
        let low_rank = (rank > 0).then(|| LowRank { s: dense(s, rank), blocks: &blocks[..count] });
        let bias = group.bias.as_ref().map(|bias| &bias[..out_width]);
        let start = residual.map_or(Start::Zero, |residual| Start::Residual(dense(residual, out_width)));
        let frozen = Linear::new(rows, dense(input.x, width), group.weight.weight());
        if !group.prepared.has_magnitudes() {
            self.multiply(
                Linear { bias, start, low_rank, ..frozen },
                RowsMut { values: y, stride: out_width },
            );
            return Ok(());
        }
        self.gains(group, adapters, gains)?;
        let v = &mut v[..rows * out_width];
        let of_seen = Linear::new(rows, dense(seen, width), group.weight.weight());
        self.multiply(Linear { low_rank, ..of_seen }, RowsMut { values: &mut *v, stride: out_width });
        let y = &mut y[..rows * out_width];
        if input.batch.settings.dropout.is_none() {
            self.add_gained(start, bias, gains, v, y);
            return Ok(());
        }
        let rest = rest.at_least(rows * width);
        self.threads.for_row_blocks(rest, width, |first, rest| {
            let part = first * width..first * width + rest.len();
            let pairs = input.x[part.clone()].iter().zip(&seen[part]);
            rest.iter_mut().zip(pairs).for_each(|(rest, (x, seen))| *rest = x - seen);
        });
        let frozen = Linear::new(rows, dense(rest, width), group.weight.weight());
        self.multiply(Linear { bias, start, ..frozen }, RowsMut { values: &mut *y, stride: out_width });
        self.add_gained(Start::Output, None, gains, v, y);
        Ok(())
    }

    /// Few rows stream the weight, more are blocked.
    fn multiply(&self, product: Linear<'_>, y: RowsMut<'_>) {
        if product.rows <= MAX_DECODE_ROWS {
            decode(self.threads.team(), product, y);
        } else {
            self.threads.pool().install(|| linear(product, y));
        }
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn linear_gradient(
        &self,
        group: &LinearGroup<Self>,
        adapters: &[f32],
        input: LinearInput<'_, Self>,
        s: &[f32],
        dy: &[f32],
        gradients: &mut [f32],
        dx: Option<&mut [f32]>,
    ) -> Result<()> {
        let (width, out_width, rank) = (group.in_features, group.out_features(), group.total_rank());
        let a = a_range(group)?;
        let rows = input.rows;
        let mut scratch = self.linear_scratch();
        let LinearScratch { dropped, ds, low_rank_dx, gained, gains, .. } = &mut *scratch;
        let ds = ds.at_least(rows * rank);
        let pool = self.threads.pool();
        let has_magnitudes = group.prepared.has_magnitudes();
        let gained = gained.at_least(if has_magnitudes { rows * out_width } else { 0 });
        if has_magnitudes {
            self.magnitude_gradients(group, rows, dy, &s[rows * rank..], gradients);
            self.gains(group, adapters, gains)?;
            self.add_gained(Start::Zero, None, gains, dy, gained);
        }
        if let Some(products) = self.adapter_products(group, rows) {
            let dy = if has_magnitudes { &*gained } else { dy };
            products.down_gradient(dy, adapters, ds);
            products.b_gradients(dy, s, gradients);
            let x = self.adapter_input(group, &input, dropped);
            products.a_gradient(x, ds, &mut gradients[a.clone()]);
        }
        let Some(dx) = dx else { return Ok(()) };
        let dx = RowsMut { values: dx, stride: width };
        let weight = || group.weight.weight();
        let frozen = LinearBackward::new(rows, dense(dy, out_width), weight());
        let a = &adapters[a];
        let block = LowRankBlock { factor: a, scale: 1.0, columns: 0..width, ranks: 0..rank };
        let blocks = [block];
        let low_rank = (rank > 0).then_some(LowRank { s: dense(ds, rank), blocks: &blocks });
        match input.batch.settings.dropout {
            Some(dropout) if rank > 0 => {
                let through = low_rank_dx.at_least(rows * width);
                if has_magnitudes {
                    gained.iter_mut().zip(dy).for_each(|(gained, dy)| *gained -= dy);
                    let seen = LinearBackward::new(rows, dense(gained, out_width), weight());
                    let through = RowsMut { values: &mut *through, stride: width };
                    pool.install(|| linear_backward(LinearBackward { low_rank, ..seen }, through));
                } else {
                    let product = LinearBackward::new(rows, dense(ds, rank), Weight::f32(width, a));
                    pool.install(|| {
                        linear_backward(product, RowsMut { values: &mut *through, stride: width });
                    });
                }
                self.drop_features(dropout, group, &input, None, through);
                let start = Start::Residual(dense(through, width));
                pool.install(|| linear_backward(LinearBackward { start, ..frozen }, dx));
            }
            _ if has_magnitudes => {
                let gained = LinearBackward::new(rows, dense(gained, out_width), weight());
                pool.install(|| linear_backward(LinearBackward { low_rank, ..gained }, dx));
            }
            _ => pool.install(|| linear_backward(LinearBackward { low_rank, ..frozen }, dx)),
        }
        Ok(())
    }

    /// The products of a group's adapters; none without adapters or rows.
    fn adapter_products<'a>(
        &'a self,
        group: &'a LinearGroup<Self>,
        rows: usize,
    ) -> Option<AdapterProducts<'a>> {
        let rank = group.total_rank();
        let products = AdapterProducts { threads: &self.threads, simd: self.simd, group, rows, rank };
        (rank > 0 && rows > 0).then_some(products)
    }

    /// What the adapters read: `x`, or its copy with dropped features.
    fn adapter_input<'a>(
        &self,
        group: &LinearGroup<Self>,
        input: &LinearInput<'a, Self>,
        dropped: &'a mut AlignedFloats,
    ) -> &'a [f32] {
        let elements = input.rows * group.in_features;
        match input.batch.settings.dropout {
            None => &input.x[..elements],
            Some(dropout) => {
                let dropped = dropped.at_least(elements);
                self.drop_features(dropout, group, input, Some(&input.x[..elements]), dropped);
                dropped
            }
        }
    }

    /// Writes `from` (or what `to` holds) times the mask and `1/(1-p)`.
    fn drop_features(
        &self,
        dropout: Dropout,
        group: &LinearGroup<Self>,
        input: &LinearInput<'_, Self>,
        from: Option<&[f32]>,
        to: &mut [f32],
    ) {
        let width = group.in_features;
        self.threads.for_row_blocks(to, width, |first, to| {
            if let Some(from) = from {
                to.copy_from_slice(&from[first * width..][..to.len()]);
            }
            for (row, place) in to.chunks_exact_mut(width).zip(places(input.batch, first)) {
                drop_row(self.simd, dropout, place, group.input_index, row);
            }
        });
    }
}

/// Calls of the generator that run side by side.
const CALLS: usize = 16;

simd_fn! {
    /// Zeroes the dropped features of a row and scales the others by `1/(1-p)`.
    fn drop_row<V>(simd: Simd, dropout: Dropout, place: Place, input_index: u32, row: &mut [f32]) -> () {
        let Ok(threshold) = u32::try_from(dropout::threshold(dropout.probability)) else {
            return row.fill(0.0);
        };
        let factor = 1.0 / (1.0 - dropout.probability);
        for (number, values) in row.chunks_mut(CALLS * FEATURES_PER_CALL).enumerate() {
            let words =
                dropout::words::<CALLS>(dropout, place.sample, place.position, input_index, number * CALLS);
            let mut factors = [0.0; CALLS * FEATURES_PER_CALL];
            for (feature, slot) in factors.iter_mut().enumerate() {
                let word = words[feature % FEATURES_PER_CALL][feature / FEATURES_PER_CALL];
                *slot = if word >= threshold { factor } else { 0.0 };
            }
            for (value, factor) in values.iter_mut().zip(factors) {
                // Not a product with zero: what is dropped is zero even where it was not finite.
                *value = if factor == 0.0 { 0.0 } else { *value * factor };
            }
        }
    }
}
