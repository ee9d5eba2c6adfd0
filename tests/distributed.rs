//! Several processes train as one does. Here they are threads, each with a model of its own.

mod support;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use fastlora::backend::Backend;
use fastlora::backend::cpu::CpuBackend;
use fastlora::checkpoint::adapter::read_adapter;
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::{
    ActivationMemory, DataSource, HashTemplate, LossOn, LrScheduler, OnBadRecord, OnNan, Overlong,
};
use fastlora::data::{LoadOptions, load};
use fastlora::distributed::{Group, Host, join};
use fastlora::error::{Error, ErrorKind, Result};
use fastlora::evaluation::Evaluation;
use fastlora::model::Transformer;
use fastlora::optim::{AdamWSettings, Schedule};
use fastlora::tensor::NamedTensor;
use fastlora::tokens::{BatchOptions, SampleOptions, SampleSet, Tokenizer, tokenise};
use fastlora::training::{
    Observer, Split, StepReport, TrainingSettings, TrainingSummary, ValidationReport, train, train_in_group,
};
use support::{fixture, largest_difference};

const PATIENCE: Duration = Duration::from_secs(300);
const WORDS: [&str; 7] = ["one", "two", "three", "four", "a", "sun", "is it"];

/// `count` records of text with three hashes, each of another length.
fn samples(first: usize, count: usize, options: &SampleOptions) -> SampleSet {
    let text = |seed: usize, length: usize| {
        let word = |place: usize| WORDS[(seed * 5 + place * place) % WORDS.len()];
        (0..length).map(word).collect::<Vec<_>>().join(" ")
    };
    let record = |number: usize| {
        let (instruction, output) = (text(number, 1 + number % 4), text(number + 3, 1 + number % 6));
        let hash = ["a", "b", "c"][number % 3];
        serde_json::json!({ "instruction": instruction, "output": output, "hash": hash }).to_string()
    };
    let file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
    std::fs::write(file.path(), (first..first + count).map(record).collect::<Vec<_>>().join("\n")).unwrap();
    let records = load(&[DataSource::new(file.path())], &LoadOptions::default()).unwrap();
    let tokenizer = Tokenizer::from_folder(fixture("tiny_tokenizer")).unwrap();
    tokenise(&records, Some(&tokenizer), options).unwrap()
}

/// What all processes read.
struct Work {
    base: BaseModel,
    training: SampleSet,
    validation: SampleSet,
    settings: TrainingSettings,
}

/// Steps of three micro-batches of two samples; of each epoch's four steps the last has one. Five validation samples.
fn work() -> Work {
    let base = BaseModel::open(fixture("tiny_qwen2")).unwrap();
    let options = SampleOptions {
        max_length: 128,
        overlong: Overlong::Error,
        loss_on: LossOn::Completion,
        on_bad_record: OnBadRecord::Error,
        embedding_rows: base.config().vocabulary,
        hash_template: HashTemplate::default(),
        also_without_hash: true,
    };
    let settings = TrainingSettings {
        // AdamW divides a gradient by its own size, which makes whole steps of the rounding of a small one; with ε = 1 a
        // step is as large as the gradient, and so is its error.
        optimizer: AdamWSettings {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1.0,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
        },
        b_rate_ratio: 2.0,
        schedule: Schedule {
            scheduler: LrScheduler::Cosine,
            peak_learning_rate: 0.01,
            warmup_steps: 2,
            total_steps: 8,
        },
        dropout_probability: 0.1,
        embedding_noise_alpha: 5.0,
        seed: 7,
        activation_memory: ActivationMemory::Auto,
        val_every: Some(3),
        early_stopping_patience: None,
        on_nan: OnNan::Stop,
    };
    let (training, validation) = (samples(0, 20, &options), samples(50, 5, &options));
    Work { base, training, validation, settings }
}

/// Everything that was reported; `stops_at` and `fails_at` are steps after which it wants that.
#[derive(Default)]
struct Seen {
    losses: Vec<f64>,
    norms: Vec<f64>,
    validations: Vec<(u64, Evaluation, bool)>,
    stops_at: Option<usize>,
    fails_at: Option<usize>,
    was_told: bool,
}

