//! Linears that run as one, and their adapters' places.

use super::{Backend, LinearShape};
use crate::error::Result;

/// One adapter inside the flat parameter buffer: `A [rank, I]` at `a_offset`, `B [O, rank]` at `b_offset`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSlot {
    /// Inner width of the adapter.
    pub rank: usize,
    /// α/r, or α/√r with rsLoRA (Hu et al. 2021, §4.1; Kalajdzievski 2023).
    pub scale: f32,
    /// First element of `A` in the flat buffer.
    pub a_offset: usize,
    /// First element of `B` in the flat buffer.
    pub b_offset: usize,
    /// First element of the magnitudes `m [O]` in the flat buffer, where it has any (DoRA, Liu et al. 2024): the projection is
    /// then `x·W'ᵀ` with `W' = m/‖W + scale·B·A‖ · (W + scale·B·A)`, row by row.
    pub magnitude_offset: Option<usize>,
}

/// One projection of a [`LinearGroup`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Projection {
    /// Width of its slice of the group's output.
    pub out_features: usize,
    /// Its adapter, if it is a target.
    pub lora: Option<LoraSlot>,
}

/// Linears that share their input and run as one: `q|k|v`, `gate|up`, or a single one.
///
/// The `A` matrices of a group's adapters stand one after the other in the flat parameter buffer, in the order of
/// `projections`, so that `[R, I]` is one matrix.
pub struct LinearGroup<B: Backend + ?Sized> {
    /// Numbers the group's input within the model: keys the dropout mask.
    pub input_index: u32,
    /// `[O, I]` frozen weight, the projections' rows in turn.
    pub weight: B::Matrix,
    /// `[O]` frozen bias.
    pub bias: Option<B::Vector>,
    /// `I`.
    pub in_features: usize,
    /// The projections in the order of their output columns.
    pub projections: Vec<Projection>,
    /// What the backend keeps for the adapters besides their parameters.
    pub prepared: B::Group,
}

impl<B: Backend + ?Sized> LinearGroup<B> {
    /// Widths and places of the projections' adapters.
    pub fn new(
        backend: &B,
        input_index: u32,
        weight: B::Matrix,
        bias: Option<B::Vector>,
        in_features: usize,
        projections: Vec<Projection>,
    ) -> Result<Self> {
        let prepared = backend.prepare_group(in_features, &projections)?;
        Ok(Self { input_index, weight, bias, in_features, projections, prepared })
    }

    /// `O`, the summed output widths.
    pub fn out_features(&self) -> usize {
        self.projections.iter().map(|projection| projection.out_features).sum()
    }

    /// `R`, the summed ranks of the adapters.
    pub fn total_rank(&self) -> usize {
        self.adapters().map(|adapter| adapter.slot.rank).sum()
    }

    /// What it is for [`Work`], on `rows` rows and with a weight of so many bytes.
    pub fn shape(&self, rows: usize, weight_bytes: usize) -> LinearShape {
        LinearShape {
            rows,
            inputs: self.in_features,
            outputs: self.out_features(),
            rank: self.total_rank(),
            b_elements: self.adapters().map(|adapter| adapter.slot.rank * adapter.out_features).sum(),
            weight_bytes,
            has_magnitudes: self.adapters().any(|adapter| adapter.slot.magnitude_offset.is_some()),
            frozen_products: 1,
        }
    }

    /// The adapters with the columns of `y` and of `s` that belong to each.
    pub fn adapters(&self) -> impl Iterator<Item = PlacedAdapter> + '_ {
        placed_adapters(&self.projections)
    }
}

/// The adapters of projections that share their input, with the columns of `y` and of `s` that belong to each.
pub fn placed_adapters(projections: &[Projection]) -> impl Iterator<Item = PlacedAdapter> + '_ {
    let (mut out_column, mut rank_column) = (0, 0);
    projections.iter().filter_map(move |projection| {
        let placed = projection.lora.map(|slot| PlacedAdapter {
            slot,
            out_column,
            out_features: projection.out_features,
            rank_column,
        });
        out_column += projection.out_features;
        rank_column += projection.lora.map_or(0, |slot| slot.rank);
        placed
    })
}

/// An adapter and the columns that it owns within its group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlacedAdapter {
    /// Rank, scale and place in the flat buffer.
    pub slot: LoraSlot,
    /// Its projection's first column of `y [T, O]`.
    pub out_column: usize,
    /// Its projection's width.
    pub out_features: usize,
    /// Its first column of `s [T, R]`.
    pub rank_column: usize,
}

/// What a linear group reads besides its weights.
pub struct LinearInput<'a, B: Backend + ?Sized> {
    /// `[T, I]`.
    pub x: &'a B::Buffer,
    /// `T`.
    pub rows: usize,
    /// The rows' samples and positions, which key the dropout mask, and the dropout.
    pub batch: &'a B::Batch,
}
