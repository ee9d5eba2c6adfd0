//! Norm, gated activation, embedding, and moves of rows.

use fastlora::backend::dropout::words_at;
use fastlora::backend::{Activation, Backend, Embedding, EmbeddingNoise, PassSettings, RmsNorm, Weight};
use fastlora::batch::{Batch, BatchRows};
use fastlora::dtype::DType;
use fastlora::tensor::WeightTensor;

use super::reference::{dot, gated, rms_norm};
use super::{
    Precision, Record, batch_of, buffer, finite_differences, read, read_floats, resident, resident_with,
    stored, values, widen,
};

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    for (rows, width) in [(1, 1), (3, 5), (2, 16), (7, 33), (4, 100), (40, 576)] {
        for offset in [0.0, 1.0] {
            norm(backend, record, rows, record.precision.width(width), offset);
        }
        for activation in [Activation::Silu, Activation::GeluTanh] {
            gate(backend, record, activation, rows, record.precision.width(width));
        }
    }
    embedding(backend, record);
    embedding_noise(backend, record);
    labelled_rows(backend, record.precision);
    rows_that_are_none(backend, record.precision);
    reading(backend);
    transfers(backend, record.precision);
}

fn norm<B: Backend>(backend: &B, record: &mut Record, rows: usize, width: usize, weight_offset: f32) {
    let case = format!("rms_norm [{rows}, {width}], {weight_offset} + w");
    let (x, dy) = (record.precision.values(rows * width, 1), record.precision.values(rows * width, 2));
    let weight = record.precision.values(width, 3);
    let epsilon = 1e-5;
    let tensors = [WeightTensor::from_f32("w", vec![width], &weight)];
    let vector = backend.vector(&tensors).unwrap();
    let norm = RmsNorm { weight: Weight::Frozen(&vector), weight_offset, epsilon, width };
    let (x_buffer, dy_buffer) = (buffer(backend, &x), buffer(backend, &dy));
    let mut y = backend.buffer(rows * width).unwrap();
    backend.rms_norm(norm, rows, &x_buffer, None, &mut y).unwrap();
    let (x, dy, epsilon) = (widen(&x), widen(&dy), f64::from(epsilon));
    let weight: Vec<f64> = widen(&weight).iter().map(|w| f64::from(weight_offset) + w).collect();
    let mut expected = rms_norm(&x, &weight, epsilon);
    record.check(&case, &read(backend, &y, rows * width), &expected, width);
    backend.rms_norm(norm, rows, &x_buffer, Some(&dy_buffer), &mut y).unwrap();
    expected.iter_mut().zip(&dy).for_each(|(y, residual)| *y += residual);
    record.check(&format!("{case} + residual"), &read(backend, &y, rows * width), &expected, width);

    let before = record.precision.values(rows * width, 4);
    let mut dx = buffer(backend, &before);
    backend.rms_norm_backward(norm, rows, &x_buffer, &dy_buffer, &mut dx).unwrap();
    let mut expected = Vec::new();
    for (x, dy) in x.chunks(width).zip(dy.chunks(width)) {
        expected.extend(finite_differences(x, |x| dot(&rms_norm(x, &weight, epsilon), dy)));
    }
    expected.iter_mut().zip(&before).for_each(|(sum, &before)| *sum += f64::from(before));
    record.check(&format!("{case} backward"), &read(backend, &dx, rows * width), &expected, width);

    // The same weight as a stretch of the parameters.
    let stored: Vec<f32> = weight.iter().map(|w| (w - f64::from(weight_offset)) as f32).collect();
    let flat = [&[9.0; 8][..], &stored, &[9.0; 3]].concat();
    let parameters = backend.floats(&flat).unwrap();
    let norm = RmsNorm { weight: Weight::Trained { parameters: &parameters, offset: 8 }, ..norm };
    backend.rms_norm(norm, rows, &x_buffer, None, &mut y).unwrap();
    record.check(
        &format!("{case} trained"),
        &read(backend, &y, rows * width),
        &rms_norm(&x, &weight, epsilon),
        width,
    );
    let before = values(width + 11, 5);
    let mut gradients = backend.floats(&before).unwrap();
    backend.rms_norm_weight_backward(norm, rows, &x_buffer, &dy_buffer, &mut gradients).unwrap();
    let found = read_floats(backend, &gradients, width + 11);
    let mut expected = finite_differences(&weight, |weight| dot(&rms_norm(&x, weight, epsilon), &dy));
    expected.iter_mut().zip(&before[8..]).for_each(|(sum, &before)| *sum += f64::from(before));
    record.check_f32(&format!("{case} weight backward"), &found[8..8 + width], &expected, rows + width);
    assert_eq!((&found[..8], &found[8 + width..]), (&before[..8], &before[8 + width..]), "{case}: around it");
}

