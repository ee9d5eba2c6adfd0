//! Attention with the linears around it: what the operations give one after the other, bit for bit. The sum of the output's
//! `s` alone may have another order: it and what is made of it are held to float64, and the backward is given the same `s`.

use fastlora::backend::{
    AttentionGradient, AttentionSaved, Backend, LinearInput, NormedInput, PassSettings, Reach, SelfAttention,
};
use fastlora::dtype::DType;

use super::attention::{self, Inputs, case};
use super::linear::{self, Setup};
use super::{Record, batch_of, buffer, norm_of, norm_weight, read, read_floats, resident_with, widen};

/// Width of the residual stream, and rank of the output's adapter.
const HIDDEN: usize = 40;
const OUTPUT: &[(usize, usize)] = &[(HIDDEN, 5)];

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

/// Adapters with magnitudes on heads that a product may rotate.
const WITH_MAGNITUDES: &[Case] = &[
    (case(&[5, 1, 9], [2, 1, 64], None, false), &[(128, 3), (64, 2), (64, 0)], 0.0),
    (case(&[7], [2, 1, 64], None, false), &[(128, 2), (64, 2), (64, 2)], 0.3),
];

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    let with = |magnitudes: bool| move |&case: &Case| (case, magnitudes);
    let cases = CASES.iter().map(with(false)).chain(WITH_MAGNITUDES.iter().map(with(true)));
    for ((shape, projections, dropout), magnitudes) in cases {
        let linear = |in_features, projections, is_output: bool| linear::Case {
            lengths: shape.lengths,
            in_features,
            projections,
            bias: !is_output,
            residual: is_output,
            dropout,
            dtype: DType::F32,
            magnitudes,
        };
        let queries = shape.query_heads * shape.head_dim;
        let linears = [linear(HIDDEN, projections, false), linear(queries, OUTPUT, true)];
        compare(backend, record, shape, linears);
    }
}

