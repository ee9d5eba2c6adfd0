//! A sample's values do not depend on the samples beside it.

use fastlora::backend::{Backend, Dropout, Head, LinearInput, PassSettings, Weight};
use fastlora::batch::Batch;
use fastlora::dtype::DType;

use super::attention::{Inputs, case};
use super::{
    Precision, batch_of, buffer, linear, read, read_floats, resident, resident_with, stored, values,
};

const LENGTHS: &[usize] = &[
    9, 1, 70, 3, 30, 12, 8, 2, 51, 17, 5, 64, 1, 33, 6, 20, 4, 11, 7, 26, 40, 15, 3, 9, 2, 48, 13, 10, 22,
    31, 5, 18,
];

/// Agreement of what belongs to one row.
const OF_A_ROW: f32 = 1e-6;

/// Runs the operations whose rows meet, or that sum over rows, over 32 samples at once and one by one. Figures of a row
/// agree within 1e-6 of the largest; sums over `n` rows, which are added up in another order, within `ε·√n` of it, as
/// the roundings of a sum grow.
pub fn batch_cuts_agree<B: Backend>(backend: &B) {
    let whole = batch_of(LENGTHS, 40);
    let cuts: Vec<Batch> = (0..LENGTHS.len()).map(|sample| cut(&whole, sample)).collect();
    attention(backend, &whole, &cuts);
    linear_group(backend, &whole, &cuts);
    head_loss(backend, &whole, &cuts);
}

fn cut(whole: &Batch, sample: usize) -> Batch {
    let (start, end) = (whole.sample_starts[sample], whole.sample_starts[sample + 1]);
    let inside = |row: u32| (start..end).contains(&(row as usize));
    let labelled = || whole.labelled_rows.iter().zip(&whole.targets).filter(|&(&row, _)| inside(row));
    Batch {
        token_ids: whole.token_ids[start..end].to_vec(),
        sample_starts: vec![0, end - start],
        sample_ids: vec![whole.sample_ids[sample]],
        labelled_rows: labelled().map(|(&row, _)| row - start as u32).collect(),
        targets: labelled().map(|(_, &target)| target).collect(),
    }
}

fn assert_close(name: &str, tolerance: f32, whole: &[f32], parts: &[f32]) {
    assert_eq!(whole.len(), parts.len(), "{name}");
    let largest = whole.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    for (place, (a, b)) in whole.iter().zip(parts).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * largest,
            "{name}: element {place}: {a} at once, {b} cut (largest {largest})"
        );
    }
}

fn attention<B: Backend>(backend: &B, whole: &Batch, cuts: &[Batch]) {
    let (query_heads, key_value_heads, head_dim) = (6, 2, 32);
    let case = case(LENGTHS, [query_heads, key_value_heads, head_dim], Some(40), true);
    let inputs = Inputs::new(case, Precision::F32);
    inputs.with_attention(backend, |attention| {
        let run = |batch: &Batch, qkv: &[f32], dout: &[f32]| {
            let rows = batch.token_count();
            let batch = resident(backend, batch);
            let (qkv_buffer, dout) = (buffer(backend, qkv), buffer(backend, dout));
            let mut log_sum = backend.floats(&vec![0.0; rows * query_heads]).unwrap();
            let mut out = backend.buffer(rows * query_heads * head_dim).unwrap();
            backend.attention(attention, &batch, &qkv_buffer, &mut log_sum, &mut out).unwrap();
            let mut dqkv = backend.buffer(qkv.len()).unwrap();
            backend
                .attention_backward(attention, &batch, &qkv_buffer, &log_sum, &out, &dout, &mut dqkv)
                .unwrap();
            (read(backend, &out, rows * query_heads * head_dim), read(backend, &dqkv, qkv.len()))
        };
        let (out, dqkv) = run(whole, &inputs.qkv, &inputs.dout);
        let (width, out_width) = (inputs.reference.width(), query_heads * head_dim);
        let (mut out_parts, mut dqkv_parts) = (Vec::new(), Vec::new());
        for (sample, part) in cuts.iter().enumerate() {
            let rows = whole.sample_starts[sample]..whole.sample_starts[sample + 1];
            let qkv = &inputs.qkv[rows.start * width..rows.end * width];
            let (out, dqkv) = run(part, qkv, &inputs.dout[rows.start * out_width..rows.end * out_width]);
            out_parts.extend(out);
            dqkv_parts.extend(dqkv);
        }
        assert_close("attention out", OF_A_ROW, &out, &out_parts);
        assert_close("attention dqkv", OF_A_ROW, &dqkv, &dqkv_parts);
    });
}

