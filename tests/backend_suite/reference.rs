//! The operations in float64, written as the formulas read.

use std::ops::Range;

/// Central differences of `function` at `x`, for every coordinate.
pub fn finite_differences(x: &[f64], function: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|place| {
            let at = x[place];
            x[place] = at + step;
            let above = function(&x);
            x[place] = at - step;
            let below = function(&x);
            x[place] = at;
            (above - below) / (2.0 * step)
        })
        .collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|row| {
            let rstd = 1.0 / (dot(row, row) / row.len() as f64 + epsilon).sqrt();
            row.iter().zip(weight).map(move |(x, w)| x * rstd * w).collect::<Vec<_>>()
        })
        .collect()
}

pub fn gated_silu(gate_up: &[f64], width: usize) -> Vec<f64> {
    gate_up
        .chunks(2 * width)
        .flat_map(|row| {
            (0..width).map(|i| row[i] / (1.0 + (-row[i]).exp()) * row[width + i]).collect::<Vec<_>>()
        })
        .collect()
}

/// `x [T, I] · Wᵀ` for `W [O, I]`.
pub fn product_transposed(x: &[f64], weight: &[f64], inputs: usize) -> Vec<f64> {
    x.chunks(inputs).flat_map(|x| weight.chunks(inputs).map(|w| dot(x, w)).collect::<Vec<_>>()).collect()
}

/// Loss of a row of logits, and whether the first of the highest is the target.
pub fn cross_entropy(logits: &[f64], target: usize) -> (f64, bool) {
    let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - highest).exp()).sum();
    let argmax = logits.iter().position(|&logit| logit == highest);
    (highest + sum.ln() - logits[target], argmax == Some(target))
}

/// Attention over float64 values.
#[derive(Clone, Debug)]
pub struct Attention {
    pub query_heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub softmax_scale: f64,
    pub window: Option<usize>,
    pub query_norm: Option<(Vec<f64>, f64)>,
    pub key_norm: Option<(Vec<f64>, f64)>,
    /// `[positions, 2, D/2]`.
    pub rope: Vec<f64>,
}

impl Attention {
    pub fn width(&self) -> usize {
        (self.query_heads + 2 * self.key_value_heads) * self.head_dim
    }

