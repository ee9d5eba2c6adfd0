//! Time, and what the machine reaches at best.

use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::operations::{Operation, Prepared, large_product};
use super::precision::Precision;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::backend::cpu::simd::{Kernel, Simd, Vector};
use crate::backend::cuda::CudaBackend;
use crate::device::{Device, Memory};
use crate::error::Result;

/// A backend whose work can be timed.
pub trait Measurable: Backend + Sized + 'static {
    /// A point in its work.
    type Mark: Send + 'static;
    /// Whether its time is that of a machine, and not of one that is only played.
    const IS_REAL: bool;

    /// Its numbers.
    fn precision(&self) -> Precision;
    /// Marks the end of the work so far.
    ///
    /// # Errors
    /// The device's.
    fn mark(&self) -> Result<Self::Mark>;
    /// Waits for `end`; the seconds from `start` to there.
    ///
    /// # Errors
    /// The device's.
    fn seconds_between(&self, start: &Self::Mark, end: &Self::Mark) -> Result<f64>;
    /// What it reaches at best.
    ///
    /// # Errors
    /// The device's.
    fn best_rates(&self) -> Result<Rates>;
    /// Whether each operation is started by itself from now on, so that marks stand between them.
    ///
    /// # Errors
    /// The device's.
    fn time_operations(&self, _is_on: bool) -> Result<()> {
        Ok(())
    }
}

/// What a machine reaches, measured on it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rates {
    /// Operations a second.
    #[serde(rename = "flops_per_second")]
    pub flops: f64,
    /// How `flops` was measured.
    pub flops_of: &'static str,
    /// Bytes a second read and written by a large copy.
    #[serde(rename = "bytes_per_second")]
    pub bytes: f64,
}

/// Bytes over which repeated runs are spread, so that none finds its inputs in a cache: no cache of a GPU or CPU of today
/// holds half of it but for a few servers' last level.
pub const ROTATED_BYTES: f64 = (256u64 << 20) as f64;
/// More would only make small cases slow to set up.
const MAX_COPIES: f64 = 32.0;
const MIN_PASSES: f64 = 3.0;
const MAX_PASSES: f64 = 30.0;

/// All copies of an operation together may take so much of the device.
const MAX_RESIDENT_BYTES: f64 = (4u64 << 30) as f64;

/// How many copies of an operation a pass should run in turn.
pub fn copies_of<B: Backend + 'static>(operation: &dyn Operation<B>) -> usize {
    copies_for(operation.work().bytes, operation.resident_bytes())
}

/// The same for a run that reads and writes `bytes`, of inputs and outputs that take `resident_bytes`.
pub(super) fn copies_for(bytes: f64, resident_bytes: f64) -> usize {
    let wanted = (ROTATED_BYTES / bytes.max(1.0)).ceil().min(MAX_COPIES);
    let fitting = (MAX_RESIDENT_BYTES / resident_bytes.max(1.0)).floor();
    wanted.min(fitting).max(1.0) as usize
}

/// How often to repeat what takes `seconds`, within about `budget_seconds`.
pub(super) fn passes_within(budget_seconds: f64, seconds: f64) -> usize {
    (budget_seconds / seconds.max(1e-9)).clamp(MIN_PASSES, MAX_PASSES) as usize
}

