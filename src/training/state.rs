//! All that a run needs to go on, between two steps.

use super::TrainingSummary;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::Transformer;
use crate::optim::{AdamW, AdamWSettings, AdamWState};
use crate::tensor::NamedTensor;

/// A run between two steps: from here it goes on bit for bit.
///
/// No random stream is in it, since none has a state: the order of the samples is a function of the seed and the
/// epoch, a dropout mask of the seed, the epoch, the sample and the position.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainingState {
    /// The adapters.
    pub adapter: Vec<NamedTensor>,
    /// AdamW's first and second moment of each adapter tensor, under its name.
    pub moments: [Vec<NamedTensor>; 2],
    /// Updates that the optimizer has done.
    pub optimizer_steps: u64,
    /// The dynamic loss scale, see [`LossScale::state`](crate::optim::LossScale::state).
    pub loss_scale: Option<(f64, u64)>,
    /// Figures so far; its steps are the position in the data.
    pub summary: TrainingSummary,
}

/// A look at a run between two steps.
pub struct Pause<'a, B: Backend> {
    /// The model with the adapters of the last step.
    pub model: &'a Transformer<B>,
    /// The optimizer.
    pub optimizer: &'a AdamW<B>,
    /// Figures so far.
    pub summary: &'a TrainingSummary,
}

impl<B: Backend> Pause<'_, B> {
    /// A copy of everything that the run needs to go on.
    ///
    /// # Errors
    /// A device error.
    pub fn state(&self) -> Result<TrainingState> {
        let AdamWState { steps, moments, loss_scale } = self.optimizer.state(&**self.model.backend())?;
        Ok(TrainingState {
            adapter: self.model.adapters()?,
            moments: moments.map(|values| self.model.layout().to_named(&values)),
            optimizer_steps: steps,
            loss_scale,
            summary: self.summary.clone(),
        })
    }
}

impl TrainingState {
    /// Puts the adapters into `model` and returns the optimizer that goes on with them.
    ///
    /// # Errors
    /// Tensors that are not this model's, or a device error.
    pub(super) fn restore<B: Backend>(
        &self,
        model: &mut Transformer<B>,
        settings: AdamWSettings,
    ) -> Result<AdamW<B>> {
        model.set_adapters(&self.adapter)?;
        let [first, second] = &self.moments;
        let state = AdamWState {
            steps: self.optimizer_steps,
            moments: [model.layout().to_flat(first)?, model.layout().to_flat(second)?],
            loss_scale: self.loss_scale,
        };
        AdamW::restore(&**model.backend(), settings, &state)
    }
}
