//! Linear groups with adapters (linear.cu, lora.cu).

use super::launch::{NULL, Shape, int};
use super::magnitudes::{Magnitudes, magnitudes_of};
use super::memory::{CudaBuffer, CudaFloats, FLOAT_BYTES, HALF_BYTES, Region};
use super::products::{BackwardProduct, ForwardProduct, NO_MASK};
use super::tiles::{ProductKind, ProductShape};
use super::weights::{WIDTH_MULTIPLE, check_width};
use super::{CudaBackend, CudaBatch, Scratch};
use crate::backend::{
    AdapterShape, LinearGroup, LinearInput, PlacedAdapter, Projection, Work, dropout, placed_adapters,
};
use crate::device::{Argument, Device};
use crate::error::{Error, Result};
use crate::range;

/// Tiles of the adapters' own products.
pub(super) const LORA_TILE: usize = 64;
const LORA_THREADS: u32 = 128;
const LORA_SHARED_BYTES: usize = 32 << 10;
/// Threads of lora.cu's element-wise kernels.
pub(super) const ELEMENT_THREADS: usize = 256;

pub(super) fn lora_shape(rows: usize, columns: usize, stretches: usize) -> Shape {
    let tiles = rows.div_ceil(LORA_TILE) * columns.div_ceil(LORA_TILE);
    Shape { grid: [tiles, stretches, 1], threads: LORA_THREADS, shared_bytes: LORA_SHARED_BYTES }
}

/// What the adapters of a group need on the device.
pub struct CudaGroup<D: Device> {
    pub(super) adapters: Option<Adapters<D>>,
}

pub(super) struct Adapters<D: Device> {
    /// `[adapters][4]`, `[adapters]` and `[adapters]`: see lora.cu.
    slots: Region<D>,
    b_offsets: Region<D>,
    scales: Region<D>,
    pub shapes: Vec<AdapterShape>,
    /// `B̂ [O, R̄]`: packed whenever the adapters have changed.
    pub b_hat: CudaBuffer<D>,
    /// First element of `A [R, I]` in the flat buffer.
    pub a_offset: usize,
    pub magnitudes: Option<Magnitudes<D>>,
}

impl<D: Device> Adapters<D> {
    /// Slots, offsets and scales as the kernels take them.
    pub fn tables(&self) -> Result<[Argument; 3]> {
        Ok([
            self.slots.first(self.shapes.len() * 16)?,
            self.b_offsets.first(self.shapes.len() * 8)?,
            self.scales.first(self.shapes.len() * FLOAT_BYTES)?,
        ])
    }
}

/// The adapters of a group; none.
pub(super) fn shapes_of<D: Device>(group: &LinearGroup<CudaBackend<D>>) -> &[AdapterShape] {
    group.prepared.adapters.as_ref().map_or(&[], |adapters| &adapters.shapes)
}

/// `R` rounded up to whole vectors.
pub(super) fn rank_leading(rank: usize) -> usize {
    rank.next_multiple_of(WIDTH_MULTIPLE)
}

/// Sizes of one call.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub tokens: usize,
    pub inputs: usize,
    pub outputs: usize,
    pub rank: usize,
    pub leading: usize,
}

impl Sizes {
    pub fn of<D: Device>(group: &LinearGroup<CudaBackend<D>>, tokens: usize) -> Self {
        let rank = group.total_rank();
        Self {
            tokens,
            inputs: group.in_features,
            outputs: group.out_features(),
            rank,
            leading: rank_leading(rank),
        }
    }

    /// `y`, for the choice of its tiles.
    pub fn forward(self) -> ProductShape {
        let Self { tokens: rows, inputs: depth, outputs: columns, .. } = self;
        ProductShape { product: ProductKind::Forward, rows, columns, depth }
    }

    /// `dx`.
    pub fn backward_input(self) -> ProductShape {
        let Self { tokens: rows, inputs: columns, outputs: depth, .. } = self;
        ProductShape { product: ProductKind::BackwardInput, rows, columns, depth }
    }
}

/// What the forward of a group takes at least where `s` is there already.
pub(super) fn work_given_s<D: Device>(group: &LinearGroup<CudaBackend<D>>, rows: usize) -> Work {
    Work::of_linear_given_s(group.shape(rows, group.weight.bytes()), HALF_BYTES)
}

