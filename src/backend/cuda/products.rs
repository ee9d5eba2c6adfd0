//! The frozen products with the adapters' share in them: linear.cu everywhere, linear_sm90a.cu on Hopper.

use super::launch::{Kernels, NULL, Shape, int};
use super::linear::Sizes;
use crate::device::{Argument, Boxes, Device};
use crate::error::{Error, Result};

/// Rows of a tile, and columns of the portable one.
const TILE: usize = 128;
const PORTABLE_THREADS: u32 = 256;
const PORTABLE_SHARED_BYTES: usize = 64 << 10;

/// Widths of Hopper's tiles.
const HOPPER_COLUMNS: [usize; 3] = [128, 192, 256];
const HOPPER_THREADS: u32 = 384;
const HOPPER_SHARED_BYTES: usize = 227 << 10;
/// What a tile costs beside its columns, in columns: filling and draining the pipeline. A guess, not measured.
const TILE_OVERHEAD_COLUMNS: usize = 16;

/// `y = residual + bias + x · Wᵀ + s · B̂ᵀ`: see linear.cu. Absent parts are [`NULL`].
pub(super) struct ForwardProduct {
    pub x: Argument,
    pub weight: Argument,
    pub bias: Argument,
    pub residual: Argument,
    pub s: Argument,
    pub b_hat: Argument,
    pub slots: Argument,
    pub adapters: usize,
    pub y: Argument,
    pub sizes: Sizes,
}

/// `dx = dy · W + mask ∘ (ds · A)`.
pub(super) struct BackwardProduct {
    pub dy: Argument,
    pub weight: Argument,
    pub ds: Argument,
    pub a: Argument,
    pub dx: Argument,
    pub sizes: Sizes,
    /// `DropoutMask` of philox.h.
    pub mask: [Argument; 8],
}

/// Sizes of the output head's products on one chunk of rows.
#[derive(Clone, Copy)]
pub(super) struct HeadSizes {
    pub rows: usize,
    pub width: usize,
    pub vocabulary: usize,
    /// Row length of the logits.
    pub leading: usize,
}

/// `DropoutMask` of philox.h where there is no dropout.
pub(super) const NO_MASK: [Argument; 8] = [
    NULL,
    NULL,
    Argument::U32(0),
    Argument::U32(0),
    NULL,
    Argument::U32(0),
    Argument::U32(0),
    Argument::F32(0.0),
];

/// The portable products' launch over an output `[rows, columns]`.
fn tile_shape(rows: usize, columns: usize) -> Shape {
    let tiles = rows.div_ceil(TILE) * columns.div_ceil(TILE);
    Shape { grid: [tiles, 1, 1], threads: PORTABLE_THREADS, shared_bytes: PORTABLE_SHARED_BYTES }
}

/// The width of Hopper's tiles for an output `[rows, columns]`: the one whose turns over the multiprocessors cost the least,
/// the widest of equals.
fn hopper_columns(rows: usize, columns: usize, multiprocessors: usize) -> usize {
    let cost = |width: &usize| {
        let tiles = rows.div_ceil(TILE) * columns.div_ceil(*width);
        tiles.div_ceil(multiprocessors) * (width + TILE_OVERHEAD_COLUMNS)
    };
    HOPPER_COLUMNS.into_iter().rev().min_by_key(cost).unwrap_or(TILE)
}

/// Row-major halves `[rows, columns]` for the TMA.
pub(super) fn boxes(
    memory: Argument,
    [rows, columns]: [usize; 2],
    row_stride: usize,
    box_rows: usize,
) -> Result<Argument> {
    let Argument::Address(address) = memory else {
        return Err(Error::internal(format!("{memory} is no matrix")));
    };
    Ok(Argument::Boxes(Boxes { address, rows, columns, row_stride, box_rows: box_rows as u32 }))
}

impl<D: Device> Kernels<D> {
    fn multiprocessors(&self) -> usize {
        self.device.limits().multiprocessor_count as usize
    }

