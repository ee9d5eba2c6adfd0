//! Settings with a fixed set of values.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Which tokens carry loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// The completion and its EOS; the prompt is masked.
    #[default]
    Completion,
    /// Every token, as a plain script does.
    All,
}

/// What happens to a record that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRecord {
    /// The run is refused.
    #[default]
    Error,
    /// The record is left out, counted and reported.
    Skip,
}

/// What happens to a sample longer than `max_length`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
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

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
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