fn gate<B: Backend>(backend: &B, record: &mut Record, activation: Activation, rows: usize, width: usize) {
    let case = format!("gated {activation:?} [{rows}, {width}]");
    let gate_up: Vec<f32> =
        values(2 * rows * width, 5).iter().map(|x| record.precision.rounded(6.0 * x)).collect();
    let dact = record.precision.values(rows * width, 6);
    let mut gate_up_buffer = buffer(backend, &gate_up);
    let mut act = backend.buffer(rows * width).unwrap();
    backend.gated(activation, rows, width, &gate_up_buffer, &mut act).unwrap();
    let x = widen(&gate_up);
    record.check(&case, &read(backend, &act, rows * width), &gated(activation, &x, width), 1);
    let dact_buffer = buffer(backend, &dact);
    backend.gated_backward(activation, rows, width, &dact_buffer, &mut gate_up_buffer).unwrap();
    let mut expected = Vec::new();
    for (pair, dact) in x.chunks(2 * width).zip(dact.chunks(width)) {
        // Elements do not meet: one at a time.
        let (mut dgate, mut dup) = (Vec::new(), Vec::new());
        for (i, &dact) in dact.iter().enumerate() {
            let gradient = finite_differences(&[pair[i], pair[width + i]], |x| gated(activation, x, 1)[0]);
            dgate.push(gradient[0] * f64::from(dact));
            dup.push(gradient[1] * f64::from(dact));
        }
        expected.extend(dgate);
        expected.extend(dup);
    }
    record.check(
        &format!("{case} backward"),
        &read(backend, &gate_up_buffer, 2 * rows * width),
        &expected,
        1,
    );
}

fn embedding<B: Backend>(backend: &B, record: &mut Record) {
    let precision = record.precision;
    let width = precision.width(21);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for offset in [0, 1] {
            let (first, mut expected_table) =
                stored(precision, "first", dtype, vec![30, width], &values(30 * width, 7), offset);
            let (second, rest) =
                stored(precision, "second", dtype, vec![13, width], &values(13 * width, 8), offset);
            expected_table.extend(rest);
            let table = backend.matrix(&[first, second]).unwrap();
            let batch = batch_of(&[5, 1, 900], 43);
            let mut x = backend.buffer(batch.token_count() * width).unwrap();
            // A factor that half types hold exactly.
            for scale in [1.0, 5.625] {
                let embedding = Embedding { table: &table, width, scale };
                backend.embedding(&resident(backend, &batch), embedding, &mut x).unwrap();
                let row = |&id: &u32| expected_table[id as usize * width..][..width].to_vec();
                let scaled = |x: f64| f64::from(scale) * x;
                let expected: Vec<f64> = batch.token_ids.iter().flat_map(row).map(scaled).collect();
                let found = read(backend, &x, expected.len());
                record.check(&format!("embedding {dtype} at byte {offset} × {scale}"), &found, &expected, 1);
            }
            let outside = batch_of(&[50], 44);
            let embedding = Embedding { table: &table, width, scale: 1.0 };
            let error = backend.embedding(&resident(backend, &outside), embedding, &mut x).unwrap_err();
            assert!(error.message().contains("43"), "{error}");
        }
    }
}

fn embedding_noise<B: Backend>(backend: &B, record: &mut Record) {
    let precision = record.precision;
    let width = precision.width(21);
    let tensor = stored(precision, "table", DType::F32, vec![43, width], &values(43 * width, 7), 0);
    let table = backend.matrix(&[tensor.0]).unwrap();
    let rows = tensor.1;
    let noise = EmbeddingNoise { alpha: 7.0, seed: 5 | 9 << 32, epoch: 2 };
    let settings = PassSettings { embedding_noise: Some(noise), ..PassSettings::default() };
    let embed = |batch: &Batch| {
        let mut x = backend.buffer(batch.token_count() * width).unwrap();
        let embedding = Embedding { table: &table, width, scale: 1.0 };
        backend.embedding(&resident_with(backend, batch, settings), embedding, &mut x).unwrap();
        read(backend, &x, batch.token_count() * width)
    };
    let batch = batch_of(&[5, 1, 300], 43);
    let mut expected = Vec::new();
    for (bounds, &sample) in batch.sample_starts.windows(2).zip(&batch.sample_ids) {
        let length = bounds[1] - bounds[0];
        for (position, &id) in batch.token_ids[bounds[0]..bounds[1]].iter().enumerate() {
            for feature in 0..width {
                let words = words_at::<1>(noise.seed, noise.epoch, sample, position, 0xFFFF, feature / 4);
                let step = f64::from((words[feature % 4][0] as i32) >> 8);
                let bound = f64::from(noise.alpha) / ((length * width) as f64).sqrt();
                expected.push(rows[id as usize * width + feature] + bound * (step + 0.5) / 2f64.powi(23));
            }
        }
    }
    let found = embed(&batch);
    record.check("embedding with noise", &found, &expected, 1);
    // The same bits when the last sample stands alone.
    let start = batch.sample_starts[2];
    let alone = Batch {
        token_ids: batch.token_ids[start..].to_vec(),
        sample_starts: vec![0, batch.token_count() - start],
        sample_ids: vec![batch.sample_ids[2]],
        ..Batch::default()
    };
    assert_eq!(embed(&alone), found[start * width..]);
}