    fn visible(&self, position: usize) -> Range<usize> {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))..position + 1
    }

    fn head<'a>(&self, qkv: &'a [f64], row: usize, head: usize) -> &'a [f64] {
        &qkv[row * self.width() + head * self.head_dim..][..self.head_dim]
    }

    fn turned(&self, raw: &[f64], norm: &Option<(Vec<f64>, f64)>, position: usize) -> Vec<f64> {
        let x = match norm {
            Some((weight, epsilon)) => rms_norm(raw, weight, *epsilon),
            None => raw.to_vec(),
        };
        let half = self.head_dim / 2;
        let table = &self.rope[position * self.head_dim..][..self.head_dim];
        let mut turned = x.clone();
        for i in 0..half {
            turned[i] = x[i] * table[i] - x[i + half] * table[half + i];
            turned[i + half] = x[i + half] * table[i] + x[i] * table[half + i];
        }
        turned
    }

    /// `(log_sum [T, Q], out [T, Q·D])`.
    pub fn forward(&self, lengths: &[usize], qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut log_sums, mut out) = (Vec::new(), Vec::new());
        let mut first = 0;
        for &length in lengths {
            let key = |position: usize, head: usize| {
                let raw = self.head(qkv, first + position, self.query_heads + head);
                self.turned(raw, &self.key_norm, position)
            };
            let keys: Vec<Vec<Vec<f64>>> =
                (0..length).map(|p| (0..self.key_value_heads).map(|h| key(p, h)).collect()).collect();
            for position in 0..length {
                for head in 0..self.query_heads {
                    let shared = head / (self.query_heads / self.key_value_heads);
                    let raw = self.head(qkv, first + position, head);
                    let query = self.turned(raw, &self.query_norm, position);
                    let visible = self.visible(position);
                    let scores: Vec<f64> =
                        visible.clone().map(|j| dot(&query, &keys[j][shared]) * self.softmax_scale).collect();
                    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
                    log_sums.push(highest + sum.ln());
                    let mut row = vec![0.0; self.head_dim];
                    for (j, score) in visible.zip(scores) {
                        let value =
                            self.head(qkv, first + j, self.query_heads + self.key_value_heads + shared);
                        let probability = (score - highest).exp() / sum;
                        row.iter_mut().zip(value).for_each(|(out, v)| *out += probability * v);
                    }
                    out.extend(row);
                }
            }
            first += length;
        }
        (log_sums, out)
    }

    /// `dqkv` for `dout`, by the chain rule; [`finite_differences`] check it where they are affordable.
    pub fn backward(&self, lengths: &[usize], qkv: &[f64], dout: &[f64]) -> Vec<f64> {
        let (log_sums, out) = self.forward(lengths, qkv);
        let (dim, width) = (self.head_dim, self.width());
        let mut dqkv = vec![0.0; qkv.len()];
        let mut first = 0;
        for &length in lengths {
            for head in 0..self.query_heads {
                let shared = head / (self.query_heads / self.key_value_heads);
                let (key_head, value_head) =
                    (self.query_heads + shared, self.query_heads + self.key_value_heads + shared);
                let turned = |position: usize, head: usize, norm: &Option<(Vec<f64>, f64)>| {
                    self.turned(self.head(qkv, first + position, head), norm, position)
                };
                let queries: Vec<Vec<f64>> = (0..length).map(|p| turned(p, head, &self.query_norm)).collect();
                let keys: Vec<Vec<f64>> = (0..length).map(|p| turned(p, key_head, &self.key_norm)).collect();
                let mut dqueries = vec![vec![0.0; dim]; length];
                let mut dkeys = vec![vec![0.0; dim]; length];
                for position in 0..length {
                    let place = (first + position) * self.query_heads + head;
                    let dout = &dout[place * dim..][..dim];
                    let delta = dot(dout, &out[place * dim..][..dim]);
                    for j in self.visible(position) {
                        let score = dot(&queries[position], &keys[j]) * self.softmax_scale;
                        let probability = (score - log_sums[place]).exp();
                        let value = self.head(qkv, first + j, value_head);
                        let dscore = probability * (dot(dout, value) - delta) * self.softmax_scale;
                        for d in 0..dim {
                            dqkv[(first + j) * width + value_head * dim + d] += probability * dout[d];
                            dqueries[position][d] += dscore * keys[j][d];
                            dkeys[j][d] += dscore * queries[position][d];
                        }
                    }
                }
                for position in 0..length {
                    for (head, norm, gradient) in [
                        (head, &self.query_norm, &dqueries[position]),
                        (key_head, &self.key_norm, &dkeys[position]),
                    ] {
                        let raw = self.head(qkv, first + position, head);
                        let start = (first + position) * width + head * dim;
                        let back = self.turned_backward(raw, norm, position, gradient);
                        dqkv[start..start + dim].iter_mut().zip(back).for_each(|(sum, g)| *sum += g);
                    }
                }
            }
            first += length;
        }
        dqkv
    }

    fn turned_backward(
        &self,
        raw: &[f64],
        norm: &Option<(Vec<f64>, f64)>,
        position: usize,
        gradient: &[f64],
    ) -> Vec<f64> {
        let half = self.head_dim / 2;
        let table = &self.rope[position * self.head_dim..][..self.head_dim];
        let mut back = gradient.to_vec();
        for i in 0..half {
            back[i] = gradient[i] * table[i] + gradient[i + half] * table[half + i];
            back[i + half] = gradient[i + half] * table[i] - gradient[i] * table[half + i];
        }
        let Some((weight, epsilon)) = norm else { return back };
        let count = raw.len() as f64;
        let rstd = 1.0 / (dot(raw, raw) / count + epsilon).sqrt();
        let weighted: Vec<f64> = back.iter().zip(weight).map(|(g, w)| g * w).collect();
        let along = dot(&weighted, raw) * rstd * rstd / count;
        weighted.iter().zip(raw).map(|(g, x)| rstd * (g - x * along)).collect()
    }
}
