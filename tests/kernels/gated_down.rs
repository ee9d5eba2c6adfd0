//! gated_down.cu

use fastlora::device::Argument;

use crate::activation::Activation;
use crate::harness::*;
use crate::lora_group::*;
use crate::shares_of_s::{Shares, check_s};

#[derive(Clone, Copy)]
struct Case {
    tokens: usize,
    width: usize,
    rank: usize,
    activation: Activation,
    has_dropout: bool,
    /// Columns of F that a block takes.
    block_columns: usize,
}

impl Case {
    const fn new(tokens: usize, width: usize, rank: usize) -> Self {
        let activation = Activation::Silu;
        Self { tokens, width, rank, activation, has_dropout: false, block_columns: 256 }
    }
}

/// One token; ragged tiles of each; several blocks of columns; every number of ranks that a block holds.
const CASES: [Case; 5] = [
    Case::new(1, 8, 1),
    Case { has_dropout: true, ..Case::new(67, 72, 16) },
    Case { activation: Activation::GeluTanh, block_columns: 64, ..Case::new(130, 200, 5) },
    Case { has_dropout: true, block_columns: 64, ..Case::new(70, 136, 20) },
    Case { activation: Activation::GeluTanh, has_dropout: true, ..Case::new(64, 328, 50) },
];

fn forward(half: Half, case: Case) {
    let Case { tokens, width, rank, activation, has_dropout, block_columns } = case;
    let name = format!(
        "gated_down {activation:?} {} T={tokens} F={width} r={rank}, dropout {has_dropout}",
        half.suffix()
    );
    let leading = rank.next_multiple_of(8);
    let mut random = Random(tokens as u64 + 1);
    let gate_up = random.halves(half, tokens * 2 * width, 4.0);
    let a = random.halves(half, rank * width, 1.0);
    let mask = Mask::new(tokens);
    let parts = width.div_ceil(block_columns);
    let outputs = run_everywhere(&name, |device| {
        let (gate_up, a) = (upload(device, &gate_up), upload(device, &a));
        let act = poisoned::<u16>(device, tokens * width);
        let shares = Shares::new(device, parts, tokens, rank);
        let masks = has_dropout.then(|| mask.upload(device));
        let mut arguments = [&gate_up, &act, &a, &shares.partials].map(Argument::of).to_vec();
        arguments.extend([tokens, width, block_columns, rank, leading].map(i32_of));
        arguments.extend(mask.arguments(masks.as_ref()));
        let ranks = [16, 32, 64].into_iter().find(|&ranks| rank <= ranks).unwrap();
        let gate = match activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu",
        };
        let kernel = format!("gated_down_{gate}_{ranks}_{}", half.suffix());
        let grid = [tokens.div_ceil(64) as u32, parts as u32, 1];
        launch_grid(device, &kernel, grid, 256, 2 * 2 * 64 * (2 * 64 + ranks as u32), &arguments);
        let mut outputs: Vec<u16> = download(device, &act);
        outputs.extend(shares.sum(device, half));
        outputs
    });
    let (act, s) = outputs.split_at(tokens * width);
    let (gate_up, act) = (half.decode_all(&gate_up), half.decode_all(act));
    let expected: Vec<Expected> = gate_up
        .chunks(2 * width)
        .flat_map(|row| (0..width).map(|column| activation.act(half, row[column], row[width + column])))
        .collect();
    assert_close(&format!("{name} act"), width, &act, &expected);

    // What the adapter sees of the activation as it is stored.
    let dropped = |i: usize| match has_dropout {
        true => half.decode(half.encode(f64::from(act[i] as f32 * mask.factor(i / width, i % width) as f32))),
        false => act[i],
    };
    let x: Vec<f64> = (0..tokens * width).map(dropped).collect();
    check_s(&name, half, rank, &x, &a, s);
}

#[test]
fn one_pass_gives_the_activation_and_what_downs_adapter_takes_from_it() {
    for half in HALVES {
        for case in CASES {
            forward(half, case);
        }
    }
}
