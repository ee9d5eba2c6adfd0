//! The training loop: steps of gradient accumulation, one AdamW update each, validation in between.
//!
//! A step's loss is the mean over the labelled tokens of all its micro-batches, so that it does not depend on how
//! they are cut, nor on how many processes they are dealt to. The loss and the gradients' norm are checked before anything
//! is updated. Between two steps a run can be put down ([`TrainingState`]) and taken up again.

mod json_lines;
mod metrics;
mod not_finite;
mod peers;
mod report;
mod spikes;
mod split;
mod state;
mod validation;

use std::time::Instant;

use tracing::{debug, info, warn};

pub use json_lines::JsonLines;
pub use metrics::MetricsFile;
pub use report::{StepReport, TrainingSummary, ValidationReport};
pub use spikes::LossWatch;
pub use split::Split;
pub use state::{Pause, TrainingState};
pub use validation::evaluate;

use self::not_finite::BadStep;
use self::peers::Peers;
use self::validation::evaluate_unless;
use crate::backend::{Backend, Dropout, EmbeddingNoise, PassSettings};
use crate::batch::Batch;
use crate::checkpoint::mapped;
use crate::config::{ActivationMemory, OnNan};
use crate::distributed::Group;
use crate::error::Result;
use crate::model::Transformer;
use crate::optim::{AdamW, AdamWSettings, Schedule};
use crate::range;
use crate::tokens::Step;

/// What a run needs to know besides its data.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingSettings {
    /// AdamW's constants.
    pub optimizer: AdamWSettings,
    /// The rate of every `B` over that of the `A`s; 1 but for LoRA+ (Hayou et al. 2024).
    pub b_rate_ratio: f64,
    /// The rate of every step, and how many there are.
    pub schedule: Schedule,
    /// Chance of a zero in an adapter's input.
    pub dropout_probability: f32,
    /// α of the noise on the embeddings (NEFTune, Jain et al. 2023); 0: none.
    pub embedding_noise_alpha: f32,
    /// Seed of the dropout masks and of the noise.
    pub seed: u64,
    /// Which activations the backward finds instead of computing them again.
    pub activation_memory: ActivationMemory,
    /// Steps between validations; none: one at the end of each epoch.
    pub val_every: Option<u64>,
    /// Validations without a lower loss after which the run ends; none: it does not end for that.
    pub early_stopping_patience: Option<u64>,
    /// What happens to a step whose loss or gradients are not finite.
    pub on_nan: OnNan,
}

impl TrainingSettings {
    /// What is drawn at random in the passes of an epoch.
    fn pass(&self, epoch: u32) -> PassSettings {
        let (probability, alpha, seed) = (self.dropout_probability, self.embedding_noise_alpha, self.seed);
        PassSettings {
            dropout: (probability > 0.0).then_some(Dropout { probability, seed, epoch }),
            embedding_noise: (alpha > 0.0).then_some(EmbeddingNoise { alpha, seed, epoch }),
            ..PassSettings::default()
        }
    }
}

/// Digits of an order's SHA-256 that stand in the log and the metrics.
const ORDER_DIGITS: usize = 16;

/// Steps in a row that may be skipped: when all are, something is wrong that no further data mends.
const MOST_SKIPPED_IN_A_ROW: u64 = 10;

/// Whether a run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next step, if there is one.
    Continue,
    /// No further step.
    Stop,
}

