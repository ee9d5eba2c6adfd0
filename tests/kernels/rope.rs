//! rope.cu

use fastlora::device::Argument;

use crate::harness::*;

const EPSILON: f32 = 1e-6;
const POSITIONS: usize = 11;

struct Shape {
    tokens: usize,
    query_heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    /// Columns of a head that are rotated.
    rotated: usize,
    /// Added to the norms' weights.
    offset: f32,
}

/// Rows of the table before position 0 of long samples, which have more than `LONGER_THAN` tokens.
const LONG_FIRST_ROW: usize = 13;
const LONGER_THAN: u32 = 20;

impl Shape {
    fn heads(&self) -> usize {
        self.query_heads + self.key_value_heads
    }

    /// First element of a query or key head in qkv.
    fn offset(&self, token: usize, head: usize) -> usize {
        (token * (self.heads() + self.key_value_heads) + head) * self.head_dim
    }
}

fn check(half: Half, shape: &Shape, with_norm: bool) {
    let Shape { tokens, query_heads, key_value_heads, head_dim, rotated, offset } = *shape;
    let name = format!(
        "rope_{} T={tokens} Q={query_heads} K={key_value_heads} D={head_dim} R={rotated} norm {with_norm} {offset}",
        half.suffix()
    );
    let mut random = Random(head_dim as u64 + tokens as u64);
    let row = (shape.heads() + key_value_heads) * head_dim;
    let qkv = random.halves(half, tokens * row, 2.0);
    let gradient = random.halves(half, tokens * row, 1.0);
    let query_norm = random.halves(half, head_dim, 1.5);
    let key_norm = random.halves(half, head_dim, 1.5);
    let half_rotated = rotated / 2;
    let angle = |row: usize, i: usize| row as f64 * 10f64.powf(-(i as f64) * 4.0 / half_rotated as f64);
    let mut angles = Vec::new();
    for row in 0..LONG_FIRST_ROW + POSITIONS {
        angles.extend((0..half_rotated).map(|i| angle(row, i).cos() as f32));
        angles.extend((0..half_rotated).map(|i| angle(row, i).sin() as f32));
    }
    let positions: Vec<u32> = (0..tokens).map(|_| random.below(POSITIONS - 1) as u32).collect();
    // Every other token is of a long sample.
    let lengths: Vec<u32> = (0..tokens).map(|token| LONGER_THAN + token as u32 % 2).collect();
    let row_of = |token: usize| match lengths[token] > LONGER_THAN {
        true => LONG_FIRST_ROW + positions[token] as usize,
        false => 1 + positions[token] as usize,
    };

    let outputs = run_everywhere(&name, |device| {
        let (qkv, dqkv) = (upload(device, &qkv), upload(device, &gradient));
        let (query_norm, key_norm) = (upload(device, &query_norm), upload(device, &key_norm));
        let (angles, positions) = (upload(device, &angles), upload(device, &positions));
        let lengths = upload(device, &lengths);
        let rotated = poisoned::<u16>(device, tokens * shape.heads() * head_dim);
        let norm_or_null = |norm| if with_norm { Argument::of(norm) } else { Argument::Address(0) };
        let arguments = |out| {
            [
                Argument::of(&qkv),
                norm_or_null(&query_norm),
                norm_or_null(&key_norm),
                Argument::of(&angles),
                Argument::of(&positions),
                Argument::of(&lengths),
                Argument::of(out),
                Argument::I32(tokens as i32),
                Argument::I32(query_heads as i32),
                Argument::I32(key_value_heads as i32),
                Argument::I32(head_dim as i32),
                Argument::I32(shape.rotated as i32),
                Argument::I32(1),
                Argument::I32(LONGER_THAN as i32),
                Argument::I32(LONG_FIRST_ROW as i32),
                Argument::F32(offset),
                Argument::F32(EPSILON),
            ]
        };
        let blocks = (tokens * shape.heads()).div_ceil(4);
        launch(device, &format!("rope_forward_{}", half.suffix()), blocks, 128, &arguments(&rotated));
        launch(device, &format!("rope_backward_{}", half.suffix()), blocks, 128, &arguments(&dqkv));
        let mut outputs: Vec<u16> = download(device, &rotated);
        outputs.extend(download::<u16>(device, &dqkv));
        outputs
    });

    let [qkv, gradient_values, mut query_norm, mut key_norm] =
        [&qkv, &gradient, &query_norm, &key_norm].map(|values| half.decode_all(values));
    query_norm.iter_mut().chain(&mut key_norm).for_each(|weight| *weight += f64::from(offset));
    let mut forward = Vec::new();
    // Values are untouched by the backward.
    let mut backward: Vec<Expected> =
        gradient_values.iter().map(|&value| Expected { value, tolerance: f64::MIN_POSITIVE }).collect();
    let u = half.unit_roundoff();
    for token in 0..tokens {
        for head in 0..shape.heads() {
            let at = shape.offset(token, head);
            let x = &qkv[at..][..head_dim];
            let d = &gradient_values[at..][..head_dim];
            let weight = if head < query_heads { &query_norm } else { &key_norm };
            let mean_square = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
            let rstd = 1.0 / (mean_square + f64::from(EPSILON)).sqrt();
            let normed = |i: usize| if with_norm { x[i] * rstd * weight[i] } else { x[i] };
            // Two roundings before the rotation where there is a norm.
            let input_error = if with_norm { 2.1 * u } else { 0.0 };
            // The columns that stay turn by nothing.
            let angle = |i: usize| if i < rotated { angle(row_of(token), i % half_rotated) } else { 0.0 };
            let partner_of = |i: usize| if i < rotated { (i + half_rotated) % rotated } else { i };
            let is_low = |i: usize| i < half_rotated;
            for i in 0..head_dim {
                let partner = partner_of(i);
                let sign = if is_low(i) { -1.0 } else { 1.0 };
                let (a, b) = (normed(i) * angle(i).cos(), sign * normed(partner) * angle(i).sin());
                let mut expected = Expected::rounded_sum(half, a + b, a.abs() + b.abs(), 8);
                // The table is f32: its rounding scales with each product.
                expected.tolerance += (a.abs() + b.abs()) * input_error * (1.0 + u);
                expected.tolerance += (normed(i).abs() + normed(partner).abs()) * F32_ROUNDOFF * 2.0;
                expected.tolerance += half.underflow() * 4.0;
                forward.push(expected);
            }
            let unrotated = |i: usize| {
                let partner = partner_of(i);
                let sign = if is_low(i) { 1.0 } else { -1.0 };
                d[i] * angle(i).cos() + sign * d[partner] * angle(i).sin()
            };
            let products = || (0..head_dim).map(|i| unrotated(i) * weight[i] * x[i]);
            let mean = products().sum::<f64>() / head_dim as f64;
            let mean_magnitude = products().map(f64::abs).sum::<f64>() / head_dim as f64;
            for i in 0..head_dim {
                let partner = partner_of(i);
                let own = d[i].abs() + d[partner].abs();
                let (value, magnitude) = if with_norm {
                    let value = rstd * unrotated(i) * weight[i] - rstd.powi(3) * x[i] * mean;
                    let along = (rstd.powi(3) * x[i]).abs() * mean_magnitude;
                    (value, rstd * weight[i].abs() * own + along)
                } else {
                    (unrotated(i), own)
                };
                backward[at + i] = Expected::rounded_sum(half, value, magnitude, 32);
            }
        }
    }
    let rotated_count = tokens * shape.heads() * head_dim;
    assert_close(&name, head_dim, &half.decode_all(&outputs[..rotated_count]), &forward);
    assert_close(&format!("{name}, gradient"), row, &half.decode_all(&outputs[rotated_count..]), &backward);
}

#[test]
fn rope_with_and_without_head_norms_matches_float64() {
    for half in HALVES {
        for (tokens, query_heads, key_value_heads, head_dim) in
            [(1, 1, 1, 16), (5, 3, 1, 64), (3, 4, 2, 80), (2, 2, 1, 128), (2, 1, 1, 256), (7, 9, 3, 12)]
        {
            let shape =
                Shape { tokens, query_heads, key_value_heads, head_dim, rotated: head_dim, offset: 0.0 };
            check(half, &shape, false);
            check(half, &shape, true);
            let rotated = (head_dim / 4 * 3) / 4 * 4;
            let shape = Shape { rotated, offset: 1.0, ..shape };
            check(half, &shape, false);
            check(half, &shape, true);
        }
    }
}
