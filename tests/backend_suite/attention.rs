//! Attention: groups, windows, norms, ragged samples, and the cache.

use fastlora::backend::{self, Backend, KvCache, RmsNorm};
use fastlora::tensor::WeightTensor;

use super::reference::{self, dot};
use super::{
    Precision, Record, batch_of, buffer, finite_differences, read, read_floats, resident, rope_table, values,
    widen,
};

const NORM_EPSILON: f32 = 1e-6;

/// One shape.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub lengths: &'static [usize],
    pub query_heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
    pub norms: bool,
}

const fn case(lengths: &'static [usize], heads: [usize; 3], window: Option<usize>, norms: bool) -> Case {
    let [query_heads, key_value_heads, head_dim] = heads;
    Case { lengths, query_heads, key_value_heads, head_dim, window, norms }
}

pub const CASES: &[Case] = &[
    case(&[1], [1, 1, 16], None, false),
    case(&[5, 1, 9], [2, 1, 16], None, true),
    case(&[7, 3], [8, 1, 32], None, false),
    case(&[6], [3, 3, 20], Some(2), true),
    case(&[4, 5], [2, 2, 80], Some(3), false),
    case(&[5], [4, 2, 128], None, true),
    case(&[70, 3, 49], [4, 2, 64], None, false),
    case(&[66], [3, 3, 80], Some(5), true),
    case(&[130, 129], [2, 1, 32], Some(64), false),
    case(&[200], [6, 3, 16], Some(65), true),
    case(&[97], [6, 1, 128], Some(17), false),
    case(&[64, 65, 48, 49], [1, 1, 64], None, true),
];

/// A case's inputs on the host, and the operation in float64.
pub struct Inputs {
    pub reference: reference::Attention,
    pub qkv: Vec<f32>,
    pub dout: Vec<f32>,
    query_norm: Vec<f32>,
    key_norm: Vec<f32>,
    rope: Vec<f32>,
}

impl Inputs {
    pub fn new(case: Case, precision: Precision) -> Self {
        let Case { lengths, query_heads, key_value_heads, head_dim, window, norms } = case;
        let rows: usize = lengths.iter().sum();
        let rope = rope_table(lengths.iter().max().unwrap() + 3, head_dim);
        let (query_norm, key_norm) = (precision.values(head_dim, 21), precision.values(head_dim, 22));
        let norm = |weight: &[f32]| norms.then(|| (widen(weight), f64::from(NORM_EPSILON)));
        // Scores between about -3 and 3.
        let sharpness = 3.0 / (head_dim as f32).sqrt();
        let reference = reference::Attention {
            query_heads,
            key_value_heads,
            head_dim,
            softmax_scale: f64::from(sharpness),
            window,
            query_norm: norm(&query_norm),
            key_norm: norm(&key_norm),
            rope: widen(&rope),
        };
        let qkv = precision.values(rows * reference.width(), 23);
        let dout = precision.values(rows * query_heads * head_dim, 24);
        Self { reference, qkv, dout, query_norm, key_norm, rope }
    }

    /// Runs `task` with the operation's parameters on `backend`.
    pub fn with_attention<B: Backend, R>(
        &self,
        backend: &B,
        task: impl FnOnce(&backend::Attention<'_, B>) -> R,
    ) -> R {
        let width = self.reference.head_dim;
        let vector =
            |values: &[f32]| backend.vector(&[WeightTensor::from_f32("norm", vec![width], values)]).unwrap();
        let (query_weight, key_weight) = (vector(&self.query_norm), vector(&self.key_norm));
        let norms = self.reference.query_norm.is_some();
        let rope = backend.floats(&self.rope).unwrap();
        task(&backend::Attention {
            query_heads: self.reference.query_heads,
            key_value_heads: self.reference.key_value_heads,
            head_dim: width,
            softmax_scale: self.reference.softmax_scale as f32,
            window: self.reference.window,
            query_norm: norms.then_some(RmsNorm { weight: &query_weight, epsilon: NORM_EPSILON, width }),
            key_norm: norms.then_some(RmsNorm { weight: &key_weight, epsilon: NORM_EPSILON, width }),
            rope: &rope,
        })
    }
}

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    for &case in CASES.iter().filter(|case| backend.check_head_dim(case.head_dim).is_ok()) {
        let inputs = Inputs::new(case, record.precision);
        check_reference(case, &inputs);
        inputs.with_attention(backend, |attention| {
            forward_and_backward(backend, record, case, &inputs, attention);
            cached(backend, record, case, &inputs, attention);
        });
    }
}

