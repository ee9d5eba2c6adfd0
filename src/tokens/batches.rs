//! Which samples make which optimizer step: a pure function of the seed and the epoch, so that a run can go on
//! anywhere without replay.
//!
//! An epoch's visits come in the order of the data or, shuffled, in that of `visits.rs`. They are cut into rows, which
//! are single samples or, packed, as many whole ones as fit into `row_tokens`; the rows into steps of
//! `batch_size × gradient_accumulation_steps`, and these into micro-batches of `batch_size`. The last of each may be
//! short, and no visit is left out.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::packing::{bucket, pack};
use super::sample_set::SampleSet;
use super::tokenizer::hex;
use super::visits::{Shares, Visit, loses_hash, shuffle};
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Epochs whose steps are counted one by one before a run.
const MOST_COUNTED_EPOCHS: u64 = 100_000;

/// How samples are grouped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchOptions {
    /// Rows of one micro-batch: samples, or packed rows.
    pub batch_size: usize,
    /// Micro-batches of one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Whether each epoch has its own order.
    pub shuffle: bool,
    /// Seed of the order.
    pub seed: u64,
    /// Chance that a visit of a sample leaves its hash out, where the sample can be without.
    pub hash_dropout: f64,
    /// Whether each hash has as many visits an epoch as the one that has most.
    pub balance_by_hash: bool,
    /// Tokens of a row into which whole samples are packed; none: a row is a sample.
    pub row_tokens: Option<usize>,
    /// Whether samples of like length meet in a micro-batch. Not of use without `shuffle` or with `row_tokens`.
    pub bucket_by_length: bool,
}

impl Default for BatchOptions {
    /// One sample a step, in the order of the data.
    fn default() -> Self {
        Self {
            batch_size: 1,
            gradient_accumulation_steps: 1,
            shuffle: false,
            seed: 0,
            hash_dropout: 0.0,
            balance_by_hash: false,
            row_tokens: None,
            bucket_by_length: false,
        }
    }
}

/// The steps of every epoch over one set of samples.
///
/// ```
/// use fastlora::batch::Batch;
/// use fastlora::data::Origin;
/// use fastlora::tokens::{BatchOptions, BatchPlan, Sample, SampleSet};
///
/// let origin = Origin { file: "train.json".into(), line: 1 };
/// let sample = Sample::new(vec![5, 6, 7], vec![-100, 6, 7], origin);
/// let samples = SampleSet::new(vec![sample; 10], vec!["faq".into()]);
/// let options = BatchOptions { batch_size: 2, gradient_accumulation_steps: 2, shuffle: true, ..BatchOptions::default() };
/// let plan = BatchPlan::new(&samples, options)?;
/// let mut batch = Batch::default();
/// let (epoch, first_step) = plan.position(1);
/// for step in plan.epoch(epoch).steps().skip(first_step) {
///     for micro_batch in step.micro_batches() {
///         plan.fill(micro_batch, &mut batch);
///         assert!(batch.token_count() <= plan.max_tokens());
///     }
///     assert_eq!(step.token_weight(), 1.0 / step.labelled_count() as f64);
/// }
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Debug)]
pub struct BatchPlan<'a> {
    samples: &'a SampleSet,
    shares: Shares,
    options: BatchOptions,
    /// Where epochs end, in steps from the start of the run; of the first few, and only where their lengths differ.
    epoch_ends: Mutex<Vec<u64>>,
}

