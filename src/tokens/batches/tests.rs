use super::*;
use crate::data::Origin;
use crate::error::ErrorKind;
use crate::tokens::{NO_LOSS, Sample, Unconditioned};

/// A set of up to three hashes.
fn set(samples: &[Sample]) -> SampleSet {
    SampleSet::new(samples.iter().cloned(), vec![String::new(); 3])
}

/// Sample `n` has `lengths[n]` tokens, all equal to `n`, of which the last `labelled[n]` carry loss.
fn samples(lengths: &[usize], labelled: &[usize]) -> Vec<Sample> {
    let origin = Origin { file: "a.json".into(), line: 1 };
    lengths
        .iter()
        .zip(labelled)
        .enumerate()
        .map(|(number, (&length, &labelled))| {
            let label = |position| if position + labelled < length { NO_LOSS } else { number as i32 };
            Sample::new(vec![number as u32; length], (0..length).map(label).collect(), origin.clone())
        })
        .collect()
}

fn options(batch_size: usize, gradient_accumulation_steps: usize, shuffle: bool) -> BatchOptions {
    BatchOptions { batch_size, gradient_accumulation_steps, shuffle, seed: 42, ..BatchOptions::default() }
}

/// The samples in the order of their visits.
fn indices(visits: &[Visit]) -> Vec<u32> {
    visits.iter().map(|visit| visit.sample).collect()
}

#[test]
fn every_sample_is_learned_once_an_epoch() {
    let samples = set(&samples(&[3; 23], &[1; 23]));
    for (batch_size, accumulation) in
        [(1, 1), (4, 1), (4, 2), (5, 3), (100, 1), (1, 100), (usize::MAX, usize::MAX)]
    {
        let plan = BatchPlan::new(&samples, options(batch_size, accumulation, true)).unwrap();
        let order = plan.epoch(3);
        let mut seen: Vec<u32> = Vec::new();
        assert_eq!(order.steps().len(), plan.steps_in(3));
        for (number, step) in order.steps().enumerate() {
            assert_eq!(step.number, number);
            assert!(step.micro_batches().len() <= accumulation);
            for micro_batch in step.micro_batches() {
                assert!((1..=batch_size).contains(&micro_batch.len()));
                seen.extend(indices(micro_batch));
            }
        }
        assert_eq!(seen, indices(order.visits()));
        seen.sort_unstable();
        assert_eq!(seen, (0..23).collect::<Vec<u32>>(), "{batch_size} × {accumulation}");
    }
}

#[test]
fn a_step_knows_its_tokens_beforehand() {
    let samples = set(&samples(&[5, 4, 3, 2, 7], &[2, 1, 3, 1, 4]));
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
            assert!(batch.targets.iter().all(|target| indices(micro_batch).contains(target)));
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
    let samples = set(&samples(&lengths, &labelled));
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
    let samples = set(&samples(&[2; 100], &[1; 100]));
    let order = |seed, epoch| {
        let options = BatchOptions { seed, ..options(4, 1, true) };
        indices(BatchPlan::new(&samples, options).unwrap().epoch(epoch).visits())
    };
    assert_eq!(order(1, 0), order(1, 0));
    let others = [order(1, 1), order(1, 2), order(2, 0), order(2, 1), order(0, 0), order(u64::MAX, u64::MAX)];
    for (number, other) in others.iter().enumerate() {
        assert_ne!(order(1, 0), *other, "{number}");
    }
    let fixed = BatchPlan::new(&samples, options(4, 1, false)).unwrap();
    assert_eq!(indices(fixed.epoch(9).visits()), (0..100).collect::<Vec<u32>>());
    assert_eq!((fixed.position(0), fixed.position(24), fixed.position(25)), ((0, 0), (0, 24), (1, 0)));
    // A resumed run sees the same samples at the same step.
    let plan = BatchPlan::new(&samples, options(4, 2, true)).unwrap();
    let (epoch, number) = plan.position(41);
    let resumed = plan.epoch(epoch);
    let step = resumed.steps().nth(number).unwrap();
    assert_eq!((epoch, number, step.number), (3, 2, 2));
    assert_eq!(step.visits(), &plan.epoch(3).visits()[16..24]);
}

