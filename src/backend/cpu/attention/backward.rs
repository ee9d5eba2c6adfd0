//! Backward: probabilities again from the scores and `log_sum`; one task a head of a sample.
//!
//! With `P` the probabilities and `delta = Σ dout·out` of each query and head: `dV = Pᵀ·dout`, `dP = dout·Vᵀ`,
//! `dS = scale·P·(dP − delta)`, `dQ = dS·K`, `dK = dSᵀ·Q`. The query heads of a group leave their `dK` and `dV` side by
//! side; they are then summed in order, and all gradients turned back through rotation and norm.

use std::ops::Range;

use super::super::CpuBackend;
use super::super::memory::DisjointParts;
use super::super::norm::add_row;
use super::super::product::{Before, Left, Right, Shape, multiply};
use super::super::rows::places;
use super::forward::batch_lengths;
use super::pack::{Source, Treatment, block_elements, pack_transposed};
use super::softmax::{dot, score_gradients};
use super::{AttentionScratch, Heads, KEY_BLOCK, KeyBlock, QUERY_BLOCK, Sequence};
use crate::backend::Attention;
use crate::batch::Batch;
use crate::error::Result;

/// What the operation was given.
struct Inputs<'a> {
    rows: usize,
    qkv: &'a [f32],
    log_sum: &'a [f32],
    out: &'a [f32],
    dout: &'a [f32],
}

/// What the tasks read: packed blocks; by head `[row][D]`; `deltas` by head `[row]`.
struct Operands<'a> {
    packed_keys: &'a [f32],
    packed_values: &'a [f32],
    key_rows: &'a [f32],
    queries: &'a [f32],
    output_gradients: &'a [f32],
    deltas: &'a [f32],
}