pub(super) fn upload<D: Device, T: bytemuck::NoUninit>(device: &D, values: &[T]) -> Result<Region<D>> {
    let bytes = bytemuck::cast_slice(values);
    let region = Region::allocate(device, bytes.len())?;
    region.upload(device, bytes, 0)?;
    Ok(region)
}

/// Positions, samples, seed, epoch, input, threshold and factor: `DropoutMask` in philox.h.
pub(super) fn mask_arguments<D: Device>(batch: &CudaBatch<D>, input_index: u32) -> Result<[Argument; 8]> {
    let Some(given) = batch.dropout else { return Ok(NO_MASK) };
    let probability = f64::from(given.probability);
    Ok([
        batch.positions()?,
        batch.samples()?,
        Argument::U32(given.seed as u32),
        Argument::U32((given.seed >> 32) as u32),
        batch.epoch()?,
        Argument::U32(input_index),
        // The probability is below one, so the threshold fits.
        Argument::U32(dropout::threshold(given.probability) as u32),
        Argument::F32((1.0 / (1.0 - probability)) as f32),
    ])
}

impl<D: Device> CudaBackend<D> {
    pub(super) fn make_group(&self, in_features: usize, projections: &[Projection]) -> Result<CudaGroup<D>> {
        check_width("a linear's input", in_features)?;
        for projection in projections {
            check_width("a linear's output", projection.out_features)?;
        }
        let placed: Vec<_> = placed_adapters(projections).collect();
        let Some(first) = placed.first() else { return Ok(CudaGroup { adapters: None }) };
        let a_offset = first.slot.a_offset;
        let mut end = a_offset;
        for adapter in &placed {
            if adapter.slot.a_offset != end || !a_offset.is_multiple_of(WIDTH_MULTIPLE) {
                let message = format!("an A matrix at {}, expected at {end}", adapter.slot.a_offset);
                return Err(Error::internal(message));
            }
            end += adapter.slot.rank * in_features;
        }
        let slots: Vec<[i32; 4]> = placed
            .iter()
            .map(|adapter| {
                let (out, rank) = (adapter.out_column, adapter.rank_column);
                [out, out + adapter.out_features, rank, rank + adapter.slot.rank].map(|place| place as i32)
            })
            .collect();
        let b_offsets: Vec<i64> = placed.iter().map(|adapter| adapter.slot.b_offset as i64).collect();
        let scales: Vec<f32> = placed.iter().map(|adapter| adapter.slot.scale).collect();
        let shape = |adapter: &PlacedAdapter| AdapterShape {
            out_features: adapter.out_features,
            rank: adapter.slot.rank,
        };
        let shapes: Vec<AdapterShape> = placed.iter().map(shape).collect();
        let outputs: usize = projections.iter().map(|projection| projection.out_features).sum();
        let rank: usize = placed.iter().map(|adapter| adapter.slot.rank).sum();
        let b_hat = Region::allocate(self.device(), outputs * rank_leading(rank) * HALF_BYTES)?;
        let adapters = Adapters {
            slots: upload(self.device(), &slots)?,
            b_offsets: upload(self.device(), &b_offsets)?,
            scales: upload(self.device(), &scales)?,
            shapes,
            b_hat: CudaBuffer { region: b_hat },
            a_offset,
            magnitudes: self.make_magnitudes(&placed, outputs)?,
        };
        Ok(CudaGroup { adapters: Some(adapters) })
    }

    pub(super) fn linear_forward(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        residual: Option<&CudaBuffer<D>>,
        s: &CudaBuffer<D>,
        y: &CudaBuffer<D>,
    ) -> Result<()> {
        if let Some(magnitudes) = magnitudes_of(group) {
            return self.magnitude_forward(group, magnitudes, parameters, input, residual, s, y);
        }
        self.adapter_down(group, parameters, &input, s)?;
        let product = self.forward_product(group, input.rows, input.x, residual, s, y)?;
        // SAFETY: every stretch was asked for by its shape.
        unsafe { self.kernels.linear_forward(&product) }
    }

