//! Attention (rope.cu, attention*.cu): queries and keys are rotated into a buffer of their own, values are read where the
//! projection left them.

use super::launch::{NULL, Shape, int};
use super::linear::rank_leading;
use super::memory::{CudaBuffer, CudaFloats, FLOAT_BYTES, HALF_BYTES};
use super::products::boxes;
use super::shares_of_s::ShareOperands;
use super::{CudaBackend, CudaBatch, Scratch};
use crate::backend::{Attention, KvCache, LongTexts, RmsNorm, Rotations, Work};
use crate::device::{Argument, Device};
use crate::error::{Error, Result};

/// Widths of a head that attention.cu is compiled for.
pub const HEAD_DIMS: &[usize] = &[16, 32, 64, 80, 96, 128, 256];

/// What the number of rotated columns must be a multiple of: rope.cu reads two halves at once.
const ROTATED_MULTIPLE: usize = 4;

const THREADS: u32 = 128;
/// Rows of a block's own tile (`outer_rows` in attention_tile.h).
const OUTER_ROWS: usize = 64;
/// Heads of a token that a block of rope.cu takes.
const ROPE_HEADS: usize = 4;

/// Widths of a head that Hopper's kernels are compiled for.
const HOPPER_HEAD_DIMS: [usize; 2] = [64, 128];
const HOPPER_THREADS: u32 = 384;
/// Rows of the boxes that they load.
const HOPPER_BOX_ROWS: usize = 64;
/// Rows of all their tiles in shared memory.
const HOPPER_FORWARD_ROWS: usize = (1 + 2 * 2) * 128 + 64;
const HOPPER_QUERIES_ROWS: usize = (2 + 2 * 2) * 128;
const HOPPER_KEYS_ROWS: usize = 2 * 128 + 2 * 3 * 64;
/// Their barriers, and the log sums and deltas of queries.
const HOPPER_REST_BYTES: usize = 2048;

/// Refuses heads of a width, or with so many rotated columns, that there is no kernel for.
pub(super) fn check_heads(head_dim: usize, rotated: usize) -> Result<()> {
    let missing = match HEAD_DIMS.contains(&head_dim) {
        false => format!("heads of width {head_dim}: the CUDA kernels have {HEAD_DIMS:?}"),
        true if !rotated.is_multiple_of(ROTATED_MULTIPLE) => {
            format!(
                "{rotated} rotated columns of a head: the CUDA kernels need a multiple of {ROTATED_MULTIPLE}"
            )
        }
        true => return Ok(()),
    };
    Err(Error::device(missing).hint("use `--device cpu`"))
}

/// Rows of the tiles that pass by (`inner_rows` in attention_tile.h).
fn inner_rows(head_dim: usize) -> usize {
    match head_dim {
        0..=64 => 64,
        65..=128 => 32,
        _ => 16,
    }
}

/// Bytes of one row of a tile, padded.
fn pitch_bytes(head_dim: usize) -> usize {
    (head_dim + 8) * HALF_BYTES
}

fn forward_shared_bytes(head_dim: usize) -> usize {
    let stages = if head_dim <= 128 { 2 } else { 1 };
    (OUTER_ROWS + 2 * stages * inner_rows(head_dim)) * pitch_bytes(head_dim)
}

fn backward_shared_bytes(head_dim: usize) -> usize {
    2 * (OUTER_ROWS + inner_rows(head_dim)) * pitch_bytes(head_dim)
}

/// What attention over a batch takes at least.
pub(super) fn work<D: Device>(
    attention: &Attention<'_, CudaBackend<D>>,
    batch: &CudaBatch<D>,
    is_backward: bool,
) -> Work {
    attention.work(batch.sample_lengths(), batch.tokens, HALF_BYTES, is_backward)
}

/// Widths of one call.
#[derive(Clone, Copy)]
struct Widths {
    /// Queries, `Q·D`.
    query: usize,
    /// Keys, as many values: `K·D`.
    key: usize,
    /// Queries and keys after the rotation.
    rotated: usize,
    /// Queries, keys and values side by side.
    qkv: usize,
}

