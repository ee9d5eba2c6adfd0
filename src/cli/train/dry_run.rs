//! `fastlora train --dry-run`: what the run would read, learn and take, without a weight on a device.

use serde_json::json;

use super::super::Cli;
use super::super::describe::{human_bytes, lengths_json, lengths_text, samples_json, samples_text};
use super::super::device::{Chosen, on_backend};
use super::super::memory::{free_bytes, largest_batch, plan, plan_json, plan_text};
use super::super::output::print_line;
use super::settings::training_settings;
use crate::backend::Backend;
use crate::checkpoint::base::BaseModel;
use crate::config::TrainingConfig;
use crate::data::Outcome;
use crate::error::{Result, escape_control};
use crate::model::{Limits, LoraConfig, ModelShape};
use crate::tokens::{BatchOptions, SampleSet, Tokenizer};
use crate::training::Split;

/// What was read for a run.
pub(super) struct DryRun<'a> {
    pub config: &'a TrainingConfig,
    pub base: &'a BaseModel,
    pub lora: &'a LoraConfig,
    pub tokenizer: Option<&'a Tokenizer>,
    pub samples: &'a SampleSet,
    pub training: &'a Split<'a>,
    pub validation: Option<&'a Split<'a>>,
    pub batches: BatchOptions,
    /// Tokens of the longest answer with its prompt, where there are test cases.
    pub answer_tokens: Option<usize>,
}

impl DryRun<'_> {
    /// Prints what was read and what the device would have to hold; `show` samples with their mask.
    pub(super) fn describe(&self, chosen: &Chosen, show: usize, cli: &Cli) -> Result<()> {
        let DryRun { config, base, lora, samples: set, training, batches, .. } = self;
        // Tokens are shown as text where the model can tell it, also if the data needed no tokenizer.
        let own = match self.tokenizer {
            Some(_) => None,
            None => Tokenizer::from_folder(base.folder()).ok(),
        };
        let tokenizer = self.tokenizer.or(own.as_ref());

        let tensors = lora.expected_tensors(base.config())?;
        let trainable: u64 = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        let frozen = base.parameter_count();
        let epoch = training.plan().epoch(0);
        let (samples_per_epoch, steps_per_epoch) = (epoch.visits().len(), epoch.steps().len());
        let total_steps = training_settings(config, training.plan())?.schedule.total_steps;
        let lengths: Vec<usize> = set.token_counts().collect();
        let validation_limits = self.validation.map(Split::limits).unwrap_or_default();
        let shape = ModelShape::new(base.config(), Some(lora))?;
        let free = free_bytes(chosen);
        let plan = |limits: Limits| {
            let limits = limits.union(validation_limits);
            plan(chosen, base, &shape, config, limits, self.answer_tokens, free)
        };
        let memory = plan(training.limits())?;
        let plan_of = |batch_size| plan(Split::new(set, BatchOptions { batch_size, ..*batches })?.limits());
        let largest = match free {
            Some(free) => largest_batch(free, set.len(), plan_of)?,
            None => None,
        };
        let device = on_backend!(chosen, |backend| backend.description());
        let accounting = &set.accounting;

        if cli.json {
            let hashes: serde_json::Map<_, _> =
                set.hash_counts().into_iter().map(|(hash, count)| (hash.to_string(), json!(count))).collect();
            let result = json!({
                "config": config,
                "records": {
                    "used": accounting.used,
                    "truncated": accounting.count(Outcome::Truncated),
                    "skipped": accounting.count(Outcome::Skipped),
                    "dropped": accounting.count(Outcome::Dropped),
                },
                "hashes": hashes,
                "lengths": lengths_json(&lengths),
                "samples_per_epoch": samples_per_epoch,
                "rows_per_epoch": epoch.row_count(),
                "tokens_per_epoch": epoch.token_count(),
                "learned_tokens_per_epoch": epoch.labelled_count(),
                "validation_samples": self.validation.map(|split| split.plan().sample_count()),
                "steps_per_epoch": steps_per_epoch,
                "steps": total_steps,
                "trainable_parameters": trainable,
                "frozen_parameters": frozen,
                "device": device,
                "memory_bytes": plan_json(&memory),
                "free_bytes": free,
                "largest_batch_size": largest,
                "samples": samples_json(set, tokenizer, show)?,
            });
            return print_line(&format!("{result:#}"));
        }

        let hashes: Vec<String> = set
            .hash_counts()
            .iter()
            .map(|(hash, count)| format!("{} {count}", escape_control(hash)))
            .collect();
        let percent = 100.0 * trainable as f64 / (trainable + frozen) as f64;
        let fit = match (free, largest) {
            (None, _) => "how much memory is free is not known\n".to_string(),
            (Some(free), None) => format!(
                "{} are free: not even a batch of one sample fits; lower max_length or lora_r, or choose another device\n",
                human_bytes(free)
            ),
            (Some(free), Some(largest)) => format!(
                "{} are free: the largest batch_size that fits is {largest}{}\n",
                human_bytes(free),
                if largest == set.len() { " (all samples)" } else { "" }
            ),
        };
        let text = format!(
            "{samples}\n{accounting}\nhashes: {hashes}\n{lengths}\
             an epoch: {samples_per_epoch} samples{rows}, {tokens} tokens, {learned} learned, {steps_per_epoch} steps; \
             the run: {total_steps} steps\n\
             trainable parameters: {trainable} of {all} ({percent:.4} %)\n\
             memory on {device}:\n{memory}{fit}the output folder is as it was; without --dry-run the run starts",
            samples = samples_text(set, tokenizer, show)?,
            hashes = hashes.join(", "),
            lengths = lengths_text("tokens", &lengths),
            rows = match config.packing {
                true => format!(" in {} rows", epoch.row_count()),
                false => String::new(),
            },
            tokens = epoch.token_count(),
            learned = epoch.labelled_count(),
            all = trainable + frozen,
            memory = plan_text(&memory),
        );
        print_line(&text)
    }
}
