//! mlp_back.cu

use fastlora::device::Argument;

use crate::activation::Activation;
use crate::harness::*;
use crate::lora_back::Partials;
use crate::lora_group::*;

/// Ranks of a block, and tokens of its stretch.
const CUTS: [(usize, usize); 3] = [(16, 7 * 64), (32, 3 * 64), (64, 3 * 64)];

#[derive(Clone, Copy)]
struct Case {
    tokens: usize,
    width: usize,
    /// Of gate, up and down; 0: no adapter.
    ranks: [usize; 3],
    activation: Activation,
    has_dropout: bool,
    /// Columns of F that a block takes.
    block_columns: usize,
}

impl Case {
    const fn new(tokens: usize, width: usize, ranks: [usize; 3]) -> Self {
        Self { tokens, width, ranks, activation: Activation::Silu, has_dropout: false, block_columns: 256 }
    }

    fn name(&self, half: Half) -> String {
        let Self { tokens, width, ranks, activation, has_dropout, .. } = self;
        format!(
            "mlp_back {activation:?} {} T={tokens} F={width} ranks {ranks:?}, dropout {has_dropout}",
            half.suffix()
        )
    }

    /// Ranks that a block must hold, up's from the multiple of 8 at or before its first.
    fn cut(&self) -> (usize, usize) {
        let [gate, up, down] = self.ranks;
        let widest = gate.max(if up > 0 { gate % 8 + up } else { 0 }).max(down);
        CUTS.into_iter().find(|cut| widest <= cut.0).unwrap()
    }
}

/// One token; ragged tiles; several blocks of columns and stretches; ranks that begin at no multiple of 8; a single adapter.
const CASES: [Case; 7] = [
    Case::new(1, 8, [1, 1, 1]),
    Case { has_dropout: true, ..Case::new(67, 72, [3, 5, 16]) },
    Case { block_columns: 64, activation: Activation::GeluTanh, ..Case::new(530, 136, [16, 16, 4]) },
    Case { has_dropout: true, activation: Activation::GeluTanh, ..Case::new(200, 72, [20, 9, 17]) },
    Case { has_dropout: true, ..Case::new(200, 72, [33, 40, 64]) },
    Case { block_columns: 64, ..Case::new(65, 136, [0, 12, 0]) },
    Case { has_dropout: true, ..Case::new(65, 72, [0, 0, 50]) },
];