/// What wants to know how a run goes: progress, metrics, the keeper of checkpoints and of the best adapter.
pub trait Observer<B: Backend> {
    /// Before memory is reserved for the steps: the place to take some for [`ask`](Self::ask).
    fn prepare(&mut self, _: &mut Transformer<B>) -> Result<()> {
        Ok(())
    }
    /// After every optimizer step.
    fn step(&mut self, report: &StepReport) -> Result<()>;
    /// After every validation; `model` has the adapters that were measured.
    fn validation(&mut self, report: &ValidationReport, model: &Transformer<B>) -> Result<()>;
    /// After a step, which is given, and its validation: the model may be asked, and must be left as it is.
    fn ask(&mut self, _: u64, _: &mut Transformer<B>) -> Result<()> {
        Ok(())
    }
    /// After a step and its validation: the place to save the state, and to stop.
    fn between_steps(&mut self, _: &Pause<'_, B>) -> Result<Flow> {
        Ok(Flow::Continue)
    }
    /// Whether the run is about to be stopped: a validation is broken off then, and is made up for when it resumes.
    fn wants_to_stop(&self) -> bool {
        false
    }
    /// In a run of several processes: one of them wants to stop, so that this one is to want it too.
    fn stop(&mut self) {}
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

/// Trains the adapters of `model` for `settings.schedule.total_steps` steps over `training`, or goes on from `start`
/// with the bits that the run would have had without the break. Ends early where the observer stops it.
///
/// ```
/// use std::sync::Arc;
///
/// use fastlora::backend::cpu::CpuBackend;
/// use fastlora::checkpoint::base::BaseModel;
/// use fastlora::config::{
///     ActivationMemory, DataSource, HashTemplate, LossOn, LrScheduler, OnBadRecord, OnNan, Overlong, TargetModules,
/// };
/// use fastlora::data::{LoadOptions, load};
/// use fastlora::model::{LoraConfig, Transformer};
/// use fastlora::optim::{AdamWSettings, Schedule};
/// use fastlora::tokens::{BatchOptions, SampleOptions, tokenise};
/// use fastlora::training::{Split, TrainingSettings, train};
///
/// // A base model with LoRA on two of its linears.
/// let base = BaseModel::open("tests/fixtures/tiny_qwen2")?;
/// let targets = TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]);
/// let lora = LoraConfig::new(8, 16.0, targets);
/// let mut model = Transformer::load(Arc::new(CpuBackend::new(None)?), &base, Some(&lora))?;
/// model.start(&base, 42)?;
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
///     hash_template: HashTemplate::default(),
///     also_without_hash: false,
/// };
/// let samples = tokenise(&records, None, &options)?;
/// let batches = BatchOptions { batch_size: 2, shuffle: true, seed: 42, ..BatchOptions::default() };
/// let split = Split::new(&samples, batches)?;
///
/// // Twenty steps; an `Observer` in place of `()` would see each of them.
/// let settings = TrainingSettings {
///     optimizer: AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 },
///     b_rate_ratio: 1.0,
///     schedule: Schedule {
///         scheduler: LrScheduler::Linear,
///         peak_learning_rate: 0.01,
///         warmup_steps: 2,
///         total_steps: 20,
///     },
///     dropout_probability: 0.05,
///     embedding_noise_alpha: 0.0,
///     seed: 42,
///     activation_memory: ActivationMemory::Auto,
///     val_every: None,
///     early_stopping_patience: None,
///     on_nan: OnNan::Stop,
/// };
/// let summary = train(&mut model, &split, None, &settings, None, &mut ())?;
/// assert_eq!(summary.steps, 20);
/// assert!(summary.last_loss < summary.first_loss);
/// // A and B of q_proj and v_proj in two layers, named as PEFT names them.
/// assert_eq!(model.adapters()?.len(), 8);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// A loss or norm that is not finite (numerical; the parameters are those of the step before), a state of another
/// model, a device error, or what an observer returns.
pub fn train<B: Backend>(
    model: &mut Transformer<B>,
    training: &Split<'_>,
    validation: Option<&Split<'_>>,
    settings: &TrainingSettings,
    start: Option<&TrainingState>,
    observer: &mut impl Observer<B>,
) -> Result<TrainingSummary> {
    train_among(Peers::default(), model, training, validation, settings, start, observer)
}

/// The same run in several processes, each with a model, data, settings and start of its own that are the same: they deal the
/// micro-batches of each step, and of each validation, to each other in turn. Losses, figures and adapters are those of
/// [`train`] up to the order in which f32 numbers are added; they are the same in all processes, and always the same for
/// the same number of them. All begin with the parameters of rank 0, and stop after the same step.
///
/// A step exchanges its gradients ([`Group::sum`]) and three small messages.
///
/// # Errors
/// As [`train`], or a process that is lost; the others are told, and fail with the same message.
pub fn train_in_group<B: Backend>(
    group: &mut Group,
    model: &mut Transformer<B>,
    training: &Split<'_>,
    validation: Option<&Split<'_>>,
    settings: &TrainingSettings,
    start: Option<&TrainingState>,
    observer: &mut impl Observer<B>,
) -> Result<TrainingSummary> {
    let peers = Peers::of(group);
    let trained = train_among(peers, model, training, validation, settings, start, observer);
    trained.inspect_err(|error| group.abort(error))
}

fn train_among<B: Backend>(
    mut peers: Peers<'_>,
    model: &mut Transformer<B>,
    training: &Split<'_>,
    validation: Option<&Split<'_>>,
    settings: &TrainingSettings,
    start: Option<&TrainingState>,
    observer: &mut impl Observer<B>,
) -> Result<TrainingSummary> {
    let limits =
        validation.map_or(training.limits(), |validation| training.limits().union(validation.limits()));
    let (mut optimizer, summary) = match start {
        Some(state) => (state.restore(model, settings.optimizer)?, state.summary.clone()),
        None => {
            let parameter_count = model.layout().parameter_count();
            let optimizer = AdamW::new(&**model.backend(), parameter_count, settings.optimizer)?;
            (optimizer, TrainingSummary::default())
        }
    };
    optimizer.set_b_rate(&**model.backend(), model.layout(), settings.b_rate_ratio)?;
    peers.begin_alike(model)?;
    observer.prepare(model)?;
    // Last, because it takes what memory is left.
    model.reserve_training(limits, settings.activation_memory, settings.dropout_probability > 0.0)?;
    if let Some(plan) = model.memory_plan() {
        info!("{plan}");
    }
    let (batch, losses) = (Batch::default(), LossWatch::default());
    let mut run =
        Run { peers, model, training, validation, settings, optimizer, summary, observer, batch, losses };
    // A run that was stopped in a validation begins with it.
    if start.is_some() && run.between_steps()? == Flow::Stop {
        return Ok(run.summary);
    }
    let plan = training.plan();
    let total_steps = settings.schedule.total_steps;
    while run.summary.steps < total_steps {
        let (epoch, done) = plan.position(run.summary.steps);
        let order = plan.epoch(epoch);
        let fingerprint = &order.fingerprint()[..ORDER_DIGITS];
        let order_number = u64::from_str_radix(fingerprint, 16).ok();
        let (samples, steps) = (order.visits().len(), order.steps().len());
        info!("epoch {}: {samples} samples in {steps} steps, their order {fingerprint}", epoch + 1);
        let pass = settings.pass(epoch as u32);
        let left = total_steps - run.summary.steps;
        for step in order.steps().skip(done).take(left as usize) {
            let named = order_number.filter(|_| step.number == 0);
            run.step(&step, Place { epoch, order: named }, pass)?;
            if run.between_steps()? == Flow::Stop {
                return Ok(run.summary);
            }
        }
    }
    Ok(run.summary)
}

/// Where a step is.
struct Place {
    epoch: u64,
    /// Of the first step of an epoch, the start of the SHA-256 of its order.
    order: Option<u64>,
}

/// A run under way.
struct Run<'a, 'data, B: Backend, O> {
    peers: Peers<'a>,
    model: &'a mut Transformer<B>,
    training: &'a Split<'data>,
    validation: Option<&'a Split<'data>>,
    settings: &'a TrainingSettings,
    optimizer: AdamW<B>,
    summary: TrainingSummary,
    observer: &'a mut O,
    batch: Batch,
    losses: LossWatch,
}

impl<B: Backend, O: Observer<B>> Run<'_, '_, B, O> {
    /// Gradients of all micro-batches, then one update.
    fn step(&mut self, step: &Step<'_>, place: Place, pass: PassSettings) -> Result<()> {
        let _range = range!("step", number = self.summary.steps + 1);
        let started = Instant::now();
        let learning_rate = self.settings.schedule.learning_rate(self.summary.steps);
        // Once, but for gradients that overflow f16: those are computed again with a lower loss scale.
        let (loss, grad_norm) = loop {
            let loss = self.gradients(step, pass)?;
            if !loss.is_finite() {
                break (loss, f64::NAN);
            }
            let (backend, parameters, gradients) = self.model.trainable();
            let grad_norm = self.optimizer.update(backend, parameters, gradients, learning_rate)?;
            if grad_norm.is_finite() || !self.optimizer.lower_loss_scale() {
                break (loss, grad_norm);
            }
            let (number, lowered) = (self.summary.steps + 1, self.optimizer.loss_scale().factor());
            debug!("step {number}: gradients overflow; loss scale lowered to {lowered}");
        };
        let number = self.summary.steps + 1;
        if !loss.is_finite() || !grad_norm.is_finite() {
            let bad = BadStep { number, step, loss, grad_norm, settings: pass };
            let error = bad.explain(self.model, self.training, &mut self.peers)?;
            if self.settings.on_nan == OnNan::Stop || self.summary.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW {
                return Err(error);
            }
            warn!("skipped: {error}");
        } else if let Some(mean) = self.losses.spike(loss) {
            let origins = self.training.origins(step.visits());
            warn!(
                "step {number} ({origins}): the loss is {loss:.4}, far above the {mean:.4} of the steps before"
            );
        }
        let report = StepReport {
            step: number,
            epoch: place.epoch + 1,
            loss,
            grad_norm,
            learning_rate,
            labelled_tokens: step.labelled_count(),
            tokens: step.token_count(),
            seconds: started.elapsed().as_secs_f64(),
            order: place.order,
        };
        self.summary.record(&report);
        self.observer.step(&report)
    }

