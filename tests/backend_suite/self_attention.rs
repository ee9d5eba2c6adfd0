//! Attention with its projection: what the two operations give one after the other, bit for bit.

use fastlora::backend::{
    AttentionGradients, AttentionResults, Backend, LinearInput, PassSettings, SelfAttention,
};
use fastlora::dtype::DType;

use super::attention::{self, Inputs, case};
use super::linear::{self, Setup};
use super::{Precision, Record, batch_of, buffer, read, read_floats, resident_with};

const IN_FEATURES: usize = 40;

/// Attention, the width and rank of each projection, and the probability of dropout.
type Case = (attention::Case, &'static [(usize, usize)], f32);

/// Heads that a product may rotate and others, samples that share tiles, dropout, and ranks that some projections lack.
const CASES: &[Case] = &[
    (case(&[5, 1, 9], [2, 1, 64], None, false), &[(128, 3), (64, 2), (64, 0)], 0.0),
    (case(&[70, 3, 60], [3, 1, 64], Some(20), false), &[(192, 4), (64, 0), (64, 4)], 0.3),
    (case(&[131], [2, 1, 128], None, false), &[(256, 8), (128, 8), (128, 8)], 0.0),
    (case(&[7], [2, 1, 64], None, true), &[(128, 2), (64, 2), (64, 2)], 0.0),
    (
        attention::Case { rotated: 32, ..case(&[9], [2, 2, 64], None, false) },
        &[(128, 0), (128, 1), (128, 0)],
        0.0,
    ),
    (case(&[6], [2, 1, 16], None, false), &[(32, 2), (16, 2), (16, 2)], 0.0),
];

pub fn run<B: Backend>(backend: &B, record: &Record) {
    for &(shape, projections, dropout) in CASES {
        let linear = linear::Case {
            lengths: shape.lengths,
            in_features: IN_FEATURES,
            projections,
            bias: true,
            residual: false,
            dropout,
            dtype: DType::F32,
            magnitudes: false,
        };
        compare(backend, record.precision, shape, linear);
    }
}

fn compare<B: Backend>(backend: &B, precision: Precision, shape: attention::Case, linear: linear::Case) {
    let setup = Setup::new(backend, linear, precision);
    let inputs = Inputs::new(shape, precision);
    let batch = batch_of(linear.lengths, 7);
    let resident =
        resident_with(backend, &batch, PassSettings { dropout: setup.dropout, ..PassSettings::default() });
    let (rows, width) = (batch.token_count(), setup.group.in_features);
    let (outputs, queries) = (setup.group.out_features(), shape.query_heads * shape.head_dim);
    let x = buffer(backend, &precision.values(rows * width, 61));
    let dout = buffer(backend, &inputs.dout);
    let adapters = backend.floats(&setup.adapters).unwrap();
    backend.renew_group(&setup.group, &adapters).unwrap();
    let input = || LinearInput { x: &x, rows, batch: &resident };

    let results = |is_one: bool| {
        let mut s = backend.buffer(rows * backend.low_rank_stride(setup.group.total_rank())).unwrap();
        let [mut qkv, mut dqkv] = [(); 2].map(|()| backend.buffer(rows * outputs).unwrap());
        let mut out = backend.buffer(rows * queries).unwrap();
        let mut dx = backend.buffer(rows * width).unwrap();
        let mut log_sum = backend.floats(&vec![0.0; rows * shape.query_heads]).unwrap();
        let mut gradients = backend.floats(&vec![0.5; setup.adapters.len()]).unwrap();
        inputs.with_attention(backend, |attention| {
            let layer = SelfAttention { projection: &setup.group, attention };
            if is_one {
                let results =
                    AttentionResults { s: &mut s, qkv: &mut qkv, log_sum: &mut log_sum, out: &mut out };
                backend.self_attention(&layer, &adapters, input(), results).unwrap();
                let results =
                    AttentionResults { s: &mut s, qkv: &mut qkv, log_sum: &mut log_sum, out: &mut out };
                let gradients = AttentionGradients {
                    dout: &dout,
                    dqkv: &mut dqkv,
                    adapters: &mut gradients,
                    dx: Some(&mut dx),
                };
                backend.self_attention_backward(&layer, &adapters, input(), results, gradients).unwrap();
            } else {
                backend.linear(&setup.group, &adapters, input(), None, &mut s, &mut qkv).unwrap();
                backend.attention(attention, &resident, &qkv, &mut log_sum, &mut out).unwrap();
                backend
                    .attention_backward(attention, &resident, &qkv, &log_sum, &out, &dout, &mut dqkv)
                    .unwrap();
                backend
                    .linear_backward(
                        &setup.group,
                        &adapters,
                        input(),
                        &s,
                        &dqkv,
                        &mut gradients,
                        Some(&mut dx),
                    )
                    .unwrap();
            }
        });
        [
            ("out", read(backend, &out, rows * queries)),
            ("log_sum", read_floats(backend, &log_sum, rows * shape.query_heads)),
            ("dqkv", read(backend, &dqkv, rows * outputs)),
            ("gradients", read_floats(backend, &gradients, setup.adapters.len())),
            ("dx", read(backend, &dx, rows * width)),
        ]
    };
    for ((what, one), (_, two)) in results(true).into_iter().zip(results(false)) {
        assert!(two.iter().any(|&value| value != 0.0 && value.is_finite()), "{shape:?}: {what} is empty");
        let first = one.iter().zip(&two).position(|(one, two)| one.to_bits() != two.to_bits());
        assert_eq!(first, None, "{shape:?}: {what} of one operation differs from that of two");
    }
}