impl<B: Backend> Observer<B> for Seen {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.losses.push(report.loss);
        self.norms.push(report.grad_norm);
        match self.fails_at == Some(self.losses.len()) {
            true => Err(Error::device("the disk burns")),
            false => Ok(()),
        }
    }

    fn validation(&mut self, report: &ValidationReport, _: &Transformer<B>) -> Result<()> {
        self.validations.push((report.step, report.evaluation.clone(), report.is_best));
        Ok(())
    }

    fn between_steps(&mut self, _: &fastlora::training::Pause<'_, B>) -> Result<fastlora::training::Flow> {
        use fastlora::training::Flow;
        Ok(if self.stops_at == Some(self.losses.len()) { Flow::Stop } else { Flow::Continue })
    }

    fn stop(&mut self) {
        self.was_told = true;
    }
}

struct Trained {
    seen: Seen,
    adapter: Vec<NamedTensor>,
    summary: TrainingSummary,
}

/// Trains in this process, of `group` if there is one. Another rank than 0 begins with nothing of its own.
fn run(work: &Work, group: Option<&mut Group>, mut seen: Seen) -> Result<Trained> {
    let adapter = read_adapter(&fixture("tiny_qwen2/adapter_init_brand"))?;
    let backend = Arc::new(CpuBackend::new(Some(1))?);
    let mut model = Transformer::load_with_adapter(backend, &work.base, &adapter)?;
    let batches = BatchOptions {
        batch_size: 2,
        gradient_accumulation_steps: 3,
        shuffle: true,
        seed: 7,
        hash_dropout: 0.5,
        ..BatchOptions::default()
    };
    let training = Split::new(&work.training, batches)?;
    let validation = Split::new(&work.validation, BatchOptions { batch_size: 2, ..BatchOptions::default() })?;
    let (validation, settings) = (Some(&validation), &work.settings);
    let summary = match group {
        None => train(&mut model, &training, validation, settings, None, &mut seen)?,
        Some(group) => {
            if group.rank() > 0 {
                let zeros = vec![0.0; model.layout().parameter_count()];
                model.set_parameters(&zeros)?;
            }
            train_in_group(group, &mut model, &training, validation, settings, None, &mut seen)?
        }
    };
    Ok(Trained { adapter: model.adapters()?, seen, summary })
}

/// The same on each of `world_size` processes.
fn run_on(world_size: usize, work: &Work, seen: impl Fn(usize) -> Seen + Sync) -> Vec<Result<Trained>> {
    let host = Host::bind((Ipv4Addr::LOCALHOST, 0), world_size).unwrap();
    let address = host.address().to_string();
    std::thread::scope(|scope| {
        let (seen, address) = (&seen, &address);
        let others: Vec<_> = (1..world_size)
            .map(|rank| {
                scope.spawn(move || {
                    let mut group = join(address, rank, world_size, PATIENCE, || Ok(())).unwrap();
                    run(work, Some(&mut group), seen(rank))
                })
            })
            .collect();
        let mut group = host.accept(PATIENCE, || Ok(())).unwrap();
        let first = run(work, Some(&mut group), seen(0));
        [first].into_iter().chain(others.into_iter().map(|other| other.join().unwrap())).collect()
    })
}

fn bits(trained: &Trained) -> Vec<u32> {
    let values = trained.adapter.iter().flat_map(|tensor| &tensor.values);
    values.map(|value| value.to_bits()).collect()
}

/// The documented bound on what the order of f32 sums does in a few steps (README; `train_cli/invariance.rs`).
const TOLERANCE: f64 = 1e-6;