/// Gradients of one head and sample, `[rows, D]` each, keys and values for this query head alone.
struct HeadGradients<'a> {
    queries: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl CpuBackend {
    #[allow(clippy::too_many_arguments)]
    pub(in super::super) fn attention_gradient(
        &self,
        attention: &Attention<'_, Self>,
        batch: &Batch,
        qkv: &[f32],
        log_sum: &[f32],
        out: &[f32],
        dout: &[f32],
        dqkv: &mut [f32],
    ) -> Result<()> {
        let heads = Heads::new(self.simd, attention, batch_lengths(batch))?;
        let inputs = Inputs { rows: batch.token_count(), qkv, log_sum, out, dout };
        let mut scratch = self.attention_scratch();
        scratch.plan_batch(&heads, batch);
        self.prepare(&heads, &mut scratch, &inputs);
        self.head_gradients(&heads, &mut scratch, &inputs);
        self.turn_gradients_back(&heads, &mut scratch, batch, &inputs, dqkv);
        Ok(())
    }

    /// Packs keys, values, turned queries and `dout`, and sums the deltas.
    fn prepare(&self, heads: &Heads<'_>, scratch: &mut AttentionScratch, inputs: &Inputs<'_>) {
        let &Inputs { rows, qkv, out, dout, .. } = inputs;
        let dim = heads.head_dim;
        let AttentionScratch {
            key_blocks,
            query_blocks,
            keys,
            values,
            key_rows,
            queries,
            output_gradients,
            deltas,
            ..
        } = scratch;
        let packed = key_blocks.len() * block_elements(heads);
        let (keys, values) = (keys.at_least(packed), values.at_least(packed));
        let key_rows = key_rows.at_least(heads.key_value_heads * rows * dim);
        let (stride, first_column) = (heads.qkv_width(), heads.key_columns(0).start);
        let key_source = Source { values: qkv, row_stride: stride, first_column };
        let value_source = Source { first_column: heads.value_columns(0).start, ..key_source };
        let threads = &self.threads;
        pack_transposed(
            threads,
            heads,
            key_blocks,
            key_source,
            Treatment::Turn,
            keys,
            Some((key_rows, rows)),
        );
        pack_transposed(threads, heads, key_blocks, value_source, Treatment::Keep, values, None);

        let elements = heads.query_heads * rows * dim;
        let queries = DisjointParts::new(queries.at_least(elements));
        let output_gradients = DisjointParts::new(output_gradients.at_least(elements));
        let deltas = DisjointParts::new(deltas.at_least(heads.query_heads * rows));
        let query_blocks = &*query_blocks;
        threads.for_each(query_blocks.len(), |index| {
            let block = query_blocks[index];
            for head in 0..heads.query_heads {
                let start = head * rows + block.first_row;
                let elements = start * dim..(start + block.rows) * dim;
                // SAFETY: one part for each block and head.
                let (queries, output_gradients, deltas) = unsafe {
                    let deltas = deltas.part(start..start + block.rows);
                    (queries.part(elements.clone()), output_gradients.part(elements), deltas)
                };
                let by_row = queries.chunks_exact_mut(dim).zip(output_gradients.chunks_exact_mut(dim));
                for (offset, ((query, gradient), delta)) in by_row.zip(deltas).enumerate() {
                    let row = block.first_row + offset;
                    let raw = &qkv[row * heads.qkv_width()..][heads.query_columns(head)];
                    heads.turn(
                        heads.query_norm,
                        block.sequence.rotation + block.first_position + offset,
                        raw,
                        query,
                    );
                    let place = (row * heads.query_heads + head) * dim;
                    gradient.copy_from_slice(&dout[place..place + dim]);
                    *delta = dot(heads.simd, gradient, &out[place..place + dim]);
                }
            }
        });
    }

    /// Fills the scratch with the gradients of turned queries and keys and of values.
    fn head_gradients(&self, heads: &Heads<'_>, scratch: &mut AttentionScratch, inputs: &Inputs<'_>) {
        let (rows, dim) = (inputs.rows, heads.head_dim);
        let elements = heads.query_heads * rows * dim;
        let AttentionScratch {
            sequences,
            key_blocks,
            keys,
            values,
            key_rows,
            queries,
            output_gradients,
            deltas,
            query_gradients,
            key_gradients,
            value_gradients,
            ..
        } = scratch;
        let (sequences, key_blocks) = (&*sequences, &*key_blocks);
        let operands = Operands {
            packed_keys: keys,
            packed_values: values,
            key_rows,
            queries,
            output_gradients,
            deltas,
        };
        let queries = DisjointParts::new(query_gradients.at_least(elements));
        let keys = DisjointParts::new(key_gradients.at_least(elements));
        let values = DisjointParts::new(value_gradients.at_least(elements));
        self.threads.for_each(sequences.len() * heads.query_heads, |task| {
            let (sequence, head) = (sequences[task / heads.query_heads], task % heads.query_heads);
            let start = (head * rows + sequence.first_row) * dim;
            let part = start..start + sequence.rows * dim;
            // SAFETY: one part for each sequence and head.
            let gradients = unsafe {
                HeadGradients {
                    queries: queries.part(part.clone()),
                    keys: keys.part(part.clone()),
                    values: values.part(part),
                }
            };
            let blocks = &key_blocks[sequence.first_key_block..][..sequence.rows.div_ceil(KEY_BLOCK)];
            let mut tiles = self.threads.scratch();
            let tiles = tiles.at_least(2 * QUERY_BLOCK * KEY_BLOCK);
            head_backward(heads, sequence, blocks, head, inputs, &operands, gradients, tiles);
        });
    }

    /// Sums `dK` and `dV` over each group and takes `dQ` and `dK` back through rotation and norm.
    fn turn_gradients_back(
        &self,
        heads: &Heads<'_>,
        scratch: &mut AttentionScratch,
        batch: &Batch,
        inputs: &Inputs<'_>,
        dqkv: &mut [f32],
    ) {
        let (simd, dim, width, group) = (heads.simd, heads.head_dim, heads.qkv_width(), heads.group());
        let AttentionScratch { query_gradients, key_gradients, value_gradients, .. } = &*scratch;
        self.threads.for_row_blocks(&mut dqkv[..inputs.rows * width], width, |first, block| {
            let mut spare = self.threads.scratch();
            let spare = spare.at_least(dim);
            let by_row = block.chunks_exact_mut(width).zip(places(batch, first)).enumerate();
            for (offset, (gradient, place)) in by_row {
                let row = first + offset;
                let raw = &inputs.qkv[row * width..][..width];
                let rotation = heads.rotations.row_of(place.length) + place.position;
                let of_head = |head: usize| {
                    let start = (head * inputs.rows + row) * dim;
                    start..start + dim
                };
                for head in 0..heads.query_heads {
                    let columns = heads.query_columns(head);
                    let gradient = &mut gradient[columns.clone()];
                    gradient.copy_from_slice(&query_gradients[of_head(head)]);
                    heads.turn_backward(heads.query_norm, rotation, &raw[columns], gradient, spare);
                }
                let sum = |source: &[f32], head: usize, to: &mut [f32]| {
                    to.copy_from_slice(&source[of_head(head * group)]);
                    for member in 1..group {
                        add_row(simd, &source[of_head(head * group + member)], to);
                    }
                };
                for head in 0..heads.key_value_heads {
                    let columns = heads.key_columns(head);
                    let key = &mut gradient[columns.clone()];
                    sum(key_gradients, head, key);
                    heads.turn_backward(heads.key_norm, rotation, &raw[columns], key, spare);
                    sum(value_gradients, head, &mut gradient[heads.value_columns(head)]);
                }
            }
        });
    }
}

