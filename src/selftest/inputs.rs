//! Numbers and batches to compute with: random, and the same on every machine.

use std::sync::Arc;

use rayon::prelude::*;

use super::Precision;
use crate::batch::Batch;
use crate::dtype::DType;
use crate::tensor::WeightTensor;

/// Values that one task makes.
const CHUNK: usize = 1 << 16;

/// `count` values in -1..1 that depend on `seed` (SplitMix64, Steele et al. 2014).
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
    let start = seed.wrapping_mul(GAMMA) ^ 0xD1B5_4A32_D192_ED03;
    let value = |place: usize| {
        let mut z = start.wrapping_add(GAMMA.wrapping_mul(place as u64 + 1));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let mut values = vec![0.0; count];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, part)| {
        part.iter_mut().enumerate().for_each(|(place, out)| *out = value(chunk * CHUNK + place));
    });
    values
}

/// Samples of the given lengths with ids below `vocabulary`; every third token carries no loss.
pub fn batch_of(lengths: &[usize], vocabulary: u32) -> Batch {
    let mut batch = Batch::default();
    for (sample, &length) in lengths.iter().enumerate() {
        let ids: Vec<u32> = (0..length).map(|t| (t * 37 + sample * 11) as u32 % vocabulary).collect();
        let label = |t: usize| if t % 3 == 2 { -100 } else { ids[t] as i32 };
        let labels: Vec<i32> = (0..length).map(label).collect();
        batch.push(100 + 7 * sample, &ids, &labels);
    }
    batch
}

/// `[positions, 2, D/2]`: cosines, then sines, with the base of 10 000 (Su et al. 2021).
pub fn rope_table(positions: usize, head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let angle = |position: usize, i: usize| position as f64 * 10_000_f64.powf(-(i as f64) / half as f64);
    (0..positions)
        .flat_map(|position| {
            let cosines = (0..half).map(move |i| angle(position, i).cos());
            cosines.chain((0..half).map(move |i| angle(position, i).sin()))
        })
        .map(|value| value as f32)
        .collect()
}

/// The values as float64.
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// A tensor of `values` rounded to `dtype`, stored from byte `offset` of its storage on.
pub fn weight(name: &str, dtype: DType, shape: Vec<usize>, values: &[f32], offset: usize) -> WeightTensor {
    let mut bytes = vec![0; offset];
    match dtype {
        DType::F32 => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        DType::F16 => bytes.extend(values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes())),
        DType::Bf16 => bytes.extend(values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())),
    }
    let range = offset..bytes.len();
    WeightTensor::new(name, dtype, shape, Arc::new(bytes), range)
}

/// `values` rounded to `dtype`, stored `offset` bytes into their storage, and what a product must see.
pub fn stored(
    precision: Precision,
    name: &str,
    dtype: DType,
    shape: Vec<usize>,
    values: &[f32],
    offset: usize,
) -> (WeightTensor, Vec<f64>) {
    let tensor = weight(name, dtype, shape, values, offset);
    let seen = tensor.to_f32().into_iter().map(|value| f64::from(precision.rounded(value))).collect();
    (tensor, seen)
}