/// The chain rule of the reference against finite differences, on the small shapes.
fn check_reference(case: Case, inputs: &Inputs) {
    if inputs.qkv.len() > 2_000 || case.lengths.iter().sum::<usize>() > 20 {
        return;
    }
    let (qkv, dout) = (widen(&inputs.qkv), widen(&inputs.dout));
    let found = inputs.reference.backward(case.lengths, &qkv, &dout);
    let expected = finite_differences(&qkv, |qkv| dot(&inputs.reference.forward(case.lengths, qkv).1, &dout));
    for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(
            (found - expected).abs() <= 1e-7,
            "{case:?}: element {place}: {found}, by differences {expected}"
        );
    }
}

fn forward_and_backward<B: Backend>(
    backend: &B,
    record: &mut Record,
    case: Case,
    inputs: &Inputs,
    attention: &backend::Attention<'_, B>,
) {
    let batch = resident(backend, &batch_of(case.lengths, 11));
    let (qkv, dout) = (buffer(backend, &inputs.qkv), buffer(backend, &inputs.dout));
    let rows: usize = case.lengths.iter().sum();
    let mut log_sum = backend.floats(&vec![0.0; rows * case.query_heads]).unwrap();
    let mut out = backend.buffer(inputs.dout.len()).unwrap();
    backend.attention(attention, &batch, &qkv, &mut log_sum, &mut out).unwrap();
    let (expected_log_sum, expected_out) = inputs.reference.forward(case.lengths, &widen(&inputs.qkv));
    let found = read_floats(backend, &log_sum, expected_log_sum.len());
    record.check(&format!("{case:?} log_sum"), &found, &expected_log_sum, case.head_dim);
    let terms = case.head_dim + case.lengths.iter().max().unwrap();
    let found = read(backend, &out, expected_out.len());
    record.check(&format!("{case:?} out"), &found, &expected_out, terms);

    let mut dqkv = buffer(backend, &values(inputs.qkv.len(), 25));
    backend.attention_backward(attention, &batch, &qkv, &log_sum, &out, &dout, &mut dqkv).unwrap();
    let expected = inputs.reference.backward(case.lengths, &widen(&inputs.qkv), &widen(&inputs.dout));
    let found = read(backend, &dqkv, expected.len());
    record.check(&format!("{case:?} dqkv"), &found, &expected, 2 * terms);
}

/// The first sample again, fed to the cache in pieces of several lengths.
fn cached<B: Backend>(
    backend: &B,
    record: &mut Record,
    case: Case,
    inputs: &Inputs,
    attention: &backend::Attention<'_, B>,
) {
    let (length, width) = (case.lengths[0], inputs.reference.width());
    let (_, expected) = inputs.reference.forward(&[length], &widen(&inputs.qkv[..length * width]));
    let capacity = length + 2;
    let elements = capacity * case.key_value_heads * case.head_dim;
    let mut cache = KvCache {
        keys: backend.buffer(elements).unwrap(),
        values: backend.buffer(elements).unwrap(),
        capacity,
    };
    let out_width = case.query_heads * case.head_dim;
    let mut found = Vec::new();
    let mut position = 0;
    for piece in [2, 20, 1, 1, 7, 61, 3, usize::MAX] {
        let rows = piece.min(length - position);
        if rows == 0 {
            break;
        }
        let part = &inputs.qkv[position * width..(position + rows) * width];
        let mut out = backend.buffer(rows * out_width).unwrap();
        backend
            .attention_cached(attention, rows, position, &buffer(backend, part), &mut cache, &mut out)
            .unwrap();
        found.extend(read(backend, &out, rows * out_width));
        position += rows;
    }
    record.check(&format!("{case:?} cached"), &found, &expected, case.head_dim + length);
    let qkv = buffer(backend, &inputs.qkv[..width]);
    let mut out = backend.buffer(out_width).unwrap();
    assert!(backend.attention_cached(attention, 1, capacity, &qkv, &mut cache, &mut out).is_err());
}
