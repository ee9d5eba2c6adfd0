//! The configuration as resolved: every key with its value, checked.

use std::path::PathBuf;

use chrono::NaiveDate;
use serde::Serialize;

use super::{
    ActivationMemory, DataSource, HashTemplate, InitLoraWeights, LossOn, LrScheduler, OnBadRecord, OnNan,
    Options, Overlong, PatternMap, ReportFormat, SaveEvery, TargetModules, TileSource, TokenCache,
    check_compute_choices,
};
use crate::error::{Error, Result};

/// The configuration that `fastlora train` runs where no file is named.
pub const DEFAULT_CONFIG_PATH: &str = "configs/training_config.json";

/// What is read, how it is trained and where it goes; saved as JSON it is a configuration that gives the same run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TrainingConfig {
    /// Base model: a folder, or a hub id `org/name[@revision]`.
    pub model_name: String,
    /// Files of training data, merged in order.
    pub train_data: Vec<DataSource>,
    /// Files of validation data; none: no validation.
    pub val_data: Option<Vec<DataSource>>,
    /// Share of the training samples that is held out for validation.
    pub val_fraction: Option<f64>,
    /// Where tokenised data are kept for the next start.
    pub token_cache: TokenCache,
    /// Folder for everything written.
    pub output_dir: PathBuf,
    /// Adapter folder that the run starts from; none: PEFT's start.
    pub init_adapter: Option<PathBuf>,
    /// Field that holds the instruction; none: searched.
    pub instruction_key: Option<String>,
    /// Field that holds the output; none: searched.
    pub output_key: Option<String>,
    /// Field that holds the hash; none: searched.
    pub hash_key: Option<String>,
    /// Text in front of a sample that carries its hash.
    pub hash_template: HashTemplate,
    /// Chance that a sample of an epoch is learned without it.
    pub hash_dropout: f64,
    /// Chat template of conversations, by name or file; none: the model's own.
    pub chat_template: Option<String>,
    /// Day that chat templates see; none: today.
    pub chat_date: Option<NaiveDate>,
    /// Longest sample in tokens.
    pub max_length: usize,
    /// Samples of one micro-batch; with `packing`, rows.
    pub batch_size: usize,
    /// Micro-batches of one optimizer step.
    pub gradient_accumulation_steps: usize,
    /// Whether whole samples are packed into rows of `max_length` tokens.
    pub packing: bool,
    /// Whether samples of like length meet in a micro-batch.
    pub bucket_by_length: bool,
    /// Whether each hash has as many samples an epoch as the one that has most.
    pub balance_by_hash: bool,
    /// Passes over the training data, unless `max_steps` is given.
    pub num_epochs: u64,
    /// Optimizer steps of the run.
    pub max_steps: Option<u64>,
    /// Whether the order of the samples is drawn anew each epoch.
    pub shuffle: bool,
    /// Seed of the order, the adapters' start, the dropout masks and the noise.
    pub seed: u64,
    /// Which tokens carry loss.
    pub loss_on: LossOn,
    /// What happens to a record that cannot be used.
    pub on_bad_record: OnBadRecord,
    /// What happens to a sample longer than `max_length`.
    pub overlong: Overlong,
    /// Inner width of the adapters, r.
    pub lora_r: usize,
    /// Scale of the adapters, α.
    pub lora_alpha: f64,
    /// Chance of a zero in an adapter's input while training.
    pub lora_dropout: f64,
    /// α of the noise on the embeddings while training (NEFTune, Jain et al. 2023); 0: none.
    pub neftune_noise_alpha: f64,
    /// Linears to adapt.
    pub lora_target_modules: TargetModules,
    /// Scale by α/√r.
    pub use_rslora: bool,
    /// Whether every target has magnitudes (DoRA, Liu et al. 2024).
    pub use_dora: bool,
    /// How A and B begin.
    pub init_lora_weights: InitLoraWeights,
    /// Ranks of modules that differ from `lora_r`.
    pub rank_pattern: PatternMap<usize>,
    /// Scales of modules that differ from `lora_alpha`.
    pub alpha_pattern: PatternMap<f64>,
    /// Layers whose targets are adapted, in order; empty: all.
    pub layers_to_transform: Vec<usize>,
    /// Ends of the names of modules that are trained whole.
    pub modules_to_save: Vec<String>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Rate of every B over that of the As (LoRA+, Hayou et al. 2024); 1: the same.
    pub loraplus_lr_ratio: f64,
    /// How the rate moves after the warm-up.
    pub lr_scheduler: LrScheduler,
    /// Steps over which the rate rises from 0.
    pub warmup_steps: u64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's β₁.
    pub adam_beta1: f64,
    /// AdamW's β₂.
    pub adam_beta2: f64,
    /// AdamW's ε.
    pub adam_epsilon: f64,
    /// Gradients are scaled down to this global norm.
    pub max_grad_norm: f64,
    /// Steps between validations; none: one each epoch.
    pub val_every: Option<u64>,
    /// Validations without a lower loss after which the run ends; none: it does not end for that.
    pub early_stopping_patience: Option<u64>,
    /// What happens to a step whose loss or gradients are not finite.
    pub on_nan: OnNan,
    /// When checkpoints are saved.
    pub save_every: SaveEvery,
    /// Newest checkpoints that are kept.
    pub keep_checkpoints: usize,
    /// What shows the run besides its log.
    pub report: Vec<ReportFormat>,
    /// File of prompts that the model answers while it is trained; none: it answers none.
    pub test_cases: Option<PathBuf>,
    /// Steps between answers to the test cases; none: once each epoch.
    pub sample_every: Option<u64>,
    /// `auto`, `cpu` or `cuda[:N][:portable]`.
    pub device: String,
    /// Compute type.
    pub dtype: String,
    /// CPU threads; none: all cores.
    pub threads: Option<usize>,
    /// Where the tiles of Hopper's products come from.
    pub tiles: TileSource,
    /// How much of a forward's activations is kept for the backward.
    pub activation_memory: ActivationMemory,
}

