//! The frozen products with the adapters' share in them: linear.cu everywhere, linear_sm90a.cu on Hopper.

use super::launch::{Kernels, NULL, Shape, int};
use super::linear::{Sizes, rank_leading};
use super::shares_of_s::ShareOperands;
use super::tiles::{Choice, ProductShape};
use crate::backend::Activation;
use crate::device::{Argument, BOX_COLUMNS, Boxes, Device};
use crate::error::{Error, Result};

/// Rows of a tile, and columns of the portable one.
pub(super) const TILE: usize = 128;
const PORTABLE_THREADS: u32 = 256;
const PORTABLE_SHARED_BYTES: usize = 64 << 10;

const HOPPER_THREADS: u32 = 384;
const HOPPER_SHARED_BYTES: usize = 227 << 10;
/// Widths of heads that the product itself can rotate.
const ROTATED_HEADS: [usize; 2] = [64, 128];

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

impl ForwardProduct {
    /// x, W, s and B̂ for Hopper's tiles; whatever stands for absent adapters.
    fn hopper_operands(&self, Choice { columns: width, .. }: Choice) -> Result<[Argument; 4]> {
        let Sizes { tokens, inputs, outputs, rank, leading } = self.sizes;
        let x = boxes(self.x, [tokens, inputs], inputs, TILE)?;
        let weight = boxes(self.weight, [outputs, inputs], inputs, width / 2)?;
        if self.adapters == 0 {
            return Ok([x, weight, x, weight]);
        }
        let s = boxes(self.s, [tokens, rank], leading, TILE)?;
        Ok([x, weight, s, boxes(self.b_hat, [outputs, rank], leading, width / 2)?])
    }
}

/// What turns the heads of queries and keys.
pub(super) struct Rotation {
    /// `Angles` of rope_angles.h, without the number of rotated columns.
    pub angles: [Argument; 6],
    pub head_dim: usize,
    /// Columns of queries and keys side by side.
    pub rotated_columns: usize,
}

/// What follows the product for gate and up.
pub(super) struct Gated {
    pub activation: Activation,
    /// Where the columns of up begin in its output.
    pub up: Argument,
    /// `[T, F]`.
    pub act: Argument,
    /// The shares of the `s` of down, if they are wanted.
    pub down: Option<ShareOperands>,
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

impl HeadSizes {
    /// A linear without adapters.
    fn as_linear(self) -> Sizes {
        let Self { rows, width, vocabulary, .. } = self;
        Sizes { tokens: rows, inputs: width, outputs: vocabulary, rank: 0, leading: 0 }
    }
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

    fn choose(&self, shape: ProductShape, choices: &[Choice]) -> Choice {
        self.tiles.choose(shape, self.multiprocessors(), choices)
    }

    /// A launch on Hopper of the kernel `name` for the tiles that were chosen.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    unsafe fn launch_hopper(
        &self,
        name: &str,
        [rows, columns]: [usize; 2],
        choice: Choice,
        arguments: &[Argument],
    ) -> Result<()> {
        let Choice { columns: width, cluster_blocks } = choice;
        let blocks = choice.clusters(rows, columns, self.multiprocessors()) * cluster_blocks;
        let shape =
            Shape { grid: [blocks, 1, 1], threads: HOPPER_THREADS, shared_bytes: HOPPER_SHARED_BYTES };
        let kernel = format!("{name}_sm90a_n{width}_{}", self.compute);
        // SAFETY: the caller's.
        unsafe { self.launch_clusters(&kernel, shape, cluster_blocks as u32, arguments) }
    }

    /// # Safety
    /// The parts are as large as `sizes` says.
    pub unsafe fn linear_forward(&self, product: &ForwardProduct) -> Result<()> {
        let &ForwardProduct { x, weight, bias, residual, s, b_hat, slots, adapters, y, sizes } = product;
        let Sizes { tokens, inputs, outputs, leading, .. } = sizes;
        if !self.uses_hopper {
            let mut arguments = vec![x, weight, bias, residual, s, b_hat, slots, y];
            arguments.extend([int(tokens)?, int(inputs)?, int(outputs)?, int(adapters)?, int(leading)?]);
            // SAFETY: the caller's.
            return unsafe { self.launch_half("linear_forward", tile_shape(tokens, outputs), &arguments) };
        }
        let choice = self.choose(sizes.forward(), &Choice::ALL);
        // SAFETY: the caller's.
        unsafe { self.hopper_forward(product, outputs, choice) }
    }

