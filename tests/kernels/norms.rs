//! rms_norm.cu, and column_sums.cu, which adds up what its weight's gradient leaves

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::{i32_of, sum_and_magnitude};

pub const EPSILON: f32 = 1e-5;
/// (rows, width): one row, a ragged last block, widths that leave lanes idle, and of every number of rounds.
const SHAPES: [(usize, usize); 6] = [(1, 8), (9, 512), (3, 520), (17, 1536), (2, 4096), (2, 4104)];

fn kernel(name: &str, width: usize, half: Half) -> String {
    let rounds = [2, 4, 8, 16].into_iter().find(|rounds| rounds * 256 >= width).unwrap_or(0);
    format!("{name}_{rounds}_{}", half.suffix())
}

fn rstd(row: &[f64]) -> f64 {
    let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    1.0 / (mean_square + f64::from(EPSILON)).sqrt()
}

/// Launches rms_norm_forward over x with w, and with a residual if there is one.
pub fn launch_forward(
    place: &Place,
    half: Half,
    [x, w, y]: [&PlaceMemory; 3],
    residual: Option<&PlaceMemory>,
    [rows, width]: [usize; 2],
    offset: f32,
) {
    let arguments = [
        Argument::of(x),
        Argument::of(w),
        residual.map_or(Argument::Address(0), Argument::of),
        Argument::of(y),
        Argument::I32(rows as i32),
        Argument::I32(width as i32),
        Argument::F32(offset),
        Argument::F32(EPSILON),
    ];
    launch(place, &kernel("rms_norm_forward", width, half), rows.div_ceil(4), 128, &arguments);
}

/// y by the formula; `weight` tells the rows' width.
pub fn expected_norm(
    half: Half,
    x: &[f64],
    weight: &[f64],
    residual: Option<&[f64]>,
    offset: f32,
) -> Vec<Expected> {
    let (u, width) = (half.unit_roundoff(), weight.len());
    let element = |i: usize| {
        let row = &x[i / width * width..][..width];
        let normed = row[i % width] * rstd(row) * (f64::from(offset) + weight[i % width]);
        let value = normed + residual.map_or(0.0, |residual| residual[i]);
        // Rounded before × w, unless there is an offset, and after all; rstd carries the sum's f32 error.
        let inner = if offset == 0.0 { u } else { 0.0 };
        let tolerance = normed.abs() * (inner + u * u + F32_ROUNDOFF * (width as f64 / 32.0 + 16.0))
            + value.abs() * (u + F32_ROUNDOFF)
            + half.underflow() * (1.0 + weight[i % width].abs());
        Expected { value, tolerance }
    };
    (0..x.len()).map(element).collect()
}

fn forward(half: Half, rows: usize, width: usize, with_residual: bool, offset: f32) {
    let name =
        format!("rms_norm_forward_{} {rows}×{width}, residual {with_residual}, {offset} + w", half.suffix());
    let mut random = Random(rows as u64 * 31 + width as u64);
    let x = random.halves(half, rows * width, 2.0);
    let residual = random.halves(half, rows * width, 2.0);
    let weight = random.halves(half, width, 1.5);
    let outputs = run_everywhere(&name, |device| {
        let (x, residual, w) = (upload(device, &x), upload(device, &residual), upload(device, &weight));
        let y = poisoned::<u16>(device, rows * width);
        let residual = with_residual.then_some(&residual);
        launch_forward(device, half, [&x, &w, &y], residual, [rows, width], offset);
        download::<u16>(device, &y)
    });

    let [x, residual, weight] = [&x, &residual, &weight].map(|values| half.decode_all(values));
    let expected = expected_norm(half, &x, &weight, with_residual.then_some(&residual), offset);
    assert_close(&name, width, &half.decode_all(&outputs), &expected);
}

