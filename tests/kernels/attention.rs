//! attention.cu, attention_backward.cu and their counterparts for Hopper

use crate::attention_launches::{Case, Further, Shape, run};
use crate::harness::*;

fn dot(a: &[f64], b: &[f64]) -> (f64, f64) {
    a.iter().zip(b).fold((0.0, 0.0), |(sum, magnitude), (a, b)| (sum + a * b, magnitude + (a * b).abs()))
}

/// A sum being made together with its allowed error.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    magnitude: f64,
    error: f64,
    terms: usize,
}

impl Sum {
    /// Adds weight · x, where the weight may be off by `weight_error`.
    fn add(&mut self, weight: f64, weight_error: f64, x: f64) {
        self.value += weight * x;
        self.magnitude += (weight * x).abs();
        self.error += weight_error * x.abs();
        self.terms += 1;
    }

    /// Padded to whole tiles, the kernel adds at most 16 terms more than there are; they are zero.
    fn expected(&self, half: Half) -> Expected {
        let mut expected = Expected::rounded_sum(half, self.value, self.magnitude, self.terms + 16);
        expected.tolerance += self.error * (1.0 + half.unit_roundoff());
        expected
    }
}

fn check(half: Half, shape: &Shape) {
    let name = shape.name(half);
    let (tokens, dim, leading) = (shape.tokens(), shape.head_dim, shape.leading());
    let mut random = Random(dim as u64 + tokens as u64);
    let qkv_bits = random.halves(half, tokens * leading, 1.5);
    let dout_bits = random.halves(half, tokens * shape.query_heads * dim, 1.0);
    let results = run(half, shape, [&qkv_bits, &dout_bits], Further::default());
    let (qkv, dout) = (half.decode_all(&qkv_bits), half.decode_all(&dout_bits));
    let u = half.unit_roundoff();
    let scale = f64::from(shape.scale());
    let row = |token: usize, head: usize| &qkv[token * leading + head * dim..][..dim];
    let group = shape.query_heads / shape.key_value_heads;

    let mut out = Vec::new();
    let mut log_sums = Vec::new();
    let mut gradient = vec![Sum::default(); tokens * leading];
    let mut begin = 0;
    for &length in &shape.sample_lengths {
        for query in begin..begin + length {
            for head in 0..shape.query_heads {
                let key_head = shape.query_heads + head / group;
                let value_head = key_head + shape.key_value_heads;
                let first = if shape.window > 0 {
                    begin.max((query + 1).saturating_sub(shape.window))
                } else {
                    begin
                };
                let q = row(query, head);
                let d_row = &dout[(query * shape.query_heads + head) * dim..][..dim];
                let keys: Vec<usize> = (first..=query).collect();
                // Scores, and how far off they may be: the product's f32 sum.
                let mut score_error = 0f64;
                let scores: Vec<(f64, f64)> = keys
                    .iter()
                    .map(|&key| {
                        let (product, magnitude) = dot(q, row(key, key_head));
                        score_error = score_error.max(F32_ROUNDOFF * (dim as f64 + 6.0) * magnitude * scale);
                        let z = product * scale;
                        if shape.soft_cap > 0.0 {
                            let t = (z / shape.soft_cap).tanh();
                            (shape.soft_cap * t, scale * (1.0 - t * t))
                        } else {
                            (z, scale)
                        }
                    })
                    .collect();
                let greatest = scores.iter().map(|score| score.0).fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score.0 - greatest).exp()).sum();
                let log_sum = greatest + total.ln();
                let spread = greatest.abs() + scores.iter().map(|score| score.0.abs()).fold(0.0, f64::max);
                let log_error = score_error
                    + F32_ROUNDOFF * (2.0 * spread + keys.len() as f64 / 4.0 + 16.0 + log_sum.abs());
                log_sums.push(Expected { value: log_sum, tolerance: log_error });
                // Relative error of p: its exponent's, both ends, and the exponential's.
                let p_error = 2.0 * (score_error + log_error);
                let p: Vec<f64> = scores.iter().map(|score| (score.0 - log_sum).exp()).collect();

                let mut sums = vec![Sum::default(); dim];
                for (&key, &p) in keys.iter().zip(&p) {
                    for (sum, &v) in sums.iter_mut().zip(row(key, value_head)) {
                        sum.add(p, p * (u + p_error) + half.underflow(), v);
                    }
                }
                let exact: Vec<f64> = sums.iter().map(|sum| sum.value).collect();
                out.extend(sums.iter().map(|sum| sum.expected(half)));

                let delta = dot(d_row, &exact).0;
                // delta is made from the rounded output.
                let delta_error: f64 = sums
                    .iter()
                    .zip(d_row)
                    .map(|(sum, d)| sum.expected(half).tolerance * d.abs())
                    .sum::<f64>()
                    + F32_ROUNDOFF * (dim as f64 + 6.0) * dot(d_row, &exact).1;
                for ((&key, &p), &(z, slope)) in keys.iter().zip(&p).zip(&scores) {
                    let v = row(key, value_head);
                    let (dp, dp_magnitude) = dot(d_row, v);
                    let dp_error = F32_ROUNDOFF * (dim as f64 + 4.0) * dp_magnitude;
                    let dr = p * (dp - delta) * slope;
                    let mut dr_error =
                        p * slope * (dp_error + delta_error) + dr.abs() * (p_error + 4.0 * F32_ROUNDOFF);
                    if shape.soft_cap > 0.0 {
                        let t = z / shape.soft_cap;
                        let slope_error =
                            scale * (2.0 * t.abs() * score_error / shape.soft_cap + 4.0 * F32_ROUNDOFF);
                        dr_error += p * (dp - delta).abs() * slope_error;
                    }
                    let (dr_error, p_error) =
                        (dr_error + u * dr.abs() + half.underflow(), p * (u + p_error) + half.underflow());
                    for i in 0..dim {
                        gradient[query * leading + head * dim + i].add(dr, dr_error, row(key, key_head)[i]);
                        gradient[key * leading + key_head * dim + i].add(dr, dr_error, q[i]);
                        gradient[key * leading + value_head * dim + i].add(p, p_error, d_row[i]);
                    }
                }
            }
        }
        begin += length;
    }
    assert_close(&format!("{name}, out"), shape.query_heads * dim, &half.decode_all(&results.out), &out);
    let actual: Vec<f64> = results.log_sum.iter().map(|&value| f64::from(value)).collect();
    assert_close(&format!("{name}, log_sum"), shape.query_heads, &actual, &log_sums);
    let gradient: Vec<Expected> = gradient.iter().map(|sum| sum.expected(half)).collect();
    assert_close(&format!("{name}, gradient"), leading, &half.decode_all(&results.gradient), &gradient);
}

