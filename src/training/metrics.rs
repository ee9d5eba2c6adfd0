//! `metrics.jsonl`: one object a step, one a validation.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{JsonLines, StepReport, TrainingSummary, ValidationReport};
use crate::error::Result;

/// The open file; every object is on its way to the disk as soon as it was written.
pub struct MetricsFile {
    lines: JsonLines,
}

impl MetricsFile {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// A file that cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self { lines: JsonLines::create(path)? })
    }

    /// Opens the file of a run that goes on after the steps of `summary`, and cuts off what came after them, so that no
    /// step stands twice.
    ///
    /// # Errors
    /// A file that cannot be read or cut.
    pub fn resume(path: &Path, summary: &TrainingSummary) -> Result<Self> {
        let mut kept_steps = 0;
        let lines = JsonLines::resume(path, |object| {
            let is_step = object.get("event").is_none();
            let last = if is_step { summary.steps } else { summary.last_validation_step };
            let is_kept = object.get("step").and_then(Value::as_u64).is_some_and(|step| step <= last);
            kept_steps += u64::from(is_step && is_kept);
            is_kept
        })?;
        if kept_steps != summary.steps {
            tracing::warn!("{} has {kept_steps} of {} steps", path.display(), summary.steps);
        }
        Ok(Self { lines })
    }

    /// Forces what was written to the disk.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn sync(&self) -> Result<()> {
        self.lines.sync()
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
        if let Some(order) = report.order {
            object["order"] = json!(format!("{order:016x}"));
        }
        if report.is_skipped() {
            object["skipped"] = json!(true);
        }
        self.lines.write(&object)
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
        self.lines.write(&json!({
            "event": "validation",
            "step": report.step,
            "loss": overall.loss(),
            "perplexity": overall.perplexity(),
            "token_accuracy": overall.token_accuracy(),
            "by_hash": by_hash,
            "seconds": report.seconds,
        }))
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
            metrics.lines.write(&json!({ "new": true })).unwrap();
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
