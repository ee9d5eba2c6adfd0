//! `metrics.jsonl`: one object a step, one a validation.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{StepReport, ValidationReport};
use crate::error::{Error, Result};

/// The open file; every object is on its way to the disk as soon as it was written.
pub struct MetricsFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl MetricsFile {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// A file that cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|source| Error::file("create", path, source))?;
        Ok(Self { path: path.to_path_buf(), file: BufWriter::new(file) })
    }

    /// Writes a step's figures.
    ///
    /// # Errors
    /// A write that fails.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        self.write(&json!({
            "step": report.step,
            "epoch": report.epoch,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "labelled_tokens": report.labelled_tokens,
            "tokens": report.tokens,
            "seconds": report.seconds,
        }))
    }

    /// Writes a validation's figures.
    ///
    /// # Errors
    /// A write that fails.
    pub fn validation(&mut self, report: &ValidationReport) -> Result<()> {
        let overall = report.evaluation.overall();
        let by_hash: Map<String, Value> = report
            .evaluation
            .by_hash()
            .iter()
            .map(|(hash, figures)| {
                let figures = json!({ "loss": figures.loss(), "perplexity": figures.perplexity() });
                (hash.clone(), figures)
            })
            .collect();
        self.write(&json!({
            "event": "validation",
            "step": report.step,
            "loss": overall.loss(),
            "perplexity": overall.perplexity(),
            "token_accuracy": overall.token_accuracy(),
            "by_hash": by_hash,
            "seconds": report.seconds,
        }))
    }

    fn write(&mut self, object: &Value) -> Result<()> {
        writeln!(self.file, "{object}")
            .and_then(|()| self.file.flush())
            .map_err(|source| Error::file("write", &self.path, source))
    }
}