#[test]
fn two_and_three_processes_train_as_one() {
    let work = work();
    let alone = run(&work, None, Seen::default()).unwrap();
    assert_eq!((alone.seen.losses.len(), alone.seen.validations.len()), (8, 3));
    let close = |found: f64, expected: f64| (found / expected - 1.0).abs() <= TOLERANCE;
    for world_size in [1, 2, 3, 4] {
        let ranks: Vec<Trained> =
            run_on(world_size, &work, |_| Seen::default()).into_iter().map(Result::unwrap).collect();
        for (rank, Trained { seen, adapter, summary }) in ranks.iter().enumerate() {
            let what = format!("rank {rank} of {world_size}");
            assert_eq!(summary.steps, 8);
            let numbers = |seen: &Seen| [seen.losses.clone(), seen.norms.clone()].concat();
            for (found, expected) in numbers(seen).into_iter().zip(numbers(&alone.seen)) {
                assert!(close(found, expected), "{what}: {found} against {expected}");
            }
            for ((step, found, is_best), (other, expected, other_best)) in
                seen.validations.iter().zip(&alone.seen.validations)
            {
                assert_eq!((step, is_best), (other, other_best));
                assert_eq!(found.by_hash().len(), 3);
                for (hash, expected) in expected.by_hash() {
                    let found = found.by_hash()[hash];
                    let counts = |figures: &fastlora::evaluation::Figures| {
                        (figures.samples, figures.labelled_tokens, figures.correct_tokens)
                    };
                    assert_eq!(counts(&found), counts(expected), "{what}, {hash}");
                    assert!(close(found.loss_sum, expected.loss_sum), "{what}: {found:?}, {expected:?}");
                }
            }
            for (found, expected) in adapter.iter().zip(&alone.adapter) {
                let wide =
                    |values: &[f32]| -> Vec<f64> { values.iter().map(|&value| value.into()).collect() };
                let largest =
                    wide(&expected.values).iter().fold(0.0_f64, |most, value| most.max(value.abs()));
                let (difference, place) = largest_difference(&wide(&found.values), &wide(&expected.values));
                assert!(difference <= TOLERANCE * largest, "{what}: {} [{place}]", found.name);
            }
            // All of the processes have the same.
            assert_eq!((&seen.losses, &seen.norms), (&ranks[0].seen.losses, &ranks[0].seen.norms));
            assert_eq!(seen.validations, ranks[0].seen.validations);
            assert!(bits(&ranks[rank]) == bits(&ranks[0]), "{what}");
        }
        if world_size == 1 {
            assert!(bits(&ranks[0]) == bits(&alone));
        } else if world_size == 3 {
            // And always the same.
            let again = run_on(3, &work, |_| Seen::default()).remove(0).unwrap();
            assert!(again.seen.losses == ranks[0].seen.losses && bits(&again) == bits(&ranks[0]));
        }
    }
    // Training did something, and so did the samples without hash: the tolerance is far below it.
    let change = (alone.seen.losses[7] / alone.seen.losses[3] - 1.0).abs();
    assert!(change > 1e-3, "{change}");
}

#[test]
fn all_stop_after_the_same_step() {
    let work = work();
    let seen = |rank| Seen { stops_at: (rank == 1).then_some(5), ..Seen::default() };
    for trained in run_on(3, &work, seen) {
        let Trained { seen, summary, .. } = trained.unwrap();
        assert_eq!((summary.steps, seen.losses.len(), seen.was_told), (5, 5, true));
    }
}

#[test]
fn an_early_end_is_the_same_everywhere() {
    let mut work = work();
    (work.settings.early_stopping_patience, work.settings.val_every) = (Some(1), Some(1));
    // So that the second validation is not better.
    work.settings.schedule.peak_learning_rate = 1e-30;
    let alone = run(&work, None, Seen::default()).unwrap().summary.steps;
    assert!(alone < 8);
    for trained in run_on(2, &work, |_| Seen::default()) {
        assert_eq!(trained.unwrap().summary.steps, alone);
    }
}

#[test]
fn fault_65_an_error_in_one_process_ends_all_with_it() {
    let work = work();
    let results = run_on(3, &work, |rank| Seen { fails_at: (rank == 2).then_some(2), ..Seen::default() });
    for (rank, result) in results.into_iter().enumerate() {
        let error = result.err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Device);
        let text = if rank == 2 { "the disk burns" } else { "rank 2 has failed: the disk burns" };
        assert!(error.to_string().starts_with(text), "{error}");
    }
}

#[test]
fn a_loss_that_is_not_finite_is_told_alike_by_all() {
    let mut work = work();
    work.settings.schedule.peak_learning_rate = 1e30;
    let errors: Vec<Error> =
        run_on(2, &work, |_| Seen::default()).into_iter().map(|result| result.err().unwrap()).collect();
    assert_eq!(errors[0].kind(), ErrorKind::Numerical);
    assert!(errors[0].to_string().contains("is not finite at token"), "{}", errors[0]);
    assert_eq!(errors[0].to_string(), errors[1].to_string());
    // Left out instead, until there are too many.
    work.settings.on_nan = OnNan::Skip;
    work.settings.schedule.total_steps = 30;
    for result in run_on(2, &work, |_| Seen::default()) {
        assert_eq!(result.err().unwrap().kind(), ErrorKind::Numerical);
    }
}