    /// A launch on Hopper of the kernel `name` for tiles of `width`.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    unsafe fn launch_hopper(
        &self,
        name: &str,
        [rows, columns]: [usize; 2],
        width: usize,
        arguments: &[Argument],
    ) -> Result<()> {
        let tiles = rows.div_ceil(TILE) * columns.div_ceil(width);
        let blocks = tiles.min(self.multiprocessors());
        let shape =
            Shape { grid: [blocks, 1, 1], threads: HOPPER_THREADS, shared_bytes: HOPPER_SHARED_BYTES };
        // SAFETY: the caller's.
        unsafe { self.launch_half(&format!("{name}_sm90a_n{width}"), shape, arguments) }
    }

    /// # Safety
    /// The parts are as large as `sizes` says.
    pub unsafe fn linear_forward(&self, product: &ForwardProduct) -> Result<()> {
        let &ForwardProduct { x, weight, bias, residual, s, b_hat, slots, adapters, y, sizes } = product;
        let Sizes { tokens, inputs, outputs, rank, leading } = sizes;
        let mut counts = vec![int(tokens)?, int(inputs)?, int(outputs)?, int(adapters)?];
        if !self.uses_hopper {
            let mut arguments = vec![x, weight, bias, residual, s, b_hat, slots, y];
            counts.push(int(leading)?);
            arguments.extend(counts);
            // SAFETY: the caller's.
            return unsafe { self.launch_half("linear_forward", tile_shape(tokens, outputs), &arguments) };
        }
        let width = hopper_columns(tokens, outputs, self.multiprocessors());
        let x = boxes(x, [tokens, inputs], inputs, TILE)?;
        let weight = boxes(weight, [outputs, inputs], inputs, width)?;
        let (mut s_boxes, mut b_hat_boxes) = (x, weight);
        if adapters > 0 {
            s_boxes = boxes(s, [tokens, rank], leading, TILE)?;
            b_hat_boxes = boxes(b_hat, [outputs, rank], leading, width)?;
        }
        let has_residual = residual != NULL;
        let y = boxes(y, [tokens, outputs], outputs, TILE / 2)?;
        let residual = if has_residual { boxes(residual, [tokens, outputs], outputs, TILE / 2)? } else { y };
        let mut arguments = vec![x, weight, s_boxes, b_hat_boxes, residual, y, bias, slots];
        arguments.push(Argument::I32(i32::from(has_residual)));
        arguments.extend(counts);
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_forward", [tokens, outputs], width, &arguments) }
    }

    /// # Safety
    /// The parts are as large as `sizes` says.
    pub unsafe fn linear_backward_input(&self, product: &BackwardProduct) -> Result<()> {
        let &BackwardProduct { dy, weight, ds, a, dx, sizes, mask } = product;
        let Sizes { tokens, inputs, outputs, rank, leading } = sizes;
        let mut counts = vec![int(tokens)?, int(inputs)?, int(outputs)?, int(rank)?];
        if !self.uses_hopper {
            let mut arguments = vec![dy, weight, ds, a, dx];
            counts.push(int(leading)?);
            arguments.extend(counts.into_iter().chain(mask));
            let shape = tile_shape(tokens, inputs);
            // SAFETY: the caller's.
            return unsafe { self.launch_half("linear_backward_input", shape, &arguments) };
        }
        let width = hopper_columns(tokens, inputs, self.multiprocessors());
        let dy = boxes(dy, [tokens, outputs], outputs, TILE)?;
        let weight = boxes(weight, [outputs, inputs], inputs, TILE / 2)?;
        let (mut ds_boxes, mut a_boxes) = (dy, weight);
        if rank > 0 {
            ds_boxes = boxes(ds, [tokens, rank], leading, TILE)?;
            a_boxes = boxes(a, [rank, inputs], inputs, TILE / 2)?;
        }
        let dx = boxes(dx, [tokens, inputs], inputs, TILE / 2)?;
        let mut arguments = vec![dy, weight, ds_boxes, a_boxes, dx];
        arguments.extend(counts.into_iter().chain(mask));
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_backward_input", [tokens, inputs], width, &arguments) }
    }
}

/// The output head: on Hopper the same kernels as a linear without adapters.
impl<D: Device> Kernels<D> {
    /// `z = x · Wᵀ`: see cross_entropy.cu.
    ///
    /// # Safety
    /// The parts are as large as `sizes` says.
    pub unsafe fn head_logits(
        &self,
        x: Argument,
        weight: Argument,
        z: Argument,
        sizes: HeadSizes,
    ) -> Result<()> {
        let HeadSizes { rows, width, vocabulary, leading } = sizes;
        let counts = [int(rows)?, int(width)?, int(vocabulary)?];
        if !self.uses_hopper {
            let arguments: Vec<_> = [x, weight, z].into_iter().chain(counts).chain([int(leading)?]).collect();
            // SAFETY: the caller's.
            return unsafe { self.launch_half("head_logits", tile_shape(rows, vocabulary), &arguments) };
        }
        let tile = hopper_columns(rows, vocabulary, self.multiprocessors());
        let x = boxes(x, [rows, width], width, TILE)?;
        let weight = boxes(weight, [vocabulary, width], width, tile)?;
        // Behind the vocabulary the rows of W read as zeros, which are written as far as the logits' rows go.
        let z = boxes(z, [rows, leading], leading, TILE / 2)?;
        let [no_bias, no_slots] = [NULL; 2];
        let mut arguments = vec![x, weight, x, weight, z, z, no_bias, no_slots, Argument::I32(0)];
        arguments.extend(counts.into_iter().chain([Argument::I32(0)]));
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_forward", [rows, vocabulary], tile, &arguments) }
    }

    /// `dx = dz · W`.
    ///
    /// # Safety
    /// The parts are as large as `sizes` says.
    pub unsafe fn head_backward_input(
        &self,
        dz: Argument,
        weight: Argument,
        dx: Argument,
        sizes: HeadSizes,
    ) -> Result<()> {
        let HeadSizes { rows, width, vocabulary, leading } = sizes;
        let counts = [int(rows)?, int(width)?, int(vocabulary)?];
        if !self.uses_hopper {
            let arguments: Vec<_> =
                [dz, weight, dx].into_iter().chain(counts).chain([int(leading)?]).collect();
            // SAFETY: the caller's.
            return unsafe { self.launch_half("head_backward_input", tile_shape(rows, width), &arguments) };
        }
        let tile = hopper_columns(rows, width, self.multiprocessors());
        let dz = boxes(dz, [rows, vocabulary], leading, TILE)?;
        let weight = boxes(weight, [vocabulary, width], width, TILE / 2)?;
        let dx = boxes(dx, [rows, width], width, TILE / 2)?;
        let mut arguments = vec![dz, weight, dz, weight, dx];
        arguments.extend(counts.into_iter().chain([Argument::I32(0)]).chain(NO_MASK));
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_backward_input", [rows, width], tile, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_the_width_and_the_waves() {
        // 576 columns are three times 192: 256 would compute a quarter for nothing.
        assert_eq!(hopper_columns(16_384, 576, 132), 192);
        assert_eq!(hopper_columns(16_384, 8960, 132), 256);
        // One row of tiles: as many multiprocessors as possible.
        assert_eq!(hopper_columns(100, 1536, 132), 128);
        assert_eq!(hopper_columns(1, 8, 4), 128);
    }
}