fn linear_group<B: Backend>(backend: &B, whole: &Batch, cuts: &[Batch]) {
    let case = linear::Case {
        lengths: LENGTHS,
        in_features: 96,
        projections: &[(64, 8), (32, 0), (32, 4)],
        bias: true,
        residual: false,
        dropout: 0.2,
        dtype: DType::F16,
        magnitudes: false,
    };
    let setup = linear::Setup::new(backend, case, Precision::F32);
    let (width, outs, ranks) = (case.in_features, setup.group.out_features(), setup.group.total_rank());
    let adapters = backend.floats(&setup.adapters).unwrap();
    let x = values(whole.token_count() * width, 80);
    let dy = values(whole.token_count() * outs, 81);
    let zeros = vec![0.0; setup.adapters.len()];
    let run = |batch: &Batch, x: &[f32], dy: &[f32], gradients: &mut B::Floats| {
        let rows = batch.token_count();
        let dropout = Some(Dropout { probability: case.dropout, seed: 3, epoch: 1 });
        let resident = resident_with(backend, batch, PassSettings { dropout, ..PassSettings::default() });
        let (x, dy) = (buffer(backend, x), buffer(backend, dy));
        let input = || LinearInput { x: &x, rows, batch: &resident };
        let mut s = backend.buffer(rows * ranks).unwrap();
        let mut y = backend.buffer(rows * outs).unwrap();
        let mut dx = backend.buffer(rows * width).unwrap();
        backend.linear(&setup.group, &adapters, input(), None, &mut s, &mut y).unwrap();
        backend.linear_backward(&setup.group, &adapters, input(), &s, &dy, gradients, Some(&mut dx)).unwrap();
        (read(backend, &y, rows * outs), read(backend, &dx, rows * width))
    };
    let mut gradients = backend.floats(&zeros).unwrap();
    let (y, dx) = run(whole, &x, &dy, &mut gradients);
    let mut gradient_parts = backend.floats(&zeros).unwrap();
    let (mut y_parts, mut dx_parts) = (Vec::new(), Vec::new());
    for (sample, part) in cuts.iter().enumerate() {
        let rows = whole.sample_starts[sample]..whole.sample_starts[sample + 1];
        let (x, dy) = (&x[rows.start * width..rows.end * width], &dy[rows.start * outs..rows.end * outs]);
        let (y, dx) = run(part, x, dy, &mut gradient_parts);
        y_parts.extend(y);
        dx_parts.extend(dx);
    }
    assert_close("linear y", OF_A_ROW, &y, &y_parts);
    assert_close("linear dx", OF_A_ROW, &dx, &dx_parts);
    let count = zeros.len();
    let read = |floats| read_floats(backend, floats, count);
    let of_a_sum = f32::EPSILON * (whole.token_count() as f32).sqrt();
    assert_close("linear gradients", of_a_sum, &read(&gradients), &read(&gradient_parts));
}

fn head_loss<B: Backend>(backend: &B, whole: &Batch, cuts: &[Batch]) {
    let (vocabulary, width) = (301, 24);
    let (tensor, _) = stored(
        Precision::F32,
        "head",
        DType::F16,
        vec![vocabulary, width],
        &values(vocabulary * width, 82),
        0,
    );
    let weight = backend.matrix(&[tensor]).unwrap();
    let x = values(whole.labelled_count() * width, 83);
    let run = |batch: &Batch, x: &[f32]| {
        let count = batch.labelled_count();
        let mut losses = backend.floats(&vec![0.0; 2 * count]).unwrap();
        let mut dx = backend.buffer(count * width).unwrap();
        let head = Head { weight: Weight::Frozen(&weight), vocabulary, width, soft_cap: None };
        let resident =
            resident_with(backend, batch, PassSettings { gradient_scale: 0.5, ..PassSettings::default() });
        backend.head_loss(head, &resident, &buffer(backend, x), &mut losses, Some(&mut dx), None).unwrap();
        let mut losses = read_floats(backend, &losses, 2 * count);
        losses.truncate(count);
        (losses, read(backend, &dx, count * width))
    };
    let (losses, dx) = run(whole, &x);
    let (mut loss_parts, mut dx_parts) = (Vec::new(), Vec::new());
    let mut first = 0;
    for part in cuts {
        let (losses, dx) = run(part, &x[first * width..(first + part.labelled_count()) * width]);
        loss_parts.extend(losses);
        dx_parts.extend(dx);
        first += part.labelled_count();
    }
    assert_close("losses", OF_A_ROW, &losses, &loss_parts);
    assert_close("head dx", OF_A_ROW, &dx, &dx_parts);
}
