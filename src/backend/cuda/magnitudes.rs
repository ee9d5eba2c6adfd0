//! Groups whose adapters have magnitudes (DoRA, Liu et al. 2024): the products of every group, and magnitude.cu around them.

use super::column_sums::{COLUMN_THREADS, ColumnSums, STRETCH_COLUMNS, column_bytes, stretches_of};
use super::launch::{NULL, Shape, int};
use super::linear::{Adapters, ELEMENT_THREADS, Sizes, mask_arguments, upload};
use super::memory::{CudaBuffer, CudaFloats, FLOAT_BYTES, HALF_BYTES, Region};
use super::products::{BackwardProduct, ForwardProduct, NO_MASK};
use super::weights::WIDTH_MULTIPLE;
use super::{CudaBackend, lock};
use crate::backend::{GroupShape, LinearGroup, LinearInput, PlacedAdapter};
use crate::device::Device;
use crate::error::Result;

/// Rows of W that a block takes, columns of it at most, its threads and shared memory: as in magnitude.cu.
const NORM_ROWS: usize = 64;
const NORM_COLUMNS: usize = 512;
const NORM_THREADS: u32 = 128;
const NORM_SHARED_BYTES: usize = 32 << 10;

/// What magnitudes need on the device.
pub(super) struct Magnitudes<D: Device> {
    /// `[adapters]`: where their magnitudes are among the parameters, or −1.
    offsets: Region<D>,
    /// The same here, with the columns of the output.
    places: Vec<Place>,
    /// `‖W + scale·B·A‖ [O]` and `g [O]`: renewed whenever the adapters have changed.
    norms: CudaFloats<D>,
    gains: CudaFloats<D>,
}

/// Magnitudes of one adapter.
struct Place {
    out_column: usize,
    out_features: usize,
    offset: usize,
}

/// Bytes of the partial sums that a group's magnitudes need, for its norms and for their gradients.
pub(super) fn magnitude_bytes(group: &GroupShape, tokens: usize) -> usize {
    match group.has_magnitudes {
        true => {
            norm_bytes(group.in_features, group.out_features).max(column_bytes(tokens, group.out_features))
        }
        false => 0,
    }
}

fn norm_bytes(in_features: usize, out_features: usize) -> usize {
    in_features.div_ceil(NORM_COLUMNS) * out_features * FLOAT_BYTES
}

/// A thread for every eight of `elements`.
fn eights(elements: usize) -> Shape {
    Shape::blocks((elements / WIDTH_MULTIPLE).div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32)
}

/// The magnitudes of a group; none.
pub(super) fn magnitudes_of<D: Device>(group: &LinearGroup<CudaBackend<D>>) -> Option<&Magnitudes<D>> {
    group.prepared.adapters.as_ref()?.magnitudes.as_ref()
}

impl<D: Device> CudaBackend<D> {
    /// None where no adapter has any.
    pub(super) fn make_magnitudes(
        &self,
        placed: &[PlacedAdapter],
        out_features: usize,
    ) -> Result<Option<Magnitudes<D>>> {
        let place = |adapter: &PlacedAdapter| {
            let PlacedAdapter { slot, out_column, out_features, .. } = *adapter;
            Some(Place { out_column, out_features, offset: slot.magnitude_offset? })
        };
        let places: Vec<Place> = placed.iter().filter_map(place).collect();
        if places.is_empty() {
            return Ok(None);
        }
        let offset =
            |adapter: &PlacedAdapter| adapter.slot.magnitude_offset.map_or(-1, |offset| offset as i64);
        let offsets: Vec<i64> = placed.iter().map(offset).collect();
        let floats = || Ok(CudaFloats::new(Region::allocate(self.device(), out_features * FLOAT_BYTES)?));
        let (norms, gains) = (floats()?, floats()?);
        Ok(Some(Magnitudes { offsets: upload(self.device(), &offsets)?, places, norms, gains }))
    }

