//! What a pass tells of each labelled token.

use crate::backend::Backend;
use crate::error::Result;

/// Figures of each labelled row of a batch, in its order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenScores {
    /// Cross-entropy in nats.
    pub losses: Vec<f32>,
    /// Whether the target had the highest logit.
    pub correct: Vec<bool>,
    host: Vec<f32>,
}

impl TokenScores {
    /// Sum of the losses.
    pub fn loss_sum(&self) -> f64 {
        self.losses.iter().map(|loss| f64::from(*loss)).sum()
    }

    /// Takes the figures of `labelled` rows from what was read of `rows`.
    pub(super) fn read<B: Backend>(
        &mut self,
        backend: &B,
        landing: &B::Landing,
        labelled: usize,
        rows: usize,
    ) -> Result<()> {
        self.host.resize(2 * rows, 0.0);
        backend.finish_reading(landing, &mut self.host)?;
        self.losses.clear();
        self.losses.extend_from_slice(&self.host[..labelled]);
        self.correct.clear();
        self.correct.extend(self.host[rows..][..labelled].iter().map(|hit| *hit > 0.5));
        Ok(())
    }
}
