//! A run as its output folder tells it.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use chrono::{DateTime, Local};
use serde_json::{Map, Value, json};

use super::{FAILURE, History, METRICS, PROVENANCE, RESOLVED_CONFIG};
use crate::checkpoint::adapter::ADAPTER_WEIGHTS;
use crate::checkpoint::run::{CHECKPOINTS, Checkpoints, read_json};
use crate::error::{Error, Result};

/// Folders below a root in which runs are looked for.
const DEPTH: usize = 3;

/// What became of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// A process trains into the folder.
    Running,
    /// All steps are done.
    Complete,
    /// It ended before, and no step is lost.
    Stopped,
    /// An error ended it, or it ended before with steps after its newest checkpoint, if it has one.
    Failed,
}

impl RunState {
    /// The state's name in tables and objects.
    pub const fn name(self) -> &'static str {
        match self {
            RunState::Running => "running",
            RunState::Complete => "complete",
            RunState::Stopped => "stopped",
            RunState::Failed => "failed",
        }
    }
}

/// A run that has begun.
#[derive(Clone, Debug)]
pub struct RunFolder {
    /// The output folder.
    pub path: PathBuf,
    /// The configuration as resolved.
    pub config: Map<String, Value>,
    /// Its figures so far.
    pub history: History,
    /// What became of it.
    pub state: RunState,
    /// The step of its newest checkpoint.
    pub checkpoint: Option<u64>,
    /// When its figures were last written.
    pub last_written: Option<DateTime<Local>>,
    /// `fastlora.json`, of a finished run.
    pub provenance: Option<Value>,
    /// The error that ended it, as `--json` has it.
    pub error: Option<Value>,
}

impl RunFolder {
    /// Reads the run in an output folder.
    ///
    /// # Errors
    /// A folder without a run (config), a file that cannot be read, or a damaged one.
    pub fn open(path: &Path) -> Result<Self> {
        if !is_run(path) {
            return Err(Error::config("no run is in this folder")
                .at(path.display().to_string())
                .hint(format!("name an output folder: it has {METRICS} and {RESOLVED_CONFIG}")));
        }
        let config_path = path.join(RESOLVED_CONFIG);
        let Value::Object(config) = read_json(&config_path)? else {
            return Err(Error::corrupt("no configuration").at(config_path.display().to_string()));
        };
        let history = History::read(path)?;
        let read_if_there = |name: &str| match path.join(name).exists() {
            true => read_json(&path.join(name)).map(Some),
            false => Ok(None),
        };
        let (provenance, failure) = (read_if_there(PROVENANCE)?, read_if_there(FAILURE)?);
        let error = failure.map(|failure| failure["error"].clone());
        let checkpoint = Checkpoints::new(path.join(CHECKPOINTS)).steps()?.into_iter().max();
        let is_finished = provenance.as_ref().is_some_and(|provenance| provenance.get("summary").is_some());
        let steps = history.steps.last().map_or(0, |step| step.step);
        let state = if is_locked(path) {
            RunState::Running
        } else if is_finished && path.join(ADAPTER_WEIGHTS).exists() {
            RunState::Complete
        } else if error.is_some() {
            RunState::Failed
        } else if checkpoint.is_some_and(|checkpoint| checkpoint >= steps) {
            RunState::Stopped
        } else {
            RunState::Failed
        };
        let written = std::fs::metadata(path.join(METRICS)).and_then(|metadata| metadata.modified()).ok();
        Ok(Self {
            path: path.to_path_buf(),
            config,
            history,
            state,
            checkpoint,
            last_written: written.map(DateTime::from),
            provenance,
            error,
        })
    }

    /// The base model's name.
    pub fn model(&self) -> &str {
        self.config.get("model_name").and_then(Value::as_str).unwrap_or_default()
    }

    /// The run's figures as an object.
    pub fn figures(&self) -> Value {
        let history = &self.history;
        let best = history.best_validation();
        json!({
            "steps": history.steps.last().map_or(0, |step| step.step),
            "first_loss": history.training_losses().first().map(|point| point.1),
            "last_loss": history.training_losses().last().map(|point| point.1),
            "validation_loss": history.validation_losses().last().map(|point| point.1),
            "best_validation_loss": best.map(|(_, loss)| loss),
            "best_step": best.map(|(step, _)| step),
            "tokens": history.steps.iter().map(|step| step.tokens).sum::<u64>(),
            "training_seconds": history.steps.iter().map(|step| step.seconds).sum::<f64>(),
            "tokens_per_second": history.tokens_per_second(),
        })
    }
}

fn is_run(path: &Path) -> bool {
    path.join(METRICS).is_file() && path.join(RESOLVED_CONFIG).is_file()
}

/// Whether a process trains into the folder; where it cannot be told, none does.
fn is_locked(path: &Path) -> bool {
    File::open(path).is_ok_and(|folder| matches!(folder.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// The output folders in `root`, itself included, by name.
///
/// # Errors
/// A folder that cannot be read.
pub fn find_runs(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    collect(root, DEPTH, &mut found)?;
    found.sort();
    Ok(found)
}

fn collect(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    if is_run(folder) {
        found.push(folder.to_path_buf());
    }
    if depth == 0 {
        return Ok(());
    }
    let failed = |source: io::Error| Error::file("read", folder, source);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // Links are left alone: they may lead in circles.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth - 1, found)?;
        }
    }
    Ok(())
}
