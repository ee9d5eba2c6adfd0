//! `fastlora train`: configuration → data → model → tokens → device, then the run and its adapter.

mod agreement;
mod checkpointer;
mod data;
mod dry_run;
mod ending;
mod follower;
mod launch;
mod output;
mod processes;
mod profile;
mod progress;
mod recorder;
mod resolved;
mod resume;
mod sampler;
mod settings;
mod time_by_operation;
mod token_cache;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use chrono::Local;
use clap::Args;
use serde_json::json;
use tracing::{info, warn};

use self::agreement::agree;
use self::checkpointer::Checkpointer;
use self::data::{TextData, conditioning, describe_data};
use self::dry_run::DryRun;
use self::ending::{note_failure, report, stopped, warn_about_missing_best, write_report};
use self::output::{AdapterWriter, Earlier, OutputFolder};
use self::processes::{ProcessArgs, Processes};
use self::profile::{Profile, ProfileSteps, Profiled};
use self::progress::Progress;
use self::recorder::Recorder;
use self::resolved::{Resolved, resolve_config};
use self::resume::Start;
use self::sampler::{Questions, Sampler, Times};
use self::settings::training_settings;
use super::Cli;
use super::cases::read_cases;
use super::device::on_backend;
use super::model::resolve_model;
use super::signals::Interrupts;
use super::tokenizer::tokenizer_for;
use crate::checkpoint::adapter::{Adapter, AdapterConfig};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::hub::ResolvedModel;
use crate::checkpoint::volume::check_space;
use crate::config::{Options, ReportFormat, TrainingConfig};
use crate::data::{ChatTemplate, TemplateChoice};
use crate::distributed::Group;
use crate::error::{Error, Result};
use crate::model::{Factors, LoraConfig, Transformer};
use crate::pissa::{self, saved_config};
use crate::report::tensorboard::EventFile;
use crate::report::{METRICS, PAGE};
use crate::selftest::Measurable;
use crate::tokens::{BatchOptions, SampleOptions, SampleSet, Tokenizer, warn_about_ends, warn_about_overlap};
use crate::training::{MetricsFile, Split, TrainingSettings};

/// Arguments of `fastlora train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Configuration file; without it, `configs/training_config.json` where that exists, else the defaults.
    config: Option<PathBuf>,
    /// Sets a key of the configuration; wins over the file. Repeat for several.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pairs: Vec<String>,
    /// Goes on from the newest checkpoint of the output folder, or begins where there is none; DIR names an output
    /// folder, whose configuration is taken unless another is named, or a checkpoint in it.
    #[arg(long, value_name = "auto|DIR", num_args = 0..=1, default_missing_value = "auto")]
    resume: Option<String>,
    /// Replaces the run in an output folder that is not empty.
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Reads and checks everything, shows samples with what is learned of them, lengths, steps and memory, and ends.
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,
    /// Samples that a dry run shows.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "dry_run")]
    show: usize,
    /// Prints where the time of steps 3 to 7, or of --profile-steps, went, by operation and beside this machine's limits.
    #[arg(long)]
    pub(super) profile: bool,
    /// Opens the GPU profiler's window for steps FIRST to LAST alone; see the README.
    #[arg(long, value_name = "FIRST:LAST")]
    profile_steps: Option<ProfileSteps>,
    #[command(flatten)]
    processes: ProcessArgs,
    #[command(flatten)]
    options: Options,
}

impl TrainArgs {
    /// The rank of a process that is not the first of its run.
    pub(super) fn follower_rank(&self) -> Option<usize> {
        self.processes.resolve().ok().map(|processes| processes.rank()).filter(|rank| *rank > 0)
    }
}

