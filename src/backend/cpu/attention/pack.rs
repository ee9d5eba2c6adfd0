//! Keys and values in the layouts that the products read.
//!
//! Each block of keys holds, head after head, `[D, KEY_BLOCK]` (a head's rows transposed; columns past the block's rows
//! are zero) or `[KEY_BLOCK, D]`.

use super::super::memory::DisjointParts;
use super::super::threads::Threads;
use super::{Heads, KEY_BLOCK, KeyBlock};

/// Where a block's raw keys or values lie.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub values: &'a [f32],
    pub row_stride: usize,
    /// Column of head 0.
    pub first_column: usize,
}

impl<'a> Source<'a> {
    fn head_row(&self, heads: &Heads<'_>, row: usize, head: usize) -> &'a [f32] {
        &self.values[row * self.row_stride + self.first_column + head * heads.head_dim..][..heads.head_dim]
    }
}

/// How a row is treated on its way.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Treatment {
    /// A raw key: normalise and rotate.
    Turn,
    /// A value, or a key that was turned before.
    Keep,
}

/// A block's elements for all heads.
pub(super) fn block_elements(heads: &Heads<'_>) -> usize {
    heads.key_value_heads * KEY_BLOCK * heads.head_dim
}

/// Packs blocks as `[block][head][D][KEY_BLOCK]`; with `rows`, also writes each treated row to `[head][row][D]` of
/// `total_rows` rows.
pub(super) fn pack_transposed(
    threads: &Threads,
    heads: &Heads<'_>,
    blocks: &[KeyBlock],
    source: Source<'_>,
    treatment: Treatment,
    packed: &mut [f32],
    rows: Option<(&mut [f32], usize)>,
) {
    let dim = heads.head_dim;
    let head_elements = KEY_BLOCK * dim;
    let packed = DisjointParts::new(packed);
    let total_rows = rows.as_ref().map_or(0, |(_, total)| *total);
    let rows = rows.map(|(rows, _)| DisjointParts::new(rows));
    for_each_block(threads, blocks, |index, block| {
        let mut scratch = threads.scratch();
        let row_tile = scratch.at_least(head_elements);
        for head in 0..heads.key_value_heads {
            for (row, turned) in row_tile.chunks_exact_mut(dim).take(block.rows).enumerate() {
                let raw = source.head_row(heads, block.first_row + row, head);
                match treatment {
                    Treatment::Turn => heads.turn(heads.key_norm, block.rotation + row, raw, turned),
                    Treatment::Keep => turned.copy_from_slice(raw),
                }
            }
            if let Some(rows) = &rows {
                let start = (head * total_rows + block.first_row) * dim;
                // SAFETY: rows belong to one block each, and this is its only task.
                let rows = unsafe { rows.part(start..start + block.rows * dim) };
                rows.copy_from_slice(&row_tile[..block.rows * dim]);
            }
            let start = (index * heads.key_value_heads + head) * head_elements;
            // SAFETY: one part for each block and head.
            let packed = unsafe { packed.part(start..start + head_elements) };
            for (feature, column) in packed.chunks_exact_mut(KEY_BLOCK).enumerate() {
                for (row, element) in column.iter_mut().enumerate() {
                    *element = if row < block.rows { row_tile[row * dim + feature] } else { 0.0 };
                }
            }
        }
    });
}

/// Packs blocks as `[block][head][KEY_BLOCK][D]`, rows past a block's left as they are.
pub(super) fn pack_rows(
    threads: &Threads,
    heads: &Heads<'_>,
    blocks: &[KeyBlock],
    source: Source<'_>,
    packed: &mut [f32],
) {
    let dim = heads.head_dim;
    let packed = DisjointParts::new(packed);
    for_each_block(threads, blocks, |index, block| {
        for head in 0..heads.key_value_heads {
            let start = (index * heads.key_value_heads + head) * KEY_BLOCK * dim;
            // SAFETY: one part for each block and head.
            let packed = unsafe { packed.part(start..start + block.rows * dim) };
            for (row, packed) in packed.chunks_exact_mut(dim).enumerate() {
                packed.copy_from_slice(source.head_row(heads, block.first_row + row, head));
            }
        }
    });
}

fn for_each_block(threads: &Threads, blocks: &[KeyBlock], task: impl Fn(usize, KeyBlock) + Send + Sync) {
    threads.for_each(blocks.len(), |index| task(index, blocks[index]));
}
