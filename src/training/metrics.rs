//! `metrics.jsonl`: one object a step, one a validation.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{StepReport, TrainingSummary, ValidationReport};
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

    /// Opens the file of a run that goes on after the steps of `summary`, and cuts off what came after them, so that no
    /// step stands twice.
    ///
    /// # Errors
    /// A file that cannot be read or cut.
    pub fn resume(path: &Path, summary: &TrainingSummary) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|source| Error::file("read", path, source))?,
        };
        let (mut kept_bytes, mut kept_steps) = (0, 0);
        for line in text.split_inclusive('\n') {
            // The last line of a run that was killed may be half a line.
            let object: Value = serde_json::from_str(line).unwrap_or_default();
            let is_step = object.get("event").is_none();
            let last = if is_step { summary.steps } else { summary.last_validation_step };
            let is_kept = object.get("step").and_then(Value::as_u64).is_some_and(|step| step <= last);
            if !is_kept || !line.ends_with('\n') {
                break;
            }
            kept_bytes += line.len() as u64;
            kept_steps += u64::from(is_step);
        }
        if kept_steps != summary.steps {
            tracing::warn!("{} has {kept_steps} of {} steps", path.display(), summary.steps);
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|file| file.set_len(kept_bytes).map(|()| file))
            .map_err(|source| Error::file("cut", path, source))?;
        Ok(Self { path: path.to_path_buf(), file: BufWriter::new(file) })
    }

    /// Forces what was written to the disk.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn sync(&self) -> Result<()> {
        self.file.get_ref().sync_data().map_err(|source| Error::file("write", &self.path, source))
    }

    /// Writes a step's figures.
    ///
    /// # Errors
    /// A write that fails.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        // The loss of a skipped step that is not finite is null: JSON has no NaN.
        let mut object = json!({
            "step": report.step,
            "epoch": report.epoch,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "labelled_tokens": report.labelled_tokens,
            "tokens": report.tokens,
            "seconds": report.seconds,
        });
        if report.is_skipped() {
            object["skipped"] = json!(true);
        }
        self.write(&object)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_after_the_checkpoint_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let lines = [
            r#"{"step":1}"#,
            r#"{"step":2}"#,
            r#"{"event":"validation","step":2}"#,
            r#"{"step":3}"#,
            r#"{"step"#,
        ];
        let resumed = |steps, last_validation_step| {
            std::fs::write(&path, lines.join("\n")).unwrap();
            let summary = TrainingSummary { steps, last_validation_step, ..TrainingSummary::default() };
            let mut metrics = MetricsFile::resume(&path, &summary).unwrap();
            metrics.write(&json!({ "new": true })).unwrap();
            metrics.sync().unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            text.strip_suffix("{\"new\":true}\n").unwrap().lines().count()
        };
        assert_eq!(resumed(0, 0), 0);
        assert_eq!(resumed(2, 2), 3);
        assert_eq!(resumed(2, 0), 2, "a validation that the checkpoint does not know of");
        assert_eq!(resumed(3, 2), 4);
        assert_eq!(resumed(9, 9), 4, "half a line is none");
    }
}