/// Durstenfeld's shuffle with SplitMix64, from the reference implementation (Vigna 2015) in Python.
#[test]
fn the_order_is_the_documented_one() {
    let samples = set(&samples(&[2; 10], &[1; 10]));
    let plan = BatchPlan::new(&samples, options(1, 1, true)).unwrap();
    assert_eq!(indices(plan.epoch(0).visits()), [0, 3, 5, 7, 9, 8, 2, 1, 4, 6]);
    // From Python's hashlib.
    let fingerprint = "6d7b87fc166e415e2762fa528c10f82b4132f0facce4f020a23ce5441089791c";
    assert_eq!(plan.epoch(0).fingerprint(), fingerprint);
    assert_eq!(indices(plan.epoch(1).visits()), [6, 5, 1, 4, 7, 3, 2, 9, 8, 0]);
}

/// Pearson's χ² over where sample 0 lands in 10 000 epochs: 9 degrees of freedom, 99.99 % below 33.72.
#[test]
fn places_are_equally_likely() {
    let samples = set(&samples(&[2; 10], &[1; 10]));
    let plan = BatchPlan::new(&samples, options(1, 1, true)).unwrap();
    let mut counts = [0_u32; 10];
    for epoch in 0..10_000 {
        let order = plan.epoch(epoch);
        counts[order.visits().iter().position(|visit| visit.sample == 0).unwrap()] += 1;
    }
    let chi_squared: f64 = counts.iter().map(|&count| (f64::from(count) - 1000.0).powi(2) / 1000.0).sum();
    assert!(chi_squared < 33.72, "{chi_squared} {counts:?}");
}

#[test]
fn fault_39_a_batch_without_targets_is_scaled_by_zero() {
    let samples = set(&samples(&[3, 3], &[0, 1]));
    let plan = BatchPlan::new(&samples, options(1, 1, false)).unwrap();
    let scales: Vec<f64> = plan.epoch(0).steps().map(|step| step.token_weight()).collect();
    assert_eq!(scales, [0.0, 1.0]);
    let plan = BatchPlan::new(&samples, options(1, 2, false)).unwrap();
    assert_eq!(plan.epoch(0).steps().next().unwrap().token_weight(), 1.0);
}

#[test]
fn fault_44_empty_batches_are_refused() {
    let samples = set(&samples(&[3], &[1]));
    for options in [options(0, 1, true), options(1, 0, true)] {
        assert_eq!(BatchPlan::new(&samples, options).unwrap_err().kind(), ErrorKind::Config);
    }
    assert_eq!(
        BatchPlan::new(&SampleSet::default(), options(1, 1, true)).unwrap_err().kind(),
        ErrorKind::Data
    );
}

/// Samples of many lengths, of which some can be without their hash and some weigh more than others.
fn mixed() -> Vec<Sample> {
    let lengths: Vec<usize> = (0..60).map(|number| 3 + number * 7 % 31).collect();
    let labelled: Vec<usize> = lengths.iter().map(|length| length / 3).collect();
    let mut samples = samples(&lengths, &labelled);
    for (number, sample) in samples.iter_mut().enumerate() {
        sample.hash = number % 7 / 3;
        sample.weight = [1.0, 2.5, 0.7][number % 3];
        if number % 4 > 0 {
            // Without its hash a sample loses its first two tokens, which are masked.
            let (token_ids, labels) = (sample.token_ids[2..].to_vec(), sample.labels[2..].to_vec());
            sample.without_hash = Some(Box::new(Unconditioned { token_ids, labels }));
        }
    }
    samples
}

