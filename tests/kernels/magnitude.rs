//! magnitude.cu, with the sums that column_sums.cu makes of what its backward leaves.

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::*;

const NULL: Argument = Argument::Address(0);

/// One output tile; a projection without adapter inside one; tiles that two adapters share, ranks beyond 16 and that are no
/// multiple of 8; inputs of more than one stretch of 512, ragged.
fn groups() -> Vec<Group> {
    vec![
        Group::new(1, 8, &[(8, 1)]),
        Group::new(67, 40, &[(48, 3), (24, 0), (24, 5)]),
        Group::new(131, 600, &[(72, 20), (136, 3)]),
    ]
}

/// Where each adapter's magnitudes begin, behind everything else; the last of several has none.
fn magnitude_offsets(group: &Group) -> Vec<i64> {
    let slots = group.slots();
    let mut next = group.parameter_count() + 1;
    let offset = |(index, slot): (usize, &Slot)| {
        if index > 0 && index + 1 == slots.len() {
            return -1;
        }
        let offset = next;
        next += slot.out_end - slot.out_begin;
        offset as i64
    };
    slots.iter().enumerate().map(offset).collect()
}

fn eights(elements: usize) -> usize {
    (elements / 8).div_ceil(256)
}

/// Norms and gains of a group, with one row of V that is zero.
fn norms(half: Half, group: &Group) {
    let name = format!("magnitude_squares_{} {}", half.suffix(), group.name);
    let (inputs, outputs) = (group.in_features, group.out_features());
    let (rank, leading) = (group.rank(), group.rank_leading());
    let mut random = Random(outputs as u64);
    let mut w = random.halves(half, outputs * inputs, 1.0);
    let mut parameters = random.floats(group.parameter_count() + 1 + outputs, 1.0);
    let first = group.slots()[0];
    w[..inputs].fill(0);
    parameters[first.b_offset..][..first.rank_end - first.rank_begin].fill(0.0);
    let a = random.halves(half, rank * inputs, 1.0);
    let b_hat = group.b_hat(half, &parameters);
    let offsets = magnitude_offsets(group);
    let stretches = inputs.div_ceil(512);
    let found = run_everywhere(&name, |device| {
        let tables = SlotTables::new(device, &group.slots());
        let [w, b_hat, a] = [&w, &b_hat, &a].map(|values| upload(device, values));
        let (parameters, offsets) = (upload(device, &parameters), upload(device, &offsets));
        let partials = poisoned::<f32>(device, stretches * outputs);
        let [norms, gains] = [(); 2].map(|()| poisoned::<f32>(device, outputs));
        let count = i32_of(group.slots().len());
        let mut arguments = [&w, &b_hat, &a, &tables.slots, &partials].map(Argument::of).to_vec();
        arguments.extend([i32_of(outputs), i32_of(inputs), count, i32_of(leading)]);
        let grid = [outputs.div_ceil(64) as u32, stretches as u32, 1];
        let kernel = format!("magnitude_squares_{}", half.suffix());
        launch_grid(device, &kernel, grid, 128, 32 << 10, &arguments);
        let mut arguments =
            [&partials, &parameters, &tables.slots, &offsets, &norms, &gains].map(Argument::of).to_vec();
        arguments.extend([i32_of(outputs), count, i32_of(stretches)]);
        launch(device, "magnitude_gains", outputs.div_ceil(256), 256, &arguments);
        [download::<f32>(device, &norms), download::<f32>(device, &gains)].concat()
    });

    let [w, a, b_hat] = [&w, &a, &b_hat].map(|values| half.decode_all(values));
    let exact = |value: f64| Expected { value, tolerance: 0.0 };
    let mut expected_norms = vec![exact(0.0); outputs];
    let mut expected_gains = vec![exact(1.0); outputs];
    for (slot, &offset) in group.slots().iter().zip(&offsets) {
        for out in (slot.out_begin..slot.out_end).filter(|_| offset >= 0) {
            let (mut square, mut error) = (0.0, 0.0);
            for input in 0..inputs {
                let terms = (slot.rank_begin..slot.rank_end)
                    .map(|r| b_hat[out * leading + r] * a[r * inputs + input])
                    .chain([w[out * inputs + input]]);
                let (v, magnitude) = sum_and_magnitude(terms);
                square += v * v;
                error += 2.0 * v.abs() * F32_ROUNDOFF * (rank as f64 + 3.0) * magnitude;
            }
            let norm = square.sqrt();
            if norm == 0.0 {
                continue;
            }
            error += F32_ROUNDOFF * (inputs as f64 + 8.0) * square;
            let relative = error / (2.0 * square) + 2.0 * F32_ROUNDOFF;
            expected_norms[out] = Expected { value: norm, tolerance: relative * norm };
            let gain = f64::from(parameters[offset as usize + out - slot.out_begin]) / norm;
            expected_gains[out] = Expected { value: gain, tolerance: 2.0 * relative * gain.abs() };
        }
    }
    let found: Vec<f64> = found.iter().map(|&value| f64::from(value)).collect();
    assert_close(&name, outputs, &found, &[expected_norms, expected_gains].concat());
}

