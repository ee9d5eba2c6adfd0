//! Norms, the gated activation, and moves of rows (rms_norm.cu, gated_activation.cu, rows.cu,
//! embedding_noise.cu).

use super::column_sums::{COLUMN_THREADS, ColumnSums, column_bytes, stretches_of};
use super::launch::{NULL, Shape, int};
use super::memory::{CudaBuffer, CudaFloats};
use super::weights::{WIDTH_MULTIPLE, check_width};
use super::{CudaBackend, CudaBatch};
use crate::backend::{Activation, Embedding, RmsNorm, Weight};
use crate::device::{Argument, Device};
use crate::error::Result;

/// Threads of the kernels that take 8 elements a thread.
const VECTOR_THREADS: u32 = 256;

/// A warp a row, four of them a block.
fn row_shape(rows: usize) -> Shape {
    Shape::blocks(rows.div_ceil(4), 128)
}

/// Elements of a row that a warp reads in one round, and the rounds that rms_norm.cu is compiled for: what it keeps of a row
/// in registers. It reads wider rows twice, as `0`.
const ROUND_ELEMENTS: usize = 256;
const NORM_ROUNDS: [usize; 4] = [2, 4, 8, 16];

/// The kernel `name` for rows of `width`.
fn norm_kernel(name: &str, width: usize) -> String {
    let fits = |rounds: &usize| rounds * ROUND_ELEMENTS >= width;
    format!("{name}_{}", NORM_ROUNDS.into_iter().find(fits).unwrap_or(0))
}

/// A thread for every eight of `elements`.
fn vector_shape(elements: usize) -> Shape {
    Shape::blocks((elements / WIDTH_MULTIPLE).div_ceil(VECTOR_THREADS as usize), VECTOR_THREADS)
}

impl<D: Device> CudaBackend<D> {
    /// The weight in the compute type; of a trained one, the copy.
    pub(super) fn norm_weight(&self, norm: RmsNorm<'_, Self>) -> Result<Argument> {
        match norm.weight {
            Weight::Frozen(weight) => weight.first(norm.width),
            Weight::Trained { parameters, offset } => self.trained_weight(parameters, offset, norm.width),
        }
    }