fn compare<B: Backend>(
    backend: &B,
    record: &mut Record,
    shape: attention::Case,
    [of_projection, of_output]: [linear::Case; 2],
) {
    let precision = record.precision;
    let projection = Setup::new(backend, of_projection, precision);
    let taken = projection.adapters.len();
    let output = Setup::behind(taken, backend, of_output, precision);
    let inputs = Inputs::new(shape, precision);
    let batch = batch_of(shape.lengths, 7);
    let settings = PassSettings { dropout: projection.dropout, ..PassSettings::default() };
    let resident = resident_with(backend, &batch, settings);
    let (rows, width) = (batch.token_count(), projection.group.in_features);
    let (outputs, queries) = (projection.group.out_features(), shape.query_heads * shape.head_dim);
    let stream = [61, 62, 63].map(|seed| precision.values(rows * width, seed));
    let [x, residual, dy] = stream.each_ref().map(|values| buffer(backend, values));
    let norm_weight = norm_weight(backend, precision, width);
    let norm = norm_of(&norm_weight, width);
    // The numbers of the first adapters are the same in both.
    let adapters = backend.floats(&output.adapters).unwrap();
    for setup in [&projection, &output] {
        backend.renew_group(&setup.group, &adapters).unwrap();
    }

    let buffer_of = |width: usize| backend.buffer(rows * width).unwrap();
    let kept = |setup: &Setup<B>| {
        let v = if setup.case.magnitudes { setup.group.out_features() } else { 0 };
        backend.low_rank_stride(setup.group.total_rank()) + v
    };
    let (mut output_s, mut y) = (buffer_of(kept(&output)), buffer_of(width));
    let mut results = |is_one: bool| {
        let mut projection_s = buffer_of(kept(&projection));
        let [mut qkv, mut dqkv] = [(); 2].map(|()| buffer_of(outputs));
        let [mut out, mut dout] = [(); 2].map(|()| buffer_of(queries));
        let [mut normed, mut dx] = [(); 2].map(|()| buffer_of(width));
        let mut log_sum = backend.floats(&vec![0.0; rows * shape.query_heads]).unwrap();
        let mut gradients = backend.floats(&vec![0.5; output.adapters.len()]).unwrap();
        inputs.with_attention(backend, |attention| {
            let layer = SelfAttention { projection: &projection.group, attention, output: &output.group };
            if is_one {
                let input = NormedInput { norm, x: &x, rows, batch: &resident, normed: &mut normed };
                let saved = AttentionSaved {
                    projection_s: &mut projection_s,
                    qkv: &mut qkv,
                    log_sum: &mut log_sum,
                    out: &mut out,
                    output_s: &mut output_s,
                };
                backend.self_attention(layer, &adapters, input, Some(&residual), saved, &mut y).unwrap();
                let saved = AttentionSaved {
                    projection_s: &mut projection_s,
                    qkv: &mut qkv,
                    log_sum: &mut log_sum,
                    out: &mut out,
                    output_s: &mut output_s,
                };
                let reach = Reach::Input(&mut dx);
                let gradient = AttentionGradient { dy: &dy, dout: &mut dout, dqkv: &mut dqkv, reach };
                let input = LinearInput { x: &normed, rows, batch: &resident };
                backend
                    .self_attention_backward(layer, &adapters, input, saved, gradient, &mut gradients)
                    .unwrap();
                return;
            }
            let SelfAttention { projection, output, .. } = layer;
            backend.rms_norm(norm, rows, &x, None, &mut normed).unwrap();
            let input = || LinearInput { x: &normed, rows, batch: &resident };
            backend.linear(projection, &adapters, input(), None, &mut projection_s, &mut qkv).unwrap();
            backend.attention(attention, &resident, &qkv, &mut log_sum, &mut out).unwrap();
            let of_output = || LinearInput { x: &out, rows, batch: &resident };
            backend
                .linear_backward(
                    output,
                    &adapters,
                    of_output(),
                    &output_s,
                    &dy,
                    &mut gradients,
                    Some(&mut dout),
                )
                .unwrap();
            backend.attention_backward(attention, &resident, &qkv, &log_sum, &out, &dout, &mut dqkv).unwrap();
            backend
                .linear_backward(
                    projection,
                    &adapters,
                    input(),
                    &projection_s,
                    &dqkv,
                    &mut gradients,
                    Some(&mut dx),
                )
                .unwrap();
        });
        [
            ("normed", read(backend, &normed, rows * width)),
            ("out", read(backend, &out, rows * queries)),
            ("log_sum", read_floats(backend, &log_sum, rows * shape.query_heads)),
            ("dout", read(backend, &dout, rows * queries)),
            ("dqkv", read(backend, &dqkv, rows * outputs)),
            ("gradients", read_floats(backend, &gradients, output.adapters.len())),
            ("dx", read(backend, &dx, rows * width)),
        ]
    };
    let (one, several) = (results(true), results(false));
    let out = widen(&one[1].1);
    let [s, _, expected_y] =
        output.forward(&output.mask(&batch), &out, &widen(&output.adapters), &widen(&stream[1]));
    let rank = output.group.total_rank();
    let stride = backend.low_rank_stride(rank);
    let found = read(backend, &output_s, rows * stride);
    let found: Vec<f32> = found.chunks(stride).flat_map(|row| &row[..rank]).copied().collect();
    record.check(&format!("{shape:?}, s of the output"), &found, &s, queries);
    record.check(&format!("{shape:?}, y"), &read(backend, &y, rows * width), &expected_y, queries + rank);
    for ((what, one), (_, two)) in one.into_iter().zip(several) {
        assert!(two.iter().any(|&value| value != 0.0 && value.is_finite()), "{shape:?}: {what} is empty");
        let first = one.iter().zip(&two).position(|(one, two)| one.to_bits() != two.to_bits());
        assert_eq!(first, None, "{shape:?}: {what} of one operation differs from that of several");
    }
}
