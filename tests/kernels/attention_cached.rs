//! attention_cached.cu

use fastlora::device::Argument;

use crate::harness::*;
use crate::lora_group::i32_of;

struct Shape {
    rows: usize,
    position: usize,
    query_heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    window: usize,
    soft_cap: f64,
}

fn check(half: Half, shape: &Shape) {
    let Shape { rows, position, query_heads, key_value_heads, head_dim, window, soft_cap } = *shape;
    let name = format!(
        "attention_cached_{} rows {rows} at {position} Q={query_heads} K={key_value_heads} D={head_dim} window {window} \
         cap {soft_cap}",
        half.suffix()
    );
    let mut random = Random(position as u64 + head_dim as u64);
    let cache_width = key_value_heads * head_dim;
    let q_leading = (query_heads + 2 * key_value_heads) * head_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let q_bits = random.halves(half, rows * q_leading, 1.5);
    // Three positions more than are valid hold NaN.
    let capacity = position + rows + 3;
    let mut cache = |count: usize| -> Vec<u16> {
        let mut values = random.halves(half, count * cache_width, 1.5);
        values.resize(capacity * cache_width, 0xFFFF);
        values
    };
    let (key_bits, value_bits) = (cache(position + rows), cache(position + rows));
    let out = run_everywhere(&name, |device| {
        let [q, keys, values] = [&q_bits, &key_bits, &value_bits].map(|bits| upload(device, bits));
        let out = poisoned::<u16>(device, rows * query_heads * head_dim);
        let mut arguments: Vec<Argument> = [&q, &keys, &values, &out].map(Argument::of).to_vec();
        arguments.extend([position, query_heads, key_value_heads, head_dim, q_leading].map(i32_of));
        arguments.extend([Argument::F32(scale), Argument::F32(soft_cap as f32), i32_of(window)]);
        let grid = [rows as u32, query_heads as u32, 1];
        launch_grid(device, &format!("attention_cached_{}", half.suffix()), grid, 128, 0, &arguments);
        download::<u16>(device, &out)
    });
    let [q, keys, values] = [&q_bits, &key_bits, &value_bits].map(|bits| half.decode_all(bits));
    let mut expected = Vec::new();
    for row in 0..rows {
        for head in 0..query_heads {
            let at = position + row;
            let first = if window > 0 { (at + 1).saturating_sub(window) } else { 0 };
            let key_column = head / (query_heads / key_value_heads) * head_dim;
            let q = &q[row * q_leading + head * head_dim..][..head_dim];
            let mut score_error = 0f64;
            let scores: Vec<f64> = (first..=at)
                .map(|key| {
                    let terms = (0..head_dim).map(|i| q[i] * keys[key * cache_width + key_column + i]);
                    let (sum, magnitude) = crate::lora_group::sum_and_magnitude(terms);
                    score_error = score_error
                        .max(F32_ROUNDOFF * (head_dim as f64 + 6.0) * magnitude * f64::from(scale));
                    let z = sum * f64::from(scale);
                    if soft_cap > 0.0 { soft_cap * (z / soft_cap).tanh() } else { z }
                })
                .collect();
            let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let spread = scores.iter().map(|z| greatest - z).fold(greatest.abs(), f64::max);
            let weights: Vec<f64> = scores.iter().map(|z| (z - greatest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let terms = scores.len();
            let p_error = 4.0 * score_error + F32_ROUNDOFF * (4.0 * spread + terms as f64 / 64.0 + 40.0);
            for i in 0..head_dim {
                let terms_of_sum = (first..=at)
                    .zip(&weights)
                    .map(|(key, w)| w / total * values[key * cache_width + key_column + i]);
                let (sum, magnitude) = crate::lora_group::sum_and_magnitude(terms_of_sum);
                let mut element = Expected::rounded_sum(half, sum, magnitude, terms);
                element.tolerance += p_error * magnitude;
                expected.push(element);
            }
        }
    }
    assert_close(&name, query_heads * head_dim, &half.decode_all(&out), &expected);
}

#[test]
fn attention_over_a_cache_matches_float64() {
    for half in HALVES {
        // The first position; several tiles of 128 keys; every number of shares; a window inside a tile and across two.
        for (rows, position, query_heads, key_value_heads, head_dim, window, soft_cap) in [
            (1, 0, 1, 1, 16, 0, 0.0),
            (3, 300, 4, 2, 64, 0, 0.0),
            (1, 127, 3, 1, 80, 0, 2.0),
            (2, 128, 2, 1, 128, 0, 0.0),
            (1, 140, 8, 1, 256, 33, 0.0),
            (2, 400, 1, 1, 96, 150, 0.0),
        ] {
            check(half, &Shape { rows, position, query_heads, key_value_heads, head_dim, window, soft_cap });
        }
    }
}