#[test]
fn norms_and_gains_match_float64() {
    for half in HALVES {
        for group in groups() {
            norms(half, &group);
        }
    }
}

fn forward(half: Half, [rows, width]: [usize; 2], has_bias: bool, has_residual: bool) {
    let name = format!("magnitude_forward_{} {rows}×{width} {has_bias} {has_residual}", half.suffix());
    let mut random = Random(width as u64);
    let [v, residual] = [2.0, 1.0].map(|limit| random.halves(half, rows * width, limit));
    let (bias, gains) = (random.halves(half, width, 1.0), random.floats(width, 2.0));
    let y = run_everywhere(&name, |device| {
        let (v, gains, bias) = (upload(device, &v), upload(device, &gains), upload(device, &bias));
        // The residual is where y goes.
        let y = if has_residual { upload(device, &residual) } else { poisoned::<u16>(device, rows * width) };
        let bias = if has_bias { Argument::of(&bias) } else { NULL };
        let residual = if has_residual { Argument::of(&y) } else { NULL };
        let arguments = [Argument::of(&v), Argument::of(&gains), bias, residual, Argument::of(&y)];
        let arguments = [&arguments[..], &[rows, width].map(i32_of)].concat();
        let kernel = format!("magnitude_forward_{}", half.suffix());
        launch(device, &kernel, eights(rows * width), 256, &arguments);
        download::<u16>(device, &y)
    });
    let [v, residual, bias] = [&v, &residual, &bias].map(|values| half.decode_all(values));
    let element = |i: usize| {
        let only = |wanted: bool, value: f64| if wanted { value } else { 0.0 };
        let terms = [
            f64::from(gains[i % width]) * v[i],
            only(has_bias, bias[i % width]),
            only(has_residual, residual[i]),
        ];
        let (sum, magnitude) = sum_and_magnitude(terms.into_iter());
        Expected::rounded_sum(half, sum, magnitude, 3)
    };
    let expected: Vec<Expected> = (0..rows * width).map(element).collect();
    assert_close(&name, width, &half.decode_all(&y), &expected);
}

const SHAPES: [[usize; 2]; 3] = [[1, 8], [67, 264], [600, 40]];

#[test]
fn outputs_match_float64() {
    for half in HALVES {
        for shape in SHAPES {
            forward(half, shape, false, false);
            forward(half, shape, true, false);
            forward(half, shape, true, true);
        }
    }
}