    /// [`linear`](crate::backend::Backend::linear) where `s` is there already.
    pub(super) fn linear_given_s(
        &self,
        group: &LinearGroup<Self>,
        input: LinearInput<'_, Self>,
        residual: Option<&CudaBuffer<D>>,
        s: &CudaBuffer<D>,
        y: &CudaBuffer<D>,
    ) -> Result<()> {
        let _range = range!("linear"; work_given_s(group, input.rows));
        let product = self.forward_product(group, input.rows, input.x, residual, s, y)?;
        // SAFETY: every stretch was asked for by its shape.
        unsafe { self.kernels.linear_forward(&product) }
    }

    /// `s = x̃ · Aᵀ`, and `x̃`, until scratch memory is used again; nothing without adapters.
    pub(super) fn adapter_down(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        input: &LinearInput<'_, Self>,
        s: &CudaBuffer<D>,
    ) -> Result<Argument> {
        if group.prepared.adapters.is_none() {
            return Ok(NULL);
        }
        let Sizes { tokens, inputs, rank, leading, .. } = Sizes::of(group, input.rows);
        let mut scratch = super::lock(&self.scratch);
        let x = self.adapter_input(group, input, &mut scratch)?;
        let arguments = [
            x,
            self.adapter_a(group, parameters)?,
            s.first(tokens * leading)?,
            int(tokens)?,
            int(inputs)?,
            int(rank)?,
            int(leading)?,
        ];
        // SAFETY: x [T, I], A [R, I], s [T, R̄].
        unsafe { self.kernels.launch_half("lora_down", lora_shape(tokens, rank, 1), &arguments)? };
        Ok(x)
    }

    /// `A [R, I]` of all adapters; NULL without.
    pub(super) fn adapter_a(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
    ) -> Result<Argument> {
        let elements = group.total_rank() * group.in_features;
        match &group.prepared.adapters {
            Some(adapters) => self.half_copy(parameters)?.at(adapters.a_offset, elements),
            None => Ok(NULL),
        }
    }

    /// The forward's product, given `s`; without the magnitudes of its adapters.
    pub(super) fn forward_product(
        &self,
        group: &LinearGroup<Self>,
        rows: usize,
        x: &CudaBuffer<D>,
        residual: Option<&CudaBuffer<D>>,
        s: &CudaBuffer<D>,
        y: &CudaBuffer<D>,
    ) -> Result<ForwardProduct> {
        let sizes @ Sizes { tokens, inputs, outputs, leading, .. } = Sizes::of(group, rows);
        let mut product = ForwardProduct {
            x: x.first(tokens * inputs)?,
            weight: group.weight.shaped(outputs, inputs)?,
            bias: group.bias.as_ref().map_or(Ok(NULL), |bias| bias.first(outputs))?,
            residual: residual.map_or(Ok(NULL), |residual| residual.first(tokens * outputs))?,
            s: NULL,
            b_hat: NULL,
            slots: NULL,
            adapters: 0,
            y: y.first(tokens * outputs)?,
            sizes,
        };
        if let Some(adapters) = &group.prepared.adapters {
            product.s = s.first(tokens * leading)?;
            product.b_hat = adapters.b_hat.first(outputs * leading)?;
            product.slots = adapters.tables()?[0];
            product.adapters = adapters.shapes.len();
        }
        Ok(product)
    }

    /// The adapters' input: `x`, or `x̃` after dropout.
    fn adapter_input(
        &self,
        group: &LinearGroup<Self>,
        input: &LinearInput<'_, Self>,
        scratch: &mut Scratch<D>,
    ) -> Result<Argument> {
        let (tokens, inputs) = (input.rows, group.in_features);
        let x = input.x.first(tokens * inputs)?;
        if input.batch.dropout.is_none() {
            return Ok(x);
        }
        let bytes = tokens * inputs * HALF_BYTES;
        let dropped = scratch.dropped.reserve(self.device(), bytes)?.first(bytes)?;
        let mut arguments = vec![x, dropped, int(tokens)?, int(inputs)?];
        arguments.extend(mask_arguments(input.batch, group.input_index)?);
        let shape = Shape::blocks((tokens * inputs / 4).div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32);
        // SAFETY: both hold [T, I], and the batch has T tokens.
        unsafe { self.kernels.launch_half("lora_dropout", shape, &arguments)? };
        Ok(dropped)
    }

