//! `fastlora train`: configuration → data → model → tokens → device, then the run and its adapter.

mod output;
mod progress;
mod recorder;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use chrono::Local;
use clap::Args;
use serde_json::json;
use tracing::{info, warn};

use self::output::{AdapterWriter, METRICS, check_output_folder, prepare_output_folder};
use self::progress::{Progress, human_time};
use self::recorder::Recorder;
use super::Cli;
use super::device::{choose_backend, on_backend};
use super::model::resolve_model;
use super::tokenizer::tokenizer_for;
use crate::backend::Backend;
use crate::checkpoint::adapter::{Adapter, AdapterConfig, read_adapter};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::hub::ResolvedModel;
use crate::config::{DEFAULT_CONFIG_PATH, DataSource, Options, TrainingConfig};
use crate::data::{ChatTemplate, Dataset, LoadOptions, TemplateChoice, load};
use crate::error::{Error, Result, escape_control};
use crate::model::{LoraConfig, Transformer};
use crate::optim::{AdamWSettings, Schedule};
use crate::tokens::{
    BatchOptions, SampleOptions, SampleSet, Tokenizer, tokenise, warn_about_ends, warn_about_overlap,
};
use crate::training::{Split, TrainingSettings, TrainingSummary, train};

/// Arguments of `fastlora train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Configuration file; without it, `configs/training_config.json` where that exists, else the defaults.
    config: Option<PathBuf>,
    /// Sets a key of the configuration; wins over the file. Repeat for several.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pairs: Vec<String>,
    /// Starts from this PEFT adapter, with its rank, scale and modules.
    #[arg(long, value_name = "DIR")]
    init_adapter: Option<PathBuf>,
    /// Replaces the run in an output folder that is not empty.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    options: Options,
}

pub(super) fn run(args: &TrainArgs, cli: &Cli) -> Result<()> {
    let started = Instant::now();
    let (mut config, init_adapter) = resolve_config(args)?;
    info!("configuration:\n{:#}", json!(config));
    check_output_folder(&config.output_dir, args.overwrite)?;

    let training_records = load_records(&config, &config.train_data)?;
    let validation_records =
        config.val_data.as_ref().map(|sources| load_records(&config, sources)).transpose()?;

    let model_files = resolve_model(&config.model_name, cli)?;
    let base = BaseModel::open(&model_files.folder)?;
    let adapter_config = adapter_config(&config, &model_files);
    match (&init_adapter, &args.init_adapter) {
        (Some(adapter), Some(folder)) => {
            adapter.check_base(base.config()).map_err(|error| error.at(folder.display().to_string()))?
        }
        _ => LoraConfig::from(&adapter_config)
            .expected_tensors(base.config())
            .map(drop)
            .map_err(|error| error.at("lora_target_modules"))?,
    }
    if config.max_length > base.config().max_positions {
        let positions = base.config().max_positions;
        warn!("max_length is {}, but the model was made for {positions} positions", config.max_length);
    }

    let choice = TemplateChoice { name: config.chat_template.clone(), date: config.chat_date };
    let datasets = [Some(&training_records), validation_records.as_ref()];
    let tokenizer = tokenizer_for(datasets.into_iter().flatten(), &base, None, &choice)?;
    let chat_template = tokenizer.as_ref().and_then(Tokenizer::chat_template);
    if chat_template.is_some_and(ChatTemplate::uses_date) && config.chat_date.is_none() {
        // In the configuration as resolved, so that running it again gives the same run.
        let today = Local::now().date_naive();
        warn!("the chat template writes the date into every sample: this run has chat_date {today}");
        config.chat_date = Some(today);
    }
    let options = SampleOptions {
        max_length: config.max_length,
        overlong: config.overlong,
        loss_on: config.loss_on,
        on_bad_record: config.on_bad_record,
        embedding_rows: base.config().vocabulary,
    };
    let training_samples = tokenise(&training_records, tokenizer.as_ref(), &options)?;
    let validation_samples = validation_records
        .as_ref()
        .map(|records| tokenise(records, tokenizer.as_ref(), &options))
        .transpose()?;
    training_samples.accounting.log();
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
    };
    let training = Split::new(&training_samples, batches)?;
    // Validation needs no order, and no step larger than a micro-batch.
    let one_by_one = BatchOptions { shuffle: false, gradient_accumulation_steps: 1, ..batches };
    let validation =
        validation_samples.as_ref().map(|samples| Split::new(samples, one_by_one)).transpose()?;

    let run = Run {
        args,
        cli,
        started,
        config: &config,
        base: &base,
        init_adapter: init_adapter.as_ref(),
        adapter_config,
        tokenizer: tokenizer.as_ref(),
        training_samples: &training_samples,
        training,
        validation_samples: validation_samples.as_ref(),
        validation,
    };
    let chosen = choose_backend(&config.device, &config.dtype, config.threads, &base)?;
    on_backend!(chosen, |backend| run.on(backend))
}

