//! Causal attention with grouped heads, in blocks with a running softmax (Dao et al. 2022): no `T × T` matrix exists.
//!
//! Queries and keys are normalised and rotated into scratch, head by head, and keys and values packed in blocks of
//! [`KEY_BLOCK`] positions in the layouts that the products read. One task owns one head and one block of queries
//! (forward) or one head of one sample (backward), so every sum has a fixed order.
//!
//! Legend: `head_dim` = `D`, `query_heads` = `Q`, `key_value_heads` = `K`; a *sequence* is one sample of the batch, or
//! the cache with the new positions at its end.

mod backward;
mod cached;
mod forward;
mod pack;
mod softmax;

use std::ops::Range;

use super::CpuBackend;
use super::memory::AlignedFloats;
use super::simd::{Simd, simd_fn};
use crate::backend::{Attention, RmsNorm, Rotations};
use crate::batch::Batch;
use crate::error::{Error, Result};
use forward::batch_lengths;
use softmax::{Running, absorb, cap_scores};

/// Positions of a block of queries.
const QUERY_BLOCK: usize = 48;
/// Positions of a block of keys.
const KEY_BLOCK: usize = 64;

/// Scratch of the attention operations; grows to the largest batch.
#[derive(Default)]
pub(super) struct AttentionScratch {
    sequences: Vec<Sequence>,
    key_blocks: Vec<KeyBlock>,
    query_blocks: Vec<QueryBlock>,
    /// Packed keys and values.
    keys: AlignedFloats,
    values: AlignedFloats,
    /// Rotated keys, row-major by head: backward only, as the rest.
    key_rows: AlignedFloats,
    queries: AlignedFloats,
    output_gradients: AlignedFloats,
    deltas: AlignedFloats,
    query_gradients: AlignedFloats,
    key_gradients: AlignedFloats,
    value_gradients: AlignedFloats,
    /// Scores of decoding.
    scores: AlignedFloats,
}

/// Consecutive positions that attend to one another.
#[derive(Clone, Copy)]
struct Sequence {
    /// First row of its queries in the operation's buffers.
    first_row: usize,
    /// Number of query rows.
    rows: usize,
    /// Position of the first query.
    first_position: usize,
    /// Its first block among the key blocks.
    first_key_block: usize,
    /// Row of its position 0 in the table of rotations.
    rotation: usize,
}

/// Up to [`KEY_BLOCK`] consecutive positions of a sequence whose keys and values are packed together.
#[derive(Clone, Copy)]
struct KeyBlock {
    /// Row of the first key in the operation's buffers (or the cache).
    first_row: usize,
    /// Position of the first key.
    first_position: usize,
    /// Number of keys.
    rows: usize,
    /// Row of the first key in the table of rotations.
    rotation: usize,
}

/// Up to [`QUERY_BLOCK`] consecutive query rows of a sequence.
#[derive(Clone, Copy)]
struct QueryBlock {
    sequence: Sequence,
    /// Row of the first query in the operation's buffers.
    first_row: usize,
    /// Position of the first query.
    first_position: usize,
    /// Number of queries.
    rows: usize,
}

impl AttentionScratch {
    /// Cuts a batch into sequences and blocks.
    fn plan_batch(&mut self, heads: &Heads<'_>, batch: &Batch) {
        self.clear_plan();
        for (length, &start) in batch_lengths(batch).zip(&batch.sample_starts) {
            self.plan_sequence(start, length, 0, start, heads.rotations.row_of(length));
        }
    }

    fn clear_plan(&mut self) {
        self.sequences.clear();
        self.key_blocks.clear();
        self.query_blocks.clear();
    }

    /// Adds a sequence of `rows` queries from `first_position` on, whose keys at positions `0..first_position + rows`
    /// start at row `first_key_row`; position 0 is rotated by row `rotation` of the table.
    fn plan_sequence(
        &mut self,
        first_row: usize,
        rows: usize,
        first_position: usize,
        first_key_row: usize,
        rotation: usize,
    ) {
        let first_key_block = self.key_blocks.len();
        let sequence = Sequence { first_row, rows, first_position, first_key_block, rotation };
        self.sequences.push(sequence);
        let key_count = first_position + rows;
        for first in (0..key_count).step_by(KEY_BLOCK) {
            let rows = KEY_BLOCK.min(key_count - first);
            self.key_blocks.push(KeyBlock {
                first_row: first_key_row + first,
                first_position: first,
                rows,
                rotation: rotation + first,
            });
        }
        for first in (0..rows).step_by(QUERY_BLOCK) {
            self.query_blocks.push(QueryBlock {
                sequence,
                first_row: first_row + first,
                first_position: first_position + first,
                rows: QUERY_BLOCK.min(rows - first),
            });
        }
    }
}

/// Sizes and norms of the heads, shared by every task.
#[derive(Clone, Copy)]
struct Heads<'a> {
    simd: Simd,
    query_heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    softmax_scale: f32,
    soft_cap: Option<f32>,
    window: usize,
    query_norm: Option<RmsNorm<'a, CpuBackend>>,
    key_norm: Option<RmsNorm<'a, CpuBackend>>,
    rotations: Rotations<'a, CpuBackend>,
}

