//! The configuration as typed: every key optional, from a file, `--set key=value` and flags of the same names.

use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use clap::{Args, CommandFactory};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::comments::blank_comments;
use super::{
    ActivationMemory, DataSource, HashTemplate, InitLoraWeights, LossOn, LrScheduler, OnBadRecord, OnNan,
    Overlong, PatternMap, ReportFormat, SaveEvery, TargetModules, TileSource, TokenCache,
};
use crate::error::{Error, Result};

/// Every key of the training configuration; what is absent takes its default in
/// [`TrainingConfig::resolve`](super::TrainingConfig::resolve).
#[derive(Args, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[command(next_help_heading = "Configuration (each overrides the file's key)")]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// What editors complete from: `fastlora schema > FILE`, then its name here.
    #[arg(skip)]
    #[serde(default, rename = "$schema", skip_serializing)]
    pub schema: Option<String>,
    /// Base model: a folder, or a hub id `org/name[@revision]`.
    #[arg(short = 'm', long, visible_alias = "model", value_name = "MODEL")]
    pub model_name: Option<String>,
    /// Training data: a file, or several (repeat the flag).
    #[arg(long, value_name = "FILE")]
    #[serde(default, deserialize_with = "one_or_many")]
    #[schemars(schema_with = "super::schema::sources")]
    pub train_data: Option<Vec<DataSource>>,
    /// Validation data: a file, or several; `none` for no validation (`null` in a file).
    #[arg(long, value_name = "FILE")]
    #[serde(default, deserialize_with = "null_one_or_many")]
    #[schemars(schema_with = "super::schema::sources")]
    pub val_data: Option<Vec<DataSource>>,
    /// Share of the training samples that is held out for validation, instead of `val_data`.
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub val_fraction: Option<f64>,
    /// Where tokenised data are kept for the next start: `auto`, `off` or a folder.
    #[arg(long, value_name = "auto|off|DIR")]
    #[schemars(with = "Option<String>")]
    pub token_cache: Option<TokenCache>,
    /// Folder for the adapter, the metrics and the resolved configuration.
    #[arg(short, long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Starts from this PEFT adapter, with its rank, scale and modules.
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
    /// Field that holds the instruction; `detect` searches the usual names.
    #[arg(long, value_name = "KEY")]
    pub instruction_key: Option<String>,
    /// Field that holds the output; `detect` searches the usual names.
    #[arg(long, value_name = "KEY")]
    pub output_key: Option<String>,
    /// Field that holds the hash; `detect` searches the usual names.
    #[arg(long, value_name = "KEY")]
    pub hash_key: Option<String>,
    /// Text in front of a sample that carries its hash; it holds `{hash}` once.
    #[arg(long, value_name = "TEXT")]
    #[schemars(schema_with = "super::schema::hash_template")]
    pub hash_template: Option<HashTemplate>,
    /// Chance that a sample of an epoch is learned without its hash in front.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub hash_dropout: Option<f64>,
    /// Chat template of conversations: one of the model's by name, a `.jinja` file, or `chatml`.
    #[arg(long, value_name = "TEMPLATE")]
    pub chat_template: Option<String>,
    /// Day that chat templates see (2026-01-31); without it, today.
    #[arg(long, value_name = "DATE")]
    pub chat_date: Option<NaiveDate>,
    /// Longest sample in tokens.
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<usize>,
    /// Samples of one micro-batch; with `packing`, rows.
    #[arg(long, value_name = "SAMPLES")]
    pub batch_size: Option<usize>,
    /// Micro-batches of one optimizer step.
    #[arg(long, value_name = "N")]
    pub gradient_accumulation_steps: Option<usize>,
    /// Whether whole samples are packed into rows of `max_length` tokens; attention never crosses them.
    #[arg(long, value_name = "BOOL")]
    pub packing: Option<bool>,
    /// Whether samples of like length meet in a micro-batch.
    #[arg(long, value_name = "BOOL")]
    pub bucket_by_length: Option<bool>,
    /// Whether each hash has as many samples an epoch as the one that has most.
    #[arg(long, value_name = "BOOL")]
    pub balance_by_hash: Option<bool>,
    /// Passes over the training data.
    #[arg(long, value_name = "N")]
    pub num_epochs: Option<u64>,
    /// Optimizer steps; replaces `num_epochs`.
    #[arg(long, value_name = "N")]
    pub max_steps: Option<u64>,
    /// Whether the order of the samples is drawn anew each epoch.
    #[arg(long, value_name = "BOOL")]
    pub shuffle: Option<bool>,
    /// Seed of the order, the adapters' start, the dropout masks and the noise.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Which tokens carry loss.
    #[arg(long, value_enum)]
    pub loss_on: Option<LossOn>,
    /// What happens to a record that cannot be used.
    #[arg(long, value_enum)]
    pub on_bad_record: Option<OnBadRecord>,
    /// What happens to a sample longer than `max_length`.
    #[arg(long, value_enum)]
    pub overlong: Option<Overlong>,
    /// Inner width of the adapters, r.
    #[arg(long, value_name = "R")]
    pub lora_r: Option<usize>,
    /// Scale of the adapters, α; their output is multiplied by α/r.
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true)]
    pub lora_alpha: Option<f64>,
    /// Chance of a zero in an adapter's input while training.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub lora_dropout: Option<f64>,
    /// Noise on the embeddings while training, α of NEFTune: uniform in ±α/√(length · width).
    #[arg(long, value_name = "ALPHA", allow_negative_numbers = true)]
    pub neftune_noise_alpha: Option<f64>,
    /// Linears to adapt: names (`q_proj,v_proj`), a regular expression, or `all-linear`.
    #[arg(long, value_name = "MODULES", value_parser = parse_targets)]
    pub lora_target_modules: Option<TargetModules>,
    /// Scale by α/√r.
    #[arg(long, value_name = "BOOL")]
    pub use_rslora: Option<bool>,
    /// Gives every target magnitudes, one an output (DoRA).
    #[arg(long, value_name = "BOOL")]
    pub use_dora: Option<bool>,
    /// How A and B begin: `true` (A random, B zero), `pissa` or `pissa_niter_N` (from the weight's largest singular values).
    #[arg(long, value_name = "INIT")]
    #[schemars(schema_with = "super::schema::init_lora_weights")]
    pub init_lora_weights: Option<InitLoraWeights>,
    /// Ranks of modules that differ from `lora_r`: patterns of their names with r.
    #[arg(long, value_name = "PATTERN=R,…")]
    pub rank_pattern: Option<PatternMap<usize>>,
    /// Scales of modules that differ from `lora_alpha`: patterns of their names with α.
    #[arg(long, value_name = "PATTERN=ALPHA,…")]
    pub alpha_pattern: Option<PatternMap<f64>>,
    /// Layers whose targets are adapted, from 0; without it, all.
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules whose weights are trained whole: ends of names (`lm_head,model.norm`).
    #[arg(long, value_name = "MODULES", value_delimiter = ',')]
    pub modules_to_save: Option<Vec<String>>,
    /// Peak learning rate.
    #[arg(long, value_name = "RATE", allow_negative_numbers = true)]
    pub learning_rate: Option<f64>,
    /// Rate of every B over that of the As (LoRA+).
    #[arg(long, value_name = "RATIO", allow_negative_numbers = true)]
    pub loraplus_lr_ratio: Option<f64>,
    /// How the rate moves after the warm-up.
    #[arg(long, value_enum)]
    pub lr_scheduler: Option<LrScheduler>,
    /// Steps over which the rate rises from 0.
    #[arg(long, value_name = "N")]
    pub warmup_steps: Option<u64>,
    /// Decoupled weight decay.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub weight_decay: Option<f64>,
    /// AdamW's β₁.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub adam_beta1: Option<f64>,
    /// AdamW's β₂.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub adam_beta2: Option<f64>,
    /// AdamW's ε.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub adam_epsilon: Option<f64>,
    /// Gradients are scaled down to this global norm.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub max_grad_norm: Option<f64>,
    /// Steps between validations; without it, one each epoch.
    #[arg(long, value_name = "STEPS")]
    pub val_every: Option<u64>,
    /// Ends the run after so many validations without a lower loss.
    #[arg(long, value_name = "N")]
    pub early_stopping_patience: Option<u64>,
    /// What happens to a step whose loss or gradients are not finite.
    #[arg(long, value_enum)]
    pub on_nan: Option<OnNan>,
    /// Steps (500) or time (10m, 2h) between checkpoints, or `never`.
    #[arg(long, value_name = "INTERVAL")]
    #[schemars(schema_with = "super::schema::save_every")]
    pub save_every: Option<SaveEvery>,
    /// Newest checkpoints that are kept.
    #[arg(long, value_name = "N")]
    pub keep_checkpoints: Option<usize>,
    /// What shows the run besides its log; with commas, or repeat the flag.
    #[arg(long, value_enum, value_name = "FORMAT", value_delimiter = ',')]
    pub report: Option<Vec<ReportFormat>>,
    /// Prompts that the model answers while it is trained: a JSON list of objects with `instruction`, `hash`, `expected`.
    #[arg(long, value_name = "FILE")]
    pub test_cases: Option<PathBuf>,
    /// Steps between answers to the test cases; without it, once each epoch.
    #[arg(long, value_name = "STEPS")]
    pub sample_every: Option<u64>,
    /// `auto`, `cpu` or `cuda[:N][:portable]` (the kernels of every GPU, not those of its generation).
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Compute type: `auto`, `f32`, `f16` or `bf16`.
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// CPU threads; without it, all cores.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Tiles of Hopper's products: `auto` (as `fastlora tune` measured), `rule`, or a file of its.
    #[arg(long, value_name = "auto|rule|FILE")]
    #[schemars(with = "Option<String>")]
    pub tiles: Option<TileSource>,
    /// How much of a forward's activations is kept for the backward; the rest is computed again.
    #[arg(long, value_enum)]
    pub activation_memory: Option<ActivationMemory>,
}

