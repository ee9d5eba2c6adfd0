//! Which samples make which optimizer step: a pure function of the seed and the epoch, so that a run can go on
//! anywhere without replay.
//!
//! An epoch's order is the identity, or with shuffling the Fisher–Yates permutation (Durstenfeld 1964) whose draws come
//! from SplitMix64 (Steele, Lea & Flood 2014) started at `mix(mix(seed) + epoch)`, `mix` being SplitMix64's output
//! function. It depends on nothing else: not on the version of a random crate, not on threads.
//! The order is cut into steps of `batch_size × gradient_accumulation_steps` samples and these into micro-batches of
//! `batch_size`; the last of each may be short, and no sample is left out.

use std::ops::Range;

use sha2::{Digest, Sha256};

use super::samples::Sample;
use super::tokenizer::hex;
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
///
/// ```
/// use fastlora::batch::Batch;
/// use fastlora::data::Origin;
/// use fastlora::tokens::{BatchOptions, BatchPlan, Sample};
///
/// let origin = Origin { file: "train.json".into(), line: 1 };
/// let samples = vec![Sample { token_ids: vec![5, 6, 7], labels: vec![-100, 6, 7], hash: 0, origin }; 10];
/// let options = BatchOptions { batch_size: 2, gradient_accumulation_steps: 2, shuffle: true, seed: 42 };
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

    /// Number of samples.
    pub fn sample_count(&self) -> usize {
        self.samples.len()
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

    /// SHA-256 over the indices (u32, little-endian) in their order, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        for index in &self.order {
            hasher.update(index.to_le_bytes());
        }
        hex(&hasher.finalize())
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
    pub fn token_weight(&self) -> f64 {
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

/// The permutation of `(seed, epoch)` that the module describes.
pub(super) fn shuffle(order: &mut [u32], seed: u64, epoch: u64) {
    let mut state = mix(mix(seed).wrapping_add(epoch));
    for last in (1..order.len()).rev() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        // 0 ..= last without division (Lemire 2019); the bias of at most 2³²/2⁶⁴ is below notice.
        let drawn = (u128::from(mix(state)) * (last as u128 + 1)) >> 64;
        order.swap(last, drawn as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;
    use crate::error::ErrorKind;
    use crate::tokens::NO_LOSS;

    /// Sample `n` has `lengths[n]` tokens, all equal to `n`, of which the last `labelled[n]` carry loss.
    fn samples(lengths: &[usize], labelled: &[usize]) -> Vec<Sample> {
        let origin = Origin { file: "a.json".into(), line: 1 };
        lengths
            .iter()
            .zip(labelled)
            .enumerate()
            .map(|(number, (&length, &labelled))| Sample {
                token_ids: vec![number as u32; length],
                labels: (0..length)
                    .map(|position| if position + labelled < length { NO_LOSS } else { number as i32 })
                    .collect(),
                hash: 0,
                origin: origin.clone(),
            })
            .collect()
    }

    fn options(batch_size: usize, gradient_accumulation_steps: usize, shuffle: bool) -> BatchOptions {
        BatchOptions { batch_size, gradient_accumulation_steps, shuffle, seed: 42 }
    }

    #[test]
    fn every_sample_is_learned_once_an_epoch() {
        let samples = samples(&[3; 23], &[1; 23]);
        for (batch_size, accumulation) in
            [(1, 1), (4, 1), (4, 2), (5, 3), (100, 1), (1, 100), (usize::MAX, usize::MAX)]
        {
            let plan = BatchPlan::new(&samples, options(batch_size, accumulation, true)).unwrap();
            let order = plan.epoch(3);
            let mut seen: Vec<u32> = Vec::new();
            assert_eq!(order.steps().len(), plan.steps_per_epoch());
            for (number, step) in order.steps().enumerate() {
                assert_eq!(step.number, number);
                assert!(step.micro_batches().len() <= accumulation);
                for micro_batch in step.micro_batches() {
                    assert!((1..=batch_size).contains(&micro_batch.len()));
                    seen.extend(micro_batch);
                }
            }
            assert_eq!(seen, order.sample_indices());
            seen.sort_unstable();
            assert_eq!(seen, (0..23).collect::<Vec<u32>>(), "{batch_size} × {accumulation}");
        }
    }

    #[test]
    fn a_step_knows_its_tokens_beforehand() {
        let samples = samples(&[5, 4, 3, 2, 7], &[2, 1, 3, 1, 4]);
        let plan = BatchPlan::new(&samples, options(2, 2, false)).unwrap();
        let order = plan.epoch(0);
        let mut batch = Batch::default();
        for step in order.steps() {
            let (mut tokens, mut labelled) = (0, 0);
            for micro_batch in step.micro_batches() {
                plan.fill(micro_batch, &mut batch);
                tokens += batch.token_count();
                labelled += batch.labelled_count();
                assert!(batch.token_count() <= plan.max_tokens());
                assert!(batch.labelled_count() <= plan.max_labelled_rows());
                assert_eq!(batch.sample_ids.len(), micro_batch.len());
                assert!(batch.targets.iter().all(|target| micro_batch.contains(target)));
            }
            assert_eq!((tokens, labelled), (step.token_count(), step.labelled_count()));
            assert_eq!(step.token_weight(), 1.0 / labelled as f64);
        }
        // Sample 2 has a label on its first token, which no row learns.
        assert_eq!(order.steps().map(|step| step.labelled_count()).collect::<Vec<_>>(), [2 + 1 + 2 + 1, 4]);
    }

    #[test]
    fn the_largest_batch_bounds_every_epoch() {
        let lengths: Vec<usize> = (0..40).map(|number| 2 + number * 7 % 31).collect();
        let labelled: Vec<usize> = lengths.iter().map(|length| length / 3).collect();
        let samples = samples(&lengths, &labelled);
        for shuffle in [false, true] {
            let plan = BatchPlan::new(&samples, options(3, 2, shuffle)).unwrap();
            let mut batch = Batch::default();
            let (mut tokens, mut rows) = (0, 0);
            for epoch in 0..50 {
                for step in plan.epoch(epoch).steps() {
                    for micro_batch in step.micro_batches() {
                        plan.fill(micro_batch, &mut batch);
                        tokens = tokens.max(batch.token_count());
                        rows = rows.max(batch.labelled_count());
                    }
                }
            }
            let planned = (plan.max_tokens(), plan.max_labelled_rows());
            assert!(
                (tokens, rows) <= planned && (shuffle || (tokens, rows) == planned),
                "{tokens} {rows} {planned:?}"
            );
            assert_eq!(plan.longest_sample(), *lengths.iter().max().unwrap());
        }
    }

    #[test]
    fn the_order_depends_on_seed_and_epoch_alone() {
        let samples = samples(&[2; 100], &[1; 100]);
        let order = |seed, epoch| {
            let options = BatchOptions { seed, ..options(4, 1, true) };
            BatchPlan::new(&samples, options).unwrap().epoch(epoch).sample_indices().to_vec()
        };
        assert_eq!(order(1, 0), order(1, 0));
        let others =
            [order(1, 1), order(1, 2), order(2, 0), order(2, 1), order(0, 0), order(u64::MAX, u64::MAX)];
        for (number, other) in others.iter().enumerate() {
            assert_ne!(order(1, 0), *other, "{number}");
        }
        let fixed = BatchPlan::new(&samples, options(4, 1, false)).unwrap();
        assert_eq!(fixed.epoch(9).sample_indices(), (0..100).collect::<Vec<u32>>());
        assert_eq!((fixed.position(0), fixed.position(24), fixed.position(25)), ((0, 0), (0, 24), (1, 0)));
        // A resumed run sees the same samples at the same step.
        let plan = BatchPlan::new(&samples, options(4, 2, true)).unwrap();
        let (epoch, number) = plan.position(41);
        let resumed = plan.epoch(epoch);
        let step = resumed.steps().nth(number).unwrap();
        assert_eq!((epoch, number, step.number), (3, 2, 2));
        assert_eq!(step.sample_indices, &plan.epoch(3).sample_indices()[16..24]);
    }

    /// Durstenfeld's shuffle with SplitMix64, from the reference implementation (Vigna 2015) in Python.
    #[test]
    fn the_order_is_the_documented_one() {
        let samples = samples(&[2; 10], &[1; 10]);
        let plan = BatchPlan::new(&samples, options(1, 1, true)).unwrap();
        assert_eq!(plan.epoch(0).sample_indices(), [0, 3, 5, 7, 9, 8, 2, 1, 4, 6]);
        // From Python's hashlib.
        let fingerprint = "6d7b87fc166e415e2762fa528c10f82b4132f0facce4f020a23ce5441089791c";
        assert_eq!(plan.epoch(0).fingerprint(), fingerprint);
        assert_eq!(plan.epoch(1).sample_indices(), [6, 5, 1, 4, 7, 3, 2, 9, 8, 0]);
    }

    /// Pearson's χ² over where sample 0 lands in 10 000 epochs: 9 degrees of freedom, 99.99 % below 33.72.
    #[test]
    fn places_are_equally_likely() {
        let samples = samples(&[2; 10], &[1; 10]);
        let plan = BatchPlan::new(&samples, options(1, 1, true)).unwrap();
        let mut counts = [0_u32; 10];
        for epoch in 0..10_000 {
            let order = plan.epoch(epoch);
            counts[order.sample_indices().iter().position(|&index| index == 0).unwrap()] += 1;
        }
        let chi_squared: f64 = counts.iter().map(|&count| (f64::from(count) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi_squared < 33.72, "{chi_squared} {counts:?}");
    }

    #[test]
    fn fault_39_a_batch_without_targets_is_scaled_by_zero() {
        let samples = samples(&[3, 3], &[0, 1]);
        let plan = BatchPlan::new(&samples, options(1, 1, false)).unwrap();
        let scales: Vec<f64> = plan.epoch(0).steps().map(|step| step.token_weight()).collect();
        assert_eq!(scales, [0.0, 1.0]);
        let plan = BatchPlan::new(&samples, options(1, 2, false)).unwrap();
        assert_eq!(plan.epoch(0).steps().next().unwrap().token_weight(), 1.0);
    }

    #[test]
    fn fault_44_empty_batches_are_refused() {
        let samples = samples(&[3], &[1]);
        for options in [options(0, 1, true), options(1, 0, true)] {
            assert_eq!(BatchPlan::new(&samples, options).unwrap_err().kind(), ErrorKind::Config);
        }
        assert_eq!(BatchPlan::new(&[], options(1, 1, true)).unwrap_err().kind(), ErrorKind::Data);
    }
}