fn back(half: Half, case: Case) {
    let Case { tokens, width, ranks: [gate, up, down], activation, .. } = case;
    let (block_ranks, stretch) = case.cut();
    let name = case.name(half);
    // Its gradients of A are not this kernel's: any input width does.
    let gate_up = Group::new(tokens, 8, &[(width, gate), (width, up)]);
    let down_group = Group::new(tokens, width, &[(8, down)]);
    let mut random = Random(tokens as u64 + 1);
    let forward = random.halves(half, tokens * 2 * width, 4.0);
    let dact = random.halves(half, tokens * width, 1.0);
    let s = gate_up.with_poisoned_padding(random.halves(half, tokens * gate_up.rank_leading(), 1.0));
    let down_ds =
        down_group.with_poisoned_padding(random.halves(half, tokens * down_group.rank_leading(), 1.0));
    let b_hat = gate_up.b_hat(half, &random.floats(gate_up.parameter_count(), 1.0));
    let before = random.floats(gate_up.parameter_count(), 1.0);
    let a_before = random.floats(down * width, 1.0);
    let mask = Mask::new(tokens);
    let slots = gate_up.slots();
    let partials = Partials::new(&gate_up, tokens.div_ceil(stretch), case.block_columns);
    let bytes = run_everywhere(&name, |device| {
        let tables = SlotTables::new(device, &slots);
        let memory = |values: &[u16]| upload(device, values);
        let (gradient, dact, s) = (memory(&forward), memory(&dact), memory(&s));
        let (b_hat, down_ds) = (memory(&b_hat), memory(&down_ds));
        let act = poisoned::<u16>(device, tokens * width);
        let shape = [tokens, width].map(i32_of);
        let kernel = format!("{}_forward_{}", activation.kernel(), half.suffix());
        let arguments = [Argument::of(&gradient), Argument::of(&act), shape[0], shape[1]];
        launch(device, &kernel, (tokens * width / 8).div_ceil(256), 256, &arguments);

        let sums @ [ds_partials, b_partials] = &partials.poisoned(device, tokens);
        let a_partials = poisoned::<f32>(device, partials.stretches * down * width);
        let masks = case.has_dropout.then(|| mask.upload(device));
        let mut arguments = [&dact, &gradient, &s, &b_hat, &down_ds, ds_partials, b_partials, &a_partials]
            .map(Argument::of)
            .to_vec();
        arguments.extend([tokens, width, case.block_columns, gate, up, down].map(i32_of));
        let leadings = [gate_up.rank_leading(), down_group.rank_leading(), partials.rank_width];
        arguments.extend(leadings.map(i32_of));
        arguments.extend(mask.arguments(masks.as_ref()));
        let grid = [partials.stretches as u32, width.div_ceil(case.block_columns) as u32, 1];
        let shared = 2 * (6 * 64 * 64 + 5 * 64 * block_ranks);
        let kernel = match activation {
            Activation::Silu => format!("mlp_back_silu_{block_ranks}_{}", half.suffix()),
            Activation::GeluTanh => format!("mlp_back_gelu_{block_ranks}_{}", half.suffix()),
        };
        let threads = if block_ranks == 64 { 512 } else { 256 };
        launch_grid(device, &kernel, grid, threads, shared as u32, &arguments);

        let mut bytes: Vec<u8> = download(device, &act);
        bytes.extend(download::<u8>(device, &gradient));
        if down > 0 {
            let gradients = upload(device, &a_before);
            let elements = (down * width) as i64;
            let mut arguments = [&a_partials, &gradients].map(Argument::of).to_vec();
            arguments.extend([i32_of(partials.stretches), Argument::I64(elements)]);
            launch(device, "lora_add_a_gradient", (down * width).div_ceil(256), 256, &arguments);
            bytes.extend(download::<u8>(device, &gradients));
        }
        if gate + up > 0 {
            bytes.extend(partials.add_up(device, half, &gate_up, &tables, sums, &before));
        }
        bytes
    });
    let (act, rest) = bytes.split_at(tokens * width * 2);
    let (gradient, rest) = rest.split_at(tokens * 2 * width * 2);
    let (a_gradient, sums) = rest.split_at(down * width * 4);
    let (forward, dact) = (half.decode_all(&forward), half.decode_all(&dact));
    let gradient = half.decode_all(&values_of(gradient));
    let mut expected = Vec::new();
    for (row, dact) in forward.chunks(2 * width).zip(dact.chunks(width)) {
        let of = |column: usize| activation.gradient(half, row[column], row[width + column], dact[column]);
        for side in 0..2 {
            expected.extend((0..width).map(|column| of(column)[side]));
        }
    }
    assert_close(&format!("{name} dg|du"), 2 * width, &gradient, &expected);

    // The activation as the forward stores it, and what dropout leaves of that.
    let dropped = |token: usize, column: usize| {
        let act = half.decode(values_of::<u16>(&act[2 * (token * width + column)..][..2])[0]);
        if !case.has_dropout {
            return act;
        }
        let factor = mask.factor(token, column);
        half.decode(half.encode(f64::from(act as f32 * factor as f32)))
    };
    let x: Vec<f64> = (0..tokens * width).map(|i| dropped(i / width, i % width)).collect();
    let down_ds = half.decode_all(&down_ds);
    let leading = down_group.rank_leading();
    let element = |i: usize| {
        let (rank, column) = (i / width, i % width);
        let terms = (0..tokens).map(|t| down_ds[t * leading + rank] * x[t * width + column]);
        let (sum, magnitude) = sum_and_magnitude(terms);
        let already = f64::from(a_before[i]);
        Expected::float_sum(already + sum, already.abs() + magnitude, tokens + partials.stretches)
    };
    let expected: Vec<Expected> = (0..down * width).map(element).collect();
    let found: Vec<f64> = values_of::<f32>(a_gradient).iter().map(|&value| f64::from(value)).collect();
    assert_close(&format!("{name} dA"), width, &found, &expected);

    if gate + up > 0 {
        let [s, b_hat] = [&s, &b_hat].map(|bits| half.decode_all(bits));
        partials.check(&name, half, &gate_up, sums, [&gradient, &s, &b_hat], &before);
    }
}

#[test]
fn one_pass_over_an_mlps_middle_gives_its_gradient_and_those_of_its_adapters() {
    for half in HALVES {
        for case in CASES {
            back(half, case);
        }
    }
}
