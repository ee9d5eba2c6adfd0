//! `fastlora evaluate`: losses by hash, the model's own answers, and how much the hash steers.

mod generated;
mod swapped;

use std::sync::Arc;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

use self::generated::{HashPattern, Questions};
use self::swapped::Swaps;
use super::Cli;
use super::conditioning::{Conditioning, HashArgs};
use super::device::{DeviceArgs, on_backend};
use super::model::ModelArgs;
use super::output::print_line;
use super::tokenizer::{ChatArgs, tokenizer_for};
use crate::backend::Backend;
use crate::config::{DataSource, LossOn, OnBadRecord, Overlong};
use crate::data::{LoadOptions, Outcome, Record, load};
use crate::error::{Error, Result, escape_control};
use crate::evaluation::{Evaluation, Figures};
use crate::tokens::{BatchOptions, SampleOptions, tokenise};
use crate::training::{Split, evaluate};

/// Arguments of `fastlora evaluate`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Data files: JSON or JSONL, plain, `.gz` or `.zst`.
    #[arg(required = true, value_name = "DATA")]
    data: Vec<DataSource>,
    /// Longest sample in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    max_length: usize,
    /// What happens to a longer sample.
    #[arg(long, value_enum, default_value_t)]
    overlong: Overlong,
    /// Which tokens carry loss.
    #[arg(long, value_enum, default_value_t)]
    loss_on: LossOn,
    /// What happens to a record that cannot be used.
    #[arg(long, value_enum, default_value_t)]
    on_bad_record: OnBadRecord,
    /// Samples computed at once.
    #[arg(long, value_name = "SAMPLES", default_value_t = 8)]
    batch_size: usize,
    /// Field that holds the instruction; without it, the usual names are tried.
    #[arg(long, value_name = "KEY")]
    instruction_key: Option<String>,
    /// Field that holds the output; without it, the usual names are tried.
    #[arg(long, value_name = "KEY")]
    output_key: Option<String>,
    /// Field that holds the hash; without it, the usual names are tried.
    #[arg(long, value_name = "KEY")]
    hash_key: Option<String>,
    /// Lets the model answer every record greedily, and scores the answers: exact match, token F1, expressions.
    #[arg(long)]
    generate: bool,
    /// A regular expression that answers under a hash should match, `*` for every hash; repeat for several.
    #[arg(long, value_name = "HASH=REGEX", requires = "generate")]
    regex: Vec<HashPattern>,
    /// At most this many tokens an answer.
    #[arg(long, value_name = "N", default_value_t = 128, requires = "generate")]
    max_new_tokens: usize,
    /// Measures the loss under every other hash too: how much the conditioning steers.
    #[arg(long)]
    swap_hash: bool,
    #[command(flatten)]
    chat: ChatArgs,
    #[command(flatten)]
    hash_text: HashArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &EvaluateArgs, cli: &Cli) -> Result<()> {
    args.device.validate()?;
    for (name, value) in [("max-length", args.max_length), ("batch-size", args.batch_size)] {
        if value == 0 {
            return Err(Error::config("0, expected at least 1").at(format!("--{name}")));
        }
    }
    let options = LoadOptions {
        instruction_key: args.instruction_key.clone(),
        output_key: args.output_key.clone(),
        hash_key: args.hash_key.clone(),
        on_bad_record: args.on_bad_record,
    };
    let dataset = load(&args.data, &options)?;
    let files = args.model.open(cli)?;
    let tokenizer =
        tokenizer_for([&dataset.kinds()], &files.base, args.model.adapter.as_deref(), &args.chat.choice())?;
    let conditioning = Conditioning::of(args.model.adapter.as_deref())?.with(&args.hash_text);
    conditioning.warn_about(dataset.records.iter().filter_map(Record::text_hash));
    let sample_options = SampleOptions {
        max_length: args.max_length,
        overlong: args.overlong,
        loss_on: args.loss_on,
        on_bad_record: args.on_bad_record,
        embedding_rows: files.base.config().vocabulary,
        hash_template: conditioning.template,
        also_without_hash: false,
    };
    let samples = tokenise(&dataset, tokenizer.as_ref(), &sample_options)?;
    samples.accounting.log();
    let batch_options = BatchOptions { batch_size: args.batch_size, ..BatchOptions::default() };
    let split = Split::new(&samples, batch_options)?;

    // All that can be refused is, before anything is computed.
    let positions = files.base.config().max_positions;
    let questions = match args.generate {
        true => Some(Questions::new(
            &dataset,
            tokenizer.as_ref(),
            &sample_options.hash_template,
            &args.regex,
            positions,
        )?),
        false => None,
    };
    let swaps = match args.swap_hash {
        true => Some(Swaps::new(&dataset, tokenizer.as_ref(), &sample_options)?),
        false => None,
    };

    let (evaluation, generated, swapped) = on_backend!(args.device.backend(&files.base)?, |backend| {
        let mut model = files.load(Arc::clone(&backend))?;
        let evaluation = backend.run(|| evaluate(&mut model, &split))?;
        let swapped = match &swaps {
            Some(swaps) => Some(swaps.measure(&mut model, &backend, batch_options, &evaluation)?),
            None => None,
        };
        let generated = match (&questions, &tokenizer) {
            (Some(questions), Some(tokenizer)) => {
                Some(questions.ask(&mut model, &backend, &files, tokenizer, args.max_new_tokens)?)
            }
            _ => None,
        };
        (evaluation, generated, swapped)
    });
    if cli.json {
        let mut object = args.model.to_json(&files);
        object["data"] = args.data.iter().map(|source| source.path.display().to_string()).collect();
        object["overall"] = evaluation.overall().to_json();
        object["by_hash"] =
            evaluation.by_hash().iter().map(|(hash, figures)| (hash.clone(), figures.to_json())).collect();
        let accounting = &samples.accounting;
        object["records"] = json!({
            "used": accounting.used,
            "truncated": accounting.count(Outcome::Truncated),
            "skipped": accounting.count(Outcome::Skipped),
            "dropped": accounting.count(Outcome::Dropped),
        });
        if let Some(generated) = generated {
            object["generated"] = generated.to_json();
        }
        if let Some(swapped) = swapped {
            object["swapped_hash"] = swapped.to_json();
        }
        return print_line(&format!("{object:#}"));
    }
    print_line(&table(&evaluation).to_string())?;
    if let Some(swapped) = swapped {
        print_line(&format!("loss with another hash in the text:\n{}", swapped.table()))?;
    }
    if let Some(generated) = generated {
        print_line(&format!("answers:\n{}", generated.table()))?;
    }
    Ok(())
}

/// One row for each hash, then one for all.
fn table(evaluation: &Evaluation) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(["hash", "samples", "labelled tokens", "loss", "perplexity", "token accuracy"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for (hash, figures) in evaluation.by_hash() {
        table.add_row(row(&escape_control(hash), figures));
    }
    table.add_row(row("all", &evaluation.overall()));
    table
}

fn row(name: &str, figures: &Figures) -> [String; 6] {
    let number = |value: Option<f64>, decimals: usize| {
        value.map_or("–".to_string(), |value| format!("{value:.decimals$}"))
    };
    [
        name.to_string(),
        figures.samples.to_string(),
        figures.labelled_tokens.to_string(),
        number(figures.loss(), 4),
        number(figures.perplexity(), 3),
        figures.token_accuracy().map_or("–".to_string(), |accuracy| format!("{:.1} %", 100.0 * accuracy)),
    ]
}