    /// Leaves the gradients of all micro-batches in the model, times the loss scale, and returns the mean loss. Where that is
    /// not finite, nobody asks for the gradients.
    fn gradients(&mut self, step: &Step<'_>, pass: PassSettings) -> Result<f64> {
        self.model.zero_gradients()?;
        let gradient_scale = (step.token_weight() * self.optimizer.loss_scale().factor()) as f32;
        let pass = PassSettings { gradient_scale, ..pass };
        let mut loss_sum = 0.0;
        for micro_batch in self.peers.share(step.micro_batches()) {
            self.training.plan().fill(micro_batch, &mut self.batch);
            let scores = self.model.accumulate_gradients(&self.batch, pass)?;
            loss_sum += scores.loss_sum();
        }
        mapped::check_intact()?;
        let loss_sum = self.peers.sum(loss_sum)?;
        if loss_sum.is_finite() {
            self.peers.sum_gradients(self.model)?;
        }
        Ok(loss_sum * step.token_weight())
    }

    /// The validation, where one is due, and what the observer wants.
    fn between_steps(&mut self) -> Result<Flow> {
        if let Some(validation) = self.validation.filter(|_| self.is_validation_due()) {
            self.validate(validation)?;
        }
        self.observer.ask(self.summary.steps, self.model)?;
        // One process saves: it must know who else wants to stop, and the others whether it does.
        agree_to_stop(&mut self.peers, self.observer)?;
        let pause = Pause { model: self.model, optimizer: &self.optimizer, summary: &self.summary };
        let flow = self.observer.between_steps(&pause)?;
        let flow = match self.peers.any(flow == Flow::Stop)? {
            true => {
                self.observer.stop();
                Flow::Stop
            }
            false => Flow::Continue,
        };
        let fruitless = self.summary.validations_since_best;
        if flow == Flow::Continue
            && self.settings.early_stopping_patience.is_some_and(|most| fruitless >= most)
        {
            info!("{fruitless} validations without a lower loss: the run ends early");
            return Ok(Flow::Stop);
        }
        Ok(flow)
    }