impl<'a> Heads<'a> {
    /// For texts of these lengths.
    fn new(
        simd: Simd,
        attention: &Attention<'a, CpuBackend>,
        mut lengths: impl Iterator<Item = usize>,
    ) -> Result<Self> {
        let &Attention { query_heads, key_value_heads, head_dim, softmax_scale, rotations, .. } = attention;
        if key_value_heads == 0 || query_heads % key_value_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(Error::internal(format!(
                "attention of {query_heads} query and {key_value_heads} key-value heads of width {head_dim}"
            )));
        }
        let width = rotations.width;
        if width == 0 || width % 2 != 0 || width > head_dim {
            return Err(Error::internal(format!("{width} rotated columns of {head_dim}")));
        }
        let rows = rotations.table.len() / width;
        if let Some(length) = lengths.find(|length| rotations.row_of(*length) + length > rows) {
            let first = rotations.row_of(length);
            return Err(Error::internal(format!(
                "{length} positions from row {first} on, the table of rotations has {rows}"
            )));
        }
        Ok(Self {
            simd,
            query_heads,
            key_value_heads,
            head_dim,
            softmax_scale,
            soft_cap: attention.soft_cap,
            window: attention.window.unwrap_or(usize::MAX),
            query_norm: attention.query_norm,
            key_norm: attention.key_norm,
            rotations,
        })
    }

    /// Query heads that share a key-value head.
    fn group(&self) -> usize {
        self.query_heads / self.key_value_heads
    }

    /// Elements of a row of `qkv`.
    fn qkv_width(&self) -> usize {
        (self.query_heads + 2 * self.key_value_heads) * self.head_dim
    }

    /// Columns of query head `head` in a row of `qkv` (and of `out`).
    fn query_columns(&self, head: usize) -> Range<usize> {
        head * self.head_dim..(head + 1) * self.head_dim
    }

    /// Columns of key head `head` in a row of `qkv`.
    fn key_columns(&self, head: usize) -> Range<usize> {
        self.query_columns(self.query_heads + head)
    }

    /// Columns of value head `head` in a row of `qkv`.
    fn value_columns(&self, head: usize) -> Range<usize> {
        self.query_columns(self.query_heads + self.key_value_heads + head)
    }

    /// Turns the rotated columns of `x` by `direction` times a row of the table.
    fn rotate(&self, row: usize, direction: f32, x: &mut [f32]) {
        let Rotations { table, width, .. } = self.rotations;
        rotate(self.simd, &table[row * width..][..width], direction, &mut x[..width]);
    }

    /// A raw query or key, normalised and rotated by a row of the table.
    fn turn(&self, norm: Option<RmsNorm<'_, CpuBackend>>, row: usize, raw: &[f32], turned: &mut [f32]) {
        match norm {
            Some(norm) => norm.rows(self.simd, raw, turned),
            None => turned.copy_from_slice(raw),
        }
        self.rotate(row, 1.0, turned);
    }

    /// Replaces the gradient of a turned query or key by that of the raw one; `spare` holds a head's elements.
    fn turn_backward(
        &self,
        norm: Option<RmsNorm<'_, CpuBackend>>,
        row: usize,
        raw: &[f32],
        gradient: &mut [f32],
        spare: &mut [f32],
    ) {
        self.rotate(row, -1.0, gradient);
        if let Some(norm) = norm {
            spare.copy_from_slice(gradient);
            gradient.fill(0.0);
            norm.rows_backward(self.simd, raw, spare, gradient);
        }
    }

    /// [`absorb`] of raw scores, scaled and capped.
    fn absorb(&self, scores: &mut [f32], visible: Range<usize>, running: Running) -> (Running, f32) {
        let scale = match self.soft_cap {
            None => self.softmax_scale,
            Some(cap) => {
                cap_scores(self.simd, &mut scores[visible.clone()], self.softmax_scale, cap);
                1.0
            }
        };
        absorb(self.simd, scores, visible, scale, running)
    }

    /// The key positions that a query at `position` sees.
    fn visible(&self, position: usize) -> Range<usize> {
        (position + 1).saturating_sub(self.window)..position + 1
    }

    /// Columns of a block of keys that a query at `position` sees.
    fn visible_in(&self, block: KeyBlock, position: usize) -> Range<usize> {
        let Range { start, end } = self.visible(position);
        let clamp = |bound: usize| bound.saturating_sub(block.first_position).min(block.rows);
        clamp(start)..clamp(end)
    }

    /// The key blocks (numbered inside their sequence) that a block of queries sees.
    fn blocks_seen(&self, queries: QueryBlock) -> Range<usize> {
        let first = self.visible(queries.first_position).start;
        let end = queries.first_position + queries.rows;
        first / KEY_BLOCK..end.div_ceil(KEY_BLOCK)
    }
}

simd_fn! {
    /// Rotates the pairs `(i, i + half)` of `x` by `direction` (1 or -1) times the angles whose cosines and sines the
    /// table's row holds (Su et al. 2021).
    fn rotate<V>(simd: Simd, row: &[f32], direction: f32, x: &mut [f32]) -> () {
        let half = x.len() / 2;
        let (cosines, sines) = row.split_at(half);
        let (first, second) = x.split_at_mut(half);
        let direction = V::splat(direction);
        let angles = cosines.chunks(V::LANES).zip(sines.chunks(V::LANES));
        for ((cosine, sine), (first, second)) in
            angles.zip(first.chunks_mut(V::LANES).zip(second.chunks_mut(V::LANES)))
        {
            let (cosine, sine) = (V::from_slice(cosine), V::from_slice(sine) * direction);
            let (a, b) = (V::from_slice(first), V::from_slice(second));
            (a * cosine - b * sine).to_slice(first);
            (b * cosine + a * sine).to_slice(second);
        }
    }
}