    pub(super) fn norm_forward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &CudaBuffer<D>,
        residual: Option<&CudaBuffer<D>>,
        y: &CudaBuffer<D>,
    ) -> Result<()> {
        check_width("a norm", norm.width)?;
        let elements = rows * norm.width;
        let arguments = [
            x.first(elements)?,
            self.norm_weight(norm)?,
            residual.map_or(Ok(NULL), |residual| residual.first(elements))?,
            y.first(elements)?,
            int(rows)?,
            int(norm.width)?,
            Argument::F32(norm.weight_offset),
            Argument::F32(norm.epsilon),
        ];
        // SAFETY: the stretches hold [rows, width], and the weight [width].
        unsafe {
            self.kernels.launch_half(
                &norm_kernel("rms_norm_forward", norm.width),
                row_shape(rows),
                &arguments,
            )
        }
    }

    pub(super) fn norm_backward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &CudaBuffer<D>,
        dy: &CudaBuffer<D>,
        dx: &CudaBuffer<D>,
    ) -> Result<()> {
        check_width("a norm", norm.width)?;
        let elements = rows * norm.width;
        let dx = dx.first(elements)?;
        let arguments = [
            x.first(elements)?,
            self.norm_weight(norm)?,
            dy.first(elements)?,
            dx, // what it holds is added
            dx,
            int(rows)?,
            int(norm.width)?,
            Argument::F32(norm.weight_offset),
            Argument::F32(norm.epsilon),
        ];
        // SAFETY: as in the forward; the kernel allows dx to be its own addend.
        unsafe {
            self.kernels.launch_half(
                &norm_kernel("rms_norm_backward", norm.width),
                row_shape(rows),
                &arguments,
            )
        }
    }

    /// Adds the gradient of a trained norm's weight to `gradients`.
    pub(super) fn norm_weight_gradient(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &CudaBuffer<D>,
        dy: &CudaBuffer<D>,
        gradients: &CudaFloats<D>,
    ) -> Result<()> {
        let width = norm.width;
        check_width("a norm", width)?;
        let target = gradients.at(norm.weight.trained_offset()?, width)?;
        let mut scratch = super::lock(&self.scratch);
        let bytes = column_bytes(rows, width);
        let partials = scratch.partials.reserve(self.device(), bytes)?.first(bytes)?;
        let mut arguments = vec![x.first(rows * width)?, dy.first(rows * width)?, partials];
        arguments.extend([int(rows)?, int(width)?, Argument::F32(norm.epsilon)]);
        let shape = Shape::blocks(stretches_of(rows), COLUMN_THREADS);
        // SAFETY: x and dy hold [rows, width], the partial sums a row for each stretch, the target [width].
        unsafe {
            self.kernels.launch_half("rms_norm_weight_gradient", shape, &arguments)?;
            self.add_column_sums(ColumnSums::of_rows(partials, rows, width), target)
        }
    }

    pub(super) fn gated_forward(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        gate_up: &CudaBuffer<D>,
        act: &CudaBuffer<D>,
    ) -> Result<()> {
        let kernel = match activation {
            Activation::Silu => "gated_silu_forward",
            Activation::GeluTanh => "gated_gelu_forward",
        };
        self.launch_gated(kernel, rows, width, gate_up.first(2 * rows * width)?, act.first(rows * width)?)
    }

    pub(super) fn gated_gradient(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        dact: &CudaBuffer<D>,
        gate_up: &CudaBuffer<D>,
    ) -> Result<()> {
        let kernel = match activation {
            Activation::Silu => "gated_silu_backward",
            Activation::GeluTanh => "gated_gelu_backward",
        };
        self.launch_gated(kernel, rows, width, dact.first(rows * width)?, gate_up.first(2 * rows * width)?)
    }

    fn launch_gated(
        &self,
        kernel: &str,
        rows: usize,
        width: usize,
        input: Argument,
        output: Argument,
    ) -> Result<()> {
        check_width("a gated activation", width)?;
        let arguments = [input, output, int(rows)?, int(width)?];
        // SAFETY: the callers asked for [rows, 2·width] of gate_up and [rows, width] of act or its gradient.
        unsafe { self.kernels.launch_half(kernel, vector_shape(rows * width), &arguments) }
    }

    pub(super) fn embed(
        &self,
        batch: &CudaBatch<D>,
        embedding: Embedding<'_, Self>,
        x: &CudaBuffer<D>,
    ) -> Result<()> {
        let Embedding { table, width, scale } = embedding;
        let rows = batch.tokens;
        let ids = batch.token_ids(table.rows)?;
        let (elements, out) = (table.shaped(table.rows, width)?, x.first(rows * width)?);
        if scale == 1.0 {
            self.gather(elements, ids, out, rows, width)?;
        } else {
            check_width("a row", width)?;
            let scale = Argument::F32(self.compute().rounded(scale));
            let arguments = [elements, ids, out, int(rows)?, int(width)?, scale];
            // SAFETY: the whole table, and every id is inside it.
            unsafe { self.kernels.launch_half("gather_scaled", vector_shape(rows * width), &arguments)? };
        }
        let Some(noise) = batch.embedding_noise else { return Ok(()) };
        let arguments = [
            x.first(rows * width)?,
            batch.positions()?,
            batch.samples()?,
            batch.lengths()?,
            Argument::U32(noise.seed as u32),
            Argument::U32((noise.seed >> 32) as u32),
            batch.noise_epoch()?,
            Argument::F32(noise.alpha),
            int(rows)?,
            int(width)?,
        ];
        // SAFETY: x holds [rows, width], and the batch has a position, sample and length for every row.
        unsafe { self.kernels.launch_half("embedding_noise", vector_shape(rows * width), &arguments) }
    }

    pub(super) fn gather_rows(
        &self,
        batch: &CudaBatch<D>,
        width: usize,
        x: &CudaBuffer<D>,
        packed: &CudaBuffer<D>,
    ) -> Result<()> {
        let rows = batch.labelled;
        let (x, packed) = (x.first(batch.tokens * width)?, packed.first(rows * width)?);
        self.gather(x, batch.labelled_rows()?, packed, rows, width)
    }

    fn gather(
        &self,
        table: Argument,
        index: Argument,
        out: Argument,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        check_width("a row", width)?;
        let arguments = [table, index, out, int(rows)?, int(width)?];
        // SAFETY: the callers asked for whole tables, and every index is inside them.
        unsafe { self.kernels.launch("gather_rows", vector_shape(rows * width), &arguments) }
    }

    pub(super) fn scatter_rows(
        &self,
        batch: &CudaBatch<D>,
        width: usize,
        packed: &CudaBuffer<D>,
        dx: &CudaBuffer<D>,
    ) -> Result<()> {
        check_width("a row", width)?;
        self.zero(dx, batch.tokens * width)?;
        let rows = batch.labelled;
        let arguments = [
            packed.first(rows * width)?,
            batch.labelled_rows()?,
            dx.first(batch.tokens * width)?,
            int(rows)?,
            int(width)?,
        ];
        // SAFETY: every labelled row is a row of the batch.
        unsafe { self.kernels.launch("scatter_rows", vector_shape(rows * width), &arguments) }
    }

    /// Copies `columns` of every row: `out` and `input` point at the first, with their rows' lengths.
    ///
    /// # Safety
    /// Both hold `rows` rows.
    pub(super) unsafe fn copy_columns(
        &self,
        rows: usize,
        columns: usize,
        (input, input_leading): (Argument, usize),
        (out, out_leading): (Argument, usize),
    ) -> Result<()> {
        check_width("a row", columns)?;
        let arguments = [input, out, int(rows)?, int(columns)?, int(input_leading)?, int(out_leading)?];
        // SAFETY: the caller's.
        unsafe { self.kernels.launch("copy_columns", vector_shape(rows * columns), &arguments) }
    }
}
