//! What a run shows of itself, from the files in its output folder: a curve in the terminal, TensorBoard's event files,
//! a page of HTML, a line among other runs.

mod curve;
mod history;
mod html;
mod plot;
mod run;
pub mod tensorboard;

pub use curve::loss_curve;
pub use history::{HashFigures, History, StepFigures, ValidationFigures};
pub use html::write_page;
pub use run::{RunFolder, RunState, find_runs};

/// Figures of every step and validation, inside the output folder.
pub const METRICS: &str = "metrics.jsonl";
/// The run's configuration as resolved.
pub const RESOLVED_CONFIG: &str = "training_config.json";
/// Where an adapter comes from; of a finished run also its figures.
pub const PROVENANCE: &str = "fastlora.json";
/// Answers to the test cases while the run went.
pub const SAMPLES: &str = "samples.jsonl";
/// Why a run ended before its end, if an error ended it.
pub const FAILURE: &str = "error.json";
/// The page.
pub const PAGE: &str = "report.html";
