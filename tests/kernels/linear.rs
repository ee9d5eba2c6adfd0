//! linear.cu and linear_sm90a.cu

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

/// Which of the two files.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Version {
    Portable,
    Hopper {
        /// Of a tile.
        columns: usize,
        cluster_blocks: u32,
    },
}
use Version::{Hopper, Portable};

impl Version {
    /// The shapes, and for Hopper more than 3 × stages × 64 of k and several tiles a block.
    fn groups(self) -> Vec<Group> {
        let mut groups = groups();
        if let Hopper { columns, .. } = self {
            groups.push(Group::new(20, 1240, &[(columns + 8, 20)]));
            groups.push(Group::new(300, 72, &[(columns, 8), (columns + 40, 70)]));
        }
        groups
    }

    /// The kernel over an output of `width`.
    fn launch(
        self,
        place: &Place,
        name: &str,
        half: Half,
        tokens: usize,
        width: usize,
        arguments: &[Argument],
    ) {
        let half = half.suffix();
        match self {
            Portable => {
                let blocks = (tokens.div_ceil(128) * width.div_ceil(128)) as u32;
                launch_grid(place, &format!("{name}_{half}"), [blocks, 1, 1], 256, SHARED_BYTES, arguments);
            }
            Hopper { columns, cluster_blocks } => {
                // Fewer blocks than tiles: each takes several.
                let blocks = (tokens.div_ceil(128) * width.div_ceil(columns)).min(2) as u32;
                let grid = [blocks.max(cluster_blocks), 1, 1];
                let kernel = format!("{name}_sm90a_n{columns}_{half}");
                launch_clusters(place, &kernel, grid, cluster_blocks, 384, 227 << 10, arguments);
            }
        }
    }
}

/// The bits of `y`, which match float64.
fn forward(version: Version, half: Half, group: &Group, with_residual: bool) -> Vec<u16> {
    let name =
        format!("linear_forward_{} {version:?} {}, residual {with_residual}", half.suffix(), group.name);
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
        let [x, w, bias, s, b_hat] = &memories;
        let bias = if with_residual { Argument::of(bias) } else { null };
        let sizes = [tokens, inputs, outputs, slots.len()].map(i32_of);
        let arguments = match version {
            Portable => {
                let residual = if with_residual { Argument::of(&y) } else { null };
                let places = [x, w].map(Argument::of).into_iter().chain([bias, residual]);
                let places = places.chain([s, b_hat, &tables.slots, &y].map(Argument::of));
                places.chain(sizes).chain([i32_of(leading)]).collect::<Vec<_>>()
            }
            Hopper { columns, .. } => {
                let x = boxes(x, [tokens, inputs], inputs, 128);
                let w = boxes(w, [outputs, inputs], inputs, columns / 2);
                let adapters = if rank > 0 {
                    let b_hat = boxes(b_hat, [outputs, rank], leading, columns / 2);
                    [boxes(s, [tokens, rank], leading, 128), b_hat]
                } else {
                    [x, w]
                };
                let y = boxes(&y, [tokens, outputs], outputs, 64);
                let matrices = [x, w].into_iter().chain(adapters).chain([y, y]);
                let slots = Argument::of(&tables.slots);
                let rest = [bias, slots, Argument::I32(i32::from(with_residual))];
                matrices.chain(rest).chain(sizes).collect()
            }
        };
        version.launch(device, "linear_forward", half, tokens, outputs, &arguments);
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
    y
}

/// The bits of `dx`, which match float64.
fn backward_input(version: Version, half: Half, group: &Group, with_dropout: bool) -> Vec<u16> {
    let name =
        format!("linear_backward_input_{} {version:?} {}, dropout {with_dropout}", half.suffix(), group.name);
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
        let mut arguments: Vec<Argument> = match version {
            Portable => memories.iter().chain([&dx]).map(Argument::of).collect(),
            Hopper { .. } => {
                let [dy, w, ds, a] = &memories;
                let dy = boxes(dy, [tokens, outputs], outputs, 128);
                let w = boxes(w, [outputs, inputs], inputs, 64);
                let adapters = if rank > 0 {
                    [boxes(ds, [tokens, rank], leading, 128), boxes(a, [rank, inputs], inputs, 64)]
                } else {
                    [dy, w]
                };
                let dx = boxes(&dx, [tokens, inputs], inputs, 64);
                [dy, w].into_iter().chain(adapters).chain([dx]).collect()
            }
        };
        arguments.extend([tokens, inputs, outputs, rank].map(i32_of));
        if version == Portable {
            arguments.push(i32_of(leading));
        }
        arguments.extend(mask.arguments(with_dropout.then_some(&mask_memories)));
        version.launch(device, "linear_backward_input", half, tokens, inputs, &arguments);
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
    dx
}

type Run = fn(Version, Half, &Group, bool) -> Vec<u16>;

fn check(run: Run) {
    for half in HALVES {
        for group in Portable.groups() {
            run(Portable, half, &group, false);
            run(Portable, half, &group, true);
        }
    }
}

/// Blocks alone and in pairs: right, and the same bits.
fn check_for_hopper(run: Run) {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    for half in HALVES {
        for columns in [128, 192, 256] {
            let [alone, pairs] = [1, 2].map(|cluster_blocks| Hopper { columns, cluster_blocks });
            for group in alone.groups() {
                for is_with in [false, true] {
                    let bits = run(alone, half, &group, is_with);
                    assert!(
                        bits == run(pairs, half, &group, is_with),
                        "{pairs:?} {}: other bits",
                        group.name
                    );
                }
            }
        }
    }
}

#[test]
fn linear_forward_matches_float64() {
    check(forward);
}

#[test]
fn linear_backward_input_matches_float64() {
    check(backward_input);
}

#[test]
fn linear_forward_for_hopper_matches_float64() {
    check_for_hopper(forward);
}

#[test]
fn linear_backward_input_for_hopper_matches_float64() {
    check_for_hopper(backward_input);
}

/// A sum runs over k in one order, whichever tile the element is in: tiles are chosen for speed alone.
#[test]
fn no_tile_of_hopper_changes_a_bit() {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    let group = Group::new(140, 400, &[(264, 20), (72, 8)]);
    for half in HALVES {
        for run in [forward, backward_input] {
            for is_with in [false, true] {
                let [narrow, middle, wide] = [128, 192, 256]
                    .map(|columns| run(Hopper { columns, cluster_blocks: 1 }, half, &group, is_with));
                assert!(narrow == middle && middle == wide, "{} {is_with}", half.suffix());
            }
        }
    }
}
