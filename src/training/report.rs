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
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// The rate of the update.
    pub learning_rate: f64,
    /// Tokens that carried loss.
    pub labelled_tokens: usize,
    /// Tokens computed.
    pub tokens: usize,
    /// Wall time of the step.
    pub seconds: f64,
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
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// The lowest validation loss and its step.
    pub best_validation: Option<(u64, f64)>,
    /// The last validation's loss.
    pub last_validation_loss: Option<f64>,
    /// The step after which that was measured; 0: there was none yet.
    pub last_validation_step: u64,
    /// Tokens computed in training.
    pub tokens: u64,
    /// Wall time of the training steps.
    pub training_seconds: f64,
}

impl TrainingSummary {
    pub(super) fn record(&mut self, report: &StepReport) {
        if self.steps == 0 {
            self.first_loss = report.loss;
        }
        self.steps = report.step;
        self.last_loss = report.loss;
        self.tokens += report.tokens as u64;
        self.training_seconds += report.seconds;
    }

    pub(super) fn record_validation(&mut self, report: &ValidationReport) {
        self.last_validation_loss = report.evaluation.overall().loss();
        self.last_validation_step = report.step;
        if report.is_best {
            self.best_validation = self.last_validation_loss.map(|loss| (report.step, loss));
        }
    }
}
