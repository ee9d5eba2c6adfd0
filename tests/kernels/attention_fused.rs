//! The way back of the rotation in Hopper's attention against rope.cu, bit for bit.

use crate::attention_launches::{Case, Rotation, Shape, run};
use crate::harness::*;

/// Few rows; samples that end inside a tile; several tiles of keys; groups; a window; a cap.
const CASES: [Case; 5] = [
    (&[1, 2], 1, 1, 64, 0, 0.0),
    (&[70, 5, 130], 3, 1, 64, 0, 0.0),
    (&[300, 2], 2, 1, 64, 65, 0.0),
    (&[127, 129], 2, 2, 128, 0, 0.0),
    (&[3, 258], 4, 2, 128, 0, 1.5),
];

fn check(half: Half, shape: &Shape) {
    let name = shape.name(half);
    let (tokens, width) = (shape.tokens(), shape.query_heads * shape.head_dim);
    let mut random = Random(tokens as u64);
    let [qkv, dout] = [(shape.leading(), 1.5), (width, 1.0)]
        .map(|(columns, limit)| random.halves(half, tokens * columns, limit));
    let gradient = |rotation| run(half, shape, [&qkv, &dout], rotation).gradient;
    let (separate, fused) = (gradient(Rotation::Behind), gradient(Rotation::Within));
    let first = fused.iter().zip(&separate).position(|(fused, separate)| fused != separate);
    let place = first.map(|index| (index / shape.leading(), index % shape.leading()));
    assert_eq!(place, None, "{name}: token and column of the first gradient that differs");
    let is_finite = |&bits: &u16| half.decode(bits).is_finite();
    assert!(fused.iter().all(is_finite), "{name}: a gradient was not written");
    assert!(gradient(Rotation::None) != fused, "{name}: nothing was rotated");
}

#[test]
fn attention_for_hopper_rotates_gradients_back() {
    if !has_hopper_kernels() {
        return println!("left out: the GPU is no Hopper");
    }
    for half in HALVES {
        for case in CASES {
            check(half, &Shape::new(true, case));
        }
    }
}
