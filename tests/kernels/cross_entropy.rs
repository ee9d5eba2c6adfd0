//! cross_entropy.cu

use fastlora::device::{Argument, Memory};

use crate::harness::*;
use crate::lora_group::{i32_of, sum_and_magnitude};

const SHARED_BYTES: u32 = 64 << 10;
/// Rows of the first of two chunks of the weight's gradient.
const FIRST_CHUNK: usize = 96;

struct Results {
    logits: Vec<u16>,
    losses: Vec<f32>,
    correct: Vec<f32>,
    gradient: Vec<u16>,
    dx: Vec<u16>,
    dw: Vec<f32>,
}

/// Logits, losses and gradients of `rows` labelled rows; that of the weight is added to `before`, of two chunks.
fn run(
    half: Half,
    [rows, width, vocabulary]: [usize; 3],
    x: &[u16],
    w: &[u16],
    targets: &[u32],
    [scale, cap]: [f32; 2],
    before: &[f32],
) -> Results {
    let leading = vocabulary.next_multiple_of(8);
    let name = format!("head {} L={rows} H={width} V={vocabulary}", half.suffix());
    let kernel = |name: &str| format!("{name}_{}", half.suffix());
    let shape = [rows, width, vocabulary, leading].map(i32_of);
    let bytes = run_everywhere(&name, |device| {
        let (x, w, targets) = (upload(device, x), upload(device, w), upload(device, targets));
        let scale = upload(device, &[scale]);
        let z = poisoned::<u16>(device, rows * leading);
        let (losses, correct) = (poisoned::<f32>(device, rows), poisoned::<f32>(device, rows));
        let dx = poisoned::<u16>(device, rows * width);
        let mut arguments = vec![Argument::of(&x), Argument::of(&w), Argument::of(&z)];
        arguments.extend(shape);
        let tiles = rows.div_ceil(128) * vocabulary.div_ceil(128);
        launch_grid(device, &kernel("head_logits"), [tiles as u32, 1, 1], 256, SHARED_BYTES, &arguments);
        let mut bytes: Vec<u8> = download(device, &z);
        let arguments = [
            Argument::of(&z),
            Argument::of(&targets),
            Argument::of(&losses),
            Argument::of(&correct),
            Argument::of(&scale),
            shape[2],
            shape[3],
            Argument::F32(cap),
        ];
        launch(device, &kernel("cross_entropy"), rows, 256, &arguments);
        let mut arguments = vec![Argument::of(&z), Argument::of(&w), Argument::of(&dx)];
        arguments.extend(shape);
        let tiles = rows.div_ceil(128) * width.div_ceil(128);
        launch_grid(
            device,
            &kernel("head_backward_input"),
            [tiles as u32, 1, 1],
            256,
            SHARED_BYTES,
            &arguments,
        );
        let dw = upload(device, before);
        let kernel = kernel("head_weight_gradient");
        let tiles = vocabulary.div_ceil(128) * width.div_ceil(128);
        let mut first = 0;
        for chunk in [rows.min(FIRST_CHUNK), rows.saturating_sub(FIRST_CHUNK)] {
            let [dz, x] = [(&z, leading), (&x, width)]
                .map(|(memory, leading)| Argument::Address(memory.address() + 2 * (first * leading) as u64));
            let mut arguments = vec![dz, x, Argument::of(&dw), i32_of(chunk)];
            arguments.extend(&shape[1..]);
            launch_grid(device, &kernel, [tiles as u32, 1, 1], 256, SHARED_BYTES, &arguments);
            first += chunk;
        }
        for memory in [&losses, &correct, &z, &dx, &dw] {
            bytes.extend(download::<u8>(device, memory));
        }
        bytes
    });
    let halves = |bytes: &[u8]| -> Vec<u16> { values_of(bytes) };
    let (logits, rest) = bytes.split_at(rows * leading * 2);
    let (losses, rest) = rest.split_at(rows * 4);
    let (correct, rest) = rest.split_at(rows * 4);
    let (gradient, rest) = rest.split_at(rows * leading * 2);
    let (dx, dw) = rest.split_at(rows * width * 2);
    let unpadded = |bytes: &[u8]| -> Vec<u16> {
        halves(bytes).chunks(leading).flat_map(|row| row[..vocabulary].iter().copied()).collect()
    };
    Results {
        logits: unpadded(logits),
        losses: values_of(losses),
        correct: values_of(correct),
        gradient: unpadded(gradient),
        dx: halves(dx),
        dw: values_of(dw),
    }
}

