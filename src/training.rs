//! The training loop: steps of gradient accumulation, one AdamW update each, validation in between.
//!
//! A step's loss is the mean over the labelled tokens of all its micro-batches, so that it does not depend on how
//! they are cut. The loss and the gradients' norm are checked before anything is updated.

mod metrics;

use std::time::Instant;

use tracing::debug;

pub use metrics::MetricsFile;

use crate::backend::{Backend, Dropout};
use crate::batch::Batch;
use crate::checkpoint::mapped;
use crate::error::{Error, Result};
use crate::evaluation::Evaluation;
use crate::model::{Limits, Purpose, Transformer};
use crate::optim::{AdamW, AdamWSettings, Schedule};
use crate::tokens::{BatchOptions, BatchPlan, SampleSet, Step};

/// What a run needs to know besides its data.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingSettings {
    /// AdamW's constants.
    pub optimizer: AdamWSettings,
    /// The rate of every step, and how many there are.
    pub schedule: Schedule,
    /// Chance of a zero in an adapter's input.
    pub dropout_probability: f32,
    /// Seed of the dropout masks.
    pub seed: u64,
    /// Steps between validations; none: one at the end of each epoch.
    pub val_every: Option<u64>,
}

/// Figures of one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, from 1.
    pub step: u64,
    /// The pass over the data that the step belongs to, from 1.
    pub epoch: u64,
    /// Mean loss of the labelled tokens, in nats, before the update.
    pub loss: f64,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// The rate of the update.
    pub learning_rate: f64,
    /// Tokens that carried loss.
    pub labelled_tokens: usize,
    /// Tokens computed.
    pub tokens: usize,
    /// Wall time of the step.
    pub seconds: f64,
}

/// Figures of one validation.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidationReport {
    /// Steps done.
    pub step: u64,
    /// Loss, perplexity and accuracy, overall and by hash.
    pub evaluation: Evaluation,
    /// Whether the loss is the lowest so far.
    pub is_best: bool,
    /// Wall time of the validation.
    pub seconds: f64,
}

/// Samples and how they are grouped into batches.
pub struct Split<'a> {
    samples: &'a SampleSet,
    plan: BatchPlan<'a>,
}

impl<'a> Split<'a> {
    /// Groups `samples`.
    ///
    /// # Errors
    /// As [`BatchPlan::new`].
    pub fn new(samples: &'a SampleSet, options: BatchOptions) -> Result<Self> {
        Ok(Self { samples, plan: BatchPlan::new(&samples.samples, options)? })
    }

    /// Which samples make which step.
    pub fn plan(&self) -> &BatchPlan<'a> {
        &self.plan
    }

    fn hash_of(&self, sample: usize) -> &'a str {
        &self.samples.hash_names[self.samples.samples[sample].hash]
    }

    /// The places of the first few of these samples' records.
    fn origins(&self, sample_indices: &[u32]) -> String {
        const NAMED: usize = 8;
        let origin = |index: &u32| self.samples.samples[*index as usize].origin.to_string();
        let mut origins: Vec<String> = sample_indices.iter().take(NAMED).map(origin).collect();
        if sample_indices.len() > NAMED {
            origins.push(format!("and {} more", sample_indices.len() - NAMED));
        }
        origins.join(", ")
    }

    /// The largest micro-batch of any epoch.
    fn limits(&self) -> Limits {
        Limits {
            tokens: self.plan.max_tokens(),
            labelled_rows: self.plan.max_labelled_rows(),
            positions: self.plan.longest_sample(),
        }
    }
}

/// What wants to know how a run goes: progress, metrics, the keeper of the best adapter.
pub trait Observer<B: Backend> {
    /// After every optimizer step.
    fn step(&mut self, report: &StepReport) -> Result<()>;
    /// After every validation; `model` has the adapters that were measured.
    fn validation(&mut self, report: &ValidationReport, model: &Transformer<B>) -> Result<()>;
}

/// Nobody listens: the summary is all there is.
impl<B: Backend> Observer<B> for () {
    fn step(&mut self, _: &StepReport) -> Result<()> {
        Ok(())
    }

    fn validation(&mut self, _: &ValidationReport, _: &Transformer<B>) -> Result<()> {
        Ok(())
    }
}

/// How a run went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TrainingSummary {
    /// Optimizer steps done.
    pub steps: u64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// The lowest validation loss and its step.
    pub best_validation: Option<(u64, f64)>,
    /// The last validation's loss.
    pub last_validation_loss: Option<f64>,
    /// Tokens computed in training.
    pub tokens: u64,
    /// Wall time of the training steps.
    pub training_seconds: f64,
}

