//! layer_norm.cu

use fastlora::device::Argument;

use crate::harness::*;

const EPSILON: f32 = 1e-5;
/// (rows, width): one row, a ragged last block, widths that leave lanes idle or take several rounds.
const SHAPES: [(usize, usize); 4] = [(1, 8), (9, 64), (17, 520), (2, 2048)];
/// Added to every input, so that a variance without the mean taken off would be far off.
const OFFSET: f64 = 3.0;

fn moments(row: &[f64]) -> (f64, f64) {
    let mean = row.iter().sum::<f64>() / row.len() as f64;
    let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
    (mean, 1.0 / (variance + f64::from(EPSILON)).sqrt())
}

fn inputs(half: Half, random: &mut Random, count: usize) -> Vec<u16> {
    (0..count).map(|_| half.encode(OFFSET + random.uniform(-2.0, 2.0))).collect()
}

/// How far rstd may be off, relatively, and (h − mean) · rstd absolutely, beyond a few roundings.
fn normed_error(row: &[f64], rstd: f64, normed: f64) -> f64 {
    let greatest = row.iter().fold(0f64, |greatest, x| greatest.max(x.abs()));
    let terms = row.len() as f64 / 32.0 + 16.0;
    // The mean's error shifts every h; the variance's scales.
    F32_ROUNDOFF * terms * (greatest * rstd * (1.0 + normed.abs()) + normed.abs())
}

fn forward(half: Half, rows: usize, width: usize, with_addend: bool) {
    let name = format!("layer_norm_forward_{} {rows}×{width}, addend and bias {with_addend}", half.suffix());
    let mut random = Random(rows as u64 * 31 + width as u64);
    let x = inputs(half, &mut random, rows * width);
    let addend = random.halves(half, rows * width, 2.0);
    let weight = random.halves(half, width, 1.5);
    let bias = random.halves(half, width, 1.0);
    let outputs = run_everywhere(&name, |device| {
        let [x, addend, w, b] = [&x, &addend, &weight, &bias].map(|values| upload(device, values));
        let (sum, y) = (poisoned::<u16>(device, rows * width), poisoned::<u16>(device, rows * width));
        let optional = |memory| if with_addend { Argument::of(memory) } else { Argument::Address(0) };
        let arguments = [
            Argument::of(&x),
            optional(&addend),
            Argument::of(&w),
            optional(&b),
            optional(&sum),
            Argument::of(&y),
            Argument::I32(rows as i32),
            Argument::I32(width as i32),
            Argument::F32(EPSILON),
        ];
        launch(device, &format!("layer_norm_forward_{}", half.suffix()), rows.div_ceil(8), 256, &arguments);
        let mut outputs: Vec<u16> = download(device, &y);
        if with_addend {
            outputs.extend(download::<u16>(device, &sum));
        }
        outputs
    });
    let h: Vec<u16> = if with_addend {
        x.iter().zip(&addend).map(|(&x, &a)| half.encode(half.decode(x) + half.decode(a))).collect()
    } else {
        x
    };
    if with_addend {
        assert!(outputs[rows * width..] == h, "{name}: sum");
    }
    let [h, weight, bias] = [&h, &weight, &bias].map(|values| half.decode_all(values));
    let mut expected = Vec::new();
    for row in h.chunks(width) {
        let (mean, rstd) = moments(row);
        for i in 0..width {
            let normed = (row[i] - mean) * rstd;
            let added = if with_addend { bias[i] } else { 0.0 };
            let magnitude = (normed * weight[i]).abs() + added.abs();
            let mut element = Expected::rounded_sum(half, normed * weight[i] + added, magnitude, 4);
            element.tolerance += normed_error(row, rstd, normed) * weight[i].abs();
            expected.push(element);
        }
    }
    assert_close(&name, width, &half.decode_all(&outputs[..rows * width]), &expected);
}

fn backward(half: Half, rows: usize, width: usize, residual: bool) {
    let name = format!("layer_norm_backward_{} {rows}×{width}, residual {residual}", half.suffix());
    let mut random = Random(rows as u64 * 77 + width as u64);
    let x = inputs(half, &mut random, rows * width);
    let weight = random.halves(half, width, 1.5);
    let dy = random.halves(half, rows * width, 1.0);
    let before = random.halves(half, rows * width, 1.0);
    let outputs = run_everywhere(&name, |device| {
        let (x, w, dy) = (upload(device, &x), upload(device, &weight), upload(device, &dy));
        let dx = if residual { upload(device, &before) } else { poisoned::<u16>(device, rows * width) };
        let arguments = [
            Argument::of(&x),
            Argument::of(&w),
            Argument::of(&dy),
            if residual { Argument::of(&dx) } else { Argument::Address(0) },
            Argument::of(&dx),
            Argument::I32(rows as i32),
            Argument::I32(width as i32),
            Argument::F32(EPSILON),
        ];
        launch(device, &format!("layer_norm_backward_{}", half.suffix()), rows.div_ceil(8), 256, &arguments);
        download::<u16>(device, &dx)
    });
    let [x, weight, dy, before] = [&x, &weight, &dy, &before].map(|values| half.decode_all(values));
    let mut expected = Vec::new();
    for (row, h) in x.chunks(width).enumerate() {
        let dy = &dy[row * width..][..width];
        let (mean, rstd) = moments(h);
        let normed: Vec<f64> = h.iter().map(|h| (h - mean) * rstd).collect();
        let weighted: Vec<f64> = (0..width).map(|i| weight[i] * dy[i]).collect();
        let average = |value: &dyn Fn(usize) -> f64| (0..width).map(value).sum::<f64>() / width as f64;
        let mean_sum = average(&|i| weighted[i]);
        let mean_products = average(&|i| weighted[i] * normed[i]);
        let sum_magnitude = average(&|i| weighted[i].abs());
        let product_magnitude = average(&|i| (weighted[i] * normed[i]).abs());
        // What the errors of the n do to their mean product.
        let product_error = average(&|i| weighted[i].abs() * normed_error(h, rstd, normed[i]));
        for i in 0..width {
            let already = if residual { before[row * width + i] } else { 0.0 };
            let value = already + rstd * (weighted[i] - mean_sum - normed[i] * mean_products);
            let magnitude = already.abs()
                + rstd * (weighted[i].abs() + sum_magnitude + normed[i].abs() * product_magnitude);
            let mut element = Expected::rounded_sum(half, value, magnitude, width / 32 + 16);
            element.tolerance += rstd
                * (normed_error(h, rstd, normed[i]) * product_magnitude + normed[i].abs() * product_error);
            // rstd's own relative error.
            element.tolerance += (value - already).abs() * normed_error(h, rstd, 1.0);
            expected.push(element);
        }
    }
    assert_close(&name, width, &half.decode_all(&outputs), &expected);
}

#[test]
fn layer_norm_matches_float64() {
    for half in HALVES {
        for (rows, width) in SHAPES {
            for optional in [false, true] {
                forward(half, rows, width, optional);
                backward(half, rows, width, optional);
            }
        }
    }
}
