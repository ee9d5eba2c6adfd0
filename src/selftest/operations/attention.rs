//! Attention: forward, backward, and over a cache.

use super::super::comparison::{Comparison, Outcome, sample_rows};
use super::super::inputs::{batch_of, rope_table, widen};
use super::super::precision::{Precision, Tolerance};
use super::super::reference;
use super::{
    Operation, Prepared, Work, expect, poisoned, poisoned_floats, read, read_floats, ready, resident, upload,
};
use crate::backend::{
    Attention, Backend, KvCache, PassSettings, RmsNorm, Rotations, Weight, attention_pairs,
};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::WeightTensor;

/// Packed samples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionCase {
    /// Tokens of each sample.
    pub lengths: &'static [usize],
    /// Query heads, key-value heads, head width.
    pub heads: [usize; 3],
    /// Sliding window.
    pub window: Option<usize>,
    /// Whether queries and keys are normalised head by head.
    pub norms: bool,
    /// Soft cap of the scores.
    pub soft_cap: Option<f32>,
    /// Columns of a head that are rotated, where it is not the whole head.
    pub rotated: Option<usize>,
}

impl AttentionCase {
    /// Without window, norms and cap.
    pub const fn plain(lengths: &'static [usize], heads: [usize; 3]) -> Self {
        Self { lengths, heads, window: None, norms: false, soft_cap: None, rotated: None }
    }
}

/// New rows over a cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CachedCase {
    /// Positions in the cache.
    pub position: usize,
    /// New rows.
    pub rows: usize,
    /// Query heads, key-value heads, head width.
    pub heads: [usize; 3],
}

const NORM_EPSILON: f32 = 1e-6;
/// Rows that are compared: each costs a pass over its sample.
const SAMPLED_ROWS: usize = 8;
/// Roundings of a probability: the rotated query and key that meet in its score, and its own.
const PROBABILITY_ROUNDINGS: usize = 3;

/// Inputs of both cases.
struct Inputs {
    precision: Precision,
    reference: reference::Attention,
    lengths: Vec<usize>,
    qkv: Vec<f32>,
    dout: Vec<f32>,
    query_norm: Vec<f32>,
    key_norm: Vec<f32>,
    rope: Vec<f32>,
}

impl Inputs {
    /// The case's settings, over samples of these lengths.
    fn new(precision: Precision, case: AttentionCase, lengths: &[usize]) -> Self {
        let AttentionCase { heads: [query_heads, key_value_heads, head_dim], window, norms, .. } = case;
        let rows: usize = lengths.iter().sum();
        let rotated = case.rotated.unwrap_or(head_dim);
        let rope = rope_table(lengths.iter().copied().max().unwrap_or(0), rotated);
        let (query_norm, key_norm) = (precision.values(head_dim, 21), precision.values(head_dim, 22));
        let norm = |weight: &[f32]| norms.then(|| (widen(weight), f64::from(NORM_EPSILON)));
        // Scores between about -3 and 3.
        let softmax_scale = f64::from(3.0 / (head_dim as f32).sqrt());
        let reference = reference::Attention {
            query_heads,
            key_value_heads,
            head_dim,
            softmax_scale,
            soft_cap: case.soft_cap.map(f64::from),
            window,
            rotated,
            query_norm: norm(&query_norm),
            key_norm: norm(&key_norm),
            rope: widen(&rope),
        };
        let qkv = precision.values(rows * reference.width(), 23);
        let dout = precision.values(rows * query_heads * head_dim, 24);
        Self { precision, reference, lengths: lengths.to_vec(), qkv, dout, query_norm, key_norm, rope }
    }

    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn out_width(&self) -> usize {
        self.reference.query_heads * self.reference.head_dim
    }

    /// Pairs of a query and a key that it sees, for one head.
    fn shape(&self) -> String {
        let reference::Attention { query_heads, key_value_heads, head_dim, window, .. } = &self.reference;
        let lengths: Vec<String> = self.lengths.iter().map(usize::to_string).collect();
        let window = window.map_or(String::new(), |window| format!(", window {window}"));
        let norms = if self.reference.query_norm.is_some() { ", norms" } else { "" };
        let cap = self.reference.soft_cap.map_or(String::new(), |cap| format!(", cap {cap}"));
        let part = match self.reference.rotated {
            rotated if rotated == *head_dim => String::new(),
            rotated => format!(", {rotated} rotated"),
        };
        format!(
            "{}, heads {query_heads}/{key_value_heads} × {head_dim}{window}{norms}{cap}{part}",
            lengths.join("+")
        )
    }

