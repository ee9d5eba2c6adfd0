//! rms_norm.cu

use fastlora::device::Argument;

use crate::harness::*;

const EPSILON: f32 = 1e-5;
/// (rows, width): one row, a ragged last block, widths that leave lanes idle or take several rounds.
const SHAPES: [(usize, usize); 5] = [(1, 8), (9, 64), (3, 264), (17, 520), (2, 2048)];

fn rstd(row: &[f64]) -> f64 {
    let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
    1.0 / (mean_square + f64::from(EPSILON)).sqrt()
}

fn forward(half: Half, rows: usize, width: usize, with_addend: bool) {
    let name = format!("rms_norm_forward_{} {rows}×{width}, addend {with_addend}", half.suffix());
    let mut random = Random(rows as u64 * 31 + width as u64);
    let x = random.halves(half, rows * width, 2.0);
    let addend = random.halves(half, rows * width, 2.0);
    let weight = random.halves(half, width, 1.5);
    let outputs = run_everywhere(&name, |device| {
        let (x, addend, w) = (upload(device, &x), upload(device, &addend), upload(device, &weight));
        let (sum, y) = (poisoned::<u16>(device, rows * width), poisoned::<u16>(device, rows * width));
        let null = Argument::Address(0);
        let arguments = [
            Argument::of(&x),
            if with_addend { Argument::of(&addend) } else { null },
            Argument::of(&w),
            if with_addend { Argument::of(&sum) } else { null },
            Argument::of(&y),
            Argument::I32(rows as i32),
            Argument::I32(width as i32),
            Argument::F32(EPSILON),
        ];
        launch(device, &format!("rms_norm_forward_{}", half.suffix()), rows.div_ceil(8), 256, &arguments);
        let mut outputs: Vec<u16> = download(device, &y);
        if with_addend {
            outputs.extend(download::<u16>(device, &sum));
        }
        outputs
    });

    // f32 addition of two halves is exact enough that one rounding follows: bits must agree.
    let h: Vec<u16> = if with_addend {
        x.iter().zip(&addend).map(|(&x, &a)| half.encode(half.decode(x) + half.decode(a))).collect()
    } else {
        x.clone()
    };
    if with_addend {
        assert!(outputs[rows * width..] == h, "{name}: sum");
    }
    let (h, weight) = (half.decode_all(&h), half.decode_all(&weight));
    let u = half.unit_roundoff();
    let expected: Vec<Expected> = (0..rows * width)
        .map(|i| {
            let row = &h[i / width * width..][..width];
            let value = row[i % width] * rstd(row) * weight[i % width];
            // Rounded before × w and after; rstd carries the sum's f32 error.
            let tolerance = value.abs() * (2.0 * u + u * u + F32_ROUNDOFF * (width as f64 / 32.0 + 16.0))
                + half.underflow() * (1.0 + weight[i % width].abs());
            Expected { value, tolerance }
        })
        .collect();
    assert_close(&name, width, &half.decode_all(&outputs[..rows * width]), &expected);
}

fn backward(half: Half, rows: usize, width: usize, residual: bool) {
    let name = format!("rms_norm_backward_{} {rows}×{width}, residual {residual}", half.suffix());
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
            Argument::F32(EPSILON),
        ];
        launch(device, &format!("rms_norm_backward_{}", half.suffix()), rows.div_ceil(8), 256, &arguments);
        download::<u16>(device, &dx)
    });

    let [x, weight, dy, before] = [&x, &weight, &dy, &before].map(|values| half.decode_all(values));
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

#[test]
fn rms_norm_forward_matches_float64() {
    for half in HALVES {
        for (rows, width) in SHAPES {
            forward(half, rows, width, false);
            forward(half, rows, width, true);
        }
    }
}

#[test]
fn rms_norm_backward_matches_float64() {
    for half in HALVES {
        for (rows, width) in SHAPES {
            backward(half, rows, width, false);
            backward(half, rows, width, true);
        }
    }
}