impl<'a> BatchPlan<'a> {
    /// A plan over `samples`.
    ///
    /// # Errors
    /// A configuration error when a micro-batch, a step or an epoch would be empty, or a sample does not fit into a row;
    /// a data error when there is no sample, or more than 2³² visits an epoch.
    pub fn new(samples: &'a SampleSet, options: BatchOptions) -> Result<Self> {
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
        let shares = Shares::new(samples, options.balance_by_hash);
        // A part of a visit that is left over may make one more, of each group of samples.
        let most = shares.least().saturating_add(samples.len() as u64);
        if u32::try_from(most).is_err() {
            return Err(Error::data(format!(
                "the weights make {most} samples an epoch, expected at most 4294967295"
            ))
            .hint("lower the weights of train_data, or leave balance_by_hash out"));
        }
        if shares.least() == 0 {
            return Err(Error::config("the weights leave epochs without any sample")
                .at("train_data")
                .hint("raise the weights: they are how often each record is seen in an epoch"));
        }
        let plan = Self { samples, shares, options, epoch_ends: Mutex::default() };
        match options.row_tokens.filter(|&row_tokens| plan.longest_sample() > row_tokens) {
            Some(row_tokens) => Err(Error::config(format!(
                "a sample has {} tokens, a row has room for {row_tokens}",
                plan.longest_sample()
            ))),
            None => Ok(plan),
        }
    }

    /// Number of samples.
    pub fn sample_count(&self) -> usize {
        self.samples.len()
    }

    /// Optimizer steps of an epoch, from 0.
    pub fn steps_in(&self, epoch: u64) -> usize {
        let rows = match self.options.row_tokens {
            // Visits fit into 32 bits.
            None => self.shares.count(epoch) as usize,
            Some(_) => self.epoch(epoch).row_count(),
        };
        rows.div_ceil(self.rows_per_step())
    }

    /// Optimizer steps of the first `epochs` epochs.
    ///
    /// # Errors
    /// A configuration error for more epochs than can be counted, where each has a number of steps of its own.
    pub fn steps_of(&self, epochs: u64) -> Result<u64> {
        if self.has_equal_epochs() {
            return Ok(epochs.saturating_mul(self.steps_in(0) as u64));
        }
        if epochs > MOST_COUNTED_EPOCHS {
            return Err(Error::config(format!(
                "{epochs} epochs: with packing or fractions of samples the steps of each are counted before the run"
            ))
            .at("num_epochs")
            .hint("give max_steps"));
        }
        let mut ends = self.epoch_ends.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<u64> =
            (ends.len() as u64..epochs).into_par_iter().map(|epoch| self.steps_in(epoch) as u64).collect();
        for steps in missing {
            let start = ends.last().copied().unwrap_or(0);
            ends.push(start + steps);
        }
        Ok(epochs.checked_sub(1).map_or(0, |last| ends[last as usize]))
    }

    /// The epoch of an optimizer step of the whole run, and the step within it; both from 0.
    pub fn position(&self, global_step: u64) -> (u64, usize) {
        if self.has_equal_epochs() {
            let steps = self.steps_in(0) as u64;
            return (global_step / steps, (global_step % steps) as usize);
        }
        let mut ends = self.epoch_ends.lock().unwrap_or_else(PoisonError::into_inner);
        while ends.last().is_none_or(|&end| end <= global_step) {
            let start = ends.last().copied().unwrap_or(0);
            let epoch = ends.len() as u64;
            ends.push(start + self.steps_in(epoch) as u64);
        }
        let epoch = ends.partition_point(|&end| end <= global_step);
        let start = epoch.checked_sub(1).map_or(0, |before| ends[before]);
        (epoch as u64, (global_step - start) as usize)
    }

    fn has_equal_epochs(&self) -> bool {
        self.options.row_tokens.is_none() && self.shares.is_constant()
    }