/// Everything that was read and checked: what is left is to compute.
struct Run<'a> {
    args: &'a TrainArgs,
    cli: &'a Cli,
    started: Instant,
    config: &'a TrainingConfig,
    base: &'a BaseModel,
    init_adapter: Option<&'a Adapter>,
    adapter_config: AdapterConfig,
    tokenizer: Option<&'a Tokenizer>,
    training_samples: &'a SampleSet,
    training: Split<'a>,
    validation_samples: Option<&'a SampleSet>,
    validation: Option<Split<'a>>,
}

impl Run<'_> {
    /// Loads the model, trains it and writes the adapter.
    fn on<B: Backend>(self, backend: Arc<B>) -> Result<()> {
        let Run { args, cli, config, base, training_samples, training, .. } = self;
        let mut model = match self.init_adapter {
            Some(adapter) => Transformer::load_with_adapter(Arc::clone(&backend), base, adapter)?,
            None => {
                let lora = (&self.adapter_config).into();
                let mut model = Transformer::load(Arc::clone(&backend), base, Some(&lora))?;
                let parameters = model.layout().initial_parameters(config.seed);
                model.set_parameters(&parameters)?;
                model
            }
        };
        print_parameter_counts(model.layout().parameter_count() as u64, base.parameter_count());

        let settings = training_settings(config, training.plan().steps_per_epoch() as u64);
        info!(
            "{} samples, {} tokens ({} labelled), {} steps",
            training_samples.samples.len(),
            training_samples.token_count(),
            training_samples.labelled_count(),
            settings.schedule.total_steps
        );
        prepare_output_folder(&config.output_dir, config)?;
        let data_fingerprint = training_samples.fingerprint();
        info!("training samples have SHA-256 {data_fingerprint}");
        let writer = AdapterWriter {
            config,
            adapter: self.adapter_config,
            base,
            init_adapter: args.init_adapter.as_deref(),
            base_fingerprints: OnceLock::new(),
            data_fingerprints: json!({
                "train": data_fingerprint,
                "validation": self.validation_samples.map(SampleSet::fingerprint),
            }),
            tokenizer_fingerprint: self.tokenizer.map(|tokenizer| tokenizer.fingerprint().to_string()),
            chat_template: self.tokenizer.and_then(Tokenizer::chat_template).map(ChatTemplate::source),
            data_description: describe_data(training_samples),
        };
        let progress = Progress::new(settings.schedule.total_steps, cli.quiet);
        let mut recorder = Recorder::new(&config.output_dir.join(METRICS), progress, &writer)?;
        info!("first step after {:.2} s", self.started.elapsed().as_secs_f64());
        let summary = backend
            .run(|| train(&mut model, &training, self.validation.as_ref(), &settings, &mut recorder))?;
        recorder.finish();
        writer.write_final(&summary, &model.adapters()?)?;
        report(cli, config, &writer, &summary)
    }
}

/// The configuration of file, `--set` and flags, and the adapter that the run starts from.
fn resolve_config(args: &TrainArgs) -> Result<(TrainingConfig, Option<Adapter>)> {
    let default = Path::new(DEFAULT_CONFIG_PATH);
    let file = match &args.config {
        Some(path) => Options::from_file(path)?,
        None if default.exists() => Options::from_file(default)?,
        None => Options::default(),
    };
    let mut options = args.options.or(&file.with_pairs(&args.pairs)?);
    let adapter = args.init_adapter.as_deref().map(read_adapter).transpose()?;
    if let Some(Adapter { config, .. }) = &adapter {
        adopt(&mut options.lora_r, config.rank, "lora_r")?;
        adopt(&mut options.lora_alpha, config.alpha, "lora_alpha")?;
        adopt(&mut options.lora_target_modules, config.target_modules.clone(), "lora_target_modules")?;
        adopt(&mut options.use_rslora, config.use_rslora, "use_rslora")?;
    }
    Ok((TrainingConfig::resolve(&options)?, adapter))
}