impl Widths {
    fn of<D: Device>(attention: &Attention<'_, CudaBackend<D>>) -> Self {
        let query = attention.query_heads * attention.head_dim;
        let key = attention.key_value_heads * attention.head_dim;
        Self { query, key, rotated: query + key, qkv: query + 2 * key }
    }
}

/// Queries and keys after the rotation, values as projected: `[T, …]` with their row lengths.
struct Operands {
    q: Argument,
    k: Argument,
    v: Argument,
    /// Row lengths: of queries and keys, and of values.
    rotated_leading: usize,
    value_leading: usize,
}

impl Operands {
    /// For the TMA.
    fn boxes(&self, rows: usize, widths: Widths) -> Result<[Argument; 3]> {
        Ok([
            boxes(self.q, [rows, widths.query], self.rotated_leading, HOPPER_BOX_ROWS)?,
            boxes(self.k, [rows, widths.key], self.rotated_leading, HOPPER_BOX_ROWS)?,
            boxes(self.v, [rows, widths.key], self.value_leading, HOPPER_BOX_ROWS)?,
        ])
    }
}

/// `Angles` where Hopper's kernels rotate nothing back.
const NO_ANGLES: [Argument; 6] = [NULL, NULL, NULL, Argument::I32(0), Argument::I32(0), Argument::I32(0)];

/// What the projection left, `[T, (Q + 2K)·D]`.
pub(super) struct Projected<'a, D: Device> {
    pub qkv: &'a CudaBuffer<D>,
    /// Whether queries and keys are as attention reads them, which Hopper's kernels alone rotate back.
    pub is_rotated: bool,
}

/// Where the rows of a call stand inside their texts.
pub(super) struct Positions {
    /// `[T]` as the kernels read them.
    array: Argument,
    /// `[T]` tokens of each row's text; null where all rows are rotated by one stretch of the table.
    lengths: Argument,
    /// Row of the table of what the array counts from.
    first_row: usize,
    /// Tokens of the longest text.
    longest: usize,
}

impl Positions {
    /// `Angles` of rope_angles.h, without the number of rotated columns.
    pub fn angles<D: Device>(&self, rotations: &Rotations<'_, CudaBackend<D>>) -> Result<[Argument; 6]> {
        let long = rotations.long.unwrap_or(LongTexts { longer_than: usize::MAX, first_row: 0 });
        let short_end = rotations.first_row + self.longest.min(long.longer_than);
        let end = short_end.max(rotations.row_of(self.longest) + self.longest);
        Ok([
            rotations.table.first(end * rotations.width)?,
            self.array,
            self.lengths,
            int(self.first_row)?,
            int(long.longer_than.min(i32::MAX as usize))?,
            int(long.first_row)?,
        ])
    }
}

impl<D: Device> CudaBackend<D> {
    /// `rope_forward` or `rope_backward` on `[input, output]`.
    fn rope(
        &self,
        kernel: &str,
        attention: &Attention<'_, Self>,
        rows: usize,
        positions: &Positions,
        [input, output]: [Argument; 2],
    ) -> Result<()> {
        let Attention { query_heads, key_value_heads, head_dim, query_norm, key_norm, rotations, .. } =
            *attention;
        let settings = [query_norm, key_norm].map(|norm| norm.map(|norm| (norm.weight_offset, norm.epsilon)));
        if let [Some(query), Some(key)] = settings
            && query != key
        {
            return Err(Error::internal(format!("norms of queries and keys with {query:?} and {key:?}")));
        }
        let (offset, epsilon) = settings[0].or(settings[1]).unwrap_or_default();
        let weight = |norm: Option<RmsNorm<'_, Self>>| norm.map_or(Ok(NULL), |norm| self.norm_weight(norm));
        let [table, array, lengths, first_row, longer_than, long_first_row] = positions.angles(&rotations)?;
        let arguments = [
            input,
            weight(query_norm)?,
            weight(key_norm)?,
            table,
            array,
            lengths,
            output,
            int(rows)?,
            int(query_heads)?,
            int(key_value_heads)?,
            int(head_dim)?,
            int(rotations.width)?,
            first_row,
            longer_than,
            long_first_row,
            Argument::F32(offset),
            Argument::F32(epsilon),
        ];
        let heads = rows * (query_heads + key_value_heads);
        let shape = Shape::blocks(heads.div_ceil(ROPE_HEADS), THREADS);
        // SAFETY: the callers give [T, qkv] and [T, rotated], and the table covers every position.
        unsafe { self.kernels.launch_half(kernel, shape, &arguments) }
    }

