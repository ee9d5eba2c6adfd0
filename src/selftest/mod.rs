//! Every operation of a backend on the machine at hand: right against float64, and how fast.
//!
//! One table of cases serves every backend. An operation runs once on poisoned outputs, is compared with float64 on a sample
//! of rows (each of which takes part in every tile of columns, so that real shapes stay affordable) and searched for
//! anything not finite, then is timed over copies of its inputs that no cache holds together.
//!
//! ```
//! use fastlora::backend::cpu::CpuBackend;
//! use fastlora::selftest::{Case, run};
//!
//! let backend = CpuBackend::new(Some(1))?;
//! let report = run(&backend, &[Case::RmsNorm { rows: 5, width: 64 }], None, |_| {});
//! assert!(report.iter().all(|row| row.passes()));
//! assert_eq!(report[1].operation, "rms_norm backward");
//! # Ok::<(), fastlora::error::Error>(())
//! ```

mod cases;
mod comparison;
pub mod inputs;
mod measure;
mod operations;
mod precision;
pub mod reference;
mod tuning;

pub use cases::{LLAMA_3_8B, ModelShape, QWEN2_5_1_5B, SMOLLM2_135M, Scale, cases};
pub use comparison::{Comparison, Outcome, sample_rows};
pub use inputs::values;
pub use measure::{
    Measurable, MultiplyAddChains, ROTATED_BYTES, Rates, copies_of, seconds_of_passes, seconds_of_run,
};
pub use operations::{AttentionCase, CachedCase, Case, LinearCase, MlpCase, Operation, Prepared, Work};
pub use precision::{Precision, Tolerance, rounding_unit, underflow};
pub use tuning::Tuner;

use crate::dtype::DType;
use crate::error::{Error, Result};

/// What was found of one operation.
#[derive(Debug)]
pub struct Row {
    /// "linear backward".
    pub operation: &'static str,
    /// Its sizes.
    pub shape: String,
    /// Compute type.
    pub dtype: DType,
    /// Each output beside float64's, or why the operation did not run.
    pub outcomes: Result<Vec<Outcome>>,
    /// How fast it ran, if it was timed.
    pub timing: Option<Timing>,
}

/// How fast an operation ran.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Median seconds of a run.
    pub seconds: f64,
    /// What a run takes at least.
    pub work: Work,
    /// The time that the machine's best rates would take, as a share of `seconds`; none where the inputs may have been in a
    /// cache.
    pub fraction_of_limit: Option<f64>,
    /// Whether arithmetic is that limit, not memory.
    pub is_arithmetic: bool,
}

impl Timing {
    fn new(seconds: f64, work: Work, copies: usize, best: Rates) -> Self {
        let (arithmetic, memory) = (work.flops / best.flops, work.bytes / best.bytes);
        let is_rotated = copies as f64 * work.bytes >= ROTATED_BYTES / 2.0;
        let fraction_of_limit = is_rotated.then(|| arithmetic.max(memory) / seconds);
        Self { seconds, work, fraction_of_limit, is_arithmetic: arithmetic > memory }
    }
}

impl Row {
    /// Whether the operation ran and every output is right.
    pub fn passes(&self) -> bool {
        self.outcomes.as_ref().is_ok_and(|outcomes| outcomes.iter().all(Outcome::passes))
    }

    /// The output that is furthest off, as a share of what it may be off.
    pub fn worst(&self) -> Option<&Outcome> {
        let outcomes = self.outcomes.as_ref().ok()?.iter();
        outcomes.max_by(|one, other| one.share().total_cmp(&other.share()))
    }
}

/// Runs the cases, and times them where the machine's `best` rates are given; `on_row` sees each row as it comes.
pub fn run<B: Measurable>(
    backend: &B,
    cases: &[Case],
    best: Option<Rates>,
    mut on_row: impl FnMut(&Row),
) -> Vec<Row> {
    let precision = backend.precision();
    let mut rows = Vec::new();
    for case in cases {
        for operation in case.operations::<B>(precision) {
            let mut timing = None;
            let outcomes = examine(backend, &*operation, best, &mut timing);
            let (name, shape) = (operation.name(), operation.shape());
            let row = Row { operation: name, shape, dtype: precision.compute, outcomes, timing };
            on_row(&row);
            rows.push(row);
        }
    }
    rows
}

/// Seconds that are spent on timing one operation, about.
const TIMING_SECONDS: f64 = 0.1;

fn examine<B: Measurable>(
    backend: &B,
    operation: &dyn Operation<B>,
    best: Option<Rates>,
    timing: &mut Option<Timing>,
) -> Result<Vec<Outcome>> {
    let mut first = operation.prepare(backend)?;
    // Not a measurement yet: it tells how many runs there is time for.
    let start = backend.mark()?;
    backend.run(|| first.run(backend))?;
    let seconds = backend.seconds_between(&start, &backend.mark()?)?;
    let outcomes = first.check(backend)?;
    if outcomes.is_empty() {
        return Err(Error::internal(format!("{}: nothing was compared", operation.name())));
    }
    if let Some(best) = best {
        let mut copies = vec![first];
        let affordable = (TIMING_SECONDS / seconds.max(1e-9)) as usize;
        for _ in 1..copies_of(operation).min(affordable) {
            copies.push(operation.prepare(backend)?);
        }
        let seconds = seconds_of_run(backend, &mut copies, TIMING_SECONDS)?;
        *timing = Some(Timing::new(seconds, operation.work(), copies.len(), best));
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_that_of_what_takes_longer_and_none_where_a_cache_may_have_helped() {
        let best = Rates { flops: 1e12, flops_of: "", bytes: 1e11 };
        let work = Work { flops: 2e10, bytes: 1e9 };
        let timing = Timing::new(0.04, work, 1, best);
        assert!(
            timing.is_arithmetic && timing.fraction_of_limit.is_some_and(|share| (share - 0.5).abs() < 1e-12)
        );
        let work = Work { flops: 1e8, bytes: 1e9 };
        let timing = Timing::new(0.02, work, 1, best);
        assert!(
            !timing.is_arithmetic
                && timing.fraction_of_limit.is_some_and(|share| (share - 0.5).abs() < 1e-12)
        );
        let small = Work { bytes: 1e6, ..work };
        assert_eq!(Timing::new(0.02, small, 32, best).fraction_of_limit, None);
    }
}
