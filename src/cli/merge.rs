//! `fastlora merge`: base + adapter → a Hugging Face folder, and how far its logits are from the pair's.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::Cli;
use super::describe::human_bytes;
use super::device::{DeviceArgs, on_backend};
use super::model::{ModelArgs, ModelFiles};
use super::output::print_line;
use crate::backend::Backend;
use crate::checkpoint::base::BaseModel;
use crate::error::{Error, Result};
use crate::export::merge;
use crate::inference::{NextTokenLogits, Session};
use crate::model::Transformer;

/// Tokens that both models read, one after the other.
const PROBE_TOKENS: usize = 16;

/// Arguments of `fastlora merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The folder to write.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Largest weight file; a number of bytes, or with KB, MB, GB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: u64,
    /// Replaces a folder that an earlier merge wrote.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.trim_end_matches(char::is_alphabetic).len());
    let factor = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err(format!("`{unit}` is no unit; there are KB, MB and GB")),
    };
    let size = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    size.filter(|&size| size > 0).ok_or_else(|| format!("`{text}` is no size, expected for example 5GB"))
}

pub(super) fn run(args: &MergeArgs, cli: &Cli) -> Result<()> {
    args.device.validate()?;
    let files = args.model.open(cli)?;
    let Some(adapter) = &files.adapter else {
        return Err(Error::config("there is nothing to merge")
            .at("--adapter")
            .hint("name the adapter's folder"));
    };
    let report = merge(&files.base, adapter, &args.output, args.max_shard_size, args.overwrite)?;

    let merged = ModelFiles { name: files.name.clone(), base: BaseModel::open(&args.output)?, adapter: None };
    let chosen = args.device.backend(&files.base)?;
    let Difference { largest, logits_up_to, same_first } =
        on_backend!(chosen, |backend| compare(&files, &merged, backend))?;
    if cli.json {
        return print_line(
            &json!({
                "folder": args.output,
                "shards": report.shards,
                "tensors": report.tensors,
                "changed": report.changed,
                "bytes": report.bytes,
                "largest_logit_difference": largest,
                "logits_up_to": logits_up_to,
                "same_first_choice": same_first,
                "compared_positions": PROBE_TOKENS,
            })
            .to_string(),
        );
    }
    print_line(&format!(
        "{}: {} tensors, {} of them changed, {} in {} files\nlogits after {PROBE_TOKENS} tokens, before and after: \
         largest difference {largest:.3e} of logits up to {logits_up_to:.2}; the most likely token is the same at \
         {same_first} of {PROBE_TOKENS}",
        args.output.display(),
        report.tensors,
        report.changed,
        human_bytes(report.bytes),
        report.shards,
    ))
}

struct Difference {
    largest: f32,
    logits_up_to: f32,
    same_first: usize,
}

/// Both read the same tokens: ids spread over the vocabulary, so that no tokenizer is needed.
fn compare<B: Backend>(pair: &ModelFiles, merged: &ModelFiles, backend: Arc<B>) -> Result<Difference> {
    let vocabulary = pair.base.config().vocabulary as u32;
    let probe: Vec<u32> = (1..=PROBE_TOKENS as u32).map(|number| number * 7919 % vocabulary).collect();
    let mut difference = Difference { largest: 0.0, logits_up_to: 0.0, same_first: 0 };
    let mut before = pair.load(Arc::clone(&backend))?;
    let before = backend.run(|| read(&mut before, &probe))?;
    let mut after = merged.load(Arc::clone(&backend))?;
    let after = backend.run(|| read(&mut after, &probe))?;
    for (before, after) in before.iter().zip(&after) {
        for (one, other) in before.iter().zip(after) {
            difference.largest = difference.largest.max((one - other).abs());
            difference.logits_up_to = difference.logits_up_to.max(one.abs());
        }
        difference.same_first += usize::from(first_choice(before) == first_choice(after));
    }
    Ok(difference)
}

/// Logits after each token.
fn read<B: Backend>(model: &mut Transformer<B>, probe: &[u32]) -> Result<Vec<Vec<f32>>> {
    let mut session = Session::new(model, probe.len())?;
    let mut all = Vec::with_capacity(probe.len());
    for id in probe {
        let mut logits = Vec::new();
        session.next_token_logits(&[*id], &mut logits)?;
        all.push(logits);
    }
    Ok(all)
}

fn first_choice(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|one, other| logits[*one].total_cmp(&logits[*other]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, size) in [
            ("5GB", Some(5_000_000_000)),
            ("10mb", Some(10_000_000)),
            ("123", Some(123)),
            ("0", None),
            ("5 GB", None),
            ("GB", None),
            ("5TB", None),
        ] {
            assert_eq!(parse_size(text).ok(), size, "{text}");
        }
    }
}