    /// Packs `B̂` from the parameters as they are now, and renews what depends on it.
    pub(super) fn pack(&self, group: &LinearGroup<Self>, parameters: &CudaFloats<D>) -> Result<()> {
        let Some(adapters) = &group.prepared.adapters else { return Ok(()) };
        let Sizes { outputs, leading, .. } = Sizes::of(group, 0);
        let elements = outputs * leading;
        let [slots, b_offsets, scales] = adapters.tables()?;
        let arguments = [
            parameters.first(parameters.elements())?,
            slots,
            b_offsets,
            scales,
            adapters.b_hat.first(elements)?,
            int(adapters.shapes.len())?,
            int(outputs)?,
            int(leading)?,
        ];
        let shape = Shape::blocks(elements.div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32);
        // SAFETY: the layout places every B inside the flat buffer.
        unsafe { self.kernels.launch_half("lora_pack", shape, &arguments)? };
        self.renew_magnitudes(group, parameters, adapters)
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn linear_gradient(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        s: &CudaBuffer<D>,
        dy: &CudaBuffer<D>,
        gradients: &CudaFloats<D>,
        dx: Option<&CudaBuffer<D>>,
    ) -> Result<()> {
        if let Some(magnitudes) = magnitudes_of(group) {
            return self.magnitude_gradient(group, magnitudes, parameters, input, s, dy, gradients, dx);
        }
        let mut scratch = super::lock(&self.scratch);
        let ds = self.output_gradient(group, input.rows, s, dy, gradients, &mut scratch)?;
        self.adapter_input_gradient(group, &input, ds, gradients, &mut scratch)?;
        match dx {
            Some(dx) => self.input_gradient(group, parameters, input.rows, input.batch, [dy, dx], ds),
            None => Ok(()),
        }
    }

    /// `ds [T, R̄]`, which it writes, and adds the gradients of every `B`; NULL without adapters.
    pub(super) fn output_gradient(
        &self,
        group: &LinearGroup<Self>,
        rows: usize,
        s: &CudaBuffer<D>,
        dy: &CudaBuffer<D>,
        gradients: &CudaFloats<D>,
        scratch: &mut Scratch<D>,
    ) -> Result<Argument> {
        let Some(adapters) = &group.prepared.adapters else { return Ok(NULL) };
        let sizes @ Sizes { tokens, outputs, leading, .. } = Sizes::of(group, rows);
        let ds = self.ds_scratch(tokens * leading, scratch)?;
        let inputs = [dy.first(tokens * outputs)?, s.first(tokens * leading)?, ds];
        self.back_pass(adapters, sizes, inputs, gradients, &mut scratch.partials)?;
        Ok(ds)
    }

    /// Room for `elements` of `ds`.
    pub(super) fn ds_scratch(&self, elements: usize, scratch: &mut Scratch<D>) -> Result<Argument> {
        let bytes = elements * HALF_BYTES;
        scratch.ds.reserve(self.device(), bytes)?.first(bytes)
    }

    /// Adds the gradients of every `A`, given `ds [T, R̄]`.
    pub(super) fn adapter_input_gradient(
        &self,
        group: &LinearGroup<Self>,
        input: &LinearInput<'_, Self>,
        ds: Argument,
        gradients: &CudaFloats<D>,
        scratch: &mut Scratch<D>,
    ) -> Result<()> {
        let Some(adapters) = &group.prepared.adapters else { return Ok(()) };
        let x = self.adapter_input(group, input, scratch)?;
        self.a_gradient(adapters, Sizes::of(group, input.rows), [ds, x], gradients, &mut scratch.partials)
    }

    /// `dx = dy · W + mask ∘ (ds · A)`, given `ds [T, R̄]`.
    pub(super) fn input_gradient(
        &self,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        rows: usize,
        batch: &CudaBatch<D>,
        [dy, dx]: [&CudaBuffer<D>; 2],
        ds: Argument,
    ) -> Result<()> {
        let sizes @ Sizes { tokens, inputs, outputs, .. } = Sizes::of(group, rows);
        let product = BackwardProduct {
            dy: dy.first(tokens * outputs)?,
            weight: group.weight.shaped(outputs, inputs)?,
            ds,
            a: self.adapter_a(group, parameters)?,
            dx: dx.first(tokens * inputs)?,
            sizes,
            mask: mask_arguments(batch, group.input_index)?,
        };
        // SAFETY: every stretch was asked for by its shape.
        unsafe { self.kernels.linear_backward_input(&product) }
    }
}