    /// Computes norms and gains for the parameters as they are now, with `B̂` packed of them.
    pub(super) fn renew_magnitudes(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        adapters: &Adapters<D>,
    ) -> Result<()> {
        let Some(magnitudes) = &adapters.magnitudes else { return Ok(()) };
        let Sizes { inputs, outputs, leading, .. } = Sizes::of(group, 0);
        let (count, stretches) = (int(adapters.shapes.len())?, inputs.div_ceil(NORM_COLUMNS));
        let [slots, ..] = adapters.tables()?;
        let mut scratch = lock(&self.scratch);
        let bytes = norm_bytes(inputs, outputs);
        let partials = scratch.partials.reserve(self.device(), bytes)?.first(bytes)?;
        let mut arguments =
            vec![group.weight.shaped(outputs, inputs)?, adapters.b_hat.first(outputs * leading)?];
        arguments.extend([self.adapter_a(group, parameters)?, slots, partials]);
        arguments.extend([int(outputs)?, int(inputs)?, count, int(leading)?]);
        let grid = [outputs.div_ceil(NORM_ROWS), stretches, 1];
        let shape = Shape { grid, threads: NORM_THREADS, shared_bytes: NORM_SHARED_BYTES };
        // SAFETY: W [O, I], B̂ [O, R̄], A [R, I]; a row of partial sums [O] for each stretch.
        unsafe { self.kernels.launch_half("magnitude_squares", shape, &arguments)? };

        let mut arguments = vec![partials, parameters.first(parameters.elements())?, slots];
        arguments.extend([magnitudes.offsets.first(adapters.shapes.len() * size_of::<i64>())?]);
        arguments.extend([magnitudes.norms.first(outputs)?, magnitudes.gains.first(outputs)?]);
        arguments.extend([int(outputs)?, count, int(stretches)?]);
        let shape = Shape::blocks(outputs.div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32);
        // SAFETY: norms and gains hold [O], and the layout places all magnitudes inside the flat buffer.
        unsafe { self.kernels.launch("magnitude_gains", shape, &arguments) }
    }

