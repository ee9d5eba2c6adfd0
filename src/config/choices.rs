//! Settings with a fixed set of values.

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DeviceName;
use crate::error::{Error, Result};

/// Which tokens carry loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// The completion and its EOS; the prompt is masked.
    #[default]
    Completion,
    /// Every token, as a plain script does.
    All,
}

/// What happens to a record that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRecord {
    /// The run is refused.
    #[default]
    Error,
    /// The record is left out, counted and reported.
    Skip,
}

/// What happens to a step whose loss or gradients are not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnNan {
    /// The run ends, before the update.
    #[default]
    Stop,
    /// The step updates nothing, is reported, and the run goes on; ten in a row end it.
    Skip,
}

/// What happens to a sample longer than `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Overlong {
    /// The run is refused.
    #[default]
    Error,
    /// The sample is cut; its hash prefix stays and at least one target is left.
    Truncate,
    /// The sample is left out, counted and reported.
    Drop,
}

/// What shows a run, besides its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ReportFormat {
    /// `report.html`, one page for a browser, written at the end.
    Html,
    /// TensorBoard's event files in `tensorboard/`, written as the run goes.
    Tensorboard,
}

/// How much of a forward's activations is kept for the backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ActivationMemory {
    /// The fastest that fits the device; on the CPU `balanced`.
    #[default]
    Auto,
    /// All that the backward reads.
    Fast,
    /// All but the outputs of norms and activations, which are computed again.
    Balanced,
    /// Only the residual stream: blocks are computed again.
    Small,
}

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// Stays at its peak.
    #[default]
    Constant,
    /// Falls on a straight line to 0 at the last step.
    Linear,
    /// Falls on half a cosine to 0 at the last step.
    Cosine,
}

/// More threads than any machine has cores would only take its memory.
const MAX_THREADS: usize = 1024;

/// Refuses a device, compute type or number of threads that is none, before anything is read. Whether the machine has
/// the device is another question.
///
/// # Errors
/// A config error that names what there is.
pub fn check_compute_choices(device: &str, dtype: &str, threads: Option<usize>) -> Result<()> {
    DeviceName::parse(device)?;
    if !matches!(dtype, "auto" | "f32" | "f16" | "bf16") {
        return Err(Error::config(format!(
            "`{dtype}` is no compute type; there are auto, f32, f16 and bf16"
        ))
        .at("dtype"));
    }
    if let Some(threads) = threads.filter(|threads| !(1..=MAX_THREADS).contains(threads)) {
        return Err(Error::config(format!("{threads} threads, expected 1 to {MAX_THREADS}"))
            .at("threads")
            .hint("leave it out to use all cores"));
    }
    Ok(())
}