/// Trains the adapters of `model` for `settings.schedule.total_steps` steps over `training`.
///
/// ```
/// use std::sync::Arc;
///
/// use fastlora::backend::cpu::CpuBackend;
/// use fastlora::checkpoint::base::BaseModel;
/// use fastlora::config::{DataSource, LossOn, LrScheduler, OnBadRecord, Overlong, TargetModules};
/// use fastlora::data::{LoadOptions, load};
/// use fastlora::model::{LoraConfig, Transformer};
/// use fastlora::optim::{AdamWSettings, Schedule};
/// use fastlora::tokens::{BatchOptions, SampleOptions, tokenise};
/// use fastlora::training::{Split, TrainingSettings, train};
///
/// // A base model with LoRA on two of its linears.
/// let base = BaseModel::open("tests/fixtures/tiny_qwen2")?;
/// let targets = TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]);
/// let lora = LoraConfig { rank: 8, alpha: 16.0, use_rslora: false, target_modules: targets };
/// let mut model = Transformer::load(Arc::new(CpuBackend::new(None)?), &base, Some(&lora))?;
/// let start = model.layout().initial_parameters(42);
/// model.set_parameters(&start)?;
///
/// // Samples: these are tokens already.
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("train.jsonl");
/// std::fs::write(&path, "{\"input_ids\": [5, 6, 7, 2]}\n{\"input_ids\": [8, 9, 2]}\n")?;
/// let records = load(&[DataSource::new(path)], &LoadOptions::default())?;
/// let options = SampleOptions {
///     max_length: 128,
///     overlong: Overlong::Error,
///     loss_on: LossOn::Completion,
///     on_bad_record: OnBadRecord::Error,
///     embedding_rows: base.config().vocabulary,
/// };
/// let samples = tokenise(&records, None, &options)?;
/// let batches = BatchOptions { batch_size: 2, gradient_accumulation_steps: 1, shuffle: true, seed: 42 };
/// let split = Split::new(&samples, batches)?;
///
/// // Twenty steps; an `Observer` in place of `()` would see each of them.
/// let settings = TrainingSettings {
///     optimizer: AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 },
///     schedule: Schedule {
///         scheduler: LrScheduler::Linear,
///         peak_learning_rate: 0.01,
///         warmup_steps: 2,
///         total_steps: 20,
///     },
///     dropout_probability: 0.05,
///     seed: 42,
///     val_every: None,
/// };
/// let summary = train(&mut model, &split, None, &settings, &mut ())?;
/// assert_eq!(summary.steps, 20);
/// assert!(summary.last_loss < summary.first_loss);
/// // A and B of q_proj and v_proj in two layers, named as PEFT names them.
/// assert_eq!(model.adapters()?.len(), 8);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// A loss or norm that is not finite (numerical; the parameters are those of the step before), a device error, or
/// what an observer returns.
pub fn train<B: Backend>(
    model: &mut Transformer<B>,
    training: &Split<'_>,
    validation: Option<&Split<'_>>,
    settings: &TrainingSettings,
    observer: &mut impl Observer<B>,
) -> Result<TrainingSummary> {
    let limits =
        validation.map_or(training.limits(), |validation| training.limits().union(validation.limits()));
    model.reserve(Purpose::Training, limits)?;
    let parameter_count = model.layout().parameter_count();
    let mut optimizer = AdamW::new(&**model.backend(), parameter_count, settings.optimizer)?;
    let steps_per_epoch = training.plan.steps_per_epoch() as u64;
    let total_steps = settings.schedule.total_steps;
    let mut summary = TrainingSummary::default();
    let mut batch = Batch::default();
    for epoch in 0..total_steps.div_ceil(steps_per_epoch) {
        let order = training.plan.epoch(epoch);
        let dropout = (settings.dropout_probability > 0.0).then_some(Dropout {
            probability: settings.dropout_probability,
            seed: settings.seed,
            epoch: epoch as u32,
        });
        for step in order.steps().take((total_steps - summary.steps) as usize) {
            let started = Instant::now();
            let learning_rate = settings.schedule.learning_rate(summary.steps);
            // Once, but for gradients that overflow f16: those are computed again with a lower loss scale.
            let (loss, grad_norm) = loop {
                model.zero_gradients()?;
                let gradient_scale = step.token_weight() * optimizer.loss_scale().factor();
                let mut loss_sum = 0.0;
                for micro_batch in step.micro_batches() {
                    training.plan.fill(micro_batch, &mut batch);
                    let scores = model.accumulate_gradients(&batch, gradient_scale as f32, dropout)?;
                    loss_sum += scores.loss_sum();
                }
                mapped::check_intact()?;
                let loss = loss_sum * step.token_weight();
                if !loss.is_finite() {
                    return Err(not_finite("loss", loss, summary.steps + 1, training, &step));
                }
                let (backend, parameters, gradients) = model.trainable();
                let grad_norm = optimizer.update(backend, parameters, gradients, learning_rate)?;
                if grad_norm.is_finite() || !optimizer.lower_loss_scale() {
                    break (loss, grad_norm);
                }
                let lowered = optimizer.loss_scale().factor();
                debug!("step {}: gradients overflow; loss scale lowered to {lowered}", summary.steps + 1);
            };
            if !grad_norm.is_finite() {
                return Err(not_finite("gradient norm", grad_norm, summary.steps + 1, training, &step));
            }
            let report = StepReport {
                step: summary.steps + 1,
                epoch: epoch + 1,
                loss,
                grad_norm,
                learning_rate,
                labelled_tokens: step.labelled_count(),
                tokens: step.token_count(),
                seconds: started.elapsed().as_secs_f64(),
            };
            summary.record(&report);
            observer.step(&report)?;

            let Some(validation) = validation else { continue };
            let is_due = match settings.val_every {
                Some(steps) => report.step.is_multiple_of(steps),
                None => report.step.is_multiple_of(steps_per_epoch),
            };
            if is_due || report.step == total_steps {
                let report = validate(model, validation, &summary)?;
                summary.record_validation(&report);
                observer.validation(&report, model)?;
            }
        }
    }
    Ok(summary)
}