    fn is_validation_due(&self) -> bool {
        let steps = self.summary.steps;
        let is_last = steps == self.settings.schedule.total_steps;
        let is_time = || match self.settings.val_every {
            Some(every) => steps.is_multiple_of(every),
            // The next step begins an epoch.
            None => self.training.plan().position(steps).1 == 0,
        };
        steps > self.summary.last_validation_step && (is_last || is_time())
    }

    fn validate(&mut self, validation: &Split<'_>) -> Result<()> {
        let started = Instant::now();
        let step = self.summary.steps;
        let observer = &mut *self.observer;
        let is_unwanted = |peers: &mut Peers<'_>| agree_to_stop(peers, observer);
        let evaluation = evaluate_unless(self.model, validation, &mut self.peers, is_unwanted).map_err(
            |error| match error.location() {
                Some(records) => {
                    let place = format!("validation at step {step} ({records})");
                    error.at(place)
                }
                None => error,
            },
        )?;
        let Some(evaluation) = evaluation else { return Ok(()) };
        let is_best = match (evaluation.overall().loss(), self.summary.best_validation) {
            (Some(loss), Some((_, best))) => loss < best,
            (loss, None) => loss.is_some(),
            (None, _) => false,
        };
        let seconds = started.elapsed().as_secs_f64();
        let report = ValidationReport { step, evaluation, is_best, seconds };
        self.summary.record_validation(&report);
        self.observer.validation(&report, self.model)
    }
}

/// Whether an observer of any process wants to stop; then all do.
fn agree_to_stop<B: Backend>(peers: &mut Peers<'_>, observer: &mut impl Observer<B>) -> Result<bool> {
    let is_wanted = peers.any(observer.wants_to_stop())?;
    if is_wanted {
        observer.stop();
    }
    Ok(is_wanted)
}