fn check_all(cases: &[Case]) {
    check_kernels(false, cases);
}

fn check_kernels(is_hopper: bool, cases: &[Case]) {
    for half in HALVES {
        for &case in cases {
            check(half, &Shape::new(is_hopper, case));
        }
    }
}

#[test]
fn attention_of_packed_samples_matches_float64() {
    check_all(&[
        (&[1], 1, 1, 16, 0, 0.0),
        (&[70, 5, 130], 4, 2, 16, 0, 0.0),
        (&[64, 65, 1], 3, 1, 32, 0, 0.0),
    ]);
}

#[test]
fn attention_with_a_window_or_a_soft_cap_matches_float64() {
    check_all(&[
        (&[150, 30], 2, 1, 32, 20, 0.0),
        (&[80], 1, 1, 16, 1, 0.0),
        (&[67], 2, 2, 64, 0, 1.5),
        (&[9, 70], 2, 1, 64, 65, 5.0),
    ]);
}

#[test]
fn attention_of_every_head_size_matches_float64() {
    check_all(&[
        (&[66], 2, 1, 64, 0, 0.0),
        (&[40, 33], 8, 1, 80, 0, 0.0),
        (&[70], 2, 1, 96, 33, 0.0),
        (&[66], 2, 1, 128, 0, 0.0),
        (&[70], 2, 2, 256, 33, 0.0),
    ]);
}

/// More than 3 × stages × 128 keys; samples that end inside a box; odd numbers of 64 queries; a window; a cap; groups.
#[test]
fn attention_for_hopper_matches_float64() {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    check_kernels(
        true,
        &[
            (&[1], 1, 1, 64, 0, 0.0),
            (&[70, 5, 130], 2, 1, 64, 0, 0.0),
            (&[790], 1, 1, 64, 0, 0.0),
            (&[300, 129], 1, 1, 128, 65, 0.0),
            (&[66], 3, 1, 128, 0, 5.0),
            (&[1, 2, 63, 64, 65], 4, 1, 64, 0, 0.0),
            (&[127, 128, 129], 2, 2, 128, 0, 0.0),
            (&[260, 2], 2, 1, 64, 1, 0.0),
            (&[200], 4, 2, 64, 33, 1.5),
            (&[2, 258], 1, 1, 128, 64, 0.7),
            (&[450], 1, 1, 128, 200, 0.0),
        ],
    );
}
