//! Causal attention with grouped heads over packed samples, row by row.

use std::ops::Range;

use rayon::prelude::*;

use super::{dot, rms_norm, rms_norm_backward, soft_cap};

/// The operation's settings.
#[derive(Clone, Debug)]
pub struct Attention {
    /// `Q`.
    pub query_heads: usize,
    /// `K`.
    pub key_value_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// Factor on `q·k`.
    pub softmax_scale: f64,
    /// Cap of the scores.
    pub soft_cap: Option<f64>,
    /// A query at `p` sees keys at positions `> p - window`.
    pub window: Option<usize>,
    /// Weight and ε of the norm over each query head.
    pub query_norm: Option<(Vec<f64>, f64)>,
    /// The same for keys.
    pub key_norm: Option<(Vec<f64>, f64)>,
    /// Columns of a head that are rotated, `R`.
    pub rotated: usize,
    /// `[positions, 2, R/2]`.
    pub rope: Vec<f64>,
}

/// Samples with their queries and keys normalised and rotated: what every row's figures need.
pub struct Rotated<'a> {
    attention: &'a Attention,
    /// `[T, (Q + 2K)·D]` as projected.
    qkv: &'a [f64],
    /// `[T, Q + K, D]`.
    turned: Vec<f64>,
    /// Rows of the sample that each row belongs to.
    samples: Vec<Range<usize>>,
}

impl Attention {
    /// `(Q + 2K)·D`.
    pub fn width(&self) -> usize {
        (self.query_heads + 2 * self.key_value_heads) * self.head_dim
    }

    /// `(log_sum [T, Q], out [T, Q·D])`.
    pub fn forward(&self, lengths: &[usize], qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let rotated = self.rotated(lengths, qkv);
        let (mut log_sums, mut out) = (Vec::new(), Vec::new());
        for row in 0..rotated.rows() {
            let (row_sums, row_out) = rotated.forward_row(row);
            log_sums.extend(row_sums);
            out.extend(row_out);
        }
        (log_sums, out)
    }

    /// `dqkv` for `dout`, by the chain rule.
    pub fn backward(&self, lengths: &[usize], qkv: &[f64], dout: &[f64]) -> Vec<f64> {
        let (log_sums, out) = self.forward(lengths, qkv);
        let rotated = self.rotated(lengths, qkv);
        (0..rotated.rows()).flat_map(|row| rotated.backward_row(row, &log_sums, &out, dout)).collect()
    }

    /// Normalises and rotates queries and keys of samples of these lengths.
    pub fn rotated<'a>(&'a self, lengths: &[usize], qkv: &'a [f64]) -> Rotated<'a> {
        let mut samples = Vec::new();
        for &length in lengths {
            let start = samples.len();
            samples.extend((0..length).map(|_| start..start + length));
        }
        let heads = self.query_heads + self.key_value_heads;
        let mut turned = vec![0.0; samples.len() * heads * self.head_dim];
        turned.par_chunks_mut(heads * self.head_dim).enumerate().for_each(|(row, turned)| {
            let position = row - samples[row].start;
            for (head, out) in turned.chunks_mut(self.head_dim).enumerate() {
                let raw = &qkv[row * self.width() + head * self.head_dim..][..self.head_dim];
                out.copy_from_slice(&self.turn(raw, self.norm_of(head), position));
            }
        });
        Rotated { attention: self, qkv, turned, samples }
    }

    fn norm_of(&self, head: usize) -> &Option<(Vec<f64>, f64)> {
        if head < self.query_heads { &self.query_norm } else { &self.key_norm }
    }

    fn visible(&self, position: usize) -> Range<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }

    fn table(&self, position: usize) -> (&[f64], &[f64]) {
        self.rope[position * self.rotated..][..self.rotated].split_at(self.rotated / 2)
    }

    fn turn(&self, raw: &[f64], norm: &Option<(Vec<f64>, f64)>, position: usize) -> Vec<f64> {
        let x = match norm {
            Some((weight, epsilon)) => rms_norm(raw, weight, *epsilon),
            None => raw.to_vec(),
        };
        let half = self.rotated / 2;
        let (cos, sin) = self.table(position);
        let low = (0..half).map(|i| x[i] * cos[i] - x[i + half] * sin[i]);
        let high = (0..half).map(|i| x[i + half] * cos[i] + x[i] * sin[i]);
        low.chain(high).chain(x[self.rotated..].iter().copied()).collect()
    }

    fn turn_back(&self, raw: &[f64], norm: &Option<(Vec<f64>, f64)>, position: usize, g: &[f64]) -> Vec<f64> {
        let half = self.rotated / 2;
        let (cos, sin) = self.table(position);
        let low = (0..half).map(|i| g[i] * cos[i] + g[i + half] * sin[i]);
        let high = (0..half).map(|i| g[i + half] * cos[i] - g[i] * sin[i]);
        let back: Vec<f64> = low.chain(high).chain(g[self.rotated..].iter().copied()).collect();
        match norm {
            Some((weight, epsilon)) => rms_norm_backward(raw, weight, *epsilon, &back),
            None => back,
        }
    }
}