    /// The visits of one epoch, from 0, in their order.
    pub fn epoch(&self, epoch: u64) -> EpochOrder<'_> {
        let BatchOptions { batch_size, shuffle: is_shuffled, seed, hash_dropout, .. } = self.options;
        let mut visits = self.shares.visits(seed, epoch);
        if hash_dropout > 0.0 {
            for visit in &mut visits {
                let entry = self.samples.entry(visit.sample as usize);
                visit.without_hash =
                    self.samples.has_without(entry) && loses_hash(hash_dropout, seed, epoch, *visit);
            }
        }
        if is_shuffled {
            shuffle(&mut visits, seed, epoch);
        }
        let length = |visit: &Visit| self.token_count(*visit);
        let row_ends =
            self.options.row_tokens.map(|row_tokens| pack(&mut visits, length, row_tokens, !is_shuffled));
        if self.options.bucket_by_length && is_shuffled && row_ends.is_none() {
            bucket(&mut visits, length, batch_size, (seed, epoch));
        }
        EpochOrder { plan: self, visits, row_ends }
    }

    /// Replaces `batch` by the samples of one micro-batch, end to end. Allocates only where `batch` must grow.
    pub fn fill(&self, micro_batch: &[Visit], batch: &mut Batch) {
        batch.clear();
        for &visit in micro_batch {
            let (token_ids, labels) = self.tokens_of(visit);
            // Each visit has dropout masks of its own.
            let id = visit.sample as usize + visit.copy as usize * self.samples.len();
            batch.push(id, token_ids, labels);
        }
    }

    /// The sample of an id in a batch.
    pub fn sample_of(&self, id: usize) -> usize {
        id % self.samples.len()
    }

    /// Tokens of the largest micro-batch that any epoch can have.
    pub fn max_tokens(&self) -> usize {
        self.largest_micro_batch(|index| self.longest(index))
    }

    /// Rows with loss of the micro-batch, of any epoch, that has the most.
    pub fn max_labelled_rows(&self) -> usize {
        self.largest_micro_batch(|index| {
            let [with, without] = self.samples.labelled(self.samples.entry(index));
            with.max(without)
        })
    }

    /// Tokens of the longest sample.
    pub fn longest_sample(&self) -> usize {
        (0..self.samples.len()).map(|index| self.longest(index)).max().unwrap_or(0)
    }

    /// Tokens of a sample, with its hash or without, whichever are more.
    fn longest(&self, index: usize) -> usize {
        let [with, without] = self.samples.lengths(self.samples.entry(index));
        with.max(without)
    }

    fn tokens_of(&self, visit: Visit) -> (&[u32], &[i32]) {
        self.samples.tokens(visit.sample as usize, visit.without_hash)
    }

    fn token_count(&self, visit: Visit) -> usize {
        let entry = self.samples.entry(visit.sample as usize);
        self.samples.lengths(entry)[usize::from(visit.without_hash)]
    }

    fn labelled_count(&self, visit: Visit) -> usize {
        let entry = self.samples.entry(visit.sample as usize);
        self.samples.labelled(entry)[usize::from(visit.without_hash)]
    }

    fn rows_per_step(&self) -> usize {
        self.options.batch_size.saturating_mul(self.options.gradient_accumulation_steps)
    }

    /// With a fixed order of single samples the largest micro-batch there is; else the largest visits may meet.
    fn largest_micro_batch(&self, size: impl Fn(usize) -> usize) -> usize {
        let BatchOptions { batch_size, row_tokens, shuffle: is_shuffled, .. } = self.options;
        let sizes = (0..self.samples.len()).map(size);
        if !is_shuffled && row_tokens.is_none() && self.shares.is_once() {
            let sizes: Vec<usize> = sizes.collect();
            return sizes.chunks(batch_size).map(|batch| batch.iter().sum()).max().unwrap_or(0);
        }
        let mut visits: Vec<(usize, usize)> = sizes.zip(self.shares.most_copies()).collect();
        visits.sort_unstable_by(|left, right| right.cmp(left));
        // A row may hold any number of samples, but no more tokens than it has room for.
        let (most_visits, most_size) = match row_tokens {
            Some(row_tokens) => (usize::MAX, batch_size.saturating_mul(row_tokens)),
            None => (batch_size, usize::MAX),
        };
        let (mut count, mut sum) = (0, 0_usize);
        for (size, copies) in visits {
            let copies = copies.min(most_visits - count);
            (count, sum) = (count + copies, sum.saturating_add(size.saturating_mul(copies)));
            if count == most_visits || sum >= most_size {
                break;
            }
        }
        sum.min(most_size)
    }
}

