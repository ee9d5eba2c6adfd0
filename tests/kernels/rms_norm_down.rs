//! rms_norm_down.cu

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora::{expected_s, launch_down, launch_dropout, without_padding};
use crate::lora_group::*;
use crate::norms::{EPSILON, expected_norm, launch_forward};

#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    width: usize,
    rank: usize,
    /// Of a block.
    rows: usize,
    /// Added to the norm's weight.
    offset: f32,
    has_dropout: bool,
}

impl Case {
    const fn new(tokens: usize, width: usize, rank: usize, rows: usize) -> Self {
        Self { tokens, width, rank, rows, offset: 0.0, has_dropout: false }
    }
    const fn with_offset(self) -> Self {
        Self { offset: 1.0, ..self }
    }
    const fn with_dropout(self) -> Self {
        Self { has_dropout: true, ..self }
    }

    /// Rows of A that its kernel takes at a time.
    fn block_ranks(self) -> usize {
        [16, 32].into_iter().find(|&ranks| self.rank <= ranks).unwrap_or(64)
    }
}

/// Every kernel; one token; blocks, tiles and ranks that end ragged; more than 3 × stages × columns of a stage; more ranks than
/// a block takes at a time.
const CASES: [Case; 10] = [
    Case::new(1, 8, 1, 16),
    Case::new(21, 1544, 16, 16).with_dropout(),
    Case::new(17, 776, 20, 16).with_offset(),
    Case::new(16, 424, 48, 16).with_dropout(),
    Case::new(35, 72, 5, 32),
    Case::new(67, 840, 32, 32).with_dropout(),
    Case::new(32, 136, 130, 32).with_offset(),
    Case::new(65, 40, 9, 64).with_dropout(),
    Case::new(64, 200, 24, 64).with_offset(),
    Case::new(130, 520, 70, 64).with_offset().with_dropout(),
];

/// y, then s with its padding.
fn fused(
    place: &Place,
    half: Half,
    case: Case,
    [x, w, a]: [&PlaceMemory; 3],
    mask: [Argument; 8],
) -> Vec<u16> {
    let Case { tokens, width, rank, rows, offset, .. } = case;
    let leading = rank.next_multiple_of(8);
    let (y, s) = (poisoned::<u16>(place, tokens * width), poisoned::<u16>(place, tokens * leading));
    let mut arguments = [x, w, a, &y, &s].map(Argument::of).to_vec();
    arguments.extend([i32_of(tokens), i32_of(width), Argument::F32(offset), Argument::F32(EPSILON)]);
    arguments.extend([i32_of(rank), i32_of(leading)]);
    arguments.extend(mask);
    let kernel = format!("rms_norm_down_{rows}_{}_{}", case.block_ranks(), half.suffix());
    let shared_bytes = rows * width.next_multiple_of(64) * 2 + (16 << 10);
    let grid = [tokens.div_ceil(rows) as u32, 1, 1];
    launch_grid(place, &kernel, grid, 256, shared_bytes as u32, &arguments);
    [download::<u16>(place, &y), download(place, &s)].concat()
}

/// The same by one kernel after the other.
fn separate(
    place: &Place,
    half: Half,
    case: Case,
    [x, w, a]: [&PlaceMemory; 3],
    mask: Option<[Argument; 8]>,
) -> Vec<u16> {
    let Case { tokens, width, rank, offset, .. } = case;
    let leading = rank.next_multiple_of(8);
    let [y, dropped] = [(); 2].map(|()| poisoned::<u16>(place, tokens * width));
    let s = poisoned::<u16>(place, tokens * leading);
    launch_forward(place, half, [x, w, &y], None, [tokens, width], offset);
    let input = match mask {
        Some(mask) => {
            launch_dropout(place, half, [&y, &dropped], [tokens, width], mask);
            &dropped
        }
        None => &y,
    };
    launch_down(place, half, [input, a, &s], [tokens, width, rank, leading]);
    [download::<u16>(place, &y), download(place, &s)].concat()
}

fn norm_and_down(half: Half, case: Case) {
    let name = format!("rms_norm_down {} {case:?}", half.suffix());
    let Case { tokens, width, rank, offset, has_dropout, .. } = case;
    let mut random = Random((tokens * width) as u64);
    let x = random.halves(half, tokens * width, 2.0);
    let weight = random.halves(half, width, 1.5);
    let a = random.halves(half, rank * width, 1.0);
    let mask = Mask::new(tokens);
    let outputs = run_everywhere(&name, |place| {
        let (x, w, a) = (upload(place, &x), upload(place, &weight), upload(place, &a));
        let masks = has_dropout.then(|| mask.upload(place));
        let arguments = mask.arguments(masks.as_ref());
        let outputs = fused(place, half, case, [&x, &w, &a], arguments);
        let expected = separate(place, half, case, [&x, &w, &a], has_dropout.then_some(arguments));
        assert!(outputs == expected, "{name}: other bits than by one kernel after the other");
        outputs
    });
    let (y, s) = outputs.split_at(tokens * width);
    let [x, weight, a, y] = [&x[..], &weight, &a, y].map(|values| half.decode_all(values));
    assert_close(&format!("{name} y"), width, &y, &expected_norm(half, &x, &weight, None, offset));

    // What the adapters see of y as it is stored.
    let dropped = |(i, &y): (usize, &f64)| match has_dropout {
        true => half.decode(half.encode(f64::from(y as f32 * mask.factor(i / width, i % width) as f32))),
        false => y,
    };
    let adapter_input: Vec<f64> = y.iter().enumerate().map(dropped).collect();
    let s = half.decode_all(&without_padding(s, rank, rank.next_multiple_of(8)));
    assert_close(&format!("{name} s"), rank, &s, &expected_s(half, &adapter_input, &a, width));
}

#[test]
fn one_pass_gives_the_norm_and_what_the_adapters_take_from_it() {
    for half in HALVES {
        for case in CASES {
            norm_and_down(half, case);
        }
    }
}