    fn comparison(&self, output: &'static str, tolerance: Tolerance, columns: usize) -> Comparison {
        Comparison { output, compute: self.precision.compute, tolerance, columns }
    }

    fn out_tolerance(&self) -> Tolerance {
        let terms = self.reference.head_dim + self.lengths.iter().max().copied().unwrap_or(0);
        Tolerance { inner_roundings: PROBABILITY_ROUNDINGS, ..Tolerance::sum(self.precision.compute, terms) }
    }
}

/// What an attention reads besides its rows.
struct Tables<B: Backend> {
    query_norm: B::Vector,
    key_norm: B::Vector,
    rope: B::Floats,
}

impl<B: Backend> Tables<B> {
    fn new(backend: &B, inputs: &Inputs) -> Result<Self> {
        let width = inputs.reference.head_dim;
        let vector = |weight: &[f32]| backend.vector(&[WeightTensor::from_f32("norm", vec![width], weight)]);
        Ok(Self {
            query_norm: vector(&inputs.query_norm)?,
            key_norm: vector(&inputs.key_norm)?,
            rope: backend.floats(&inputs.rope)?,
        })
    }

    fn attention<'a>(&'a self, reference: &reference::Attention) -> Attention<'a, B> {
        let has_norms = reference.query_norm.is_some();
        let norm = |weight: &'a B::Vector| RmsNorm {
            weight: Weight::Frozen(weight),
            weight_offset: 0.0,
            epsilon: NORM_EPSILON,
            width: reference.head_dim,
        };
        Attention {
            query_heads: reference.query_heads,
            key_value_heads: reference.key_value_heads,
            head_dim: reference.head_dim,
            softmax_scale: reference.softmax_scale as f32,
            soft_cap: reference.soft_cap.map(|cap| cap as f32),
            window: reference.window,
            query_norm: has_norms.then(|| norm(&self.query_norm)),
            key_norm: has_norms.then(|| norm(&self.key_norm)),
            rotations: Rotations { table: &self.rope, width: reference.rotated, first_row: 0, long: None },
        }
    }
}

struct Packed {
    inputs: Inputs,
    batch: Batch,
    is_backward: bool,
}

pub(super) fn operations<B: Backend + 'static>(
    precision: Precision,
    case: AttentionCase,
) -> Vec<Box<dyn Operation<B>>> {
    let of = |is_backward| -> Box<dyn Operation<B>> {
        let inputs = Inputs::new(precision, case, case.lengths);
        Box::new(Packed { inputs, batch: batch_of(case.lengths, 11), is_backward })
    };
    vec![of(false), of(true)]
}

impl Packed {
    fn check_forward(&self, log_sum: &[f32], out: &[f32]) -> Vec<Outcome> {
        let Inputs { reference, qkv, lengths, .. } = &self.inputs;
        let qkv = widen(qkv);
        let rotated = reference.rotated(lengths, &qkv);
        let rows = expect(sample_rows(self.inputs.rows(), SAMPLED_ROWS), |row| {
            let (mut log_sums, out) = rotated.forward_row(row);
            log_sums.extend(out);
            log_sums
        });
        let heads = reference.query_heads;
        let split = |from: usize, to: usize| -> Vec<(usize, Vec<f64>)> {
            rows.iter().map(|(row, values)| (*row, values[from..to].to_vec())).collect()
        };
        // A score is off by the roundings of a rotated query and key, whose products it sums.
        let absolute = 8.0 * self.inputs.precision.rounding_unit() * 2f64.sqrt();
        let tolerance = Tolerance { absolute, ..Tolerance::sum(DType::F32, reference.head_dim) };
        let width = self.inputs.out_width();
        vec![
            self.inputs.comparison("log_sum", tolerance, heads).compare(log_sum, &split(0, heads)),
            self.inputs
                .comparison("out", self.inputs.out_tolerance(), width)
                .compare(out, &split(heads, heads + width)),
        ]
    }