/// All blocks of one head and sample: for each block of keys the queries that see it, in order.
#[allow(clippy::too_many_arguments)]
fn head_backward(
    heads: &Heads<'_>,
    sequence: Sequence,
    key_blocks: &[KeyBlock],
    head: usize,
    inputs: &Inputs<'_>,
    operands: &Operands<'_>,
    gradients: HeadGradients<'_>,
    tiles: &mut [f32],
) {
    let (simd, dim, group) = (heads.simd, heads.head_dim, heads.group());
    let (scores, score_changes) = tiles.split_at_mut(QUERY_BLOCK * KEY_BLOCK);
    let HeadGradients { queries: query_gradients, keys: key_gradients, values: value_gradients } = gradients;
    query_gradients.fill(0.0);
    key_gradients.fill(0.0);
    value_gradients.fill(0.0);
    // Rows of this sample in the arrays by head.
    let by_query_head = head * inputs.rows + sequence.first_row;
    let by_key_head = head / group * inputs.rows + sequence.first_row;
    for (number, &block) in key_blocks.iter().enumerate() {
        let start =
            ((sequence.first_key_block + number) * heads.key_value_heads + head / group) * KEY_BLOCK * dim;
        let packed = start..start + KEY_BLOCK * dim;
        let keys = Right { values: &operands.packed_keys[packed.clone()], stride: KEY_BLOCK };
        let values = Right { values: &operands.packed_values[packed], stride: KEY_BLOCK };
        let last_key = block.first_position + block.rows - 1;
        let end = sequence.rows.min(last_key.saturating_add(heads.window));
        let key_rows = &operands.key_rows[(by_key_head + block.first_position) * dim..][..block.rows * dim];
        let block_part = block.first_position * dim..(block.first_position + block.rows) * dim;
        for first in (block.first_position..end).step_by(QUERY_BLOCK) {
            let rows = QUERY_BLOCK.min(end - first);
            let columns = heads.visible_in(block, first + rows - 1).end;
            let here = (by_query_head + first) * dim..(by_query_head + first + rows) * dim;
            let (queries, output_gradients) =
                (&operands.queries[here.clone()], &operands.output_gradients[here]);
            let tile = Shape { rows, columns, depth: dim };
            multiply(simd, tile, Left::rows(queries, dim), keys, Before::Undefined, scores, KEY_BLOCK);
            let left = Left::rows(output_gradients, dim);
            multiply(simd, tile, left, values, Before::Undefined, score_changes, KEY_BLOCK);
            for row in 0..rows {
                let position = first + row;
                let tile_row: Range<usize> = row * KEY_BLOCK..row * KEY_BLOCK + columns;
                score_gradients(
                    simd,
                    &mut scores[tile_row.clone()],
                    &mut score_changes[tile_row],
                    heads.visible_in(block, position),
                    heads.softmax_scale,
                    heads.soft_cap,
                    inputs.log_sum[(sequence.first_row + position) * heads.query_heads + head],
                    operands.deltas[by_query_head + position],
                );
            }
            let over_queries = Shape { rows: columns, columns: dim, depth: rows };
            let gradient_rows = Right { values: output_gradients, stride: dim };
            let probabilities = Left::transposed(scores, KEY_BLOCK);
            let to = &mut value_gradients[block_part.clone()];
            multiply(simd, over_queries, probabilities, gradient_rows, Before::Sum, to, dim);
            let changes = Left::transposed(score_changes, KEY_BLOCK);
            let query_rows = Right { values: queries, stride: dim };
            let to = &mut key_gradients[block_part.clone()];
            multiply(simd, over_queries, changes, query_rows, Before::Sum, to, dim);
            let over_keys = Shape { rows, columns: dim, depth: columns };
            let changes = Left::rows(score_changes, KEY_BLOCK);
            let to = &mut query_gradients[first * dim..(first + rows) * dim];
            multiply(simd, over_keys, changes, Right { values: key_rows, stride: dim }, Before::Sum, to, dim);
        }
    }
}
