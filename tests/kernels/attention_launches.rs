//! Launches of attention.cu, attention_backward.cu and their counterparts for Hopper.

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::i32_of;
use crate::random_angles::RandomAngles;
use crate::shares_of_s::Shares;

const NULL: Argument = Argument::Address(0);

pub struct Shape {
    pub sample_lengths: Vec<usize>,
    pub query_heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub window: usize,
    pub soft_cap: f64,
    /// Whether the kernels are Hopper's.
    pub is_hopper: bool,
}

/// (sample lengths, query heads, key heads, head size, window, soft cap)
pub type Case = (&'static [usize], usize, usize, usize, usize, f64);

impl Shape {
    pub fn new(is_hopper: bool, case: Case) -> Self {
        let (sample_lengths, query_heads, key_value_heads, head_dim, window, soft_cap) = case;
        let sample_lengths = sample_lengths.to_vec();
        Self { sample_lengths, query_heads, key_value_heads, head_dim, window, soft_cap, is_hopper }
    }

    pub fn tokens(&self) -> usize {
        self.sample_lengths.iter().sum()
    }

    pub fn name(&self, half: Half) -> String {
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
    pub fn leading(&self) -> usize {
        (self.query_heads + 2 * self.key_value_heads) * self.head_dim
    }

    pub fn scale(&self) -> f32 {
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

/// What rotates the gradients of queries and keys back.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Rotation {
    #[default]
    None,
    /// rope.cu, behind the backward.
    Behind,
    /// Hopper's kernels, before the gradients leave.
    Within,
}

/// What is wanted further.
#[derive(Clone, Copy, Debug, Default)]
pub struct Further<'a> {
    pub rotation: Rotation,
    /// `A [rank, Q·D]` of the adapter that reads `out`: Hopper's kernels then leave the shares of its `s`.
    pub output_a: Option<&'a [u16]>,
}

pub struct Results {
    pub out: Vec<u16>,
    pub log_sum: Vec<f32>,
    pub gradient: Vec<u16>,
    /// `[T, R̄]`; empty if it is not wanted.
    pub s: Vec<u16>,
}

/// Forward and backward.
pub fn run(half: Half, shape: &Shape, [qkv, dout]: [&[u16]; 2], further: Further<'_>) -> Results {
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
        let mut s = Vec::new();
        if shape.is_hopper {
            let a = upload(device, further.output_a.unwrap_or_default());
            let rank = further.output_a.map_or(0, |a| a.len() / (query_heads * dim));
            let shares = Shares::new(device, query_heads, tokens, rank);
            let of_output = match rank {
                0 => [matrices[0], NULL],
                _ => [
                    boxes(&a, [rank, query_heads * dim], query_heads * dim, 64),
                    Argument::of(&shares.partials),
                ],
            };
            let sizes = [tokens, rank.next_multiple_of(8)].map(i32_of);
            let arguments = [&matrices[..], &rest, &without_lengths, &of_output, &sizes].concat();
            let name = kernel("forward_sm90a");
            launch_grid(device, &name, per_query_head, 384, hopper_shared(5 * 128 + 64), &arguments);
            if rank > 0 {
                s = shares.sum(device, half);
            }
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
        let angles = RandomAngles::new(device, tokens, dim);
        if shape.is_hopper {
            let dout = matrix(&dout, 0, query_heads, query_heads * dim);
            let angles = match further.rotation {
                Rotation::Within => [angles.arrays(), angles.rows()],
                _ => [[NULL; 3], [i32_of(0); 3]],
            };
            let inputs = [&matrices[..], &[dout], &rest, &without_lengths, angles.as_flattened()].concat();
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

        if further.rotation == Rotation::Behind {
            let kernel = format!("rope_backward_{}", half.suffix());
            let memories = [&qkv, &gradient].map(Argument::of);
            angles.rope(device, &kernel, tokens, [query_heads, key_heads, dim], memories);
        }

        let mut bytes: Vec<u8> = download(device, &out);
        bytes.extend(download::<u8>(device, &log_sum));
        bytes.extend(download::<u8>(device, &gradient));
        bytes.extend_from_slice(bytemuck::cast_slice(&s));
        bytes
    });
    let (out, rest) = bytes.split_at(tokens * query_heads * dim * 2);
    let (log_sum, rest) = rest.split_at(tokens * query_heads * 4);
    let (gradient, s) = rest.split_at(tokens * leading * 2);
    Results {
        out: values_of(out),
        log_sum: values_of(log_sum),
        gradient: values_of(gradient),
        s: values_of(s),
    }
}
