//! Attention over the cache: blocks of queries in a prompt, dot products in decoding.

use super::super::CpuBackend;
use super::super::memory::DisjointParts;
use super::super::product::{Before, Left, Right, Shape, multiply};
use super::super::simd::simd_fn;
use super::pack::{Source, Treatment};
use super::softmax::{Running, scale_row};
use super::{AttentionScratch, Heads};
use crate::backend::{Attention, KvCache};
use crate::error::{Error, Result};

/// From this many new rows on, packing the cache for blocked products pays.
const BLOCKED_ROWS: usize = 8;
/// Elements of keys below which one thread decodes faster than several.
const PARALLEL_ELEMENTS: usize = 16 * 1024;

impl CpuBackend {
    pub(in super::super) fn attention_over_cache(
        &self,
        attention: &Attention<'_, Self>,
        rows: usize,
        position: usize,
        qkv: &[f32],
        cache: &mut KvCache<Self>,
        out: &mut [f32],
    ) -> Result<()> {
        if position + rows > cache.capacity {
            return Err(Error::internal(format!(
                "positions {position}..{} do not fit into a cache of {}",
                position + rows,
                cache.capacity
            )));
        }
        let heads = Heads::new(self.simd, attention, [position + rows].into_iter())?;
        let rotation = heads.rotations.row_of(position + rows);
        self.append(&heads, rows, [position, rotation + position], qkv, cache);
        let mut scratch = self.attention_scratch();
        if rows >= BLOCKED_ROWS {
            let row_stride = heads.key_value_heads * heads.head_dim;
            let source = |values| Source { values, row_stride, first_column: 0 };
            let sources = [source(&cache.keys[..]), source(&cache.values[..])];
            scratch.clear_plan();
            scratch.plan_sequence(0, rows, position, 0, rotation);
            self.attend(&heads, &mut scratch, sources, Treatment::Keep, qkv, out, None);
        } else {
            for row in 0..rows {
                let raw = &qkv[row * heads.qkv_width()..][..heads.query_heads * heads.head_dim];
                let out = &mut out[row * heads.query_heads * heads.head_dim..][..raw.len()];
                let place = [position + row, rotation + position + row];
                self.decode(&heads, &mut scratch, place, raw, cache, out);
            }
        }
        Ok(())
    }

    /// Turned keys, and values, of the positions from the first on, whose rotation is given as well.
    fn append(
        &self,
        heads: &Heads<'_>,
        rows: usize,
        [position, rotation]: [usize; 2],
        qkv: &[f32],
        cache: &mut KvCache<Self>,
    ) {
        let (dim, width) = (heads.head_dim, heads.key_value_heads * heads.head_dim);
        let part = position * width..(position + rows) * width;
        self.threads.for_row_blocks(&mut cache.keys[part.clone()], width, |first, keys| {
            for (row, keys) in keys.chunks_exact_mut(width).enumerate() {
                let raw = &qkv[(first + row) * heads.qkv_width()..][..heads.qkv_width()];
                for (head, key) in keys.chunks_exact_mut(dim).enumerate() {
                    heads.turn(heads.key_norm, rotation + first + row, &raw[heads.key_columns(head)], key);
                }
            }
        });
        self.threads.for_row_blocks(&mut cache.values[part], width, |first, values| {
            for (row, values) in values.chunks_exact_mut(width).enumerate() {
                let start = (first + row) * heads.qkv_width() + heads.value_columns(0).start;
                values.copy_from_slice(&qkv[start..start + width]);
            }
        });
    }

    /// One query row at a position, whose rotation is given as well, over the cache.
    fn decode(
        &self,
        heads: &Heads<'_>,
        scratch: &mut AttentionScratch,
        [position, rotation]: [usize; 2],
        raw: &[f32],
        cache: &KvCache<Self>,
        out: &mut [f32],
    ) {
        let (dim, group) = (heads.head_dim, heads.group());
        let visible = heads.visible(position);
        let keys = visible.len();
        let scores = DisjointParts::new(scratch.scores.at_least(heads.query_heads * keys));
        let queries = DisjointParts::new(scratch.queries.at_least(heads.query_heads * dim));
        let out = DisjointParts::new(out);
        let task = |head: usize| {
            let members = head * group..(head + 1) * group;
            let elements = members.start * dim..members.end * dim;
            // SAFETY: one part of each for each key-value head.
            let (scores, queries, out) = unsafe {
                let scores = scores.part(members.start * keys..members.end * keys);
                (scores, queries.part(elements.clone()), out.part(elements))
            };
            let stride = heads.key_value_heads * dim;
            let first = visible.start * stride + head * dim;
            for (member, query) in queries.chunks_exact_mut(dim).enumerate() {
                let raw = &raw[heads.query_columns(head * group + member)];
                heads.turn(heads.query_norm, rotation, raw, query);
                let scores = &mut scores[member * keys..][..keys];
                key_scores(heads.simd, query, &cache.keys[first..], stride, scores);
                let (running, _) = heads.absorb(scores, 0..keys, Running::EMPTY);
                scale_row(heads.simd, 1.0 / running.sum, scores);
            }
            multiply(
                heads.simd,
                Shape { rows: group, columns: dim, depth: keys },
                Left::rows(scores, keys),
                Right { values: &cache.values[first..], stride },
                Before::Undefined,
                out,
                dim,
            );
        };
        if keys * heads.query_heads * dim < PARALLEL_ELEMENTS {
            (0..heads.key_value_heads).for_each(task);
        } else {
            self.threads.team().for_each(heads.key_value_heads, task);
        }
    }
}

simd_fn! {
    /// `scores[j] = query · keys[j]`, keys `stride` apart.
    fn key_scores<V>(simd: Simd, query: &[f32], keys: &[f32], stride: usize, scores: &mut [f32]) -> () {
        for (key, score) in keys.chunks(stride).zip(scores) {
            let mut sum = V::splat(0.0);
            for (query, key) in query.chunks(V::LANES).zip(key[..query.len()].chunks(V::LANES)) {
                sum = V::from_slice(query).mul_add(V::from_slice(key), sum);
            }
            *score = sum.sum();
        }
    }
}
