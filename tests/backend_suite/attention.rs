//! Attention: groups, windows, norms, ragged samples, and the cache.

use fastlora::backend::{self, Backend, KvCache, LongTexts, RmsNorm, Rotations, Weight};
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
    /// Added to the weights of the norms.
    pub norm_offset: f32,
    pub soft_cap: Option<f32>,
    /// Columns of a head that are rotated.
    pub rotated: usize,
}

pub const fn case(lengths: &'static [usize], heads: [usize; 3], window: Option<usize>, norms: bool) -> Case {
    let [query_heads, key_value_heads, head_dim] = heads;
    Case {
        lengths,
        query_heads,
        key_value_heads,
        head_dim,
        window,
        norms,
        norm_offset: 0.0,
        soft_cap: None,
        rotated: head_dim,
    }
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
    case(&[40, 300], [2, 1, 64], None, false),
    Case { soft_cap: Some(1.5), ..case(&[9, 4], [4, 2, 16], Some(5), false) },
    Case { soft_cap: Some(0.7), ..case(&[130, 67], [2, 1, 32], None, false) },
    Case { norm_offset: 1.0, ..case(&[7, 3], [4, 1, 16], Some(3), true) },
    Case { rotated: 8, ..case(&[6, 2], [2, 1, 16], None, true) },
    Case { rotated: 72, ..case(&[70, 3], [3, 1, 96], None, false) },
];

/// A case's inputs on the host, and the operation in float64.
pub struct Inputs {
    pub reference: reference::Attention,
    pub qkv: Vec<f32>,
    pub dout: Vec<f32>,
    case: Case,
    query_norm: Vec<f32>,
    key_norm: Vec<f32>,
    rope: Vec<f32>,
}

impl Inputs {
    pub fn new(case: Case, precision: Precision) -> Self {
        let Case { lengths, query_heads, key_value_heads, head_dim, window, norms, rotated, .. } = case;
        let rows: usize = lengths.iter().sum();
        let rope = rope_table(lengths.iter().max().unwrap() + 3, rotated);
        let (query_norm, key_norm) = (precision.values(head_dim, 21), precision.values(head_dim, 22));
        let offset = f64::from(case.norm_offset);
        let weights = |weight: &[f32]| widen(weight).iter().map(|w| offset + w).collect();
        let norm = |weight: &[f32]| norms.then(|| (weights(weight), f64::from(NORM_EPSILON)));
        // Scores between about -3 and 3.
        let sharpness = 3.0 / (head_dim as f32).sqrt();
        let reference = reference::Attention {
            query_heads,
            key_value_heads,
            head_dim,
            softmax_scale: f64::from(sharpness),
            soft_cap: case.soft_cap.map(f64::from),
            window,
            rotated,
            query_norm: norm(&query_norm),
            key_norm: norm(&key_norm),
            rope: widen(&rope),
        };
        let qkv = precision.values(rows * reference.width(), 23);
        let dout = precision.values(rows * query_heads * head_dim, 24);
        Self { reference, qkv, dout, case, query_norm, key_norm, rope }
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
        let norm = |weight| RmsNorm {
            weight: Weight::Frozen(weight),
            weight_offset: self.case.norm_offset,
            epsilon: NORM_EPSILON,
            width,
        };
        let rope = backend.floats(&self.rope).unwrap();
        task(&backend::Attention {
            query_heads: self.reference.query_heads,
            key_value_heads: self.reference.key_value_heads,
            head_dim: width,
            softmax_scale: self.reference.softmax_scale as f32,
            soft_cap: self.case.soft_cap,
            window: self.reference.window,
            query_norm: self.case.norms.then_some(norm(&query_weight)),
            key_norm: self.case.norms.then_some(norm(&key_weight)),
            rotations: Rotations { table: &rope, width: self.case.rotated, first_row: 0, long: None },
        })
    }
}

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    for &case in CASES.iter().filter(|case| backend.check_heads(case.head_dim, case.rotated).is_ok()) {
        let inputs = Inputs::new(case, record.precision);
        check_reference(case, &inputs);
        inputs.with_attention(backend, |attention| {
            forward_and_backward(backend, record, case, &inputs, attention);
            cached(backend, record, case, &inputs, attention);
        });
    }
    long_texts(backend, record.precision);
}

/// Samples above a length are rotated by rows of their own: each has the bits that it has alone, with those rows as its first.
fn long_texts<B: Backend>(backend: &B, precision: Precision) {
    let case = Case { rotated: 8, ..case(&[12, 80, 13], [2, 1, 16], None, false) };
    let inputs = Inputs::new(case, precision);
    let [first_row, longer_than] = [100, 12];
    let mut table = rope_table(first_row, case.rotated);
    table.extend(rope_table(110, case.rotated).iter().map(|value| 0.5 * value));
    let table = backend.floats(&table).unwrap();
    let (width, out_width) = (inputs.reference.width(), 2 * 16);
    let run = |rows: std::ops::Range<usize>, lengths: &[usize], rotations: Rotations<'_, B>| {
        inputs.with_attention(backend, |attention| {
            let attention = backend::Attention { rotations, ..*attention };
            let batch = resident(backend, &batch_of(lengths, 11));
            let qkv = buffer(backend, &inputs.qkv[rows.start * width..rows.end * width]);
            let dout = buffer(backend, &inputs.dout[rows.start * out_width..rows.end * out_width]);
            let mut log_sum = backend.floats(&vec![0.0; rows.len() * 2]).unwrap();
            let mut out = backend.buffer(rows.len() * out_width).unwrap();
            backend.attention(&attention, &batch, &qkv, &mut log_sum, &mut out).unwrap();
            let mut dqkv = backend.buffer(rows.len() * width).unwrap();
            backend.attention_backward(&attention, &batch, &qkv, &log_sum, &out, &dout, &mut dqkv).unwrap();
            let capacity = rows.len();
            let keys = || backend.buffer(capacity * 16).unwrap();
            let mut cache = KvCache { keys: keys(), values: keys(), capacity };
            let mut cached = backend.buffer(rows.len() * out_width).unwrap();
            backend.attention_cached(&attention, rows.len(), 0, &qkv, &mut cache, &mut cached).unwrap();
            [
                read(backend, &out, rows.len() * out_width),
                read(backend, &dqkv, rows.len() * width),
                read(backend, &cached, rows.len() * out_width),
            ]
        })
    };
    let plain = Rotations { table: &table, width: case.rotated, first_row: 0, long: None };
    let long = Rotations { long: Some(LongTexts { longer_than, first_row }), ..plain };
    let [out, dqkv, _] = run(0..105, case.lengths, long);
    let mut start = 0;
    for &length in case.lengths {
        let first_row = if length > longer_than { first_row } else { 0 };
        let rows = start..start + length;
        let alone = run(rows.clone(), &[length], Rotations { first_row, ..plain });
        assert_eq!(alone[0], out[rows.start * out_width..rows.end * out_width], "{length} tokens, out");
        assert_eq!(alone[1], dqkv[rows.start * width..rows.end * width], "{length} tokens, dqkv");
        let told_by_length = run(rows.clone(), &[length], long);
        assert_eq!(alone, told_by_length, "{length} tokens");
        if length > longer_than {
            assert_ne!(alone[0], run(rows.clone(), &[length], plain)[0]);
        }
        start = rows.end;
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