fn backward(half: Half, rows: usize, width: usize, residual: bool, offset: f32) {
    let name =
        format!("rms_norm_backward_{} {rows}×{width}, residual {residual}, {offset} + w", half.suffix());
    let mut random = Random(rows as u64 * 77 + width as u64);
    let x = random.halves(half, rows * width, 2.0);
    let weight = random.halves(half, width, 1.5);
    let dy = random.halves(half, rows * width, 1.0);
    let before = random.halves(half, rows * width, 1.0);
    let outputs = run_everywhere(&name, |device| {
        let (x, w, dy) = (upload(device, &x), upload(device, &weight), upload(device, &dy));
        // With a residual the gradient is added in place.
        let dx = if residual { upload(device, &before) } else { poisoned::<u16>(device, rows * width) };
        let arguments = [
            Argument::of(&x),
            Argument::of(&w),
            Argument::of(&dy),
            if residual { Argument::of(&dx) } else { Argument::Address(0) },
            Argument::of(&dx),
            Argument::I32(rows as i32),
            Argument::I32(width as i32),
            Argument::F32(offset),
            Argument::F32(EPSILON),
        ];
        launch(device, &kernel("rms_norm_backward", width, half), rows.div_ceil(4), 128, &arguments);
        download::<u16>(device, &dx)
    });

    let [x, mut weight, dy, before] = [&x, &weight, &dy, &before].map(|values| half.decode_all(values));
    weight.iter_mut().for_each(|weight| *weight += f64::from(offset));
    let mut expected = Vec::new();
    for row in 0..rows {
        let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
        let rstd = rstd(x);
        let products = || (0..width).map(|i| weight[i] * dy[i] * x[i]);
        let mean = products().sum::<f64>() / width as f64;
        let mean_magnitude = products().map(f64::abs).sum::<f64>() / width as f64;
        for i in 0..width {
            let direct = rstd * weight[i] * dy[i];
            let along_x = rstd.powi(3) * x[i] * mean;
            let already = if residual { before[row * width + i] } else { 0.0 };
            let magnitude = direct.abs() + (rstd.powi(3) * x[i] * mean_magnitude).abs() + already.abs();
            // A lane adds width / 32 terms in order, then five levels of the butterfly.
            expected.push(Expected::rounded_sum(
                half,
                already + direct - along_x,
                magnitude,
                width / 32 + 16,
            ));
        }
    }
    assert_close(&name, width, &half.decode_all(&outputs), &expected);
}

/// The gradient of a trained weight, added to what is there.
fn weight_gradient(half: Half, rows: usize, width: usize) {
    let name = format!("rms_norm_weight_gradient_{} {rows}×{width}", half.suffix());
    let mut random = Random(rows as u64 * 13 + width as u64);
    let [x, dy] = [2.0, 1.0].map(|limit| random.halves(half, rows * width, limit));
    let before = random.floats(width, 1.0);
    let stretches = rows.div_ceil(64);
    let after = run_everywhere(&name, |device| {
        let (x, dy, gradients) = (upload(device, &x), upload(device, &dy), upload(device, &before));
        let partials = poisoned::<f32>(device, stretches * width);
        let mut arguments = [&x, &dy, &partials].map(Argument::of).to_vec();
        arguments.extend([rows, width].map(i32_of));
        arguments.push(Argument::F32(EPSILON));
        let kernel = format!("rms_norm_weight_gradient_{}", half.suffix());
        launch(device, &kernel, stretches, 256, &arguments);
        let mut arguments = vec![Argument::of(&partials), Argument::Address(0), Argument::of(&gradients)];
        arguments.extend([stretches, width, width].map(i32_of));
        launch(device, "add_column_sums", width.div_ceil(32), 256, &arguments);
        download::<f32>(device, &gradients)
    });
    let [x, dy] = [&x, &dy].map(|values| half.decode_all(values));
    let rstds: Vec<f64> = x.chunks(width).map(rstd).collect();
    let expected = (0..width).map(|column| {
        let term = |row: usize| dy[row * width + column] * x[row * width + column] * rstds[row];
        let (sum, magnitude) = sum_and_magnitude((0..rows).map(term));
        let already = f64::from(before[column]);
        // A term's rstd has the error of a sum over the row: a lane's share in order, and five levels of the butterfly.
        Expected::float_sum(already + sum, already.abs() + magnitude, rows + width / 32 + 16)
    });
    let actual: Vec<f64> = after.iter().map(|&value| f64::from(value)).collect();
    assert_close(&name, width, &actual, &expected.collect::<Vec<_>>());
}

/// Fewer and more stretches than the threads that add them up, a ragged last one, and columns that leave lanes idle.
#[test]
fn the_gradient_of_a_norms_weight_matches_float64() {
    for half in HALVES {
        for (rows, width) in [(1, 8), (64, 264), (131, 520), (700, 40)] {
            weight_gradient(half, rows, width);
        }
    }
}

#[test]
fn rms_norm_forward_matches_float64() {
    for half in HALVES {
        for (rows, width) in SHAPES {
            for offset in [0.0, 1.0] {
                forward(half, rows, width, false, offset);
                forward(half, rows, width, true, offset);
            }
        }
    }
}

#[test]
fn rms_norm_backward_matches_float64() {
    for half in HALVES {
        for (rows, width) in SHAPES {
            backward(half, rows, width, false, 0.0);
            backward(half, rows, width, true, 1.0);
        }
    }
}
