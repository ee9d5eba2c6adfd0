//! Output head: losses, hits and gradients; logits of one row.

use fastlora::backend::{Backend, Head, PassSettings, Weight};
use fastlora::batch::BatchRows;
use fastlora::dtype::DType;

use super::reference::{cross_entropy, cross_entropy_backward, dot, product_transposed, soft_cap};
use super::{
    Precision, Record, batch_of, buffer, finite_differences, read, read_floats, resident, resident_with,
    stored, values, widen,
};

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    for (vocabulary, width, dtype) in [(5, 3, DType::F32), (50, 12, DType::F16), (1031, 9, DType::Bf16)] {
        for cap in [None, Some(1.5)] {
            check(backend, record, vocabulary, record.precision.width(width), dtype, cap);
        }
    }
    for (vocabulary, width) in [(5, 3), (50, 12), (131, 40)] {
        for cap in [None, Some(1.5)] {
            trained(backend, record, vocabulary, record.precision.width(width), cap);
        }
    }
    ties(backend, record.precision);
}

fn check<B: Backend>(
    backend: &B,
    record: &mut Record,
    vocabulary: usize,
    width: usize,
    dtype: DType,
    cap: Option<f32>,
) {
    let case = format!("head_loss V={vocabulary} H={width} {dtype} {cap:?}");
    let data: Vec<f32> = values(vocabulary * width, 50).iter().map(|w| 2.0 * w).collect();
    let (tensor, table) = stored(record.precision, "head", dtype, vec![vocabulary, width], &data, 0);
    let weight = backend.matrix(&[tensor]).unwrap();
    let head = || Head { weight: Weight::Frozen(&weight), vocabulary, width, soft_cap: cap };
    let host = batch_of(&[6, 1, 9], vocabulary as u32);
    let gradient_scale = 0.37;
    let settings = PassSettings { gradient_scale, ..PassSettings::default() };
    let batch = resident_with(backend, &host, settings);
    let count = host.labelled_count();
    let x = record.precision.values(count * width, 51);
    let x_buffer = buffer(backend, &x);
    let mut losses = backend.floats(&vec![0.0; 2 * count + 3]).unwrap();
    let mut dx = backend.buffer(count * width).unwrap();
    backend.head_loss(head(), &batch, &x_buffer, &mut losses, Some(&mut dx), None).unwrap();
    let wide = widen(&x);
    let capped = |logits: Vec<f64>| -> Vec<f64> {
        logits.into_iter().map(|logit| soft_cap(logit, cap.map(f64::from))[0]).collect()
    };
    let row_logits = |x: &[f64]| capped(product_transposed(x, &table, width));
    let row_loss = |x: &[f64], target: u32| cross_entropy(&row_logits(x), target as usize);
    let rows = || wide.chunks(width).zip(&host.targets);
    let expected: Vec<f64> = rows().map(|(x, &target)| row_loss(x, target).0).collect();
    let found = read_floats(backend, &losses, 2 * count);
    record.check(&case, &found[..count], &expected, width);
    for ((x, &target), &hit) in rows().zip(&found[count..]) {
        let logits = row_logits(x);
        // Rounded to the compute type, two logits may change places.
        let slack = record.slack(&logits, width);
        let is_highest = |bound: f64| {
            logits
                .iter()
                .enumerate()
                .all(|(v, z)| v == target as usize || *z < logits[target as usize] + bound)
        };
        match hit {
            1.0 => assert!(is_highest(slack), "{case}: a hit on {target}"),
            0.0 => assert!(!is_highest(-slack), "{case}: no hit on {target}"),
            other => panic!("{case}: hit {other}"),
        }
    }
    let expected: Vec<f64> = rows()
        .flat_map(|(x, &target)| finite_differences(x, |x| f64::from(gradient_scale) * row_loss(x, target).0))
        .collect();
    record.check(&format!("{case} dx"), &read(backend, &dx, count * width), &expected, vocabulary);

    let mut again = backend.floats(&vec![0.0; 2 * count]).unwrap();
    backend.head_loss(head(), &batch, &x_buffer, &mut again, None, None).unwrap();
    assert_eq!(read_floats(backend, &again, 2 * count), found, "{case}: without dx");

    // Entries that fill up a batch have neither loss nor hit nor gradient, and change no other.
    let mut padded = host.clone();
    padded.pad(BatchRows { tokens: host.token_count() + 5, labelled: count + 3 });
    let batch = resident_with(backend, &padded, settings);
    let mut x = x;
    x.extend(record.precision.values(3 * width, 52));
    let mut all = backend.floats(&vec![f32::NAN; 2 * (count + 3)]).unwrap();
    let mut all_dx = buffer(backend, &vec![f32::NAN; x.len()]);
    backend.head_loss(head(), &batch, &buffer(backend, &x), &mut all, Some(&mut all_dx), None).unwrap();
    let all = read_floats(backend, &all, 2 * (count + 3));
    let parts = [&found[..count], &[0.0; 3], &found[count..], &[0.0; 3]].concat();
    assert_eq!(all, parts, "{case}: losses and hits of a batch filled up");
    let parts = [&read(backend, &dx, count * width)[..], &vec![0.0; 3 * width]].concat();
    assert_eq!(read(backend, &all_dx, x.len()), parts, "{case}: dx of a batch filled up");

    let mut logits = vec![0.0; vocabulary];
    backend.head_logits(head(), &x_buffer, 2, &mut logits).unwrap();
    let row = &wide[2 * width..3 * width];
    let expected = capped(table.chunks(width).map(|w| dot(w, row)).collect());
    record.check(&format!("{case} logits"), &logits, &expected, width);
}