pub(super) fn run(args: &TrainArgs, cli: &Cli) -> Result<()> {
    let started = Instant::now();
    let interrupts = Interrupts::install()?;
    let Resolved { mut config, init_adapter, resume } = resolve_config(args)?;
    info!("configuration:\n{:#}", json!(config));
    let processes = args.processes.resolve()?;
    processes.check(&config, args.dry_run)?;
    let device = processes.device(&config)?;
    device.validate()?;
    let earlier = match &resume {
        _ if args.dry_run => Earlier::Ignore,
        Some(_) => Earlier::Resume,
        None if args.overwrite => Earlier::Overwrite,
        None => Earlier::Keep,
    };
    // One process alone writes.
    let output = match processes.rank() {
        0 => Some(OutputFolder::check(&config.output_dir, earlier)?),
        _ => None,
    };
    let start = resume.map_or(Ok(Start::Fresh), |resume| resume.find(&config, &interrupts))?;
    match &start {
        Start::Fresh => {}
        Start::Resumed(resumed) => config.chat_date = config.chat_date.or(resumed.chat_date()),
        Start::Complete(_) if output.is_none() => return Ok(()),
        Start::Complete(summary) => {
            info!("{}: the run is complete", config.output_dir.display());
            if !config.output_dir.join(PAGE).exists() {
                write_report(&config, None);
            }
            return report(cli, &config, summary, None);
        }
    }

    let training_data = TextData::read(&config, &config.train_data, "name another file with --train-data")?;
    let advice = "name another file with --val-data, or `--val-data none` for no validation";
    let validation_data =
        config.val_data.as_ref().map(|sources| TextData::read(&config, sources, advice)).transpose()?;

    let cases = config.test_cases.as_ref().map(|path| read_cases(path, None)).transpose()?;

    let model_files = resolve_model(&config.model_name, cli)?;
    let base = BaseModel::open(&model_files.folder)?;
    let adapter_config = adapter_config(&config, &model_files);
    if let (Some(adapter), Some(folder)) = (&init_adapter, &config.init_adapter) {
        adapter.check_base(base.config()).map_err(|error| error.at(folder.display().to_string()))?;
    }
    let is_pissa = config.init_lora_weights.is_pissa();
    let lora = LoraConfig { has_residuals: is_pissa, ..LoraConfig::from(&adapter_config) };
    let at_targets = |error: Error| match error.location() {
        None => error.at("lora_target_modules"),
        Some(_) => error,
    };
    if init_adapter.is_none() {
        lora.check_matches(base.config()).map_err(at_targets)?;
    }
    let expected_tensors = lora.expected_tensors(base.config()).map_err(at_targets)?;
    if config.max_length > base.config().max_positions {
        let positions = base.config().max_positions;
        warn!("max_length is {}, but the model was made for {positions} positions", config.max_length);
    }
    if is_pissa && config.lora_dropout > 0.0 {
        warn!(
            "lora_dropout is {}, which takes from the largest part of every weight too: 0 is what PiSSA is meant for",
            config.lora_dropout
        );
    }

    let open_tokenizer = |config: &TrainingConfig| {
        let choice = TemplateChoice { name: config.chat_template.clone(), date: config.chat_date };
        let data = [Some(&training_data), validation_data.as_ref()];
        tokenizer_for(data.into_iter().flatten().map(TextData::kinds), &base, None, &choice)
    };
    let mut tokenizer = open_tokenizer(&config)?;
    let template = tokenizer.as_ref().and_then(Tokenizer::chat_template);
    if template.is_some_and(ChatTemplate::uses_date) && config.chat_date.is_none() {
        // In the configuration as resolved, so that running it again gives the same run.
        let today = Local::now().date_naive();
        warn!("the chat template writes the date into every sample: this run has chat_date {today}");
        config.chat_date = Some(today);
        tokenizer = open_tokenizer(&config)?;
    }
    let chat_template = tokenizer.as_ref().and_then(Tokenizer::chat_template);
    // Data may be tokens, prompts are not.
    let own_tokenizer = match (&cases, &tokenizer) {
        (Some(_), None) => Some(Tokenizer::from_folder(base.folder())?),
        _ => None,
    };
    let options = SampleOptions {
        max_length: config.max_length,
        overlong: config.overlong,
        loss_on: config.loss_on,
        on_bad_record: config.on_bad_record,
        embedding_rows: base.config().vocabulary,
        hash_template: config.hash_template.clone(),
        also_without_hash: false,
    };
    let training_options = SampleOptions { also_without_hash: config.hash_dropout > 0.0, ..options.clone() };
    let samples = training_data.samples(&config, tokenizer.as_ref(), &training_options)?;
    samples.accounting.log();
    if config.hash_dropout > 0.0 && !samples.can_lose_hash() {
        warn!("hash_dropout is of no effect: no hash stands in the text of any sample");
    }
    let (training_samples, validation_samples) = match (&validation_data, config.val_fraction) {
        (Some(data), _) => (samples, Some(data.samples(&config, tokenizer.as_ref(), &options)?)),
        (None, Some(share)) => {
            let (training, validation) = samples.hold_out(share, config.seed)?;
            info!("{} samples are held out for validation", validation.len());
            (training, Some(validation))
        }
        (None, None) => (samples, None),
    };
    let tokenizer_eos = tokenizer.as_ref().and_then(Tokenizer::eos_id);
    let eos_ids: Vec<u32> = base.config().eos_token_ids.iter().copied().chain(tokenizer_eos).collect();
    let bos_id = tokenizer.as_ref().and_then(Tokenizer::bos_id).or(base.config().bos_token_id);
    warn_about_ends(&training_samples, &eos_ids, bos_id);
    if let Some(validation_samples) = &validation_samples {
        validation_samples.accounting.log();
        warn_about_overlap(&training_samples, validation_samples);
    }

    let batches = BatchOptions {
        batch_size: config.batch_size,
        gradient_accumulation_steps: config.gradient_accumulation_steps,
        shuffle: config.shuffle,
        seed: config.seed,
        hash_dropout: config.hash_dropout,
        balance_by_hash: config.balance_by_hash,
        row_tokens: config.packing.then_some(config.max_length),
        bucket_by_length: config.bucket_by_length,
    };
    let training = Split::new(&training_samples, batches)?;
    // Validation needs no order, and no step larger than a micro-batch.
    let one_by_one = BatchOptions {
        batch_size: config.batch_size,
        row_tokens: batches.row_tokens,
        ..BatchOptions::default()
    };
    let validation =
        validation_samples.as_ref().map(|samples| Split::new(samples, one_by_one)).transpose()?;

    let conditioning = conditioning(&config, &training_samples, tokenizer.is_some())?;
    let questions = match (cases, tokenizer.as_ref().or(own_tokenizer.as_ref())) {
        (Some(cases), Some(tokenizer)) => Some(Questions::new(cases, tokenizer, &base, &conditioning)?),
        _ => None,
    };

    if args.dry_run {
        let plan = DryRun {
            config: &config,
            base: &base,
            lora: &lora,
            tokenizer: tokenizer.as_ref(),
            samples: &training_samples,
            training: &training,
            validation: validation.as_ref(),
            batches,
            answer_tokens: questions
                .as_ref()
                .map(|questions| questions.capacity(base.config().max_positions)),
        };
        let chosen = device.backend(&base)?;
        return plan.describe(&chosen, args.show, cli);
    }

    let order_fingerprint = training.plan().epoch(0).fingerprint();
    let data_fingerprint = training_samples.fingerprint();
    info!("training samples have SHA-256 {data_fingerprint}, their order in epoch 1 {order_fingerprint}");
    let writer = AdapterWriter {
        config: &config,
        adapter: if is_pissa { saved_config(&adapter_config) } else { adapter_config },
        base: &base,
        base_fingerprints: OnceLock::new(),
        data_fingerprints: json!({
            "train": data_fingerprint,
            "validation": validation_samples.as_ref().map(SampleSet::fingerprint),
            "order": order_fingerprint,
        }),
        tokenizer_fingerprint: tokenizer.as_ref().map(|tokenizer| tokenizer.fingerprint().to_string()),
        chat_template: chat_template.map(ChatTemplate::source),
        data_description: describe_data(&training_samples),
        hashes: json!(conditioning.hashes),
        process_count: processes.count(),
    };
    if let Start::Resumed(resumed) = &start {
        resumed.check_files(&writer.provenance()?)?;
    }
    let parameter_count =
        expected_tensors.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
    // Saved at twice the rank.
    let saved_count = if is_pissa { 2 * parameter_count } else { parameter_count };
    if output.is_some() {
        check_space(&config.output_dir, writer.largest_output_bytes(saved_count))?;
    }

    let run = Run {
        cli,
        profile: Profile { steps: args.profile_steps, is_timed: args.profile },
        started,
        interrupts,
        start,
        processes,
        output,
        writer,
        init_adapter: init_adapter.as_ref(),
        lora: &lora,
        training_samples: &training_samples,
        training,
        validation,
        questions: questions.as_ref(),
    };
    let chosen = device.backend(&base)?;
    on_backend!(chosen, |backend| run.on(backend))
}

