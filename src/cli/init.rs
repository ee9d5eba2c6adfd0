//! `fastlora init`: a configuration to start from, for a model and data.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::Cli;
use super::model::resolve_model;
use super::output::print_line;
use super::tokenizer::tokenizer_for;
use crate::checkpoint::atomic::replace_file;
use crate::checkpoint::base::BaseModel;
use crate::config::{
    Choice, DataSource, OnBadRecord, Options, Overlong, TrainingConfig, starting_configuration,
};
use crate::data::{Dataset, Kinds, LoadOptions, TemplateChoice, load};
use crate::error::{Error, Result};
use crate::tokens::{SampleOptions, tokenise};

/// `max_length` is the longest sample rounded up to a multiple of this.
const LENGTH_MULTIPLE: usize = 64;
/// Tokens that one micro-batch should have at least, where there are so many samples.
const TOKENS_A_BATCH: usize = 512;
/// Samples of one micro-batch at most.
const LARGEST_BATCH: usize = 32;

/// Arguments of `fastlora init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The file to write. It has comments, which the parser of configurations takes.
    #[arg(value_name = "FILE", default_value = "training_config.json")]
    file: PathBuf,
    /// Base model: a folder, or a hub id `org/name[@revision]`; without it, the default one.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Training data: a file, or several (repeat the flag).
    #[arg(long, value_name = "FILE", required = true)]
    train_data: Vec<DataSource>,
    /// Validation data: a file, or several.
    #[arg(long, value_name = "FILE")]
    val_data: Vec<DataSource>,
    /// Replaces the file where it is there.
    #[arg(long)]
    overwrite: bool,
}

pub(super) fn run(args: &InitArgs, cli: &Cli) -> Result<()> {
    let place = || args.file.display().to_string();
    if args.file.exists() && !args.overwrite {
        return Err(Error::config("the file is there already")
            .at(place())
            .hint("name another, or give --overwrite to replace it"));
    }
    let defaults = TrainingConfig::resolve(&Options::default())?;
    let model_name = args.model.clone().unwrap_or(defaults.model_name);
    let options = LoadOptions { on_bad_record: OnBadRecord::Skip, ..LoadOptions::default() };
    let training = load(&args.train_data, &options)?;
    let validation = match args.val_data.is_empty() {
        true => None,
        false => Some(load(&args.val_data, &options)?),
    };
    let base = BaseModel::open(resolve_model(&model_name, cli)?.folder)?;
    let lengths = lengths(&base, [Some(&training), validation.as_ref()].into_iter().flatten())?;
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let mean = lengths.iter().sum::<usize>() / lengths.len().max(1);
    let max_length = longest.next_multiple_of(LENGTH_MULTIPLE).min(base.config().max_positions);
    let batch_size = TOKENS_A_BATCH.div_ceil(mean.max(1)).clamp(1, LARGEST_BATCH);

    let mut choices = vec![
        Choice::new("model_name", json!(model_name), ""),
        Choice::new("train_data", json!(args.train_data), format!("{} records", training.records.len())),
        match &validation {
            Some(validation) => {
                Choice::new("val_data", json!(args.val_data), format!("{} records", validation.records.len()))
            }
            None => Choice::new("val_data", json!(null), "none was given"),
        },
        Choice::new("output_dir", json!(output_dir(&args.file)), ""),
        Choice::new(
            "max_length",
            json!(max_length),
            format!("the longest of {} samples has {longest} tokens", lengths.len()),
        ),
        Choice::new("batch_size", json!(batch_size), format!("a sample has {mean} tokens in the mean")),
        Choice::new("num_epochs", json!(defaults.num_epochs), ""),
        Choice::new("lora_r", json!(defaults.lora_r), ""),
        Choice::new("lora_alpha", json!(defaults.lora_alpha), ""),
        Choice::new("lora_target_modules", json!("all-linear"), "learns more a step than q and v alone"),
        Choice::new("learning_rate", json!(defaults.learning_rate), ""),
    ];
    if longest > max_length {
        let reason = format!("the model was made for {max_length} positions, and some samples are longer");
        choices.push(Choice::new("overlong", json!(Overlong::Truncate), reason));
    }
    let skipped = training.accounting.exceptions.len();
    if skipped > 0 {
        let reason = format!("{skipped} records cannot be used; `fastlora inspect` names them");
        choices.push(Choice::new("on_bad_record", json!(OnBadRecord::Skip), reason));
    }
    let text = starting_configuration(&choices)?;
    replace_file(&args.file, text.as_bytes())?;
    if cli.json {
        return print_line(
            &json!({ "file": args.file, "max_length": max_length, "batch_size": batch_size }).to_string(),
        );
    }
    print_line(&format!(
        "{0}: written; look with fastlora train {0} --dry-run, then run fastlora train {0}",
        place()
    ))
}

/// Tokens of every usable sample.
fn lengths<'d>(base: &BaseModel, datasets: impl Iterator<Item = &'d Dataset> + Clone) -> Result<Vec<usize>> {
    let kinds: Vec<Kinds> = datasets.clone().map(Dataset::kinds).collect();
    let tokenizer = tokenizer_for(&kinds, base, None, &TemplateChoice::default())?;
    let options = SampleOptions::counting(base.config().vocabulary);
    let mut lengths = Vec::new();
    for dataset in datasets {
        let set = tokenise(dataset, tokenizer.as_ref(), &options)?;
        lengths.extend(set.token_counts());
    }
    Ok(lengths)
}

/// A folder for the run that is named as the file is.
fn output_dir(file: &Path) -> PathBuf {
    Path::new("outputs").join(file.file_stem().unwrap_or_default())
}