    /// The gradients, given the `log_sum` and `out` that the backward read.
    fn check_backward(&self, log_sum: &[f32], out: &[f32], dqkv: &[f32]) -> Vec<Outcome> {
        let Inputs { reference, qkv, dout, lengths, precision, .. } = &self.inputs;
        let (qkv, dim) = (widen(qkv), reference.head_dim);
        let rotated = reference.rotated(lengths, &qkv);
        let rows = expect(sample_rows(self.inputs.rows(), SAMPLED_ROWS), |row| {
            rotated.backward_row(row, log_sum, out, dout)
        });
        let width = reference.width();
        let query = reference.query_heads * dim;
        let key = reference.key_value_heads * dim;
        // dp − delta cancels, wholly where a query sees one key: what is left is the rounding of two sums of D terms.
        let cancelled = 8.0 * 2f64.powi(-23) * dim as f64 / 3.0 * reference.softmax_scale;
        let terms = dim + lengths.iter().max().unwrap_or(&0);
        let tolerance = |is_value: bool| Tolerance {
            // A gradient of queries and keys is stored, then rotated back in place.
            roundings: if is_value { 1 } else { 2 },
            // Besides the probability's: the score's gradient, and the rotated operand.
            inner_roundings: PROBABILITY_ROUNDINGS + if is_value { 0 } else { 2 },
            absolute: if is_value { 0.0 } else { cancelled },
            ..Tolerance::sum(precision.compute, terms)
        };
        let parts = [("dq", 0, query, false), ("dk", query, key, false), ("dv", query + key, key, true)];
        let outcome = |(output, start, count, is_value): (&'static str, usize, usize, bool)| {
            let columns = |row: &[f32]| row[start..start + count].to_vec();
            let found: Vec<f32> = dqkv.chunks(width).flat_map(columns).collect();
            let expected: Vec<(usize, Vec<f64>)> =
                rows.iter().map(|(row, values)| (*row, values[start..start + count].to_vec())).collect();
            self.inputs.comparison(output, tolerance(is_value), count).compare(&found, &expected)
        };
        parts.map(outcome).into()
    }
}

/// What lies on the backend.
struct State<B: Backend> {
    tables: Tables<B>,
    batch: B::Batch,
    qkv: B::Buffer,
    log_sum: B::Floats,
    out: B::Buffer,
    /// `dout` and `dqkv`.
    backward: Option<(B::Buffer, B::Buffer)>,
}

impl<B: Backend + 'static> Operation<B> for Packed {
    fn name(&self) -> &'static str {
        if self.is_backward { "attention backward" } else { "attention" }
    }

    fn shape(&self) -> String {
        self.inputs.shape()
    }

    fn work(&self) -> Work {
        let Inputs { reference, lengths, precision, .. } = &self.inputs;
        let pairs = attention_pairs(lengths.iter().copied(), reference.window);
        let (rows, width, element) = (self.inputs.rows(), self.inputs.out_width(), precision.compute.bytes());
        Work::of_attention(rows, width, reference.width(), pairs, element, self.is_backward)
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let (inputs, rows, heads) = (&self.inputs, self.inputs.rows(), self.inputs.reference.query_heads);
        let mut state = State::<B> {
            tables: Tables::new(backend, inputs)?,
            batch: resident(backend, &self.batch, PassSettings::default())?,
            qkv: upload(backend, &inputs.qkv)?,
            log_sum: poisoned_floats(backend, rows * heads)?,
            out: poisoned(backend, inputs.dout.len())?,
            backward: None,
        };
        let forward = move |backend: &B, state: &mut State<B>| {
            let attention = state.tables.attention(&inputs.reference);
            backend.attention(&attention, &state.batch, &state.qkv, &mut state.log_sum, &mut state.out)
        };
        if self.is_backward {
            forward(backend, &mut state)?;
            state.backward = Some((upload(backend, &inputs.dout)?, poisoned(backend, inputs.qkv.len())?));
        }
        Ok(ready(
            state,
            move |backend: &B, state: &mut State<B>| {
                let attention = state.tables.attention(&inputs.reference);
                let State { batch, qkv, log_sum, out, backward, .. } = state;
                match backward {
                    None => backend.attention(&attention, batch, qkv, log_sum, out),
                    Some((dout, dqkv)) => {
                        backend.attention_backward(&attention, batch, qkv, log_sum, out, dout, dqkv)
                    }
                }
            },
            move |backend: &B, state: &State<B>| {
                let log_sum = read_floats(backend, &state.log_sum, rows * heads)?;
                let out = read(backend, &state.out, inputs.dout.len())?;
                Ok(match &state.backward {
                    None => self.check_forward(&log_sum, &out),
                    Some((_, dqkv)) => {
                        self.check_backward(&log_sum, &out, &read(backend, dqkv, inputs.qkv.len())?)
                    }
                })
            },
        ))
    }
}