/// For help and for the list of keys.
#[derive(clap::Parser)]
pub(super) struct Keys {
    #[command(flatten)]
    _options: Options,
}

impl Options {
    /// Every key, in the order of the documentation.
    pub fn keys() -> Vec<String> {
        Keys::command().get_arguments().map(|argument| argument.get_id().to_string()).collect()
    }

    /// Reads a JSON file, which may have comments (`//`, `/* */`) and commas after last entries.
    ///
    /// # Errors
    /// A file that cannot be read, broken JSON, an unknown key or a value of the wrong type, with line and column.
    pub fn from_file(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| {
            let hint = match source.kind() {
                std::io::ErrorKind::IsADirectory => {
                    "a folder is no configuration: -m FOLDER names a model, --resume FOLDER a run to go on with"
                }
                _ => "name an existing file: fastlora train CONFIG",
            };
            Error::config("cannot read the configuration").at(&place).caused_by(source).hint(hint)
        })?;
        let at = |error: &serde_json::Error| format!("{place}:{}:{}", error.line(), error.column());
        let text = blank_comments(text.trim_start_matches('\u{feff}'));
        let map: Map<String, Value> = serde_json::from_str(&text).map_err(|error| {
            let refusal = Error::config(format!("no JSON object: {error}")).at(at(&error));
            let is_lines = path.extension().is_some_and(|ending| ending == "jsonl" || ending == "ndjson");
            match is_lines || text.trim_start().starts_with('[') {
                true => refusal.hint(format!("this looks like data: fastlora train --train-data {place}")),
                false => refusal,
            }
        })?;
        Self::check_keys(&map, &place)?;
        serde_json::from_str(&text).map_err(|error| Error::config(error.to_string()).at(at(&error)))
    }

    /// Reads `key=value` pairs; a value is JSON, or else a string.
    ///
    /// # Errors
    /// A pair without `=`, an unknown key, or a value of the wrong type.
    pub fn from_pairs(pairs: &[String]) -> Result<Self> {
        Self::default().with_pairs(pairs)
    }

    /// These options with `key=value` pairs over them; `null` takes a value back, so that the default holds.
    ///
    /// # Errors
    /// As [`from_pairs`](Self::from_pairs).
    pub fn with_pairs(&self, pairs: &[String]) -> Result<Self> {
        let mut map = Map::new();
        for pair in pairs {
            let Some((key, text)) = pair.split_once('=') else {
                return Err(Error::config(format!("`{pair}` has no `=`"))
                    .at("--set")
                    .hint("write --set key=value"));
            };
            let value = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_string()));
            map.insert(key.trim().to_string(), value);
        }
        Self::check_keys(&map, "--set")?;
        let taken_back: Vec<String> =
            map.iter().filter(|(_, value)| value.is_null()).map(|(key, _)| key.clone()).collect();
        Ok(Self::from_map(map, "--set")?.over(self, &taken_back))
    }

    /// These options, and `lower`'s where these are silent.
    pub fn or(&self, lower: &Self) -> Self {
        self.over(lower, &[])
    }

    /// These options, and where they are silent `lower`'s but for the keys in `taken_back`.
    fn over(&self, lower: &Self, taken_back: &[String]) -> Self {
        // Not by way of JSON, which has no NaN: a rate of NaN must reach the check that refuses it.
        macro_rules! each_field {
            ($($field:ident)*) => {
                Self { $($field: self.$field.clone().or_else(|| {
                    lower.$field.clone().filter(|_| !taken_back.iter().any(|key| key == stringify!($field)))
                }),)* }
            };
        }
        each_field! {
            schema model_name train_data val_data val_fraction token_cache output_dir init_adapter instruction_key output_key hash_key
            hash_template hash_dropout chat_template chat_date max_length batch_size gradient_accumulation_steps packing bucket_by_length
            balance_by_hash num_epochs max_steps shuffle
            seed loss_on on_bad_record overlong lora_r lora_alpha lora_dropout neftune_noise_alpha
            lora_target_modules use_rslora use_dora init_lora_weights rank_pattern alpha_pattern layers_to_transform modules_to_save
            learning_rate loraplus_lr_ratio lr_scheduler warmup_steps
            weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm val_every
            early_stopping_patience on_nan save_every keep_checkpoints report test_cases sample_every device dtype threads tiles activation_memory
        }
    }

    fn from_map(map: Map<String, Value>, place: &str) -> Result<Self> {
        // One key at a time, so that the error can name it.
        for (key, value) in &map {
            let single = Map::from_iter([(key.clone(), value.clone())]);
            serde_json::from_value::<Self>(Value::Object(single))
                .map_err(|error| Error::config(error.to_string()).at(format!("{place} {key}")))?;
        }
        serde_json::from_value(Value::Object(map)).map_err(|error| Error::config(error.to_string()).at(place))
    }

    fn check_keys(map: &Map<String, Value>, place: &str) -> Result<()> {
        let keys = Self::keys();
        let Some(unknown) = map.keys().find(|key| !keys.contains(key) && *key != "$schema") else {
            return Ok(());
        };
        let nearest = keys.iter().max_by(|one, other| {
            strsim::jaro_winkler(one, unknown).total_cmp(&strsim::jaro_winkler(other, unknown))
        });
        let error = Error::config(format!("unknown key `{unknown}`")).at(place);
        Err(match nearest {
            Some(key) if strsim::jaro_winkler(key, unknown) > 0.7 => {
                error.hint(format!("did you mean `{key}`?"))
            }
            _ => error.hint(format!("the keys are {}", keys.join(", "))),
        })
    }
}

/// One source, or a list of them.
fn one_or_many<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<DataSource>>, D::Error> {
    // By hand, since an untagged enum would hide which key of a source is wrong.
    let value = Value::deserialize(deserializer)?;
    let sources = match value {
        Value::Null => return Ok(None),
        Value::Array(_) => serde_json::from_value::<Vec<DataSource>>(value),
        _ => serde_json::from_value::<DataSource>(value).map(|source| vec![source]),
    };
    sources.map(Some).map_err(serde::de::Error::custom)
}

/// `null` says that there is none, which is not the same as an absent key.
fn null_one_or_many<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<DataSource>>, D::Error> {
    Ok(Some(one_or_many(deserializer)?.unwrap_or_default()))
}

fn parse_targets(text: &str) -> Result<TargetModules, std::convert::Infallible> {
    let is_name =
        |entry: &str| entry.chars().all(|character| character.is_ascii_alphanumeric() || character == '_');
    Ok(if text != TargetModules::ALL_LINEAR && text.split(',').all(is_name) {
        TargetModules::Names(text.split(',').map(str::to_string).collect())
    } else {
        TargetModules::Pattern(text.to_string())
    })
}
