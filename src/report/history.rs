//! `metrics.jsonl` read back.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::METRICS;
use crate::error::{Error, Result};

/// Figures of one step; null stands for what was not finite.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct StepFigures {
    /// Steps done, from 1.
    pub step: u64,
    /// Mean loss of the labelled tokens, in nats.
    pub loss: Option<f64>,
    /// Global norm of the gradients before clipping.
    pub grad_norm: Option<f64>,
    /// The rate of the update.
    pub learning_rate: f64,
    /// Tokens computed.
    pub tokens: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Figures of one validation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct ValidationFigures {
    /// Steps done.
    pub step: u64,
    /// Mean loss of the labelled tokens, in nats.
    pub loss: Option<f64>,
    /// Share of the labelled tokens that were the most likely.
    #[serde(default)]
    pub token_accuracy: Option<f64>,
    /// Figures of each hash.
    #[serde(default)]
    pub by_hash: BTreeMap<String, HashFigures>,
}

/// Figures of one hash in one validation.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct HashFigures {
    /// Mean loss of its labelled tokens, in nats.
    pub loss: Option<f64>,
}

/// All figures of a run, in the order in which they were measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// One a step.
    pub steps: Vec<StepFigures>,
    /// One a validation.
    pub validations: Vec<ValidationFigures>,
}

impl History {
    /// Reads the metrics in an output folder; none are there before the first step.
    ///
    /// ```
    /// use fastlora::report::History;
    ///
    /// let folder = tempfile::tempdir()?;
    /// let step = r#"{"step":1,"epoch":1,"loss":2.5,"grad_norm":0.3,"learning_rate":0.1,"tokens":8,"seconds":0.5}"#;
    /// std::fs::write(folder.path().join("metrics.jsonl"), format!("{step}\n{{\"step\":2,\"lo"))?;
    /// let history = History::read(folder.path())?;
    /// assert_eq!(history.steps.len(), 1, "the line that a dead run left is none");
    /// assert_eq!(history.tokens_per_second(), Some(16.0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// A file that cannot be read (I/O), or a whole line that is no object of metrics (corrupt), with its number.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(METRICS);
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            bytes => bytes.map_err(|source| Error::file("read", &path, source))?,
        };
        let mut history = Self::default();
        for (number, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            let Some(line) = line.strip_suffix(b"\n") else { break };
            history.add(line).map_err(|source| {
                let place = format!("{}:{}", path.display(), number + 1);
                Error::corrupt("no figures of a run").at(place).caused_by(source)
            })?;
        }
        Ok(history)
    }

    fn add(&mut self, line: &[u8]) -> serde_json::Result<()> {
        let object: Value = serde_json::from_slice(line)?;
        match object.get("event").and_then(Value::as_str) {
            None => self.steps.push(serde_json::from_value(object)?),
            Some("validation") => self.validations.push(serde_json::from_value(object)?),
            // Of a version that measures more.
            Some(_) => {}
        }
        Ok(())
    }

    /// Tokens that a second of training computed, over the whole run; none before the first step.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds: f64 = self.steps.iter().map(|step| step.seconds).sum();
        let tokens: u64 = self.steps.iter().map(|step| step.tokens).sum();
        (seconds > 0.0).then(|| tokens as f64 / seconds)
    }

    /// (step, loss) of the steps whose loss is finite.
    pub fn training_losses(&self) -> Vec<(f64, f64)> {
        points(self.steps.iter().map(|step| (step.step, step.loss)))
    }

    /// (step, loss) of the validations.
    pub fn validation_losses(&self) -> Vec<(f64, f64)> {
        points(self.validations.iter().map(|validation| (validation.step, validation.loss)))
    }

    /// (step, loss) of one hash in the validations.
    pub fn losses_of(&self, hash: &str) -> Vec<(f64, f64)> {
        let loss = |validation: &ValidationFigures| validation.by_hash.get(hash).and_then(|one| one.loss);
        points(self.validations.iter().map(|validation| (validation.step, loss(validation))))
    }

    /// The lowest validation loss with its step.
    pub fn best_validation(&self) -> Option<(u64, f64)> {
        let losses = self.validation_losses();
        let best = losses.into_iter().reduce(|best, next| if next.1 < best.1 { next } else { best });
        best.map(|(step, loss)| (step as u64, loss))
    }

    /// Every hash that was measured.
    pub fn hashes(&self) -> Vec<&str> {
        let mut hashes: Vec<&str> = self
            .validations
            .iter()
            .flat_map(|validation| validation.by_hash.keys())
            .map(String::as_str)
            .collect();
        hashes.sort_unstable();
        hashes.dedup();
        hashes
    }
}

fn points(values: impl Iterator<Item = (u64, Option<f64>)>) -> Vec<(f64, f64)> {
    values.filter_map(|(step, value)| Some((step as f64, value?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_line_that_is_damaged_is_named() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(History::read(folder.path()).unwrap(), History::default());
        std::fs::write(folder.path().join(METRICS), "{\"event\":\"later\"}\n{\"step\":1}\n").unwrap();
        let error = History::read(folder.path()).unwrap_err();
        assert_eq!(error.kind().exit_code(), 8);
        assert!(error.to_string().contains("metrics.jsonl:2: "), "{error}");
    }

    #[test]
    fn figures_that_are_not_finite_are_left_out() {
        let mut history = History::default();
        for line in [
            r#"{"step":1,"loss":3.0,"grad_norm":1.0,"learning_rate":0.1,"tokens":10,"seconds":2.0}"#,
            r#"{"step":2,"loss":null,"grad_norm":null,"learning_rate":0.1,"tokens":30,"seconds":2.0,"skipped":true}"#,
            r#"{"event":"validation","step":2,"loss":2.0,"by_hash":{"b":{"loss":2.5},"a":{"loss":null}},"seconds":1.0}"#,
            r#"{"event":"validation","step":4,"loss":2.25,"by_hash":{"b":{"loss":2.25}},"seconds":1.0}"#,
        ] {
            history.add(line.as_bytes()).unwrap();
        }
        assert_eq!(history.training_losses(), [(1.0, 3.0)]);
        assert_eq!(history.best_validation(), Some((2, 2.0)));
        assert_eq!(history.losses_of("b"), [(2.0, 2.5), (4.0, 2.25)]);
        assert_eq!((history.hashes(), history.tokens_per_second()), (vec!["a", "b"], Some(10.0)));
    }
}
