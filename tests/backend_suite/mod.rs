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
use fastlora::dtype::DType;

#[allow(unused_imports)] // Only backends in f32 promise it.
pub use invariance::batch_cuts_agree;

/// What the cases must know of a backend's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Precision {
    /// Type of activations and of frozen weights in products.
    pub compute: DType,
    /// Widths are multiples of this.
    pub width_multiple: usize,
    /// Relative error of the gradients' norm.
    pub norm_tolerance: f64,
}

impl Precision {
    /// f32 throughout, any width, the norm summed in f64.
    pub const F32: Self = Self { compute: DType::F32, width_multiple: 1, norm_tolerance: 1e-12 };

    /// Half the distance of 1 and the next number of the compute type.
    fn rounding_unit(self) -> f64 {
        match self.compute {
            DType::F32 => f64::from(f32::EPSILON) / 2.0,
            DType::F16 => 2f64.powi(-11),
            DType::Bf16 => 2f64.powi(-8),
        }
    }

    /// `width` or the next that the backend takes.
    pub fn width(self, width: usize) -> usize {
        width.next_multiple_of(self.width_multiple)
    }

    /// What a value becomes on the backend.
    pub fn rounded(self, value: f32) -> f32 {
        match self.compute {
            DType::F32 => value,
            DType::F16 => half::f16::from_f32(value).to_f32(),
            DType::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// As [`values`], in the compute type.
    pub fn values(self, count: usize, seed: u64) -> Vec<f32> {
        values(count, seed).into_iter().map(|value| self.rounded(value)).collect()
    }
}

/// What the cases found, checked as it came.
pub struct Record {
    /// The backend's numbers.
    pub precision: Precision,
    /// Every output, by case.
    pub outputs: Vec<(String, Vec<f32>)>,
}

impl Record {
    /// Checks `found` against `expected`: each element may differ by [`slack`](Self::slack).
    fn check(&mut self, case: &str, found: &[f32], expected: &[f64], terms: usize) {
        self.check_in(self.precision.rounding_unit(), case, found, expected, terms);
    }

    /// The same for what is f32 on every backend.
    fn check_f32(&mut self, case: &str, found: &[f32], expected: &[f64], terms: usize) {
        self.check_in(Precision::F32.rounding_unit(), case, found, expected, terms);
    }

    /// How far an element may be off: the rounding of a sum of `terms` (a random walk of as many steps, eight deviations
    /// wide) of the size of the largest.
    fn slack(&self, expected: &[f64], terms: usize) -> f64 {
        slack(self.precision.rounding_unit(), expected, terms)
    }

    fn check_in(&mut self, unit: f64, case: &str, found: &[f32], expected: &[f64], terms: usize) {
        assert_eq!(found.len(), expected.len(), "{case}: length");
        let bound = slack(unit, expected, terms);
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
            "{case}: element {place} is {}, expected {}: off by {error:e}, allowed {bound:e}",
            found[place],
            expected[place]
        );
        self.outputs.push((case.to_owned(), found.to_vec()));
    }
}

fn slack(unit: f64, expected: &[f64], terms: usize) -> f64 {
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    8.0 * unit * (terms as f64 + 4.0).sqrt() * largest
}

/// Runs every case on `backend`.
pub fn run<B: Backend>(backend: &B, precision: Precision) -> Record {
    let mut record = Record { precision, outputs: Vec::new() };
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
