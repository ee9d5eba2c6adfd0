//! A group of linears with adapters, row by row (Hu et al. 2021).

use super::{dot, product};
use crate::backend::Dropout;
use crate::backend::PlacedAdapter;
use crate::backend::dropout::keep;
use crate::batch::Batch;

/// Weights and adapters of a group, in any type that becomes float64.
#[derive(Clone, Copy)]
pub struct Linear<'a, W, P> {
    /// `[O, I]`.
    pub weight: &'a [W],
    /// `I`.
    pub in_features: usize,
    /// `[O]`.
    pub bias: Option<&'a [W]>,
    /// Their places.
    pub adapters: &'a [PlacedAdapter],
    /// The flat buffer.
    pub parameters: &'a [P],
}

impl<W: Copy + Into<f64>, P: Copy + Into<f64>> Linear<'_, W, P> {
    fn a(&self, adapter: &PlacedAdapter) -> &[P] {
        &self.parameters[adapter.slot.a_offset..][..adapter.slot.rank * self.in_features]
    }

    fn b(&self, adapter: &PlacedAdapter) -> &[P] {
        &self.parameters[adapter.slot.b_offset..][..adapter.slot.rank * adapter.out_features]
    }

    /// `s = x̃ · Aᵀ`, the adapters' columns in turn.
    pub fn s_row(&self, dropped_x: &[f64]) -> Vec<f64> {
        let rows = self.adapters.iter().flat_map(|adapter| self.a(adapter).chunks(self.in_features));
        rows.map(|a| dot(dropped_x, a)).collect()
    }

    /// `y = bias + x · Wᵀ + scale · s · Bᵀ`.
    pub fn y_row(&self, x: &[f64], s: &[f64]) -> Vec<f64> {
        let mut y: Vec<f64> = self.weight.chunks(self.in_features).map(|w| dot(x, w)).collect();
        for adapter in self.adapters {
            let (rank, scale) = (adapter.slot.rank, f64::from(adapter.slot.scale));
            let inner = &s[adapter.rank_column..][..rank];
            let columns = &mut y[adapter.out_column..][..adapter.out_features];
            columns
                .iter_mut()
                .zip(self.b(adapter).chunks(rank))
                .for_each(|(y, b)| *y += scale * dot(inner, b));
        }
        if let Some(bias) = self.bias {
            y.iter_mut().zip(bias).for_each(|(y, &bias)| *y += bias.into());
        }
        y
    }

    /// `ds = scale · dy · B`.
    pub fn ds_row(&self, dy: &[f64]) -> Vec<f64> {
        let adapters = self.adapters.iter();
        adapters
            .flat_map(|adapter| {
                let scale = f64::from(adapter.slot.scale);
                let dy = &dy[adapter.out_column..][..adapter.out_features];
                let ds = product(dy, self.b(adapter), adapter.slot.rank);
                ds.into_iter().map(move |ds| scale * ds)
            })
            .collect()
    }

    /// `dx = dy · W + factors ∘ (ds · A)`, the factors being those of dropout.
    pub fn dx_row(&self, dy: &[f64], ds: &[f64], factors: &[f64]) -> Vec<f64> {
        let mut dx = product(dy, self.weight, self.in_features);
        for adapter in self.adapters {
            let ds = &ds[adapter.rank_column..][..adapter.slot.rank];
            let through = product(ds, self.a(adapter), self.in_features);
            dx.iter_mut()
                .zip(through)
                .zip(factors)
                .for_each(|((dx, through), factor)| *dx += factor * through);
        }
        dx
    }
}

/// What dropout multiplies row `row` of a group's input `[T, width]` by: 0 or `1/(1-p)`; 1 without dropout.
pub fn dropout_factors(
    batch: &Batch,
    dropout: Option<Dropout>,
    input_index: u32,
    row: usize,
    width: usize,
) -> Vec<f64> {
    let Some(dropout) = dropout else { return vec![1.0; width] };
    let sample = batch.sample_starts.partition_point(|&start| start <= row) - 1;
    let position = row - batch.sample_starts[sample];
    let kept = |feature| keep(dropout, batch.sample_ids[sample], position, input_index, feature);
    let factor = 1.0 / (1.0 - f64::from(dropout.probability));
    (0..width).map(|feature| if kept(feature) { factor } else { 0.0 }).collect()
}