#[test]
fn every_visit_is_learned_once_whatever_groups_them() {
    let samples = set(&mixed());
    let mut batch = Batch::default();
    for number in 0..48 {
        let is_on = |bit: u32| number & (1 << bit) != 0;
        let options = BatchOptions {
            hash_dropout: if is_on(0) { 0.4 } else { 0.0 },
            balance_by_hash: is_on(1),
            row_tokens: (number >= 32).then_some(40),
            bucket_by_length: is_on(2) && number < 32,
            ..options(if is_on(3) { 3 } else { 2 }, 2, number < 16 || is_on(4))
        };
        let plan = BatchPlan::new(&samples, options).unwrap();
        let mut global_step = 0;
        for epoch in 0..6 {
            let order = plan.epoch(epoch);
            assert_eq!(order.steps().len(), plan.steps_in(epoch), "{options:?}");
            let mut seen: Vec<Visit> = Vec::new();
            for step in order.steps() {
                assert_eq!(plan.position(global_step), (epoch, step.number), "{options:?}");
                global_step += 1;
                let (mut tokens, mut labelled) = (0, 0);
                for micro_batch in step.micro_batches() {
                    seen.extend(micro_batch);
                    plan.fill(micro_batch, &mut batch);
                    tokens += batch.token_count();
                    labelled += batch.labelled_count();
                    assert!(batch.token_count() <= plan.max_tokens(), "{options:?}");
                    assert!(batch.labelled_count() <= plan.max_labelled_rows(), "{options:?}");
                    assert!(batch.token_count() <= options.batch_size * options.row_tokens.unwrap_or(1000));
                }
                assert_eq!((tokens, labelled), (step.token_count(), step.labelled_count()));
            }
            assert_eq!(seen, order.visits());
            let of_steps =
                |count: fn(&Step<'_>) -> usize| order.steps().map(|step| count(&step)).sum::<usize>();
            assert_eq!(order.token_count(), of_steps(|step| step.token_count()));
            assert_eq!(order.labelled_count(), of_steps(|step| step.labelled_count()));
            // The visits are those of the plainest plan: grouping changes their order alone.
            let plain = BatchOptions { row_tokens: None, bucket_by_length: false, shuffle: false, ..options };
            let plain = BatchPlan::new(&samples, plain).unwrap();
            let sorted = |visits: &[Visit]| {
                let mut keys: Vec<_> =
                    visits.iter().map(|visit| (visit.sample, visit.copy, visit.without_hash)).collect();
                keys.sort_unstable();
                keys
            };
            assert_eq!(sorted(order.visits()), sorted(plain.epoch(epoch).visits()), "{options:?}");
            assert_eq!(order.visits().iter().any(|visit| visit.without_hash), options.hash_dropout > 0.0);
        }
        // Counted beforehand it is the same.
        let counted = BatchPlan::new(&samples, options).unwrap();
        assert_eq!(counted.steps_of(6).unwrap(), global_step);
        assert_eq!((counted.position(global_step), counted.steps_of(0).unwrap()), ((6, 0), 0));
    }
}

#[test]
fn rows_hold_whole_samples_and_copies_have_masks_of_their_own() {
    let samples = set(&mixed());
    let packed = BatchOptions { row_tokens: Some(40), ..options(1, 1, true) };
    let plan = BatchPlan::new(&samples, packed).unwrap();
    let (mut batch, mut ids) = (Batch::default(), Vec::new());
    for step in plan.epoch(2).steps() {
        plan.fill(step.visits(), &mut batch);
        for (place, visit) in step.visits().iter().enumerate() {
            let row = batch.sample_starts[place]..batch.sample_starts[place + 1];
            assert_eq!(batch.token_ids[row], *samples.get(visit.sample as usize).token_ids);
            assert_eq!(plan.sample_of(batch.sample_ids[place]), visit.sample as usize);
        }
        ids.extend(batch.sample_ids.iter().copied());
    }
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "a sample's second visit has another id");
    // 40 rows and more would be needed at one sample a row.
    assert!(plan.epoch(2).row_count() * 2 < count, "{} rows of {count}", plan.epoch(2).row_count());

    let error = BatchPlan::new(&samples, BatchOptions { row_tokens: Some(20), ..packed }).unwrap_err();
    assert!(error.to_string().contains("33 tokens, a row has room for 20"), "{error}");
}

#[test]
fn fault_44_weights_without_a_whole_epoch_and_epochs_without_number_are_refused() {
    let weighing = |weight| {
        let samples = samples(&[3; 3], &[1; 3]);
        set(&samples.into_iter().map(|sample| Sample { weight, ..sample }).collect::<Vec<_>>())
    };
    let (light, half, heavy, double) = (weighing(0.3), weighing(0.5), weighing(2e9), weighing(2.0));
    let error = BatchPlan::new(&light, options(1, 1, true)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    let plan = BatchPlan::new(&half, options(1, 1, true)).unwrap();
    let error = plan.steps_of(u64::MAX).unwrap_err();
    assert!(error.to_string().contains("give max_steps"), "{error}");
    let error = BatchPlan::new(&heavy, options(1, 1, true)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Data, "{error}");
    let plan = BatchPlan::new(&double, options(1, 1, true)).unwrap();
    assert_eq!(plan.steps_of(u64::MAX).unwrap(), u64::MAX);
}