    /// [`linear_forward`](Self::linear_forward) by Hopper's kernel into rows of `row_length`, of which the columns behind the
    /// output become zero.
    ///
    /// # Safety
    /// The parts are as large as their sizes say, `y` as `row_length` says.
    pub unsafe fn hopper_forward(
        &self,
        product: &ForwardProduct,
        row_length: usize,
        choice: Choice,
    ) -> Result<()> {
        let &ForwardProduct { bias, residual, slots, adapters, y, sizes, .. } = product;
        let Sizes { tokens, inputs, outputs, .. } = sizes;
        let has_residual = residual != NULL;
        // Behind the output the rows of W read as zeros, which are written as far as the rows of y go.
        let y = boxes(y, [tokens, row_length], row_length, TILE / 2)?;
        let residual = if has_residual { boxes(residual, [tokens, outputs], outputs, TILE / 2)? } else { y };
        let mut arguments = product.hopper_operands(choice)?.to_vec();
        arguments.extend([residual, y, bias, slots, Argument::I32(i32::from(has_residual))]);
        arguments.extend([int(tokens)?, int(inputs)?, int(outputs)?, int(adapters)?]);
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_forward", [tokens, outputs], choice, &arguments) }
    }

    /// Whether [`rotated_forward`](Self::rotated_forward) rotates heads of `head_dim` columns, `rotated` of them.
    pub fn rotates_in_products(&self, head_dim: usize, rotated: usize) -> bool {
        self.uses_hopper && rotated == head_dim && ROTATED_HEADS.contains(&head_dim)
    }

    /// The product for queries, keys and values on Hopper, without residual, and its heads rotated as by rope.cu.
    ///
    /// # Safety
    /// The parts are as large as `sizes` says, the rotation's as its own fields say.
    pub unsafe fn rotated_forward(&self, product: &ForwardProduct, rotation: &Rotation) -> Result<()> {
        let &ForwardProduct { bias, slots, adapters, y, sizes, .. } = product;
        let Sizes { tokens, inputs, outputs, .. } = sizes;
        let &Rotation { angles, head_dim, rotated_columns } = rotation;
        let mut whole_heads = Choice::ALL.to_vec();
        whole_heads.retain(|choice| choice.columns.is_multiple_of(head_dim));
        let choice = self.choose(sizes.forward(), &whole_heads);
        let mut arguments = product.hopper_operands(choice)?.to_vec();
        arguments.extend([boxes(y, [tokens, outputs], outputs, TILE / 2)?, bias, slots]);
        arguments.extend(angles);
        arguments.extend([int(head_dim)?, int(rotated_columns)?]);
        arguments.extend([int(tokens)?, int(inputs)?, int(outputs)?, int(adapters)?]);
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_forward_rotated", [tokens, outputs], choice, &arguments) }
    }

    /// The product for gate and up on Hopper, without residual, and the activation of it.
    ///
    /// # Safety
    /// The parts are as large as `sizes` and their own fields say.
    pub unsafe fn gated_forward(&self, product: &ForwardProduct, gated: &Gated) -> Result<()> {
        let &ForwardProduct { bias, slots, adapters, y, sizes, .. } = product;
        let &Gated { activation, up, act, ref down } = gated;
        let Sizes { tokens, inputs, outputs, .. } = sizes;
        let columns = outputs / 2;
        let mut choices = Choice::ALL.to_vec();
        choices.retain(|choice| match down {
            // One alone, so that no choice changes a sum: see GATED_TILE_COLUMNS.
            Some(_) => choice.columns == 256,
            None => choice.columns.is_multiple_of(2 * BOX_COLUMNS),
        });
        let choice = self.choose(sizes.forward(), &choices);
        let mut arguments = product.hopper_operands(choice)?.to_vec();
        for (memory, stride) in [(y, outputs), (up, outputs), (act, columns)] {
            arguments.push(boxes(memory, [tokens, columns], stride, TILE / 2)?);
        }
        let (down_a, partials, rank) = match down {
            Some(down) => (down.boxes_of_a(columns)?, down.partials, down.shares.rank),
            None => (arguments[0], NULL, 0),
        };
        arguments.extend([down_a, bias, slots, partials]);
        arguments.extend([
            int(tokens)?,
            int(inputs)?,
            int(columns)?,
            int(adapters)?,
            int(rank_leading(rank))?,
        ]);
        arguments.push(Argument::I32(i32::from(activation == Activation::GeluTanh)));
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_forward_gated", [tokens, outputs], choice, &arguments) }
    }

