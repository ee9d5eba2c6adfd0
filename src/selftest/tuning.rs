//! The time of a product with each choice of its tiles.

use super::measure::{Measurable, copies_for, median, passes_within};
use crate::backend::cuda::tiles::{MeasuredProduct, Measurement, ProductShape};
use crate::backend::cuda::{CudaBackend, Trial};
use crate::device::Device;
use crate::error::Result;

/// Seconds that are spent on one product, about.
const SECONDS: f64 = 0.4;
/// Values that inputs repeat: a prime number, so that rows differ.
const VALUES: usize = 4_194_301;
const SMALLEST_VALUES: usize = 65_537;

/// Measures products on one backend.
pub struct Tuner<'a, D: Device> {
    backend: &'a CudaBackend<D>,
    values: Vec<f32>,
}

impl<'a, D: Device> Tuner<'a, D> {
    /// On `backend`, which has a choice of tiles.
    pub fn new(backend: &'a CudaBackend<D>) -> Self {
        // Random: a GPU draws less power, and runs faster, on zeros.
        let count = if D::IS_REAL { VALUES } else { SMALLEST_VALUES };
        Self { backend, values: super::values(count, 60) }
    }

    /// Bytes that the measurement of a product takes on the device.
    pub fn bytes_needed(shape: ProductShape, rank: usize) -> usize {
        let bytes = Trial::<D>::bytes_of_run(shape, rank);
        bytes * copies::<D>(bytes)
    }

    /// The median times of a product with adapters of `rank`, over inputs that no cache holds together. The choices take turns, so
    /// that a clock that drifts hits all of them.
    ///
    /// # Errors
    /// As [`CudaBackend::trial`], or the device's.
    pub fn measure(&self, shape: ProductShape, rank: usize) -> Result<MeasuredProduct> {
        let bytes = Trial::<D>::bytes_of_run(shape, rank);
        let trial = self.backend.trial(shape, rank, copies::<D>(bytes), &self.values)?;
        let choices: Vec<_> = trial.choices().collect();
        let all = || {
            (0..choices.len()).map(|index| self.seconds_of_run(&trial, index)).collect::<Result<Vec<f64>>>()
        };
        let warm_up: f64 = all()?.iter().sum::<f64>() * trial.runs() as f64;
        let rounds = if D::IS_REAL { passes_within(SECONDS, warm_up) } else { 1 };
        let rounds = (0..rounds).map(|_| all()).collect::<Result<Vec<_>>>()?;
        let ProductShape { rows, columns, depth, .. } = shape;
        let flops = 2.0 * rows as f64 * columns as f64 * (depth + rank) as f64;
        let mut measured: Vec<Measurement> = choices
            .into_iter()
            .enumerate()
            .map(|(index, choice)| {
                let seconds = median(rounds.iter().map(|seconds| seconds[index]).collect());
                Measurement { choice, microseconds: 1e6 * seconds, teraflops: flops / seconds / 1e12 }
            })
            .collect();
        measured.sort_by(|one, other| one.microseconds.total_cmp(&other.microseconds));
        Ok(MeasuredProduct { shape, choices: measured })
    }

    fn seconds_of_run(&self, trial: &Trial<D>, index: usize) -> Result<f64> {
        let start = self.backend.mark()?;
        trial.start(self.backend, index)?;
        let end = self.backend.mark()?;
        Ok(self.backend.seconds_between(&start, &end)? / trial.runs() as f64)
    }
}

/// Copies of what takes `bytes`; an emulator has no cache to outrun.
fn copies<D: Device>(bytes: usize) -> usize {
    if D::IS_REAL { copies_for(bytes as f64, bytes as f64) } else { 1 }
}
