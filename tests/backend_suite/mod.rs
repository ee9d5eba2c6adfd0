//! One table of cases for every backend: each operation's forward against float64, each backward against finite
//! differences of the float64 forward, over ragged shapes.
//!
//! A backend's test calls [`run`] with the rounding unit of its compute type. Formulas and random numbers are those of
//! `fastlora selftest`, which runs the same operations at real sizes; here finite differences check the formulas too.

#![allow(dead_code)]

mod attention;
mod elementwise;
mod head;
mod invariance;
mod linear;
mod mlp;
mod optimizer;
mod self_attention;

use fastlora::backend::{Backend, Dropout, EmbeddingNoise, PassSettings, RmsNorm, Weight};
use fastlora::batch::Batch;
#[allow(unused_imports)] // Each backend's test uses its part.
pub use fastlora::selftest::inputs::{batch_of, rope_table, stored, values, widen};
pub use fastlora::selftest::{Precision, reference};
use fastlora::tensor::WeightTensor;

#[allow(unused_imports)] // Only backends in f32 promise it.
pub use invariance::batch_cuts_agree;

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

/// Central differences of `function` at `x`, for every coordinate.
pub fn finite_differences(x: &[f64], function: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-5;
    let mut x = x.to_vec();
    (0..x.len())
        .map(|place| {
            let at = x[place];
            x[place] = at + step;
            let above = function(&x);
            x[place] = at - step;
            let below = function(&x);
            x[place] = at;
            (above - below) / (2.0 * step)
        })
        .collect()
}

/// Runs every case on `backend`.
pub fn run<B: Backend>(backend: &B, precision: Precision) -> Record {
    let mut record = Record { precision, outputs: Vec::new() };
    elementwise::run(backend, &mut record);
    linear::run(backend, &mut record);
    mlp::run(backend, &mut record);
    attention::run(backend, &mut record);
    self_attention::run(backend, &mut record);
    head::run(backend, &mut record);
    optimizer::run(backend, &mut record);
    record
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
    resident_with(backend, batch, PassSettings::default())
}

pub fn resident_with<B: Backend>(backend: &B, batch: &Batch, settings: PassSettings) -> B::Batch {
    let mut resident = backend.new_batch().unwrap();
    // A larger one first: nothing of it may stay.
    let before = Dropout { probability: 0.9, seed: 8, epoch: 3 };
    let noise = EmbeddingNoise { alpha: 3.0, seed: 8, epoch: 3 };
    let before = PassSettings { gradient_scale: 5.0, dropout: Some(before), embedding_noise: Some(noise) };
    backend.load_batch(&mut resident, &batch_of(&[9, 30], 7), before).unwrap();
    backend.load_batch(&mut resident, batch, settings).unwrap();
    resident
}

/// Weights of a norm over rows of `width`: halved, as the rows of `values` grow by √3 when they are normalised.
pub fn norm_weight<B: Backend>(backend: &B, precision: Precision, width: usize) -> B::Vector {
    let weight: Vec<f32> = precision.values(width, 66).iter().map(|value| value / 2.0).collect();
    backend.vector(&[WeightTensor::from_f32("norm", vec![width], &weight)]).unwrap()
}

/// The norm with them.
pub fn norm_of<B: Backend>(weight: &B::Vector, width: usize) -> RmsNorm<'_, B> {
    RmsNorm { weight: Weight::Frozen(weight), weight_offset: 0.0, epsilon: 1e-5, width }
}
