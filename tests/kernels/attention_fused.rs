//! What Hopper's attention does beside attention: the `s` of the output projection's adapter against float64, and the way back
//! of the rotation against rope.cu, bit for bit.

use crate::attention_launches::{Case, Further, Rotation, Shape, run};
use crate::harness::*;
use crate::shares_of_s::check_s;

/// Attention and the rank of the output's adapter: few rows; samples that end inside a tile; several tiles of keys; groups; a
/// window; a cap.
const CASES: [(Case, usize); 5] = [
    ((&[1, 2], 1, 1, 64, 0, 0.0), 1),
    ((&[70, 5, 130], 3, 1, 64, 0, 0.0), 16),
    ((&[300, 2], 2, 1, 64, 65, 0.0), 64),
    ((&[127, 129], 2, 2, 128, 0, 0.0), 8),
    ((&[3, 258], 4, 2, 128, 0, 1.5), 21),
];

fn check(half: Half, shape: &Shape, rank: usize) {
    let name = format!("{} r={rank}", shape.name(half));
    let (tokens, width) = (shape.tokens(), shape.query_heads * shape.head_dim);
    let mut random = Random(tokens as u64 + rank as u64);
    let [qkv, dout] = [(shape.leading(), 1.5), (width, 1.0)]
        .map(|(columns, limit)| random.halves(half, tokens * columns, limit));
    let a = random.halves(half, rank * width, 1.0);
    let results = |rotation, output_a| run(half, shape, [&qkv, &dout], Further { rotation, output_a });
    let separate = results(Rotation::Behind, None);
    let fused = results(Rotation::Within, Some(&a[..]));
    assert!(fused.out == separate.out && fused.log_sum == separate.log_sum, "{name}: the forward differs");
    check_s(&name, half, rank, &half.decode_all(&fused.out), &a, &fused.s);
    let mut pairs = fused.gradient.iter().zip(&separate.gradient);
    let first = pairs.position(|(fused, separate)| fused != separate);
    let place = first.map(|index| (index / shape.leading(), index % shape.leading()));
    assert_eq!(place, None, "{name}: token and column of the first gradient that differs");
    let is_finite = |&bits: &u16| half.decode(bits).is_finite();
    assert!(fused.gradient.iter().all(is_finite), "{name}: a gradient was not written");
    let unrotated = results(Rotation::None, None);
    assert!(unrotated.gradient != fused.gradient, "{name}: nothing was rotated");
}

#[test]
fn attention_for_hopper_takes_the_s_of_the_output_and_rotates_gradients_back() {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    for half in HALVES {
        for (case, rank) in CASES {
            check(half, &Shape::new(true, case), rank);
        }
    }
}