/// Loss, perplexity and accuracy of `model` on every sample, overall and by hash.
///
/// # Errors
/// A loss that is not finite, or a device error.
pub fn evaluate<B: Backend>(model: &mut Transformer<B>, split: &Split<'_>) -> Result<Evaluation> {
    model.reserve(Purpose::Inference, split.limits())?;
    let mut evaluation = Evaluation::default();
    let mut batch = Batch::default();
    for step in split.plan.epoch(0).steps() {
        for micro_batch in step.micro_batches() {
            split.plan.fill(micro_batch, &mut batch);
            let scores = model.evaluate(&batch)?;
            evaluation
                .add(&batch, &scores.losses, &scores.correct, |sample| split.hash_of(sample))
                .map_err(|error| error.at(split.origins(micro_batch)))?;
        }
    }
    mapped::check_intact()?;
    Ok(evaluation)
}

fn validate<B: Backend>(
    model: &mut Transformer<B>,
    validation: &Split<'_>,
    summary: &TrainingSummary,
) -> Result<ValidationReport> {
    let started = Instant::now();
    let evaluation = evaluate(model, validation).map_err(|error| match error.location() {
        Some(records) => {
            let place = format!("validation at step {} ({records})", summary.steps);
            error.at(place)
        }
        None => error,
    })?;
    let is_best = match (evaluation.overall().loss(), summary.best_validation) {
        (Some(loss), Some((_, best))) => loss < best,
        (loss, None) => loss.is_some(),
        (None, _) => false,
    };
    let seconds = started.elapsed().as_secs_f64();
    Ok(ValidationReport { step: summary.steps, evaluation, is_best, seconds })
}

impl TrainingSummary {
    fn record(&mut self, report: &StepReport) {
        if self.steps == 0 {
            self.first_loss = report.loss;
        }
        self.steps = report.step;
        self.last_loss = report.loss;
        self.tokens += report.tokens as u64;
        self.training_seconds += report.seconds;
    }

    fn record_validation(&mut self, report: &ValidationReport) {
        self.last_validation_loss = report.evaluation.overall().loss();
        if report.is_best {
            self.best_validation = self.last_validation_loss.map(|loss| (report.step, loss));
        }
    }
}

fn not_finite(what: &str, value: f64, step_number: u64, training: &Split<'_>, step: &Step<'_>) -> Error {
    Error::numerical(format!("the {what} is {value}; nothing was updated in this step"))
        .at(format!("step {step_number} ({})", training.origins(step.sample_indices)))
        .hint("look at these records, lower learning_rate or max_grad_norm, or add warmup_steps")
}
