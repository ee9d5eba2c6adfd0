//! Forward: one task a block of queries and head.

use super::super::CpuBackend;
use super::super::memory::DisjointParts;
use super::super::product::{Before, Left, Right, Shape, multiply};
use super::pack::{Source, Treatment, block_elements, pack_rows, pack_transposed};
use super::softmax::{Running, scale_row, scaled_copy};
use super::{AttentionScratch, Heads, KEY_BLOCK, QUERY_BLOCK, QueryBlock};
use crate::backend::Attention;
use crate::batch::Batch;
use crate::error::Result;

impl CpuBackend {
    pub(in super::super) fn attention_forward(
        &self,
        attention: &Attention<'_, Self>,
        batch: &Batch,
        qkv: &[f32],
        log_sum: &mut [f32],
        out: &mut [f32],
    ) -> Result<()> {
        let heads = Heads::new(self.simd, attention, batch_lengths(batch))?;
        let mut scratch = self.attention_scratch();
        scratch.plan_batch(&heads, batch);
        let key_columns =
            Source { values: qkv, row_stride: heads.qkv_width(), first_column: heads.key_columns(0).start };
        let value_columns = Source { first_column: heads.value_columns(0).start, ..key_columns };
        self.attend(
            &heads,
            &mut scratch,
            [key_columns, value_columns],
            Treatment::Turn,
            qkv,
            out,
            Some(log_sum),
        );
        Ok(())
    }

    /// Attention of all planned queries over all planned keys.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attend(
        &self,
        heads: &Heads<'_>,
        scratch: &mut AttentionScratch,
        [key_source, value_source]: [Source<'_>; 2],
        treatment: Treatment,
        qkv: &[f32],
        out: &mut [f32],
        log_sum: Option<&mut [f32]>,
    ) {
        let AttentionScratch { key_blocks, query_blocks, keys, values, .. } = scratch;
        let packed = key_blocks.len() * block_elements(heads);
        let (keys, values) = (keys.at_least(packed), values.at_least(packed));
        pack_transposed(&self.threads, heads, key_blocks, key_source, treatment, keys, None);
        pack_rows(&self.threads, heads, key_blocks, value_source, values);
        let (keys, values, query_blocks) = (&*keys, &*values, &*query_blocks);
        let out = DisjointParts::new(out);
        let log_sum = log_sum.map(DisjointParts::new);
        // Late blocks see the most keys: they go first, and the short ones fill up the end.
        let blocks = query_blocks.len();
        self.threads.for_each(blocks * heads.query_heads, |task| {
            let block = query_blocks[blocks - 1 - task / heads.query_heads];
            let head = task % heads.query_heads;
            let mut tile = self.threads.scratch();
            let tile = QueryTile::compute(heads, block, head, qkv, keys, values, &mut tile);
            tile.write(heads, block, head, &out, log_sum.as_ref());
        });
    }
}

/// A finished block of one head's outputs.
struct QueryTile<'a> {
    running: [Running; QUERY_BLOCK],
    sums: &'a [f32],
}

impl<'a> QueryTile<'a> {
    fn compute(
        heads: &Heads<'_>,
        block: QueryBlock,
        head: usize,
        qkv: &[f32],
        keys: &[f32],
        values: &[f32],
        scratch: &'a mut super::AlignedFloats,
    ) -> Self {
        let (simd, dim) = (heads.simd, heads.head_dim);
        let elements = QUERY_BLOCK * dim;
        let (queries, rest) = scratch.at_least(2 * elements + QUERY_BLOCK * KEY_BLOCK).split_at_mut(elements);
        let (sums, scores) = rest.split_at_mut(elements);
        for (row, query) in queries.chunks_exact_mut(dim).take(block.rows).enumerate() {
            let raw = &qkv[(block.first_row + row) * heads.qkv_width()..][heads.query_columns(head)];
            heads.turn(heads.query_norm, block.sequence.rotation + block.first_position + row, raw, query);
        }
        sums.fill(0.0);
        let mut running = [Running::EMPTY; QUERY_BLOCK];
        let key_value_head = head / heads.group();
        for number in heads.blocks_seen(block) {
            let key_block = super::KeyBlock {
                first_row: 0,
                rotation: 0,
                first_position: number * KEY_BLOCK,
                rows: KEY_BLOCK.min(block.sequence.first_position + block.sequence.rows - number * KEY_BLOCK),
            };
            let start = ((block.sequence.first_key_block + number) * heads.key_value_heads + key_value_head)
                * KEY_BLOCK
                * dim;
            // Columns past the last visible key are never read.
            let columns = heads.visible_in(key_block, block.first_position + block.rows - 1).end;
            multiply(
                simd,
                Shape { rows: block.rows, columns, depth: dim },
                Left::rows(queries, dim),
                Right { values: &keys[start..][..KEY_BLOCK * dim], stride: KEY_BLOCK },
                Before::Undefined,
                scores,
                KEY_BLOCK,
            );
            for (row, running) in running.iter_mut().take(block.rows).enumerate() {
                let visible = heads.visible_in(key_block, block.first_position + row);
                let scores = &mut scores[row * KEY_BLOCK..][..columns];
                let (state, factor) = heads.absorb(scores, visible, *running);
                *running = state;
                if factor != 1.0 {
                    scale_row(simd, factor, &mut sums[row * dim..][..dim]);
                }
            }
            multiply(
                simd,
                Shape { rows: block.rows, columns: dim, depth: columns },
                Left::rows(scores, KEY_BLOCK),
                Right { values: &values[start..][..columns * dim], stride: dim },
                Before::Sum,
                sums,
                dim,
            );
        }
        Self { running, sums }
    }

    fn write(
        &self,
        heads: &Heads<'_>,
        block: QueryBlock,
        head: usize,
        out: &DisjointParts<'_, f32>,
        log_sum: Option<&DisjointParts<'_, f32>>,
    ) {
        let dim = heads.head_dim;
        for (row, (running, sums)) in
            self.running.iter().zip(self.sums.chunks_exact(dim)).take(block.rows).enumerate()
        {
            let place = (block.first_row + row) * heads.query_heads + head;
            // SAFETY: one task for each block of rows and head.
            let out = unsafe { out.part(place * dim..(place + 1) * dim) };
            scaled_copy(heads.simd, 1.0 / running.sum, sums, out);
            if let Some(log_sum) = log_sum {
                // SAFETY: as above.
                unsafe { log_sum.part(place..place + 1)[0] = running.log_sum() };
            }
        }
    }
}

/// Tokens of each sample.
pub(super) fn batch_lengths(batch: &Batch) -> impl Iterator<Item = usize> {
    batch.sample_starts.windows(2).map(|bounds| bounds[1] - bounds[0])
}