impl TrainingConfig {
    /// Fills in the defaults and checks every value.
    ///
    /// # Errors
    /// A value outside its range, with the range.
    pub fn resolve(options: &Options) -> Result<Self> {
        let options = options.clone();
        let default_targets = || TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]);
        let default_source = |path: &str| vec![DataSource::new(path)];
        let key = |key: Option<String>| key.filter(|key| key != "detect");
        let config = Self {
            model_name: options.model_name.unwrap_or_else(|| "HuggingFaceTB/SmolLM2-135M-Instruct".into()),
            train_data: options.train_data.unwrap_or_else(|| default_source("data/train_data.json")),
            val_data: options
                .val_data
                .or_else(|| options.val_fraction.is_none().then(|| default_source("data/val_data.json")))
                .filter(|sources| !sources.is_empty() && *sources != default_source("none")),
            val_fraction: options.val_fraction,
            token_cache: options.token_cache.unwrap_or_default(),
            output_dir: options.output_dir.unwrap_or_else(|| "outputs".into()),
            init_adapter: options.init_adapter,
            instruction_key: key(options.instruction_key),
            output_key: key(options.output_key),
            hash_key: key(options.hash_key),
            hash_template: options.hash_template.unwrap_or_default(),
            hash_dropout: options.hash_dropout.unwrap_or(0.0),
            chat_template: options.chat_template,
            chat_date: options.chat_date,
            max_length: options.max_length.unwrap_or(512),
            batch_size: options.batch_size.unwrap_or(4),
            gradient_accumulation_steps: options.gradient_accumulation_steps.unwrap_or(1),
            packing: options.packing.unwrap_or(false),
            bucket_by_length: options.bucket_by_length.unwrap_or(false),
            balance_by_hash: options.balance_by_hash.unwrap_or(false),
            num_epochs: options.num_epochs.unwrap_or(3),
            max_steps: options.max_steps,
            shuffle: options.shuffle.unwrap_or(true),
            seed: options.seed.unwrap_or(42),
            loss_on: options.loss_on.unwrap_or_default(),
            on_bad_record: options.on_bad_record.unwrap_or_default(),
            overlong: options.overlong.unwrap_or_default(),
            lora_r: options.lora_r.unwrap_or(8),
            lora_alpha: options.lora_alpha.unwrap_or(16.0),
            lora_dropout: options.lora_dropout.unwrap_or(0.05),
            neftune_noise_alpha: options.neftune_noise_alpha.unwrap_or(0.0),
            lora_target_modules: options.lora_target_modules.unwrap_or_else(default_targets),
            use_rslora: options.use_rslora.unwrap_or(false),
            use_dora: options.use_dora.unwrap_or(false),
            init_lora_weights: options.init_lora_weights.unwrap_or_default(),
            rank_pattern: options.rank_pattern.unwrap_or_default(),
            alpha_pattern: options.alpha_pattern.unwrap_or_default(),
            layers_to_transform: in_order(options.layers_to_transform.unwrap_or_default()),
            modules_to_save: options.modules_to_save.unwrap_or_default(),
            learning_rate: options.learning_rate.unwrap_or(2e-4),
            loraplus_lr_ratio: options.loraplus_lr_ratio.unwrap_or(1.0),
            lr_scheduler: options.lr_scheduler.unwrap_or_default(),
            warmup_steps: options.warmup_steps.unwrap_or(0),
            weight_decay: options.weight_decay.unwrap_or(0.01),
            adam_beta1: options.adam_beta1.unwrap_or(0.9),
            adam_beta2: options.adam_beta2.unwrap_or(0.999),
            adam_epsilon: options.adam_epsilon.unwrap_or(1e-8),
            max_grad_norm: options.max_grad_norm.unwrap_or(1.0),
            val_every: options.val_every,
            early_stopping_patience: options.early_stopping_patience,
            on_nan: options.on_nan.unwrap_or_default(),
            save_every: options.save_every.unwrap_or(SaveEvery::Minutes(10)),
            keep_checkpoints: options.keep_checkpoints.unwrap_or(2),
            report: options.report.unwrap_or_else(|| vec![ReportFormat::Html]),
            test_cases: options.test_cases,
            sample_every: options.sample_every,
            device: options.device.unwrap_or_else(|| "auto".into()),
            dtype: options.dtype.unwrap_or_else(|| "auto".into()),
            threads: options.threads,
            tiles: options.tiles.unwrap_or_default(),
            activation_memory: options.activation_memory.unwrap_or_default(),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let non_negative = |value: f64| value.is_finite() && value >= 0.0;
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let below_one = |value: f64| (0.0..1.0).contains(&value);
        let checks: &[(&str, String, bool, &str)] = &[
            (
                "max_length",
                self.max_length.to_string(),
                (2..=1 << 24).contains(&self.max_length),
                "2 to 16777216",
            ),
            (
                "batch_size",
                self.batch_size.to_string(),
                (1..=1 << 20).contains(&self.batch_size),
                "1 to 1048576",
            ),
            (
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps.to_string(),
                (1..=1 << 20).contains(&self.gradient_accumulation_steps),
                "1 to 1048576",
            ),
            ("num_epochs", self.num_epochs.to_string(), self.num_epochs >= 1, "1 or more"),
            ("max_steps", format!("{:?}", self.max_steps), self.max_steps != Some(0), "1 or more"),
            ("val_every", format!("{:?}", self.val_every), self.val_every != Some(0), "1 or more"),
            ("sample_every", format!("{:?}", self.sample_every), self.sample_every != Some(0), "1 or more"),
            ("keep_checkpoints", self.keep_checkpoints.to_string(), self.keep_checkpoints >= 1, "1 or more"),
            (
                "early_stopping_patience",
                format!("{:?}", self.early_stopping_patience),
                self.early_stopping_patience != Some(0),
                "1 or more",
            ),
            (
                "val_fraction",
                format!("{:?}", self.val_fraction),
                self.val_fraction.is_none_or(|share| 0.0 < share && share < 1.0),
                "above 0 and below 1",
            ),
            ("lora_r", self.lora_r.to_string(), RANKS.contains(&self.lora_r), "1 to 4096"),
            ("lora_alpha", self.lora_alpha.to_string(), positive(self.lora_alpha), "above 0"),
            (
                "lora_dropout",
                self.lora_dropout.to_string(),
                below_one(self.lora_dropout) && (self.lora_dropout as f32) < 1.0,
                "0 or more and below 1",
            ),
            (
                "hash_dropout",
                self.hash_dropout.to_string(),
                (0.0..=1.0).contains(&self.hash_dropout),
                "0 to 1",
            ),
            (
                "neftune_noise_alpha",
                self.neftune_noise_alpha.to_string(),
                non_negative(self.neftune_noise_alpha) && (self.neftune_noise_alpha as f32).is_finite(),
                "0 or more",
            ),
            ("learning_rate", self.learning_rate.to_string(), positive(self.learning_rate), "above 0"),
            (
                "loraplus_lr_ratio",
                self.loraplus_lr_ratio.to_string(),
                positive(self.loraplus_lr_ratio),
                "above 0",
            ),
            ("weight_decay", self.weight_decay.to_string(), non_negative(self.weight_decay), "0 or more"),
            ("adam_beta1", self.adam_beta1.to_string(), below_one(self.adam_beta1), "0 or more and below 1"),
            ("adam_beta2", self.adam_beta2.to_string(), below_one(self.adam_beta2), "0 or more and below 1"),
            (
                "adam_epsilon",
                self.adam_epsilon.to_string(),
                // In f32 a smaller one is zero, and 0/0 follows where a gradient is zero.
                positive(self.adam_epsilon) && self.adam_epsilon as f32 >= f32::MIN_POSITIVE,
                "1.2e-38 or more",
            ),
            ("max_grad_norm", self.max_grad_norm.to_string(), positive(self.max_grad_norm), "above 0"),
        ];
        if let Some((key, value, _, range)) = checks.iter().find(|(_, _, in_range, _)| !in_range) {
            return Err(Error::config(format!("{value} is out of range"))
                .at(*key)
                .hint(format!("it must be {range}")));
        }
        if self.train_data.is_empty() {
            return Err(Error::config("no training data").at("train_data").hint("name at least one file"));
        }
        for (key, is_empty) in [
            ("model_name", self.model_name.is_empty()),
            ("chat_template", self.chat_template.as_deref() == Some("")),
            ("output_dir", self.output_dir.as_os_str().is_empty()),
            ("test_cases", self.test_cases.as_ref().is_some_and(|path| path.as_os_str().is_empty())),
            ("train_data", self.train_data.iter().any(|source| source.path.as_os_str().is_empty())),
            ("val_data", self.val_data.iter().flatten().any(|source| source.path.as_os_str().is_empty())),
        ] {
            if is_empty {
                return Err(Error::config("the name is empty").at(key).hint("give a name, or leave it out"));
            }
        }
        if self.val_fraction.is_some() && self.val_data.is_some() {
            return Err(Error::config(
                "the validation samples come from val_data or from val_fraction, not both",
            )
            .at("val_fraction")
            .hint("remove one of the two"));
        }
        if self.early_stopping_patience.is_some() && self.val_fraction.is_none() && self.val_data.is_none() {
            return Err(Error::config("there is no validation to judge by")
                .at("early_stopping_patience")
                .hint("name val_data, or give val_fraction"));
        }
        if self.sample_every.is_some() && self.test_cases.is_none() {
            return Err(Error::config("there are no prompts to answer")
                .at("sample_every")
                .hint("name a file of them with test_cases"));
        }
        if self.bucket_by_length && (self.packing || !self.shuffle) {
            let (reason, hint) = match self.packing {
                true => ("packed rows are of like length already", "remove one of the two: packing or this"),
                false => {
                    ("with shuffle = false the order of the data stays", "remove it, or set shuffle to true")
                }
            };
            return Err(Error::config(reason).at("bucket_by_length").hint(hint));
        }
        let is_weighted = |source: &&DataSource| source.weight.is_some_and(|weight| weight != 1.0);
        if let Some(source) = self.val_data.iter().flatten().find(is_weighted) {
            return Err(Error::config(format!(
                "{} has a weight: each validation sample counts once",
                source.path.display()
            ))
            .at("val_data")
            .hint("remove it"));
        }
        check_compute_choices(&self.device, &self.dtype, self.threads)?;
        self.check_targets()?;
        for source in self.train_data.iter().chain(self.val_data.iter().flatten()) {
            source.validate()?;
        }
        Ok(())
    }

    /// What can be told of the adapters' places and sizes without a model.
    fn check_targets(&self) -> Result<()> {
        self.lora_target_modules.validate().map_err(|error| error.at("lora_target_modules"))?;
        self.rank_pattern.compile().map_err(|error| error.at("rank_pattern"))?;
        self.alpha_pattern.compile().map_err(|error| error.at("alpha_pattern"))?;
        if self.init_lora_weights.is_pissa() {
            let conflict = if self.use_dora {
                Some(("DoRA's magnitudes are lost where PiSSA is saved as a plain adapter", "use_dora"))
            } else if self.init_adapter.is_some() {
                Some(("the run begins with the adapter of init_adapter", "init_adapter"))
            } else {
                None
            };
            if let Some((reason, other)) = conflict {
                return Err(Error::config(reason)
                    .at("init_lora_weights")
                    .hint(format!("remove one of the two: {other} or this")));
            }
        }
        let out_of_range = |key: &str, pattern: &str, value: String, range: &str| {
            Error::config(format!("`{pattern}`: {value} is out of range"))
                .at(key)
                .hint(format!("it must be {range}"))
        };
        if let Some((pattern, rank)) = self.rank_pattern.entries().find(|(_, rank)| !RANKS.contains(rank)) {
            return Err(out_of_range("rank_pattern", pattern, rank.to_string(), "1 to 4096"));
        }
        let is_positive = |alpha: f64| alpha.is_finite() && alpha > 0.0;
        if let Some((pattern, alpha)) = self.alpha_pattern.entries().find(|(_, alpha)| !is_positive(**alpha))
        {
            return Err(out_of_range("alpha_pattern", pattern, alpha.to_string(), "above 0"));
        }
        if matches!(self.lora_target_modules, TargetModules::Pattern(_))
            && !self.layers_to_transform.is_empty()
        {
            return Err(Error::config("PEFT takes it with a list of module names only")
                .at("layers_to_transform")
                .hint(
                    "give lora_target_modules as a list, [\"q_proj\", \"v_proj\"], or name the layers in its expression",
                ));
        }
        Ok(())
    }
}

/// Ranks that an adapter may have.
const RANKS: std::ops::RangeInclusive<usize> = 1..=4096;

/// As PEFT reads it, a list of layers is a set.
fn in_order(mut layers: Vec<usize>) -> Vec<usize> {
    layers.sort_unstable();
    layers.dedup();
    layers
}

#[cfg(test)]
mod tests;