/// Everything that was read and checked: what is left is to compute.
struct Run<'a> {
    cli: &'a Cli,
    profile: Profile,
    started: Instant,
    interrupts: Interrupts,
    start: Start,
    processes: Processes,
    /// Where this process writes.
    output: Option<OutputFolder>,
    writer: AdapterWriter<'a>,
    init_adapter: Option<&'a Adapter>,
    lora: &'a LoraConfig,
    training_samples: &'a SampleSet,
    training: Split<'a>,
    validation: Option<Split<'a>>,
    questions: Option<&'a Questions<'a>>,
}

impl Run<'_> {
    /// Meets the other processes, if there are any, and computes.
    fn on<B: Measurable>(self, backend: Arc<B>) -> Result<()> {
        let Some(mut joined) = self.processes.join()? else { return self.compute(backend, None) };
        let provenance = self.writer.provenance();
        let result = provenance
            .and_then(|provenance| agree(&mut joined.group, &provenance, &self.start, &backend.description()))
            .and_then(|()| self.compute(backend, Some(&mut joined.group)));
        joined.end(result)
    }

    /// Loads the model, trains it and writes the adapter.
    fn compute<B: Measurable>(&self, backend: Arc<B>, group: Option<&mut Group>) -> Result<()> {
        let Run { start, writer, lora, training_samples, training, .. } = self;
        let AdapterWriter { config, base, .. } = writer;
        if let Start::Resumed(resumed) = start {
            resumed.compare_device(&writer.computed_by(&*backend));
        }
        let mut model = match self.init_adapter {
            Some(adapter) => Transformer::load_with_adapter(Arc::clone(&backend), base, adapter)?,
            None => {
                let factors = match start.state() {
                    _ if !lora.has_residuals => None,
                    Some(state) => Some(Factors::split(&state.adapter)?.1),
                    None => Some(pissa::factors(base, lora, config.init_lora_weights, config.seed)?),
                };
                let backend = Arc::clone(&backend);
                let mut model = match factors {
                    Some(factors) => Transformer::load_residual(backend, base, lora, factors)?,
                    None => Transformer::load(backend, base, Some(lora))?,
                };
                model.start(base, config.seed)?;
                model
            }
        };
        print_parameter_counts(model.layout().parameter_count() as u64, base.parameter_count());

        let settings = training_settings(config, training.plan())?;
        let total_steps = settings.schedule.total_steps;
        info!(
            "{} samples, {} tokens ({} labelled), {total_steps} steps",
            training_samples.len(),
            training_samples.token_count(),
            training_samples.labelled_count(),
        );
        self.interrupts.arm();
        let Some(output) = &self.output else { return self.follow(&mut model, &settings, group) };
        output.prepare(config, start)?;
        if let Some(state) = start.state() {
            warn_about_missing_best(config, &state.summary);
        }
        let description = writer.computed_by(&*backend);
        // From here on the folder holds a run.
        let result = self.train(&mut model, &settings, group);
        if let Err(error) = &result {
            note_failure(config, error, description);
        }
        result
    }

    /// Trains the model that is loaded, and writes the adapter.
    fn train<B: Measurable>(
        &self,
        model: &mut Transformer<B>,
        settings: &TrainingSettings,
        group: Option<&mut Group>,
    ) -> Result<()> {
        let Run { cli, start, writer, training, .. } = self;
        let config = writer.config;
        let backend = Arc::clone(model.backend());
        let total_steps = settings.schedule.total_steps;
        let metrics_path = config.output_dir.join(METRICS);
        let metrics = match start.state() {
            Some(state) => MetricsFile::resume(&metrics_path, &state.summary)?,
            None => MetricsFile::create(&metrics_path)?,
        };
        let events = match (config.report.contains(&ReportFormat::Tensorboard), start.state()) {
            (false, _) => None,
            (true, Some(state)) => Some(EventFile::resume(&config.output_dir, &state.summary)?),
            (true, None) => Some(EventFile::create(&config.output_dir)?),
        };
        let sampler = |questions| {
            let times = Times { every: config.sample_every, plan: training.plan(), total_steps };
            Sampler::new(questions, &config.output_dir, times, start.steps())
        };
        let recorder = Recorder {
            metrics,
            events,
            progress: Progress::new(start.steps(), total_steps, cli.quiet || cli.json),
            sampler: self.questions.map(sampler).transpose()?,
            writer,
            checkpointer: Checkpointer::new(writer, &self.interrupts, start.steps()),
        };
        let mut observer = Profiled::new(Arc::clone(&backend), self.profile, start.steps(), recorder)?;
        info!("first step after {:.2} s", self.started.elapsed().as_secs_f64());
        let summary = self.steps(model, settings, group, &mut observer)?;
        let (recorder, times) = observer.into_parts();
        recorder.progress.finish();
        let times = times.map(|times| times.beside_limits(&*backend)).transpose()?;
        match &times {
            Some(times) if !cli.json => info!("time by operation:\n{}", times.to_text()),
            None if self.profile.is_timed => {
                warn!("--profile: the run did not take all of the steps that were to be timed");
            }
            _ => {}
        }
        if recorder.checkpointer.is_stopped() {
            write_report(config, Some(writer.computed_by(&*backend)));
            return Err(stopped(config, summary.steps, total_steps));
        }
        let computed_by = writer.computed_by(&*backend);
        writer.write_final(&summary, &model.adapters()?, &computed_by)?;
        write_report(config, Some(computed_by));
        report(cli, config, &summary, times.as_ref())
    }
}

fn adapter_config(config: &TrainingConfig, base: &ResolvedModel) -> AdapterConfig {
    AdapterConfig {
        rank: config.lora_r,
        alpha: config.lora_alpha,
        dropout: config.lora_dropout,
        target_modules: config.lora_target_modules.clone(),
        use_rslora: config.use_rslora,
        use_dora: config.use_dora,
        rank_pattern: config.rank_pattern.clone(),
        alpha_pattern: config.alpha_pattern.clone(),
        layers_to_transform: config.layers_to_transform.clone(),
        modules_to_save: config.modules_to_save.clone(),
        base_model: Some(base.name.clone()),
        revision: base.revision.clone(),
    }
}

fn print_parameter_counts(trainable: u64, frozen: u64) {
    let total = trainable + frozen;
    let percent = 100.0 * trainable as f64 / total as f64;
    info!("trainable parameters: {trainable} of {total} ({percent:.4} %)");
}