    /// # Safety
    /// The parts are as large as `sizes` says.
    pub unsafe fn linear_backward_input(&self, product: &BackwardProduct) -> Result<()> {
        let &BackwardProduct { dy, weight, ds, a, dx, sizes, mask } = product;
        let Sizes { tokens, inputs, outputs, rank, leading } = sizes;
        if !self.uses_hopper {
            let mut arguments = vec![dy, weight, ds, a, dx];
            arguments.extend([int(tokens)?, int(inputs)?, int(outputs)?, int(rank)?, int(leading)?]);
            arguments.extend(mask);
            let shape = tile_shape(tokens, inputs);
            // SAFETY: the caller's.
            return unsafe { self.launch_half("linear_backward_input", shape, &arguments) };
        }
        let choice = self.choose(sizes.backward_input(), &Choice::ALL);
        // SAFETY: the caller's.
        unsafe { self.hopper_backward_input(product, outputs, choice) }
    }

    /// [`linear_backward_input`](Self::linear_backward_input) by Hopper's kernel from rows of `row_length`.
    ///
    /// # Safety
    /// The parts are as large as their sizes say, `dy` as `row_length` says.
    pub unsafe fn hopper_backward_input(
        &self,
        product: &BackwardProduct,
        row_length: usize,
        choice: Choice,
    ) -> Result<()> {
        let &BackwardProduct { dy, weight, ds, a, dx, sizes, mask } = product;
        let Sizes { tokens, inputs, outputs, rank, leading } = sizes;
        let dy = boxes(dy, [tokens, outputs], row_length, TILE)?;
        let weight = boxes(weight, [outputs, inputs], inputs, TILE / 2)?;
        let (mut ds_boxes, mut a_boxes) = (dy, weight);
        if rank > 0 {
            ds_boxes = boxes(ds, [tokens, rank], leading, TILE)?;
            a_boxes = boxes(a, [rank, inputs], inputs, TILE / 2)?;
        }
        let dx = boxes(dx, [tokens, inputs], inputs, TILE / 2)?;
        let mut arguments = vec![dy, weight, ds_boxes, a_boxes, dx];
        arguments.extend([int(tokens)?, int(inputs)?, int(outputs)?, int(rank)?]);
        arguments.extend(mask);
        // SAFETY: the caller's.
        unsafe { self.launch_hopper("linear_backward_input", [tokens, inputs], choice, &arguments) }
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
        let [bias, residual, s, b_hat, slots] = [NULL; 5];
        let (adapters, y, sizes) = (0, z, sizes.as_linear());
        let product = ForwardProduct { x, weight, bias, residual, s, b_hat, slots, adapters, y, sizes };
        let choice = self.choose(sizes.forward(), &Choice::ALL);
        // SAFETY: the caller's.
        unsafe { self.hopper_forward(&product, leading, choice) }
    }

    /// `dW += dzᵀ · x`, in f32; the same kernel on every GPU.
    ///
    /// # Safety
    /// The parts are as large as `sizes` says.
    pub unsafe fn head_weight_gradient(
        &self,
        dz: Argument,
        x: Argument,
        dweight: Argument,
        sizes: HeadSizes,
    ) -> Result<()> {
        let HeadSizes { rows, width, vocabulary, leading } = sizes;
        let counts = [int(rows)?, int(width)?, int(vocabulary)?, int(leading)?];
        let arguments: Vec<_> = [dz, x, dweight].into_iter().chain(counts).collect();
        // SAFETY: the caller's.
        unsafe { self.launch_half("head_weight_gradient", tile_shape(vocabulary, width), &arguments) }
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
        let [ds, a] = [NULL; 2];
        let sizes = sizes.as_linear();
        let product = BackwardProduct { dy: dz, weight, ds, a, dx, sizes, mask: NO_MASK };
        let choice = self.choose(sizes.backward_input(), &Choice::ALL);
        // SAFETY: the caller's.
        unsafe { self.hopper_backward_input(&product, leading, choice) }
    }
}