    /// What attention over `rows` reads: in place if it is rotated, else rotated into scratch memory.
    fn operands(
        &self,
        attention: &Attention<'_, Self>,
        rows: usize,
        positions: &Positions,
        projected: &Projected<'_, D>,
        scratch: &mut Scratch<D>,
    ) -> Result<Operands> {
        let widths = Widths::of(attention);
        // A column's address; rows follow at the buffer's own length.
        let column = |first: usize, width| projected.qkv.at(first, (rows - 1) * widths.qkv + width);
        let v = column(widths.rotated, widths.key)?;
        if projected.is_rotated {
            let (q, k) = (column(0, widths.query)?, column(widths.query, widths.key)?);
            return Ok(Operands { q, k, v, rotated_leading: widths.qkv, value_leading: widths.qkv });
        }
        let region = scratch.rotated.reserve(self.device(), rows * widths.rotated * HALF_BYTES)?;
        let rotated = region.first(rows * widths.rotated * HALF_BYTES)?;
        self.rope("rope_forward", attention, rows, positions, [column(0, widths.qkv)?, rotated])?;
        let key_bytes = (rows - 1) * widths.rotated + widths.key;
        Ok(Operands {
            q: rotated,
            k: region.at(widths.query * HALF_BYTES, key_bytes * HALF_BYTES)?,
            v,
            rotated_leading: widths.rotated,
            value_leading: widths.qkv,
        })
    }

    pub(super) fn batch_positions(
        &self,
        attention: &Attention<'_, Self>,
        batch: &CudaBatch<D>,
    ) -> Result<Positions> {
        Ok(Positions {
            array: batch.positions()?,
            lengths: if attention.rotations.long.is_some() { batch.lengths()? } else { NULL },
            first_row: attention.rotations.first_row,
            longest: batch.longest_sample,
        })
    }

    /// Factor, soft cap (0: none) and window of the scores.
    fn score_arguments(&self, attention: &Attention<'_, Self>) -> Result<[Argument; 3]> {
        Ok([
            Argument::F32(attention.softmax_scale),
            Argument::F32(attention.soft_cap.unwrap_or(0.0)),
            int(attention.window.unwrap_or(0).min(i32::MAX as usize))?,
        ])
    }

    /// Heads, row lengths of queries, keys and values, and the scores: what all kernels over a batch take after the tensors.
    fn shape_arguments(&self, attention: &Attention<'_, Self>, operands: &Operands) -> Result<Vec<Argument>> {
        let Attention { query_heads, key_value_heads, .. } = *attention;
        let &Operands { rotated_leading, value_leading, .. } = operands;
        let sizes = [query_heads, key_value_heads, rotated_leading, rotated_leading, value_leading];
        let mut arguments = sizes.into_iter().map(int).collect::<Result<Vec<_>>>()?;
        arguments.extend(self.score_arguments(attention)?);
        Ok(arguments)
    }

    /// Whether Hopper's kernels compute heads of this width.
    pub(super) fn is_for_hopper(&self, head_dim: usize) -> bool {
        self.kernels.uses_hopper && HOPPER_HEAD_DIMS.contains(&head_dim)
    }

    /// What Hopper's kernels take after the tensors: their boxes know the row lengths.
    fn hopper_shape_arguments(&self, attention: &Attention<'_, Self>) -> Result<Vec<Argument>> {
        let mut arguments = vec![int(attention.query_heads)?, int(attention.key_value_heads)?];
        arguments.extend(self.score_arguments(attention)?);
        Ok(arguments)
    }

    /// A block for each tile and head, with `rows` of the head in shared memory.
    fn hopper_shape(batch: &CudaBatch<D>, heads: usize, head_dim: usize, rows: usize) -> Shape {
        let shared_bytes = rows * head_dim * HALF_BYTES + HOPPER_REST_BYTES;
        Shape { grid: [batch.hopper_tiles, heads, 1], threads: HOPPER_THREADS, shared_bytes }
    }