/// `g∘dy`, and the magnitudes' gradients of the columns from the eighth on, of which one has no norm.
fn backward(half: Half, [rows, width]: [usize; 2]) {
    let name = format!("magnitude_backward_{} {rows}×{width}", half.suffix());
    let mut random = Random(width as u64 + 1);
    let [dy, v] = [1.0, 2.0].map(|limit| random.halves(half, rows * width, limit));
    let [gains, before] = [2.0, 1.0].map(|limit| random.floats(width, limit));
    let mut norms: Vec<f32> = random.floats(width, 1.0).iter().map(|value| value.abs() + 0.5).collect();
    norms[width - 1] = 0.0;
    let (stretches, skipped) = (rows.div_ceil(64), if width > 8 { 8 } else { 0 });
    let owned = width - skipped;
    let found = run_everywhere(&name, |device| {
        let (dy, v) = (upload(device, &dy), upload(device, &v));
        let (gains, norms, gradients) =
            (upload(device, &gains), upload(device, &norms[skipped..]), upload(device, &before[skipped..]));
        let gained = poisoned::<u16>(device, rows * width);
        let partials = poisoned::<f32>(device, stretches * width);
        let mut arguments = [&dy, &v, &gains, &gained, &partials].map(Argument::of).to_vec();
        arguments.extend([rows, width].map(i32_of));
        let kernel = format!("magnitude_backward_{}", half.suffix());
        let grid = [width.div_ceil(256) as u32, stretches as u32, 1];
        launch_grid(device, &kernel, grid, 256, 0, &arguments);
        let Argument::Address(first) = Argument::of(&partials) else { unreachable!("an address") };
        let mut arguments = vec![Argument::Address(first + 4 * skipped as u64)];
        arguments.extend([&norms, &gradients].map(Argument::of));
        arguments.extend([stretches, owned, width].map(i32_of));
        launch(device, "add_column_sums", owned.div_ceil(32), 256, &arguments);
        [download::<u8>(device, &gained), download::<u8>(device, &gradients)].concat()
    });
    let (gained, gradients) = found.split_at(rows * width * 2);
    let (gained, gradients) = (values_of::<u16>(gained), values_of::<f32>(gradients));
    let [dy, v] = [&dy, &v].map(|values| half.decode_all(values));
    let element = |i: usize| {
        let value = f64::from(gains[i % width]) * dy[i];
        Expected::rounded_sum(half, value, value.abs(), 1)
    };
    let expected: Vec<Expected> = (0..rows * width).map(element).collect();
    assert_close(&name, width, &half.decode_all(&gained), &expected);
    let of_column = |column: usize| {
        let already = f64::from(before[column]);
        if norms[column] == 0.0 {
            return Expected { value: already, tolerance: 0.0 };
        }
        let terms = (0..rows).map(|row| dy[row * width + column] * v[row * width + column]);
        let (sum, magnitude) = sum_and_magnitude(terms.map(|term| term / f64::from(norms[column])));
        Expected::float_sum(already + sum, already.abs() + magnitude, rows)
    };
    let expected: Vec<Expected> = (skipped..width).map(of_column).collect();
    let gradients: Vec<f64> = gradients.iter().map(|&value| f64::from(value)).collect();
    assert_close(&format!("{name}, magnitudes"), owned, &gradients, &expected);
}

#[test]
fn gradients_of_magnitudes_match_float64() {
    for half in HALVES {
        SHAPES.into_iter().for_each(|shape| backward(half, shape));
    }
}

/// What dropout adds: `(g − 1)∘dy`, `x − x̃`, and the masked gradient.
fn with_dropout(half: Half, [rows, width]: [usize; 2]) {
    let name = |what: &str| format!("magnitude_{what}_{}", half.suffix());
    let mut random = Random(width as u64 + 2);
    let [one, other] = [1.0, 2.0].map(|limit| random.halves(half, rows * width, limit));
    let gains = random.floats(width, 2.0);
    let mask = Mask::new(rows);
    let counts = [rows, width].map(i32_of);
    let found = run_everywhere(&format!("magnitude {rows}×{width} with dropout"), |device| {
        let run = |what: &str, arguments: &[Argument]| {
            launch(device, &name(what), eights(rows * width), 256, arguments);
        };
        let (first, gains) = (upload(device, &one), upload(device, &gains));
        let [rest, through] = [(); 2].map(|()| upload(device, &other));
        let change = poisoned::<u16>(device, rows * width);
        let memories = mask.upload(device);
        let of = |memories: &[&PlaceMemory]| -> Vec<Argument> {
            memories.iter().map(|memory| Argument::of(*memory)).chain(counts).collect()
        };
        run("change", &of(&[&first, &gains, &change]));
        run("rest", &of(&[&first, &rest]));
        run("through", &[&of(&[&first, &through])[..], &mask.arguments(Some(&memories))].concat());
        [&change, &rest, &through].map(|memory| download::<u16>(device, memory)).concat()
    });
    let [one, other] = [&one, &other].map(|values| half.decode_all(values));
    let all = |what: &str, found: &[u16], value: &dyn Fn(usize) -> [f64; 2]| {
        let element = |i: usize| {
            let (sum, magnitude) = sum_and_magnitude(value(i).into_iter());
            Expected::rounded_sum(half, sum, magnitude, 2)
        };
        let expected: Vec<Expected> = (0..rows * width).map(element).collect();
        assert_close(&format!("{} {rows}×{width}", name(what)), width, &half.decode_all(found), &expected);
    };
    let [change, rest, through] = [0, 1, 2].map(|part| &found[part * rows * width..][..rows * width]);
    all("change", change, &|i| [f64::from(gains[i % width]) * one[i], -one[i]]);
    all("rest", rest, &|i| [one[i], -other[i]]);
    all("through", through, &|i| [other[i], one[i] * mask.factor(i / width, i % width)]);
}

#[test]
fn what_dropout_adds_matches_float64() {
    for half in HALVES {
        SHAPES.into_iter().for_each(|shape| with_dropout(half, shape));
    }
}
