//! lora.cu

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::*;

const SHARED_BYTES: u32 = 32 << 10;

/// One token; ragged tiles; ranks that are no multiple of 8; a rank beyond one tile; more than 3 × stages × 32 of k.
fn groups() -> Vec<Group> {
    vec![
        Group::new(1, 8, &[(8, 1)]),
        Group::new(67, 40, &[(48, 3), (24, 5), (24, 3)]),
        Group::new(9, 424, &[(416, 16)]),
        Group::new(130, 72, &[(64, 40), (32, 0), (40, 30)]),
    ]
}

fn tiles(m: usize, n: usize) -> u32 {
    (m.div_ceil(64) * n.div_ceil(64)) as u32
}

/// `rows × rank` from a `[rows, leading]` matrix whose other columns must be untouched.
pub fn without_padding(values: &[u16], rank: usize, leading: usize) -> Vec<u16> {
    for row in values.chunks(leading) {
        assert!(row[rank..].iter().all(|&bits| bits == 0xFFFF), "a padding column was written");
    }
    values.chunks(leading).flat_map(|row| row[..rank].iter().copied()).collect()
}

/// Launches lora_down: s of x and A.
pub fn launch_down(
    place: &Place,
    half: Half,
    [x, a, s]: [&PlaceMemory; 3],
    [tokens, inputs, rank, leading]: [usize; 4],
) {
    let mut arguments = [x, a, s].map(Argument::of).to_vec();
    arguments.extend([tokens, inputs, rank, leading].map(i32_of));
    let kernel = format!("lora_down_{}", half.suffix());
    launch_grid(place, &kernel, [tiles(tokens, rank), 1, 1], 128, SHARED_BYTES, &arguments);
}

/// Launches lora_dropout.
pub fn launch_dropout(
    place: &Place,
    half: Half,
    [x, dropped]: [&PlaceMemory; 2],
    [tokens, inputs]: [usize; 2],
    mask: [Argument; 8],
) {
    let mut arguments = vec![Argument::of(x), Argument::of(dropped), i32_of(tokens), i32_of(inputs)];
    arguments.extend(mask);
    let kernel = format!("lora_dropout_{}", half.suffix());
    launch(place, &kernel, (tokens * inputs / 4).div_ceil(256), 256, &arguments);
}

/// s by the formula, of x̃ and A.
pub fn expected_s(half: Half, x: &[f64], a: &[f64], inputs: usize) -> Vec<Expected> {
    let (tokens, rank) = (x.len() / inputs, a.len() / inputs);
    let element = |i: usize| {
        let terms = (0..inputs).map(|k| x[i / rank * inputs + k] * a[i % rank * inputs + k]);
        let (sum, magnitude) = sum_and_magnitude(terms);
        Expected::rounded_sum(half, sum, magnitude, inputs)
    };
    (0..tokens * rank).map(element).collect()
}

fn down(half: Half, group: &Group) {
    let name = format!("lora_down_{} {}", half.suffix(), group.name);
    let (tokens, inputs, rank, leading) =
        (group.tokens, group.in_features, group.rank(), group.rank_leading());
    let mut random = Random(tokens as u64);
    let x = random.halves(half, tokens * inputs, 1.0);
    let a = random.halves(half, rank * inputs, 1.0);
    let s = run_everywhere(&name, |device| {
        let (x, a, s) = (upload(device, &x), upload(device, &a), poisoned::<u16>(device, tokens * leading));
        launch_down(device, half, [&x, &a, &s], [tokens, inputs, rank, leading]);
        download::<u16>(device, &s)
    });
    let expected = expected_s(half, &half.decode_all(&x), &half.decode_all(&a), inputs);
    assert_close(&name, rank, &half.decode_all(&without_padding(&s, rank, leading)), &expected);
}

/// dA of a group, with the tokens in `stretches`, added to gradients that are already there.
fn a_gradient(half: Half, group: &Group, stretches: usize) {
    let name = format!("lora_gradient_{} {}, {stretches} stretches", half.suffix(), group.name);
    let (tokens, inputs) = (group.tokens, group.in_features);
    let (rank, leading) = (group.rank(), group.rank_leading());
    let mut random = Random(tokens as u64 + 2);
    let x = random.halves(half, tokens * inputs, 1.0);
    let ds = group.with_poisoned_padding(random.halves(half, tokens * leading, 1.0));
    let before = random.floats(rank * inputs, 1.0);
    let after = run_everywhere(&name, |device| {
        let (x, ds, gradients) = (upload(device, &x), upload(device, &ds), upload(device, &before));
        let partials = poisoned::<f32>(device, stretches * rank * inputs);
        let mut arguments = [&ds, &x, &partials].map(Argument::of).to_vec();
        arguments.extend([tokens, rank, inputs, leading, inputs].map(i32_of));
        let grid = [tiles(rank, inputs), stretches as u32, 1];
        let kernel = format!("lora_gradient_{}", half.suffix());
        launch_grid(device, &kernel, grid, 128, SHARED_BYTES, &arguments);
        let elements = Argument::I64((rank * inputs) as i64);
        let arguments = [Argument::of(&partials), Argument::of(&gradients), i32_of(stretches), elements];
        launch(device, "lora_add_a_gradient", (rank * inputs).div_ceil(256), 256, &arguments);
        download::<f32>(device, &gradients)
    });
    let (x, ds) = (half.decode_all(&x), half.decode_all(&ds));
    let element = |i: usize| {
        let (row, input) = (i / inputs, i % inputs);
        let terms = (0..tokens).map(|t| ds[t * leading + row] * x[t * inputs + input]);
        let (sum, magnitude) = sum_and_magnitude(terms);
        let already = f64::from(before[i]);
        Expected::float_sum(already + sum, already.abs() + magnitude, tokens + stretches)
    };
    let expected: Vec<Expected> = (0..rank * inputs).map(element).collect();
    let actual: Vec<f64> = after.iter().map(|&value| f64::from(value)).collect();
    assert_close(&name, inputs, &actual, &expected);
}

#[test]
fn lora_down_matches_float64() {
    for half in HALVES {
        for group in groups() {
            down(half, &group);
        }
    }
}

#[test]
fn lora_gradients_match_float64() {
    for half in HALVES {
        for group in groups() {
            a_gradient(half, &group, 1);
            a_gradient(half, &group, 3);
        }
    }
}

#[test]
fn the_device_drops_what_the_cpu_drops() {
    for half in HALVES {
        let (tokens, inputs) = (19, 40);
        let mask = Mask::new(tokens);
        let x = Random(1).halves(half, tokens * inputs, 4.0);
        let name = format!("lora_dropout_{}", half.suffix());
        let dropped = run_everywhere(&name, |device| {
            let (x, out) = (upload(device, &x), poisoned::<u16>(device, tokens * inputs));
            let memories = mask.upload(device);
            launch_dropout(device, half, [&x, &out], [tokens, inputs], mask.arguments(Some(&memories)));
            download::<u16>(device, &out)
        });
        let expected: Vec<Expected> = half
            .decode_all(&x)
            .iter()
            .enumerate()
            .map(|(i, x)| {
                Expected::rounded_sum(half, x * mask.factor(i / inputs, i % inputs), x.abs() * 1.5, 1)
            })
            .collect();
        let dropped = half.decode_all(&dropped);
        assert_close(&name, inputs, &dropped, &expected);
        let zeros = dropped.iter().filter(|&&value| value == 0.0).count();
        assert!((100..400).contains(&zeros), "{zeros} zeros of {} at p = 0.3", dropped.len());
    }
}