/// Each stage is compared from what the stage before really wrote, so that tolerances need not compound.
fn check(half: Half, [rows, width, vocabulary]: [usize; 3], cap: f32) {
    let name = format!("{} L={rows} H={width} V={vocabulary} cap {cap}", half.suffix());
    let mut random = Random(vocabulary as u64);
    let x_bits = random.halves(half, rows * width, 1.0);
    let w_bits = random.halves(half, vocabulary * width, 1.0);
    let targets: Vec<u32> = (0..rows).map(|_| random.below(vocabulary) as u32).collect();
    let scale = 0.25f32;
    let before = random.floats(vocabulary * width, 1.0);
    let results = run(half, [rows, width, vocabulary], &x_bits, &w_bits, &targets, [scale, cap], &before);
    let (x, w) = (half.decode_all(&x_bits), half.decode_all(&w_bits));

    let element = |i: usize| {
        let terms = (0..width).map(|k| x[i / vocabulary * width + k] * w[i % vocabulary * width + k]);
        let (sum, magnitude) = sum_and_magnitude(terms);
        Expected::rounded_sum(half, sum, magnitude, width)
    };
    let logits: Vec<Expected> = (0..rows * vocabulary).map(element).collect();
    let z = half.decode_all(&results.logits);
    assert_close(&format!("head_logits {name}"), vocabulary, &z, &logits);

    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    let cap = f64::from(cap);
    for row in 0..rows {
        // The capped logits, and the slopes of the cap.
        let capped = |z: &f64| if cap > 0.0 { cap * (z / cap).tanh() } else { *z };
        let z: Vec<f64> = z[row * vocabulary..][..vocabulary].iter().map(capped).collect();
        let slope = |z: f64| if cap > 0.0 { 1.0 - (z / cap).powi(2) } else { 1.0 };
        let target = targets[row] as usize;
        let greatest = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let least = z.iter().copied().fold(f64::INFINITY, f64::min);
        let total: f64 = z.iter().map(|z| (z - greatest).exp()).sum();
        let loss = greatest + total.ln() - z[target];
        // The exponent's argument is rounded; a sum of V / 256 terms a thread and eight levels of the block.
        let error = F32_ROUNDOFF * (2.0 * (greatest - least) + vocabulary as f64 / 256.0 + 40.0);
        losses
            .push(Expected { value: loss, tolerance: error + F32_ROUNDOFF * 4.0 * (loss + greatest.abs()) });
        let first_highest = z.iter().position(|&z| z == greatest);
        assert_eq!(results.correct[row] == 1.0, first_highest == Some(target), "correct, {name}, row {row}");
        for (column, z) in z.iter().enumerate() {
            let p = (z - greatest).exp() / total;
            let one_hot = if column == target { 1.0 } else { 0.0 };
            let value = (p - one_hot) * f64::from(scale) * slope(*z);
            let error = (p * error + F32_ROUNDOFF) * f64::from(scale);
            // tanh is off by a few units, and so is its square.
            let error = error + (p - one_hot).abs() * f64::from(scale) * 16.0 * F32_ROUNDOFF;
            let rounding = half.unit_roundoff() * (value.abs() + error) + half.underflow();
            gradient.push(Expected { value, tolerance: error + rounding });
        }
    }
    let actual: Vec<f64> = results.losses.iter().map(|&loss| f64::from(loss)).collect();
    assert_close(&format!("losses {name}"), 1, &actual, &losses);
    let dz = half.decode_all(&results.gradient);
    assert_close(&format!("gradient {name}"), vocabulary, &dz, &gradient);

    let element = |i: usize| {
        let terms = (0..vocabulary).map(|k| dz[i / width * vocabulary + k] * w[k * width + i % width]);
        let (sum, magnitude) = sum_and_magnitude(terms);
        Expected::rounded_sum(half, sum, magnitude, vocabulary)
    };
    let dx: Vec<Expected> = (0..rows * width).map(element).collect();
    assert_close(&format!("head_backward_input {name}"), width, &half.decode_all(&results.dx), &dx);

    let element = |i: usize| {
        let terms = (0..rows).map(|row| dz[row * vocabulary + i / width] * x[row * width + i % width]);
        let (sum, magnitude) = sum_and_magnitude(terms);
        let already = f64::from(before[i]);
        Expected::float_sum(already + sum, already.abs() + magnitude, rows)
    };
    let dw: Vec<Expected> = (0..vocabulary * width).map(element).collect();
    let actual: Vec<f64> = results.dw.iter().map(|&value| f64::from(value)).collect();
    assert_close(&format!("head_weight_gradient {name}"), width, &actual, &dw);
}

#[test]
fn head_and_cross_entropy_match_float64() {
    for half in HALVES {
        // One row; a vocabulary that is no multiple of 8, of a tile, or of the threads' stride; more than one tile of rows.
        for shape in [[1, 8, 3], [5, 40, 257], [131, 16, 130], [3, 24, 2053]] {
            check(half, shape, 0.0);
            check(half, shape, 2.5);
        }
    }
}

#[test]
fn of_equal_highest_logits_the_first_counts() {
    for half in HALVES {
        // W's rows 1 and 2 are equal and give the highest logit.
        let rows_of_w = [0.0, 1.0, 1.0, 0.5];
        let w: Vec<u16> = rows_of_w.iter().flat_map(|&value| [half.encode(value); 8]).collect();
        let x = vec![half.encode(1.0); 3 * 8];
        let results = run(half, [3, 8, 4], &x, &w, &[1, 2, 3], [1.0, 0.0], &[0.0; 4 * 8]);
        assert_eq!(results.correct, [1.0, 0.0, 0.0]);
    }
}