/// Takes the adapter's value where the configuration is silent; where it says otherwise, that is an error.
fn adopt<T: PartialEq + std::fmt::Display>(option: &mut Option<T>, value: T, key: &str) -> Result<()> {
    if let Some(set) = option.as_ref().filter(|set| **set != value) {
        return Err(Error::config(format!("{set}, but the adapter of --init-adapter has {value}"))
            .at(key)
            .hint("remove the key: the adapter brings its own"));
    }
    *option = Some(value);
    Ok(())
}

fn load_records(config: &TrainingConfig, sources: &[DataSource]) -> Result<Dataset> {
    let options = LoadOptions {
        instruction_key: config.instruction_key.clone(),
        output_key: config.output_key.clone(),
        hash_key: config.hash_key.clone(),
        on_bad_record: config.on_bad_record,
    };
    load(sources, &options)
}

fn adapter_config(config: &TrainingConfig, base: &ResolvedModel) -> AdapterConfig {
    AdapterConfig {
        rank: config.lora_r,
        alpha: config.lora_alpha,
        dropout: config.lora_dropout,
        target_modules: config.lora_target_modules.clone(),
        use_rslora: config.use_rslora,
        base_model: Some(base.name.clone()),
        revision: base.revision.clone(),
    }
}

fn training_settings(config: &TrainingConfig, steps_per_epoch: u64) -> TrainingSettings {
    TrainingSettings {
        optimizer: AdamWSettings {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
        },
        schedule: Schedule {
            scheduler: config.lr_scheduler,
            peak_learning_rate: config.learning_rate,
            warmup_steps: config.warmup_steps,
            total_steps: config.max_steps.unwrap_or(config.num_epochs.saturating_mul(steps_per_epoch)),
        },
        dropout_probability: config.lora_dropout as f32,
        seed: config.seed,
        val_every: config.val_every,
    }
}

fn print_parameter_counts(trainable: u64, frozen: u64) {
    let total = trainable + frozen;
    let percent = 100.0 * trainable as f64 / total as f64;
    info!("trainable parameters: {trainable} of {total} ({percent:.4} %)");
}

fn describe_data(samples: &SampleSet) -> String {
    let hashes: Vec<String> =
        samples.hash_names.iter().map(|hash| format!("`{}`", escape_control(hash))).collect();
    format!(
        "{} training samples with {} tokens, of which {} carry loss; hashes: {}.",
        samples.samples.len(),
        samples.token_count(),
        samples.labelled_count(),
        hashes.join(", ")
    )
}

fn report(
    cli: &Cli,
    config: &TrainingConfig,
    writer: &AdapterWriter<'_>,
    summary: &TrainingSummary,
) -> Result<()> {
    let output_dir = config.output_dir.display();
    let best = summary
        .best_validation
        .map(|(step, loss)| json!({ "step": step, "loss": loss, "folder": writer.best_folder() }));
    let tokens_per_second = summary.tokens as f64 / summary.training_seconds.max(1e-9);
    if cli.json {
        let result = json!({
            "output_dir": config.output_dir,
            "steps": summary.steps,
            "first_loss": summary.first_loss,
            "last_loss": summary.last_loss,
            "validation_loss": summary.last_validation_loss,
            "best": best,
            "tokens": summary.tokens,
            "training_seconds": summary.training_seconds,
        });
        return super::output::print_line(&result.to_string());
    }
    info!(
        "{} steps in {}, {tokens_per_second:.0} tokens/s; training loss {:.4} at the first step, {:.4} at the last",
        summary.steps,
        human_time(summary.training_seconds),
        summary.first_loss,
        summary.last_loss
    );
    if let Some((step, loss)) = summary.best_validation {
        info!("best validation loss {loss:.4} at step {step}: {}", writer.best_folder().display());
    }
    info!("adapter: {output_dir}");
    info!("next: fastlora generate --adapter {output_dir} --hash HASH --prompt TEXT");
    Ok(())
}
