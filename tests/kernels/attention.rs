//! attention.cu, attention_backward.cu and their counterparts for Hopper

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::i32_of;

struct Shape {
    sample_lengths: Vec<usize>,
    query_heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    window: usize,
    soft_cap: f64,
    /// Whether the kernels are Hopper's.
    is_hopper: bool,
}

impl Shape {
    fn tokens(&self) -> usize {
        self.sample_lengths.iter().sum()
    }

    fn name(&self, half: Half) -> String {
        format!(
            "attention{} {} samples {:?} Q={} K={} D={} window {} cap {}",
            if self.is_hopper { " for Hopper" } else { "" },
            half.suffix(),
            self.sample_lengths,
            self.query_heads,
            self.key_value_heads,
            self.head_dim,
            self.window,
            self.soft_cap
        )
    }

    /// Row length of the fused projections.
    fn leading(&self) -> usize {
        (self.query_heads + 2 * self.key_value_heads) * self.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// (first row of the sample, its end, first row owned), long samples first.
    fn tiles(&self) -> Vec<i32> {
        let mut samples = Vec::new();
        let mut begin = 0;
        for &length in &self.sample_lengths {
            samples.push((begin, begin + length));
            begin += length;
        }
        samples.sort_by_key(|(begin, end)| std::cmp::Reverse(end - begin));
        let rows = if self.is_hopper { 128 } else { 64 };
        let tiles_of = |(begin, end): (usize, usize)| {
            (begin..end).step_by(rows).flat_map(move |first| [begin, end, first]).map(|value| value as i32)
        };
        samples.into_iter().flat_map(tiles_of).collect()
    }

    fn inner_rows(&self) -> usize {
        if self.head_dim <= 64 {
            64
        } else if self.head_dim <= 128 {
            32
        } else {
            16
        }
    }
}

struct Results {
    out: Vec<u16>,
    log_sum: Vec<f32>,
    gradient: Vec<u16>,
}

fn run(half: Half, shape: &Shape, qkv: &[u16], dout: &[u16]) -> Results {
    let (tokens, dim) = (shape.tokens(), shape.head_dim);
    let (query_heads, key_heads, leading) = (shape.query_heads, shape.key_value_heads, shape.leading());
    let tiles = shape.tiles();
    let tile_count = (tiles.len() / 3) as u32;
    let pitch_bytes = (dim + 8) * 2;
    let kernel = |name: &str| format!("attention_{name}_d{dim}_{}", half.suffix());
    let heads = [query_heads, key_heads, leading, leading, leading].map(i32_of);
    let tail = [
        Argument::F32(shape.scale()),
        Argument::F32(shape.soft_cap as f32),
        Argument::I32(shape.window as i32),
    ];

    let bytes = run_everywhere(&shape.name(half), |device| {
        let (qkv, dout, tiles) = (upload(device, qkv), upload(device, dout), upload(device, &tiles));
        let out = poisoned::<u16>(device, tokens * query_heads * dim);
        let log_sum = poisoned::<f32>(device, tokens * query_heads);
        let delta = poisoned::<f32>(device, tokens * query_heads);
        let gradient = poisoned::<u16>(device, tokens * leading);
        // Queries, keys and values inside a fused row.
        let part = |base: &Argument, head: usize| match base {
            Argument::Address(address) => Argument::Address(address + (head * dim * 2) as u64),
            _ => unreachable!(),
        };
        let parts =
            |base: Argument| [part(&base, 0), part(&base, query_heads), part(&base, query_heads + key_heads)];
        let [q, k, v] = parts(Argument::of(&qkv));
        let [dq, dk, dv] = parts(Argument::of(&gradient));

        let matrix = |memory: &_, first_head: usize, heads: usize, leading: usize| {
            boxes_from(memory, first_head * dim, [tokens, heads * dim], leading, 64)
        };
        let value_head = query_heads + key_heads;
        let matrices = [(0, query_heads), (query_heads, key_heads), (value_head, key_heads)]
            .map(|(first, heads)| matrix(&qkv, first, heads, leading));
        let all: Vec<_> = heads.iter().chain(&tail).copied().collect();
        // The matrices of Hopper's kernels know their row lengths.
        let without_lengths: Vec<_> = heads[..2].iter().chain(&tail).copied().collect();
        let (per_query_head, per_key_head) =
            ([tile_count, query_heads as u32, 1], [tile_count, key_heads as u32, 1]);
        let hopper_shared = |rows: usize| (rows * dim * 2 + 3 * 1024) as u32;

        let rest = [Argument::of(&out), Argument::of(&log_sum), Argument::of(&tiles)];
        if shape.is_hopper {
            let arguments = [&matrices[..], &rest, &without_lengths].concat();
            let name = kernel("forward_sm90a");
            launch_grid(device, &name, per_query_head, 384, hopper_shared(5 * 128), &arguments);
        } else {
            let arguments = [&[q, k, v][..], &rest, &all].concat();
            let stages = if dim <= 128 { 2 } else { 1 };
            let shared = (64 + 2 * stages * shape.inner_rows()) * pitch_bytes;
            launch_grid(device, &kernel("forward"), per_query_head, 128, shared as u32, &arguments);
        }

        let rows = tokens * query_heads;
        let arguments =
            [Argument::of(&out), Argument::of(&dout), Argument::of(&delta), i32_of(rows), i32_of(dim)];
        launch(device, &format!("attention_delta_{}", half.suffix()), rows.div_ceil(4), 128, &arguments);

        let rest = [&log_sum, &delta, &tiles].map(Argument::of);
        let leading = i32_of(leading);
        if shape.is_hopper {
            let dout = matrix(&dout, 0, query_heads, query_heads * dim);
            let inputs = [&matrices[..], &[dout], &rest, &without_lengths].concat();
            let run = |name: &str, grid: [u32; 3], rows: usize, results: &[Argument]| {
                let arguments = [&inputs, results].concat();
                launch_grid(device, &kernel(name), grid, 384, hopper_shared(rows), &arguments);
            };
            run("backward_queries_sm90a", per_query_head, 6 * 128, &[dq, leading]);
            run("backward_keys_sm90a", per_key_head, 5 * 128, &[dk, dv, leading]);
        } else {
            let inputs = [&[q, k, v, Argument::of(&dout)][..], &rest, &all].concat();
            let run = |name: &str, grid: [u32; 3], results: &[Argument]| {
                let arguments = [&inputs, results].concat();
                let shared = 2 * (64 + shape.inner_rows()) * pitch_bytes;
                launch_grid(device, &kernel(name), grid, 128, shared as u32, &arguments);
            };
            run("backward_queries", per_query_head, &[dq, leading]);
            let [tiles, heads, _] = per_key_head;
            run("backward_keys", [tiles, heads, dim.div_ceil(128) as u32], &[dk, dv, leading, leading]);
        }

        let mut bytes: Vec<u8> = download(device, &out);
        bytes.extend(download::<u8>(device, &log_sum));
        bytes.extend(download::<u8>(device, &gradient));
        bytes
    });
    let (out, rest) = bytes.split_at(tokens * query_heads * dim * 2);
    let (log_sum, gradient) = rest.split_at(tokens * query_heads * 4);
    Results { out: values_of(out), log_sum: values_of(log_sum), gradient: values_of(gradient) }
}

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
    let results = run(half, shape, &qkv_bits, &dout_bits);
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

/// (sample lengths, query heads, key heads, head size, window, soft cap)
type Case = (&'static [usize], usize, usize, usize, usize, f64);

fn check_all(cases: &[Case]) {
    check_kernels(false, cases);
}

fn check_kernels(is_hopper: bool, cases: &[Case]) {
    for half in HALVES {
        for &(sample_lengths, query_heads, key_value_heads, head_dim, window, soft_cap) in cases {
            let sample_lengths = sample_lengths.to_vec();
            check(
                half,
                &Shape {
                    sample_lengths,
                    query_heads,
                    key_value_heads,
                    head_dim,
                    window,
                    soft_cap,
                    is_hopper,
                },
            );
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