/// The median; of an even number the higher of the two in the middle.
pub(super) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Seconds of one run, the median over passes through `copies` that take about `budget_seconds` together, after one to warm
/// up. Inputs that a run overwrites are put back between passes, which is not timed.
///
/// # Errors
/// The operation's.
pub fn seconds_of_run<B: Measurable>(
    backend: &B,
    copies: &mut [Box<dyn Prepared<B> + '_>],
    budget_seconds: f64,
) -> Result<f64> {
    let warm_up = seconds_of_passes(backend, copies, 1)?;
    let passes = passes_within(budget_seconds, warm_up * copies.len() as f64);
    let times = (0..passes).map(|_| seconds_of_passes(backend, copies, 1));
    Ok(median(times.collect::<Result<Vec<f64>>>()?))
}

/// Mean seconds of a run over `runs` passes through all copies, one after the other.
///
/// # Errors
/// The operation's.
pub fn seconds_of_passes<B: Measurable>(
    backend: &B,
    copies: &mut [Box<dyn Prepared<B> + '_>],
    passes: usize,
) -> Result<f64> {
    for copy in copies.iter_mut() {
        copy.restore(backend)?;
    }
    backend.run(|| {
        let start = backend.mark()?;
        for _ in 0..passes {
            for copy in copies.iter_mut() {
                copy.run(backend)?;
            }
        }
        let end = backend.mark()?;
        Ok(backend.seconds_between(&start, &end)? / (passes * copies.len()) as f64)
    })
}

impl Measurable for CpuBackend {
    type Mark = Instant;
    const IS_REAL: bool = true;

    fn precision(&self) -> Precision {
        Precision::F32
    }

    fn mark(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn seconds_between(&self, start: &Instant, end: &Instant) -> Result<f64> {
        Ok(end.duration_since(*start).as_secs_f64())
    }

    fn best_rates(&self) -> Result<Rates> {
        Ok(self.run(|| Rates {
            flops: multiply_add_rate(),
            flops_of: "multiply-adds in registers",
            bytes: copy_rate(),
        }))
    }
}

/// Multiply-adds in 12 independent chains: enough to hide their latency, few enough for sixteen registers.
pub struct MultiplyAddChains {
    /// Steps of each chain.
    pub steps: usize,
}

impl MultiplyAddChains {
    /// Vectors that are worked on at once.
    pub const COUNT: usize = 12;
}

impl Kernel for MultiplyAddChains {
    /// Lanes of a vector, and a sum that must be computed.
    type Output = (usize, f32);

    #[inline(always)]
    fn run<V: Vector>(self) -> (usize, f32) {
        use std::hint::black_box;
        let (factor, addend) = (V::splat(black_box(0.999)), V::splat(black_box(0.001)));
        let mut sums = [V::splat(0.5); MultiplyAddChains::COUNT];
        for _ in 0..self.steps {
            for sum in &mut sums {
                *sum = sum.mul_add(factor, addend);
            }
        }
        (V::LANES, sums.into_iter().fold(V::splat(0.0), |total, sum| total + sum).sum())
    }
}

/// Best of several tries: a limit is what was reached once.
fn best_seconds(mut work: impl FnMut()) -> f64 {
    let tries = (0..7).map(|_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    });
    tries.fold(f64::INFINITY, f64::min)
}

/// Operations a second of this pool's threads, on registers alone.
fn multiply_add_rate() -> f64 {
    const STEPS: usize = 2_000_000;
    let simd = Simd::detect();
    let (lanes, _) = simd.run(MultiplyAddChains { steps: 1 });
    let operations = 2 * STEPS * MultiplyAddChains::COUNT * lanes * rayon::current_num_threads();
    let seconds = best_seconds(|| {
        std::hint::black_box(rayon::broadcast(|_| simd.run(MultiplyAddChains { steps: STEPS })));
    });
    operations as f64 / seconds
}

/// Bytes a second that this pool's threads read and write when they copy.
fn copy_rate() -> f64 {
    const ELEMENTS: usize = 32 << 20;
    let from = vec![1.0f32; ELEMENTS];
    let mut to = vec![0.0f32; ELEMENTS];
    let chunk = ELEMENTS / rayon::current_num_threads();
    let seconds = best_seconds(|| {
        to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
        std::hint::black_box(&to);
    });
    2.0 * size_of_val(&from[..]) as f64 / seconds
}

impl<D: Device> Measurable for CudaBackend<D> {
    type Mark = D::Event;
    const IS_REAL: bool = D::IS_REAL;

    fn precision(&self) -> Precision {
        Precision::half(self.compute().dtype())
    }

    fn mark(&self) -> Result<D::Event> {
        self.device().record_event()
    }

    fn seconds_between(&self, start: &D::Event, end: &D::Event) -> Result<f64> {
        Ok(f64::from(self.device().milliseconds_between(start, end)?) / 1e3)
    }

    fn best_rates(&self) -> Result<Rates> {
        let product: Box<dyn Operation<Self>> = large_product(self.precision());
        let mut copies = vec![product.prepare(self)?];
        let flops = product.work().flops / seconds_of_run(self, &mut copies, 0.5)?;
        drop(copies);
        Ok(Rates {
            flops,
            flops_of: "our product of 8192 × 8192 × 8192",
            bytes: device_copy_rate(self.device())?,
        })
    }

    fn time_operations(&self, is_on: bool) -> Result<()> {
        self.start_operations_singly(is_on);
        Ok(())
    }
}

/// Bytes a second that the device reads and writes when it copies.
fn device_copy_rate<D: Device>(device: &D) -> Result<f64> {
    let bytes = (1usize << 30).min(device.limits().total_memory_bytes as usize / 8);
    let (from, to) = (device.allocate(bytes)?, device.allocate(bytes)?);
    device.fill(&from, 0..bytes, 0x3C)?;
    let mut best = f32::INFINITY;
    for _ in 0..10 {
        let start = device.record_event()?;
        device.copy(&from, 0..from.bytes(), &to, 0)?;
        let end = device.record_event()?;
        best = best.min(device.milliseconds_between(&start, &end)?);
    }
    Ok(2.0 * bytes as f64 / (f64::from(best) / 1e3))
}