/// The visits of one epoch in the order in which they are learned.
#[derive(Clone, Debug)]
pub struct EpochOrder<'a> {
    plan: &'a BatchPlan<'a>,
    visits: Vec<Visit>,
    /// Visits up to the end of each packed row; none: a row is a visit.
    row_ends: Option<Vec<u32>>,
}

impl<'a> EpochOrder<'a> {
    /// The visits.
    pub fn visits(&self) -> &[Visit] {
        &self.visits
    }

    /// Rows: visits, or what they are packed into.
    pub fn row_count(&self) -> usize {
        self.row_ends.as_ref().map_or(self.visits.len(), Vec::len)
    }

    /// Tokens of all visits.
    pub fn token_count(&self) -> usize {
        self.visits.iter().map(|&visit| self.plan.token_count(visit)).sum()
    }

    /// Tokens with loss of all visits.
    pub fn labelled_count(&self) -> usize {
        self.visits.iter().map(|&visit| self.plan.labelled_count(visit)).sum()
    }

    /// SHA-256 over the samples' indices (u32, little-endian) in their order, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        for visit in &self.visits {
            hasher.update(visit.sample.to_le_bytes());
        }
        hex(&hasher.finalize())
    }

    /// The optimizer steps; `skip` is free, so a resumed run begins where it stopped.
    pub fn steps(&self) -> impl ExactSizeIterator<Item = Step<'_>> {
        let size = self.plan.rows_per_step();
        let range: Range<usize> = 0..self.row_count().div_ceil(size);
        range.map(move |number| {
            let start = number * size;
            let end = start.saturating_add(size).min(self.row_count());
            Step { order: self, number, rows: (start, end) }
        })
    }

    /// The visits of the rows from `start` to `end`.
    fn visits_of(&self, (start, end): (usize, usize)) -> &[Visit] {
        let place = |row: usize| match &self.row_ends {
            None => row,
            Some(ends) => row.checked_sub(1).map_or(0, |before| ends[before] as usize),
        };
        &self.visits[place(start)..place(end)]
    }
}

/// One optimizer step: its micro-batches, and what their gradients are divided by.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    order: &'a EpochOrder<'a>,
    /// Number within the epoch, from 0.
    pub number: usize,
    /// The first row, and the one after the last.
    rows: (usize, usize),
}

impl<'a> Step<'a> {
    /// The visits in their order.
    pub fn visits(&self) -> &'a [Visit] {
        self.order.visits_of(self.rows)
    }

    /// The visits of each micro-batch, for [`BatchPlan::fill`].
    pub fn micro_batches(&self) -> impl ExactSizeIterator<Item = &'a [Visit]> {
        let (order, (start, end)) = (self.order, self.rows);
        let size = order.plan.options.batch_size;
        (0..(end - start).div_ceil(size)).map(move |number| {
            let first = start + number * size;
            order.visits_of((first, first.saturating_add(size).min(end)))
        })
    }

    /// Tokens of the whole step.
    pub fn token_count(&self) -> usize {
        self.visits().iter().map(|&visit| self.order.plan.token_count(visit)).sum()
    }

    /// Tokens with loss of the whole step.
    pub fn labelled_count(&self) -> usize {
        self.visits().iter().map(|&visit| self.order.plan.labelled_count(visit)).sum()
    }

    /// What the summed loss and its gradients are multiplied by to give the step's mean over labelled tokens; 0 where
    /// there are none, never 0/0.
    pub fn token_weight(&self) -> f64 {
        match self.labelled_count() {
            0 => 0.0,
            count => 1.0 / count as f64,
        }
    }
}

#[cfg(test)]
mod tests;
