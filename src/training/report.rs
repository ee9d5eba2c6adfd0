//! Figures of a run: of a step, of a validation, of the whole.

use serde::{Deserialize, Serialize};

use crate::evaluation::Evaluation;

/// Figures of one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Steps done, from 1.
    pub step: u64,
    /// The pass over the data that the step belongs to, from 1.
    pub epoch: u64,
    /// Mean loss of the labelled tokens, in nats, before the update.
    pub loss: f64,
    /// Global norm of the gradients before clipping. Where this or the loss is not finite, there was no update.
    pub grad_norm: f64,
    /// The rate of the update.
    pub learning_rate: f64,
    /// Tokens that carried loss.
    pub labelled_tokens: usize,
    /// Tokens computed.
    pub tokens: usize,
    /// Wall time of the step.
    pub seconds: f64,
    /// Of the first step of an epoch, the start of the SHA-256 of the epoch's order.
    pub order: Option<u64>,
}

impl StepReport {
    /// Whether the step was skipped, since a number was not finite.
    pub fn is_skipped(&self) -> bool {
        !self.loss.is_finite() || !self.grad_norm.is_finite()
    }
}

/// Figures of one validation.
#[derive(Clone, Debug, PartialEq)]
pub struct ValidationReport {
    /// Steps done.
    pub step: u64,
    /// Loss, perplexity and accuracy, overall and by hash.
    pub evaluation: Evaluation,
    /// Whether the loss is the lowest so far.
    pub is_best: bool,
    /// Wall time of the validation.
    pub seconds: f64,
}

/// How a run went.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub struct TrainingSummary {
    /// Optimizer steps done.
    pub steps: u64,
    /// Of these, the ones that updated nothing, since a number was not finite.
    pub skipped_steps: u64,
    /// Steps skipped since the last update.
    pub skipped_in_a_row: u64,
    /// Loss of the first step that was not skipped.
    pub first_loss: f64,
    /// Loss of the last step that was not skipped.
    pub last_loss: f64,
    /// The lowest validation loss and its step.
    pub best_validation: Option<(u64, f64)>,
    /// The last validation's loss.
    pub last_validation_loss: Option<f64>,
    /// The step after which that was measured; 0: there was none yet.
    pub last_validation_step: u64,
    /// Validations since the lowest loss.
    pub validations_since_best: u64,
    /// Tokens computed in training.
    pub tokens: u64,
    /// Wall time of the training steps.
    pub training_seconds: f64,
}

impl TrainingSummary {
    pub(super) fn record(&mut self, report: &StepReport) {
        if report.is_skipped() {
            self.skipped_steps += 1;
            self.skipped_in_a_row += 1;
        } else {
            if self.steps == self.skipped_steps {
                self.first_loss = report.loss;
            }
            self.last_loss = report.loss;
            self.skipped_in_a_row = 0;
        }
        self.steps = report.step;
        self.tokens += report.tokens as u64;
        self.training_seconds += report.seconds;
    }

    pub(super) fn record_validation(&mut self, report: &ValidationReport) {
        self.last_validation_loss = report.evaluation.overall().loss();
        self.last_validation_step = report.step;
        self.validations_since_best = if report.is_best { 0 } else { self.validations_since_best + 1 };
        if report.is_best {
            self.best_validation = self.last_validation_loss.map(|loss| (report.step, loss));
        }
    }
}