/// A trained head: the gradient of its weight, and the same losses and `dx`.
fn trained<B: Backend>(backend: &B, record: &mut Record, vocabulary: usize, width: usize, cap: Option<f32>) {
    let case = format!("head_loss V={vocabulary} H={width} cap {cap:?} trained");
    let table = record.precision.values(vocabulary * width, 60);
    let parameters = backend.floats(&[&[9.0; 8][..], &table, &[9.0; 3]].concat()).unwrap();
    let weight = Weight::Trained { parameters: &parameters, offset: 8 };
    let head = Head { weight, vocabulary, width, soft_cap: cap };
    let host = batch_of(&[6, 1, 150], vocabulary as u32);
    let gradient_scale = 0.37;
    let batch = resident_with(backend, &host, PassSettings { gradient_scale, ..PassSettings::default() });
    let count = host.labelled_count();
    let x = record.precision.values(count * width, 61);
    let mut losses = backend.floats(&vec![0.0; 2 * count]).unwrap();
    let mut dx = backend.buffer(count * width).unwrap();
    let before = values(table.len() + 11, 62);
    let mut gradients = backend.floats(&before).unwrap();
    let x_buffer = buffer(backend, &x);
    backend.head_loss(head, &batch, &x_buffer, &mut losses, Some(&mut dx), Some(&mut gradients)).unwrap();
    let (x, table) = (widen(&x), widen(&table));
    let mut expected: Vec<f64> = before[8..][..table.len()].iter().map(|&value| value.into()).collect();
    let (mut row_losses, mut expected_dx) = (Vec::new(), Vec::new());
    for (x, &target) in x.chunks(width).zip(&host.targets) {
        let capped: Vec<[f64; 2]> = product_transposed(x, &table, width)
            .into_iter()
            .map(|logit| soft_cap(logit, cap.map(f64::from)))
            .collect();
        let logits: Vec<f64> = capped.iter().map(|[logit, _]| *logit).collect();
        row_losses.push(cross_entropy(&logits, target as usize).0);
        let mut dlogits = cross_entropy_backward(&logits, target as usize);
        let slopes = capped.iter().map(|[_, slope]| slope);
        dlogits.iter_mut().zip(slopes).for_each(|(d, slope)| *d *= slope * f64::from(gradient_scale));
        for (row, d) in expected.chunks_mut(width).zip(&dlogits) {
            row.iter_mut().zip(x).for_each(|(sum, x)| *sum += d * x);
        }
        let mut row_dx = vec![0.0; width];
        for (w, d) in table.chunks(width).zip(&dlogits) {
            row_dx.iter_mut().zip(w).for_each(|(sum, w)| *sum += d * w);
        }
        expected_dx.extend(row_dx);
    }
    record.check(&case, &read_floats(backend, &losses, count), &row_losses, width);
    record.check(&format!("{case} dx"), &read(backend, &dx, count * width), &expected_dx, vocabulary);
    let found = read_floats(backend, &gradients, table.len() + 11);
    let stretch = 8..8 + table.len();
    record.check(&format!("{case} dW"), &found[stretch.clone()], &expected, count + width);
    assert_eq!(
        (&found[..8], &found[stretch.end..]),
        (&before[..8], &before[stretch.end..]),
        "{case}: around it"
    );

    let mut logits = vec![0.0; vocabulary];
    backend.head_logits(head, &x_buffer, 2, &mut logits).unwrap();
    let row = &x[2 * width..3 * width];
    let expected: Vec<f64> =
        table.chunks(width).map(|w| soft_cap(dot(w, row), cap.map(f64::from))[0]).collect();
    record.check(&format!("{case} logits"), &logits, &expected, width);
}

/// Of equal highest logits the first counts, as in argmax.
fn ties<B: Backend>(backend: &B, precision: Precision) {
    let (vocabulary, width) = (20, precision.width(2));
    let mut table = vec![0.0; vocabulary * width];
    for row in [4, 17] {
        table[row * width] = 1.0;
    }
    let (tensor, _) = stored(precision, "head", DType::F32, vec![vocabulary, width], &table, 0);
    let weight = backend.matrix(&[tensor]).unwrap();
    let mut x = vec![0.0; width];
    x[..2].copy_from_slice(&[3.0, 1.0]);
    let x = buffer(backend, &x);
    for (target, hit) in [(4, 1.0), (17, 0.0), (5, 0.0)] {
        let mut host = fastlora::batch::Batch::default();
        host.push(0, &[1, target], &[-100, target as i32]);
        let mut losses = backend.floats(&[0.0; 2]).unwrap();
        let head = Head { weight: Weight::Frozen(&weight), vocabulary, width, soft_cap: None };
        backend.head_loss(head, &resident(backend, &host), &x, &mut losses, None, None).unwrap();
        assert_eq!(read_floats(backend, &losses, 2)[1], hit, "target {target}");
    }
    let mut host = fastlora::batch::Batch::default();
    host.push(0, &[1, 20], &[-100, 20]);
    let head = Head { weight: Weight::Frozen(&weight), vocabulary, width, soft_cap: None };
    let mut losses = backend.floats(&[0.0; 2]).unwrap();
    let error = backend.head_loss(head, &resident(backend, &host), &x, &mut losses, None, None).unwrap_err();
    assert!(error.message().contains("20"), "{error}");
}