impl Rotated<'_> {
    /// `T`.
    pub fn rows(&self) -> usize {
        self.samples.len()
    }

    fn turned(&self, row: usize, head: usize) -> &[f64] {
        let (heads, dim) =
            (self.attention.query_heads + self.attention.key_value_heads, self.attention.head_dim);
        &self.turned[(row * heads + head) * dim..][..dim]
    }

    fn raw(&self, row: usize, head: usize) -> &[f64] {
        &self.qkv[row * self.attention.width() + head * self.attention.head_dim..][..self.attention.head_dim]
    }

    /// Key and value head of a query head, as heads of `qkv`.
    fn shared(&self, head: usize) -> (usize, usize) {
        let Attention { query_heads, key_value_heads, .. } = *self.attention;
        let shared = head / (query_heads / key_value_heads);
        (query_heads + shared, query_heads + key_value_heads + shared)
    }

    /// Rows that the query of `row` sees.
    fn keys_of(&self, row: usize) -> Range<usize> {
        let start = self.samples[row].start;
        let visible = self.attention.visible(row - start);
        start + visible.start..start + visible.end
    }

    /// A score, and its slope in `q·k`.
    fn score(&self, query: usize, key: usize, head: usize) -> [f64; 2] {
        let (key_head, _) = self.shared(head);
        let scale = self.attention.softmax_scale;
        let product = dot(self.turned(query, head), self.turned(key, key_head));
        let [score, slope] = soft_cap(product * scale, self.attention.soft_cap);
        [score, slope * scale]
    }

    /// `(log_sum [Q], out [Q·D])` of one row.
    pub fn forward_row(&self, row: usize) -> (Vec<f64>, Vec<f64>) {
        let Attention { query_heads, head_dim, .. } = *self.attention;
        let (mut log_sums, mut out) = (Vec::new(), vec![0.0; query_heads * head_dim]);
        for (head, out) in out.chunks_mut(head_dim).enumerate() {
            let keys = self.keys_of(row);
            let scores: Vec<f64> = keys.clone().map(|key| self.score(row, key, head)[0]).collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
            log_sums.push(highest + sum.ln());
            for (key, score) in keys.zip(scores) {
                let probability = (score - highest).exp() / sum;
                let value = self.raw(key, self.shared(head).1);
                out.iter_mut().zip(value).for_each(|(out, v)| *out += probability * v);
            }
        }
        (log_sums, out)
    }

    /// `dqkv [(Q + 2K)·D]` of one row, given the whole `log_sum [T, Q]`, `out` and `dout [T, Q·D]`.
    pub fn backward_row<S: Copy + Into<f64>>(
        &self,
        row: usize,
        log_sums: &[S],
        out: &[S],
        dout: &[S],
    ) -> Vec<f64> {
        let Attention { query_heads, head_dim: dim, window, .. } = *self.attention;
        let mut gradient = vec![0.0; self.attention.width()];
        // p and the score's gradient for a query and a key, and dout's row.
        let pair = |query: usize, key: usize, head: usize| {
            let place = query * query_heads + head;
            let dout = &dout[place * dim..][..dim];
            let [score, slope] = self.score(query, key, head);
            let probability = (score - log_sums[place].into()).exp();
            let delta = dot(dout, &out[place * dim..][..dim]);
            let value = self.raw(key, self.shared(head).1);
            let dscore = probability * (dot(dout, value) - delta) * slope;
            (probability, dscore, dout)
        };
        for head in 0..query_heads {
            let (key_head, value_head) = self.shared(head);
            for key in self.keys_of(row) {
                let (_, dscore, _) = pair(row, key, head);
                let dq = &mut gradient[head * dim..][..dim];
                dq.iter_mut().zip(self.turned(key, key_head)).for_each(|(dq, k)| *dq += dscore * k);
            }
            let end = window.map_or(usize::MAX, |window| row + window).min(self.samples[row].end);
            for query in row..end {
                let (probability, dscore, dout) = pair(query, row, head);
                let dk = &mut gradient[key_head * dim..][..dim];
                dk.iter_mut().zip(self.turned(query, head)).for_each(|(dk, q)| *dk += dscore * q);
                let dv = &mut gradient[value_head * dim..][..dim];
                dv.iter_mut().zip(dout).for_each(|(dv, &dout)| *dv += probability * dout.into());
            }
        }
        let position = row - self.samples[row].start;
        for head in 0..query_heads + self.attention.key_value_heads {
            let part = &mut gradient[head * dim..][..dim];
            let back =
                self.attention.turn_back(self.raw(row, head), self.attention.norm_of(head), position, part);
            part.copy_from_slice(&back);
        }
        gradient
    }
}