fn labelled_rows<B: Backend>(backend: &B, precision: Precision) {
    let width = precision.width(37);
    let host = batch_of(&[4, 1, 700, 2], 50);
    let batch = resident(backend, &host);
    let x = precision.values(host.token_count() * width, 9);
    let mut packed = backend.buffer(host.labelled_count() * width).unwrap();
    backend.gather_labelled(&batch, width, &buffer(backend, &x), &mut packed).unwrap();
    let row = |&row: &u32| x[row as usize * width..][..width].to_vec();
    let expected: Vec<f32> = host.labelled_rows.iter().flat_map(row).collect();
    assert_eq!(read(backend, &packed, expected.len()), expected, "gather_labelled");
    let mut dx = buffer(backend, &x);
    backend.scatter_labelled(&batch, width, &packed, &mut dx).unwrap();
    let mut expected = vec![0.0; x.len()];
    for &row in &host.labelled_rows {
        let part = row as usize * width..(row as usize + 1) * width;
        expected[part.clone()].copy_from_slice(&x[part]);
    }
    assert_eq!(read(backend, &dx, x.len()), expected, "scatter_labelled");
}

/// Labelled rows that are none are packed as zeros, and nothing is written for them.
fn rows_that_are_none<B: Backend>(backend: &B, precision: Precision) {
    let width = precision.width(24);
    let mut host = batch_of(&[4, 3], 50);
    let labelled = host.labelled_count();
    host.pad(BatchRows { tokens: host.token_count(), labelled: labelled + 9 });
    let batch = resident(backend, &host);
    let x = precision.values(host.token_count() * width, 9);
    let mut packed = buffer(backend, &vec![f32::NAN; host.labelled_count() * width]);
    backend.gather_labelled(&batch, width, &buffer(backend, &x), &mut packed).unwrap();
    let row = |&row: &u32| x[row as usize * width..][..width].to_vec();
    let mut expected: Vec<f32> = host.labelled_rows[..labelled].iter().flat_map(row).collect();
    expected.resize(host.labelled_count() * width, 0.0);
    assert_eq!(read(backend, &packed, expected.len()), expected, "gather_labelled");
    let mut dx = buffer(backend, &x);
    let ones = buffer(backend, &vec![1.0; expected.len()]);
    backend.scatter_labelled(&batch, width, &ones, &mut dx).unwrap();
    let sum: f32 = read(backend, &dx, x.len()).iter().sum();
    assert_eq!(sum, (labelled * width) as f32, "scatter_labelled");
}

/// A read that was started holds the values of its place in the work.
fn reading<B: Backend>(backend: &B) {
    let mut floats = backend.floats(&values(40, 3)).unwrap();
    let mut landing = B::Landing::default();
    for (count, seed) in [(7, 4), (40, 5), (3, 6)] {
        let written = values(40, seed);
        backend.write_floats(&mut floats, &written).unwrap();
        backend.start_reading(&floats, count, &mut landing).unwrap();
        backend.zero_floats(&mut floats).unwrap();
        let mut found = vec![f32::NAN; count];
        backend.finish_reading(&landing, &mut found).unwrap();
        assert_eq!(found, written[..count]);
    }
    assert!(backend.finish_reading(&landing, &mut [0.0; 4]).is_err(), "more than was read");
}

fn transfers<B: Backend>(backend: &B, precision: Precision) {
    let data = precision.values(50, 10);
    let mut floats = backend.floats(&data).unwrap();
    backend.write_floats(&mut floats, &[7.0; 3]).unwrap();
    assert_eq!(super::read_floats(backend, &floats, 5)[..], [7.0, 7.0, 7.0, data[3], data[4]]);
    backend.zero_floats(&mut floats).unwrap();
    assert_eq!(super::read_floats(backend, &floats, 50), [0.0; 50]);
    let mut part = buffer(backend, &data);
    backend.zero_buffer(&mut part, 20).unwrap();
    assert_eq!(read(backend, &part, 50)[..20], [0.0; 20]);
    assert_eq!(read(backend, &part, 50)[20..], data[20..]);
    assert!(backend.write_floats(&mut floats, &[0.0; 51]).is_err());
    assert!(backend.read_floats(&floats, &mut [0.0; 51]).is_err());
}
