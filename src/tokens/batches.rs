//! Which samples make which optimizer step: a pure function of the seed and the epoch, so that a run can go on
//! anywhere without replay.
//!
//! An epoch's order is the identity, or with shuffling the Fisher–Yates permutation (Durstenfeld 1964) whose draws come
//! from SplitMix64 (Steele, Lea & Flood 2014) started at `mix(mix(seed) + epoch)`, `mix` being SplitMix64's output
//! function. It depends on nothing else: not on the version of a random crate, not on threads.
//! The order is cut into steps of `batch_size × gradient_accumulation_steps` samples and these into micro-batches of
//! `batch_size`; the last of each may be short, and no sample is left out.

use std::ops::Range;

use super::samples::Sample;
use crate::batch::Batch;
use crate::error::{Error, Result};

/// How samples are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// Samples of one micro-batch.
    pub batch_size: usize,
    /// Micro-batches of one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Whether each epoch has its own order.
    pub shuffle: bool,
    /// Seed of the order.
    pub seed: u64,
}

/// The steps of every epoch over one set of samples.
#[derive(Clone, Debug)]
pub struct BatchPlan<'a> {
    samples: &'a [Sample],
    /// `[samples]` tokens with loss of each sample.
    labelled_counts: Vec<usize>,
    options: BatchOptions,
}

impl<'a> BatchPlan<'a> {
    /// A plan over `samples`.
    ///
    /// # Errors
    /// A configuration error when a micro-batch or a step would be empty; a data error when there is no sample or
    /// more than 2³².
    pub fn new(samples: &'a [Sample], options: BatchOptions) -> Result<Self> {
        for (name, value) in [
            ("batch_size", options.batch_size),
            ("gradient_accumulation_steps", options.gradient_accumulation_steps),
        ] {
            if value == 0 {
                return Err(Error::config(format!("`{name}` is 0, expected at least 1")));
            }
        }
        if samples.is_empty() || u32::try_from(samples.len()).is_err() {
            return Err(Error::data(format!("{} samples, expected 1 to 4294967295", samples.len())));
        }
        let labelled_counts = samples.iter().map(Sample::labelled_count).collect();
        Ok(Self { samples, labelled_counts, options })
    }

    /// Optimizer steps of one epoch.
    pub fn steps_per_epoch(&self) -> usize {
        self.samples.len().div_ceil(self.samples_per_step())
    }

    /// The epoch of an optimizer step of the whole run, and the step within it; both from 0.
    pub fn position(&self, global_step: u64) -> (u64, usize) {
        let steps = self.steps_per_epoch() as u64;
        (global_step / steps, (global_step % steps) as usize)
    }

    /// The order of one epoch, from 0.
    pub fn epoch(&self, epoch: u64) -> EpochOrder<'_> {
        let mut order: Vec<u32> = (0..self.samples.len() as u32).collect();
        if self.options.shuffle {
            shuffle(&mut order, self.options.seed, epoch);
        }
        EpochOrder { plan: self, order }
    }

    /// Replaces `batch` by the samples of one micro-batch, end to end. Allocates only where `batch` must grow.
    pub fn fill(&self, micro_batch: &[u32], batch: &mut Batch) {
        batch.clear();
        for &index in micro_batch {
            let sample = &self.samples[index as usize];
            batch.push(index as usize, &sample.token_ids, &sample.labels);
        }
    }

    /// Tokens of the largest micro-batch that any epoch can have.
    pub fn max_tokens(&self) -> usize {
        self.largest_micro_batch(|index| self.samples[index].token_ids.len())
    }

    /// Rows with loss of the micro-batch, of any epoch, that has the most.
    pub fn max_labelled_rows(&self) -> usize {
        self.largest_micro_batch(|index| self.labelled_counts[index])
    }

    /// Tokens of the longest sample.
    pub fn longest_sample(&self) -> usize {
        self.samples.iter().map(|sample| sample.token_ids.len()).max().unwrap_or(0)
    }

    fn samples_per_step(&self) -> usize {
        self.options.batch_size.saturating_mul(self.options.gradient_accumulation_steps)
    }

    /// With a fixed order the largest micro-batch there is; shuffled, the `batch_size` largest samples may meet.
    fn largest_micro_batch(&self, size: impl Fn(usize) -> usize) -> usize {
        let mut sizes: Vec<usize> = (0..self.samples.len()).map(size).collect();
        if self.options.shuffle {
            sizes.sort_unstable_by(|left, right| right.cmp(left));
            sizes.truncate(self.options.batch_size);
        }
        sizes.chunks(self.options.batch_size).map(|batch| batch.iter().sum()).max().unwrap_or(0)
    }
}

/// The order of the samples in one epoch.
#[derive(Clone, Debug)]
pub struct EpochOrder<'a> {
    plan: &'a BatchPlan<'a>,
    order: Vec<u32>,
}

impl EpochOrder<'_> {
    /// The samples' indices in the order in which they are learned.
    pub fn sample_indices(&self) -> &[u32] {
        &self.order
    }

    /// The optimizer steps; `skip` is free, so a resumed run begins where it stopped.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = Step<'_>> {
        let size = self.plan.samples_per_step();
        let range: Range<usize> = 0..self.plan.steps_per_epoch();
        range.map(move |number| {
            let start = number * size;
            let end = start.saturating_add(size).min(self.order.len());
            Step { plan: self.plan, number, sample_indices: &self.order[start..end] }
        })
    }
}

/// One optimizer step: its micro-batches, and what their gradients are divided by.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    plan: &'a BatchPlan<'a>,
    /// Number within the epoch, from 0.
    pub number: usize,
    /// The samples in their order.
    pub sample_indices: &'a [u32],
}

impl<'a> Step<'a> {
    /// The sample indices of each micro-batch, for [`BatchPlan::fill`].
    pub fn micro_batches(&self) -> impl ExactSizeIterator<Item = &'a [u32]> {
        self.sample_indices.chunks(self.plan.options.batch_size)
    }

    /// Tokens of the whole step.
    pub fn token_count(&self) -> usize {
        self.sample_indices.iter().map(|&index| self.plan.samples[index as usize].token_ids.len()).sum()
    }

    /// Tokens with loss of the whole step.
    pub fn labelled_count(&self) -> usize {
        self.sample_indices.iter().map(|&index| self.plan.labelled_counts[index as usize]).sum()
    }

    /// What the summed loss and its gradients are multiplied by to give the step's mean over labelled tokens; 0 where
    /// there are none, never 0/0.
    pub fn loss_scale(&self) -> f64 {
        match self.labelled_count() {
            0 => 0.0,
            count => 1.0 / count as f64,
        }
    }
}

/// SplitMix64's output function.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

fn shuffle(order: &mut [u32], seed: u64, epoch: u64) {
    let mut state = mix(mix(seed).wrapping_add(epoch));
    for last in (1..order.len()).rev() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        // 0 ..= last without division (Lemire 2019); the bias of at most 2³²/2⁶⁴ is below notice.
        let drawn = (u128::from(mix(state)) * (last as u128 + 1)) >> 64;
        order.swap(last, drawn as usize);
    }
}
