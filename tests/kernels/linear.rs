//! linear.cu

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::*;

const SHARED_BYTES: u32 = 64 << 10;

/// M = 1; tails in every dimension; more than 3 × stages × 32 of k; tiles across projections; ranks 1 to 40; no adapter.
fn groups() -> Vec<Group> {
    vec![
        Group::new(1, 8, &[(8, 1)]),
        Group::new(130, 72, &[(136, 4), (40, 3), (40, 4)]),
        Group::new(5, 416, &[(24, 16)]),
        Group::new(70, 40, &[(264, 0)]),
        Group::new(33, 64, &[(64, 0), (32, 40), (32, 0)]),
    ]
}

fn blocks(group: &Group, width: usize) -> [u32; 3] {
    [(group.tokens.div_ceil(128) * width.div_ceil(128)) as u32, 1, 1]
}

fn forward(half: Half, group: &Group, with_residual: bool) {
    let name = format!("linear_forward_{} {}, residual {with_residual}", half.suffix(), group.name);
    let (tokens, inputs, outputs) = (group.tokens, group.in_features, group.out_features());
    let (rank, leading) = (group.rank(), group.rank_leading());
    let mut random = Random(tokens as u64 + inputs as u64);
    let x = random.halves(half, tokens * inputs, 1.0);
    let w = random.halves(half, outputs * inputs, 1.0);
    let bias = random.halves(half, outputs, 1.0);
    let residual = random.halves(half, tokens * outputs, 2.0);
    let s = group.with_poisoned_padding(random.halves(half, tokens * leading, 1.0));
    let parameters = random.floats(group.parameter_count(), 1.0);
    let b_hat = group.b_hat(half, &parameters);
    let slots = group.slots();
    let y = run_everywhere(&name, |device| {
        let memories = [&x, &w, &bias, &s, &b_hat].map(|values| upload(device, values));
        let tables = SlotTables::new(device, &slots);
        // The residual is replaced by the sum, in place.
        let y =
            if with_residual { upload(device, &residual) } else { poisoned::<u16>(device, tokens * outputs) };
        let null = Argument::Address(0);
        let arguments = [
            Argument::of(&memories[0]),
            Argument::of(&memories[1]),
            if with_residual { Argument::of(&memories[2]) } else { null },
            if with_residual { Argument::of(&y) } else { null },
            Argument::of(&memories[3]),
            Argument::of(&memories[4]),
            Argument::of(&tables.slots),
            Argument::of(&y),
            i32_of(tokens),
            i32_of(inputs),
            i32_of(outputs),
            i32_of(slots.len()),
            i32_of(leading),
        ];
        let kernel = format!("linear_forward_{}", half.suffix());
        launch_grid(device, &kernel, blocks(group, outputs), 256, SHARED_BYTES, &arguments);
        download::<u16>(device, &y)
    });
    let [x, w, bias, residual, s, b_hat] =
        [&x, &w, &bias, &residual, &s, &b_hat].map(|values| half.decode_all(values));
    let mut expected = Vec::new();
    for token in 0..tokens {
        for out in 0..outputs {
            let frozen = (0..inputs).map(|k| x[token * inputs + k] * w[out * inputs + k]);
            let adapters = (0..rank).map(|k| s[token * leading + k] * b_hat[out * leading + k]);
            let added = if with_residual { [bias[out], residual[token * outputs + out]] } else { [0.0; 2] };
            let (sum, magnitude) = sum_and_magnitude(frozen.chain(adapters).chain(added));
            expected.push(Expected::rounded_sum(half, sum, magnitude, inputs + rank + 2));
        }
    }
    assert_close(&name, outputs, &half.decode_all(&y), &expected);
}

fn backward_input(half: Half, group: &Group, with_dropout: bool) {
    let name = format!("linear_backward_input_{} {}, dropout {with_dropout}", half.suffix(), group.name);
    let (tokens, inputs, outputs) = (group.tokens, group.in_features, group.out_features());
    let (rank, leading) = (group.rank(), group.rank_leading());
    let mut random = Random(tokens as u64 * 3 + inputs as u64);
    let dy = random.halves(half, tokens * outputs, 1.0);
    let w = random.halves(half, outputs * inputs, 1.0);
    let ds = group.with_poisoned_padding(random.halves(half, tokens * leading, 1.0));
    let a = random.halves(half, rank * inputs, 1.0);
    let mask = Mask::new(tokens);
    let dx = run_everywhere(&name, |device| {
        let memories = [&dy, &w, &ds, &a].map(|values| upload(device, values));
        let mask_memories = mask.upload(device);
        let dx = poisoned::<u16>(device, tokens * inputs);
        let mut arguments: Vec<Argument> = memories.iter().map(Argument::of).collect();
        arguments.push(Argument::of(&dx));
        arguments.extend([tokens, inputs, outputs, rank, leading].map(i32_of));
        arguments.extend(mask.arguments(with_dropout.then_some(&mask_memories)));
        let kernel = format!("linear_backward_input_{}", half.suffix());
        launch_grid(device, &kernel, blocks(group, inputs), 256, SHARED_BYTES, &arguments);
        download::<u16>(device, &dx)
    });
    let [dy, w, ds, a] = [&dy, &w, &ds, &a].map(|values| half.decode_all(values));
    let mut expected = Vec::new();
    for token in 0..tokens {
        for input in 0..inputs {
            let factor = if with_dropout { mask.factor(token, input) } else { 1.0 };
            let frozen = (0..outputs).map(|k| dy[token * outputs + k] * w[k * inputs + input]);
            let adapters = (0..rank).map(|k| factor * ds[token * leading + k] * a[k * inputs + input]);
            let (sum, magnitude) = sum_and_magnitude(frozen.chain(adapters));
            expected.push(Expected::rounded_sum(half, sum, magnitude, outputs + rank + 1));
        }
    }
    assert_close(&name, inputs, &half.decode_all(&dx), &expected);
}

#[test]
fn linear_forward_matches_float64() {
    for half in HALVES {
        for group in groups() {
            forward(half, &group, false);
            forward(half, &group, true);
        }
    }
}

#[test]
fn linear_backward_input_matches_float64() {
    for half in HALVES {
        for group in groups() {
            backward_input(half, &group, false);
            backward_input(half, &group, true);
        }
    }
}