    /// Hopper's kernels also take the shares of the adapter that reads `out`, if they are given its operands.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attention_forward(
        &self,
        attention: &Attention<'_, Self>,
        batch: &CudaBatch<D>,
        projected: &Projected<'_, D>,
        log_sum: &CudaFloats<D>,
        out: &CudaBuffer<D>,
        output_shares: Option<&ShareOperands>,
        scratch: &mut Scratch<D>,
    ) -> Result<()> {
        let (rows, widths, dim) = (batch.tokens, Widths::of(attention), attention.head_dim);
        if rows == 0 {
            return Ok(());
        }
        let positions = self.batch_positions(attention, batch)?;
        let operands = self.operands(attention, rows, &positions, projected, scratch)?;
        let out = out.first(rows * widths.query)?;
        let results = [out, log_sum.first(rows * attention.query_heads)?];
        if self.is_for_hopper(dim) {
            let mut arguments = operands.boxes(rows, widths)?.to_vec();
            arguments.extend(results);
            arguments.push(batch.hopper_sample_tiles()?);
            arguments.extend(self.hopper_shape_arguments(attention)?);
            let (a, partials, rank) = match output_shares {
                Some(of) => (of.boxes_of_a(widths.query)?, of.partials, of.shares.rank),
                None => (arguments[0], NULL, 0),
            };
            arguments.extend([a, partials, int(rows)?, int(rank_leading(rank))?]);
            let shape = Self::hopper_shape(batch, attention.query_heads, dim, HOPPER_FORWARD_ROWS);
            // SAFETY: as below.
            return unsafe {
                self.kernels.launch_half(&format!("attention_forward_sm90a_d{dim}"), shape, &arguments)
            };
        }
        let mut arguments = vec![operands.q, operands.k, operands.v];
        arguments.extend(results);
        arguments.push(batch.sample_tiles()?);
        arguments.extend(self.shape_arguments(attention, &operands)?);
        let grid = [batch.tiles, attention.query_heads, 1];
        let shape = Shape { grid, threads: THREADS, shared_bytes: forward_shared_bytes(dim) };
        // SAFETY: tiles name rows of the batch alone, and every operand has that many rows.
        unsafe { self.kernels.launch_half(&format!("attention_forward_d{dim}"), shape, &arguments) }
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn attention_gradient(
        &self,
        attention: &Attention<'_, Self>,
        batch: &CudaBatch<D>,
        projected: &Projected<'_, D>,
        log_sum: &CudaFloats<D>,
        out: &CudaBuffer<D>,
        dout: &CudaBuffer<D>,
        dqkv: &CudaBuffer<D>,
    ) -> Result<()> {
        let (rows, widths, dim) = (batch.tokens, Widths::of(attention), attention.head_dim);
        if rows == 0 {
            return Ok(());
        }
        let mut scratch = super::lock(&self.scratch);
        let positions = self.batch_positions(attention, batch)?;
        let operands = self.operands(attention, rows, &positions, projected, &mut scratch)?;
        let heads = rows * attention.query_heads;
        let delta = scratch.delta.reserve(self.device(), heads * FLOAT_BYTES)?.first(heads * FLOAT_BYTES)?;
        let dout = dout.first(rows * widths.query)?;
        let arguments = [out.first(rows * widths.query)?, dout, delta, int(heads)?, int(dim)?];
        let shape = Shape::blocks(heads.div_ceil(ROPE_HEADS), THREADS);
        // SAFETY: out and dout [T, Q·D], delta [T, Q].
        unsafe { self.kernels.launch_half("attention_delta", shape, &arguments)? };

        let column = |first: usize| dqkv.at(first, rows * widths.qkv - first);
        let [dq, dk, dv] = [column(0)?, column(widths.query)?, column(widths.rotated)?];
        let leading = int(widths.qkv)?;
        let statistics = [log_sum.first(heads)?, delta];
        let launch = |owner: &str, shape: Shape, inputs: &[Argument], results: &[Argument]| {
            let name = format!("attention_backward_{owner}_d{dim}");
            // SAFETY: as in the forward.
            unsafe { self.kernels.launch_half(&name, shape, &[inputs, results].concat()) }
        };
        let [query_heads, key_heads] = [attention.query_heads, attention.key_value_heads];
        if self.is_for_hopper(dim) {
            let mut inputs = operands.boxes(rows, widths)?.to_vec();
            inputs.push(boxes(dout, [rows, widths.query], widths.query, HOPPER_BOX_ROWS)?);
            inputs.extend(statistics);
            inputs.push(batch.hopper_sample_tiles()?);
            inputs.extend(self.hopper_shape_arguments(attention)?);
            inputs.extend(match projected.is_rotated {
                true => positions.angles(&attention.rotations)?,
                false => NO_ANGLES,
            });
            let shape = Self::hopper_shape(batch, query_heads, dim, HOPPER_QUERIES_ROWS);
            launch("queries_sm90a", shape, &inputs, &[dq, leading])?;
            let shape = Self::hopper_shape(batch, key_heads, dim, HOPPER_KEYS_ROWS);
            launch("keys_sm90a", shape, &inputs, &[dk, dv, leading])?;
            if projected.is_rotated {
                return Ok(());
            }
        } else {
            let mut inputs = vec![operands.q, operands.k, operands.v, dout];
            inputs.extend(statistics);
            inputs.push(batch.sample_tiles()?);
            inputs.extend(self.shape_arguments(attention, &operands)?);
            let shared_bytes = backward_shared_bytes(dim);
            let shape = Shape { grid: [batch.tiles, query_heads, 1], threads: THREADS, shared_bytes };
            launch("queries", shape, &inputs, &[dq, leading])?;
            let shape = Shape { grid: [batch.tiles, key_heads, dim.div_ceil(128)], ..shape };
            launch("keys", shape, &inputs, &[dk, dv, leading, leading])?;
        }
        let projected = projected.qkv.first(rows * widths.qkv)?;
        self.rope("rope_backward", attention, rows, &positions, [projected, dq])
    }

    pub(super) fn attention_over_cache(
        &self,
        attention: &Attention<'_, Self>,
        rows: usize,
        position: usize,
        qkv: &CudaBuffer<D>,
        cache: &KvCache<Self>,
        out: &CudaBuffer<D>,
    ) -> Result<()> {
        let (widths, end) = (Widths::of(attention), position + rows);
        if end > cache.capacity {
            return Err(Error::internal(format!("position {end} of a cache for {}", cache.capacity)));
        }
        let counting = self.counting(rows)?;
        let positions = Positions {
            array: counting.first(rows * FLOAT_BYTES)?,
            lengths: NULL,
            first_row: attention.rotations.row_of(end) + position,
            longest: end,
        };
        let mut scratch = super::lock(&self.scratch);
        let projected = Projected { qkv, is_rotated: false };
        let operands = self.operands(attention, rows, &positions, &projected, &mut scratch)?;
        let Operands { q, k, v, rotated_leading, value_leading } = operands;
        for (input, leading, cached) in [(k, rotated_leading, &cache.keys), (v, value_leading, &cache.values)]
        {
            let out = cached.at(position * widths.key, rows * widths.key)?;
            // SAFETY: `rotate` checked the rows of k and v, and the cache has room for as many.
            unsafe { self.copy_columns(rows, widths.key, (input, leading), (out, widths.key))? };
        }
        let past = end * widths.key;
        let mut arguments =
            vec![q, cache.keys.first(past)?, cache.values.first(past)?, out.first(rows * widths.query)?];
        for size in
            [position, attention.query_heads, attention.key_value_heads, attention.head_dim, rotated_leading]
        {
            arguments.push(int(size)?);
        }
        arguments.extend(self.score_arguments(attention)?);
        let shape = Shape { grid: [rows, attention.query_heads, 1], threads: THREADS, shared_bytes: 0 };
        // SAFETY: every operand was asked for by its shape.
        unsafe { self.kernels.launch_half("attention_cached", shape, &arguments) }
    }
}
