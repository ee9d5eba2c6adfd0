//! One table of cases for every backend: each operation's forward against float64, each backward against finite
//! differences of the float64 forward, over ragged shapes.
//!
//! A backend's test calls [`run`] with the rounding unit of its compute type.

#![allow(dead_code)]

mod attention;
mod elementwise;
mod head;
mod invariance;
mod linear;
mod optimizer;
pub mod reference;

use fastlora::backend::Backend;
use fastlora::batch::Batch;

pub use invariance::batch_cuts_agree;

/// What the cases found, checked as it came.
pub struct Record {
    /// Half the distance of 1 and the next number of the compute type.
    rounding_unit: f64,
    /// Every output, by case.
    pub outputs: Vec<(String, Vec<f32>)>,
}

impl Record {
    /// Checks `found` against `expected`. Each element may differ by the rounding of a sum of `terms` (a random walk
    /// of as many steps, eight deviations wide) of the size of the tensor's largest.
    fn check(&mut self, case: &str, found: &[f32], expected: &[f64], terms: usize) {
        assert_eq!(found.len(), expected.len(), "{case}: length");
        let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
        let bound = 8.0 * self.rounding_unit * (terms as f64 + 4.0).sqrt() * largest;
        let mut worst = (0.0, 0);
        for (place, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs();
            assert!(!error.is_nan(), "{case}: element {place} is {found}, expected {expected}");
            if error > worst.0 {
                worst = (error, place);
            }
        }
        let (error, place) = worst;
        assert!(
            error <= bound,
            "{case}: element {place} is {}, expected {}: off by {error:e}, allowed {bound:e} (largest {largest:e})",
            found[place],
            expected[place]
        );
        self.outputs.push((case.to_owned(), found.to_vec()));
    }
}

/// Runs every case on `backend`.
pub fn run<B: Backend>(backend: &B, rounding_unit: f64) -> Record {
    let mut record = Record { rounding_unit, outputs: Vec::new() };
    elementwise::run(backend, &mut record);
    linear::run(backend, &mut record);
    attention::run(backend, &mut record);
    head::run(backend, &mut record);
    optimizer::run(backend, &mut record);
    record
}

/// `count` values in -1..1 that depend on `seed`.
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    (0..count)
        .map(|_| {
            // SplitMix64 (Steele et al. 2014).
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
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

pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

pub fn buffer<B: Backend>(backend: &B, values: &[f32]) -> B::Buffer {
    // Buffers may be longer than needed, and what lies behind must not matter.
    let mut buffer = backend.buffer(values.len() + 5).unwrap();
    backend.write_buffer(&mut buffer, values).unwrap();
    buffer
}

pub fn read<B: Backend>(backend: &B, buffer: &B::Buffer, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    backend.read_buffer(buffer, &mut values).unwrap();
    values
}

pub fn read_floats<B: Backend>(backend: &B, floats: &B::Floats, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    backend.read_floats(floats, &mut values).unwrap();
    values
}

pub fn resident<B: Backend>(backend: &B, batch: &Batch) -> B::Batch {
    let mut resident = backend.new_batch().unwrap();
    // A larger one first: nothing of it may stay.
    backend.load_batch(&mut resident, &batch_of(&[9, 30], 7)).unwrap();
    backend.load_batch(&mut resident, batch).unwrap();
    resident
}
