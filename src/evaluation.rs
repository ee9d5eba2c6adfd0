//! Figures of a model on data: loss, perplexity and token accuracy, overall and by hash.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::batch::Batch;
use crate::error::{Error, Result};

/// Sums over labelled tokens.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Figures {
    /// Samples.
    pub samples: u64,
    /// Tokens that carry loss.
    pub labelled_tokens: u64,
    /// Of these, the ones that were the most likely.
    pub correct_tokens: u64,
    /// Sum of their losses, in nats.
    pub loss_sum: f64,
}

impl Figures {
    /// Mean loss of a labelled token in nats; none without labelled tokens.
    pub fn loss(&self) -> Option<f64> {
        (self.labelled_tokens > 0).then(|| self.loss_sum / self.labelled_tokens as f64)
    }

    /// e to the loss.
    pub fn perplexity(&self) -> Option<f64> {
        self.loss().map(f64::exp)
    }

    /// Share of the labelled tokens that were the most likely.
    pub fn token_accuracy(&self) -> Option<f64> {
        (self.labelled_tokens > 0).then(|| self.correct_tokens as f64 / self.labelled_tokens as f64)
    }

    fn plus(&self, other: &Figures) -> Figures {
        Figures {
            samples: self.samples + other.samples,
            labelled_tokens: self.labelled_tokens + other.labelled_tokens,
            correct_tokens: self.correct_tokens + other.correct_tokens,
            loss_sum: self.loss_sum + other.loss_sum,
        }
    }

    /// The figures as an object.
    pub fn to_json(&self) -> Value {
        json!({
            "loss": self.loss(),
            "perplexity": self.perplexity(),
            "token_accuracy": self.token_accuracy(),
            "samples": self.samples,
            "labelled_tokens": self.labelled_tokens,
        })
    }
}

/// Figures overall and by hash, gathered batch by batch.
///
/// ```
/// use fastlora::batch::Batch;
/// use fastlora::evaluation::Evaluation;
///
/// let mut batch = Batch::default();
/// batch.push(0, &[5, 6, 7], &[-100, 6, 7]);
/// batch.push(1, &[8, 9], &[-100, 9]);
/// let hashes = ["math", "faq"];
/// let mut evaluation = Evaluation::default();
/// evaluation.add(&batch, &[1.0, 3.0, 0.5], &[true, false, true], |sample_id| hashes[sample_id])?;
/// assert_eq!(evaluation.overall().loss(), Some(1.5));
/// assert_eq!(evaluation.by_hash()["math"].token_accuracy(), Some(0.5));
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    by_hash: BTreeMap<String, Figures>,
}

impl Evaluation {
    /// Adds a batch: `losses` and `correct` of its labelled rows, in their order, and the hash of each sample id.
    ///
    /// # Errors
    /// A loss that is not finite.
    pub fn add<'a>(
        &mut self,
        batch: &Batch,
        losses: &[f32],
        correct: &[bool],
        hash_of: impl Fn(usize) -> &'a str,
    ) -> Result<()> {
        debug_assert_eq!((losses.len(), correct.len()), (batch.labelled_count(), batch.labelled_count()));
        let mut scores = batch.labelled_rows.iter().zip(losses.iter().zip(correct)).peekable();
        for (sample_id, &sample_end) in batch.sample_ids.iter().zip(batch.sample_starts.iter().skip(1)) {
            let hash = hash_of(*sample_id);
            if !self.by_hash.contains_key(hash) {
                self.by_hash.insert(hash.to_string(), Figures::default());
            }
            let Some(figures) = self.by_hash.get_mut(hash) else { continue };
            figures.samples += 1;
            while let Some((row, (&loss, &is_correct))) =
                scores.next_if(|(row, _)| (**row as usize) < sample_end)
            {
                if !loss.is_finite() {
                    return Err(Error::numerical(format!(
                        "the loss of sample {sample_id} at row {row} is {loss}"
                    ))
                    .hint("the weights or the adapter overflow; try another adapter"));
                }
                figures.labelled_tokens += 1;
                figures.correct_tokens += u64::from(is_correct);
                figures.loss_sum += f64::from(loss);
            }
        }
        Ok(())
    }

    /// Adds figures of `hash` that were gathered elsewhere.
    pub fn add_figures(&mut self, hash: String, figures: Figures) {
        let own = self.by_hash.entry(hash).or_default();
        *own = own.plus(&figures);
    }

    /// Figures of each hash.
    pub fn by_hash(&self) -> &BTreeMap<String, Figures> {
        &self.by_hash
    }

    /// Figures of all samples.
    pub fn overall(&self) -> Figures {
        self.by_hash.values().fold(Figures::default(), |sum, figures| sum.plus(figures))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_to_the_hash_of_their_sample() {
        let mut batch = Batch::default();
        batch.push(2, &[1, 2, 3], &[-100, -100, 3]);
        batch.push(0, &[1, 2], &[-100, -100]);
        batch.push(1, &[1, 2, 3], &[1, 2, 3]);
        let hashes = ["faq", "math", "faq"];
        let mut evaluation = Evaluation::default();
        for _ in 0..2 {
            evaluation
                .add(&batch, &[2.0, 1.0, 0.5], &[true, true, false], |sample_id| hashes[sample_id])
                .unwrap();
        }
        let faq = Figures { samples: 4, labelled_tokens: 2, correct_tokens: 2, loss_sum: 4.0 };
        let math = Figures { samples: 2, labelled_tokens: 4, correct_tokens: 2, loss_sum: 3.0 };
        assert_eq!(evaluation.by_hash()["faq"], faq);
        assert_eq!(evaluation.by_hash()["math"], math);
        let overall = evaluation.overall();
        assert_eq!(overall.loss(), Some(7.0 / 6.0));
        assert_eq!(overall.perplexity(), Some((7.0f64 / 6.0).exp()));
        assert_eq!(overall.token_accuracy(), Some(4.0 / 6.0));
    }

    #[test]
    fn fault_39_no_targets_give_no_figures_rather_than_nan() {
        let mut batch = Batch::default();
        batch.push(0, &[1, 2], &[-100, -100]);
        let mut evaluation = Evaluation::default();
        evaluation.add(&batch, &[], &[], |_| "faq").unwrap();
        assert_eq!(evaluation.overall().loss(), None);
        assert_eq!(evaluation.overall().to_json()["loss"], Value::Null);
    }

    #[test]
    fn a_loss_that_is_not_finite_names_the_sample() {
        let mut batch = Batch::default();
        batch.push(3, &[1, 2], &[-100, 2]);
        let error = Evaluation::default().add(&batch, &[f32::NAN], &[false], |_| "faq").unwrap_err();
        assert_eq!(error.kind().exit_code(), 7);
        assert!(error.message().contains("sample 3"), "{error}");
    }
}