/// One sample, the last rows of which come when the others are in the cache.
struct Cached {
    inputs: Inputs,
    position: usize,
    new_rows: usize,
}

pub(super) fn cached<B: Backend + 'static>(
    precision: Precision,
    case: CachedCase,
) -> Vec<Box<dyn Operation<B>>> {
    let CachedCase { position, rows, heads } = case;
    let inputs = Inputs::new(precision, AttentionCase::plain(&[], heads), &[position + rows]);
    vec![Box::new(Cached { inputs, position, new_rows: rows })]
}

impl<B: Backend + 'static> Operation<B> for Cached {
    fn name(&self) -> &'static str {
        "attention over a cache"
    }

    fn shape(&self) -> String {
        let reference::Attention { query_heads, key_value_heads, head_dim, .. } = &self.inputs.reference;
        let (rows, position) = (self.new_rows, self.position);
        format!("{rows} after {position}, heads {query_heads}/{key_value_heads} × {head_dim}")
    }

    fn work(&self) -> Work {
        let (position, rows) = (self.position as f64, self.new_rows as f64);
        let width = self.inputs.out_width() as f64;
        let keys = (self.inputs.reference.key_value_heads * self.inputs.reference.head_dim) as f64;
        let element = self.inputs.precision.compute.bytes() as f64;
        Work {
            flops: 4.0 * width * rows * (position + (rows + 1.0) / 2.0),
            bytes: element * (2.0 * keys * (position + 2.0 * rows) + 2.0 * width * rows),
        }
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let (inputs, position, rows) = (&self.inputs, self.position, self.new_rows);
        let (width, out_width) = (inputs.reference.width(), inputs.out_width());
        let capacity = position + rows;
        let elements = capacity * inputs.reference.key_value_heads * inputs.reference.head_dim;
        let tables = Tables::new(backend, inputs)?;
        let mut cache = KvCache::<B> {
            keys: poisoned(backend, elements)?,
            values: poisoned(backend, elements)?,
            capacity,
        };
        if position > 0 {
            let earlier = upload(backend, &inputs.qkv[..position * width])?;
            let mut out = backend.buffer(position * out_width)?;
            let attention = tables.attention(&inputs.reference);
            backend.attention_cached(&attention, position, 0, &earlier, &mut cache, &mut out)?;
        }
        let state = (
            tables,
            upload(backend, &inputs.qkv[position * width..])?,
            cache,
            poisoned(backend, rows * out_width)?,
        );
        Ok(ready(
            state,
            move |backend: &B, (tables, qkv, cache, out)| {
                backend.attention_cached(
                    &tables.attention(&inputs.reference),
                    rows,
                    position,
                    qkv,
                    cache,
                    out,
                )
            },
            move |backend: &B, (_, _, _, out)| {
                let qkv = widen(&inputs.qkv);
                let rotated = inputs.reference.rotated(&inputs.lengths, &qkv);
                let expected =
                    expect(sample_rows(rows, SAMPLED_ROWS), |row| rotated.forward_row(position + row).1);
                let found = read(backend, out, rows * out_width)?;
                let comparison = inputs.comparison("out", inputs.out_tolerance(), out_width);
                Ok(vec![comparison.compare(&found, &expected)])
            },
        ))
    }
}