    /// The forward of a group with `magnitudes`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn magnitude_forward(
        &self,
        group: &LinearGroup<Self>,
        magnitudes: &Magnitudes<D>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        residual: Option<&CudaBuffer<D>>,
        s: &CudaBuffer<D>,
        y: &CudaBuffer<D>,
    ) -> Result<()> {
        let sizes = Sizes::of(group, input.rows);
        let Sizes { tokens, inputs, outputs, leading, .. } = sizes;
        let seen = self.adapter_down(group, parameters, &input, s)?;
        let v = s.at(tokens * leading, tokens * outputs)?;
        let whole = self.forward_product(group, tokens, input.x, residual, s, y)?;
        let of_seen = ForwardProduct { x: seen, bias: NULL, residual: NULL, y: v, ..whole };
        // SAFETY: every stretch was asked for by its shape.
        unsafe { self.kernels.linear_forward(&of_seen)? };
        let (mut bias, mut residual) = (whole.bias, whole.residual);
        if input.batch.dropout.is_some() {
            let arguments = [whole.x, seen, int(tokens)?, int(inputs)?];
            let sizes = Sizes { rank: 0, leading: 0, ..sizes };
            let rest =
                ForwardProduct { x: seen, s: NULL, b_hat: NULL, slots: NULL, adapters: 0, sizes, ..whole };
            // SAFETY: as above; what the adapters see is a copy in scratch memory, which they have read.
            unsafe {
                self.kernels.launch_half("magnitude_rest", eights(tokens * inputs), &arguments)?;
                self.kernels.linear_forward(&rest)?;
            }
            (bias, residual) = (NULL, whole.y);
        }
        let gains = magnitudes.gains.first(outputs)?;
        let arguments = [v, gains, bias, residual, whole.y, int(tokens)?, int(outputs)?];
        // SAFETY: v, residual and y hold [T, O], gains and bias [O].
        unsafe { self.kernels.launch_half("magnitude_forward", eights(tokens * outputs), &arguments) }
    }

    /// The backward of a group with `magnitudes`.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn magnitude_gradient(
        &self,
        group: &LinearGroup<Self>,
        magnitudes: &Magnitudes<D>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        s: &CudaBuffer<D>,
        dy: &CudaBuffer<D>,
        gradients: &CudaFloats<D>,
        dx: Option<&CudaBuffer<D>>,
    ) -> Result<()> {
        let mut scratch = lock(&self.scratch);
        let sizes = Sizes::of(group, input.rows);
        let Sizes { tokens, inputs, outputs, leading, .. } = sizes;
        let bytes = tokens * outputs * HALF_BYTES;
        let gained = CudaBuffer { region: scratch.gained.reserve(self.device(), bytes)?.part(0, bytes)? };
        let v = s.at(tokens * leading, tokens * outputs)?;
        let partial_bytes = column_bytes(tokens, outputs);
        let partials = scratch.partials.reserve(self.device(), partial_bytes)?.part(0, partial_bytes)?;
        let (counts, gains) = ([int(tokens)?, int(outputs)?], magnitudes.gains.first(outputs)?);
        let dy_rows = dy.first(tokens * outputs)?;
        let mut arguments =
            vec![dy_rows, v, gains, gained.first(tokens * outputs)?, partials.first(partial_bytes)?];
        arguments.extend(counts);
        let grid = [outputs.div_ceil(STRETCH_COLUMNS), stretches_of(tokens), 1];
        let shape = Shape { grid, threads: COLUMN_THREADS, shared_bytes: 0 };
        // SAFETY: dy, v and what is gained hold [T, O], gains [O], the partial sums a row for each stretch.
        unsafe { self.kernels.launch_half("magnitude_backward", shape, &arguments)? };
        for &Place { out_column, out_features, offset } in &magnitudes.places {
            let sums = ColumnSums {
                partials: partials.at(out_column * FLOAT_BYTES, partial_bytes - out_column * FLOAT_BYTES)?,
                divisors: magnitudes.norms.at(out_column, out_features)?,
                columns: out_features,
                ..ColumnSums::of_rows(NULL, tokens, outputs)
            };
            // SAFETY: the adapter's columns of the same sums, and its magnitudes' gradients.
            unsafe { self.add_column_sums(sums, gradients.at(offset, out_features)?)? };
        }

        let ds = self.output_gradient(group, tokens, s, &gained, gradients, &mut scratch)?;
        self.adapter_input_gradient(group, &input, ds, gradients, &mut scratch)?;
        let Some(dx) = dx else { return Ok(()) };
        if input.batch.dropout.is_none() {
            return self.input_gradient(group, parameters, tokens, input.batch, [&gained, dx], ds);
        }
        let through_bytes = tokens * inputs * HALF_BYTES;
        let through = scratch.dropped.reserve(self.device(), through_bytes)?.first(through_bytes)?;
        let change = gained.first(tokens * outputs)?;
        let of_seen = BackwardProduct {
            dy: change,
            weight: group.weight.shaped(outputs, inputs)?,
            ds,
            a: self.adapter_a(group, parameters)?,
            dx: through,
            sizes,
            mask: NO_MASK,
        };
        let dx = dx.first(tokens * inputs)?;
        let sizes = Sizes { rank: 0, leading: 0, ..sizes };
        let frozen = BackwardProduct { dy: dy_rows, ds: NULL, a: NULL, dx, sizes, ..of_seen };
        let [rows, width] = counts;
        let mut arguments = vec![through, dx, int(tokens)?, int(inputs)?];
        arguments.extend(mask_arguments(input.batch, group.input_index)?);
        // SAFETY: every stretch was asked for by its shape, and the batch has T tokens.
        unsafe {
            let of_change = [dy_rows, gains, change, rows, width];
            self.kernels.launch_half("magnitude_change", eights(tokens * outputs), &of_change)?;
            self.kernels.linear_backward_input(&of_seen)?;
            self.kernels.linear_backward_input(&frozen)?;
            self.kernels.launch_half("magnitude_through", eights(tokens * inputs), &arguments)
        }
    }
}
