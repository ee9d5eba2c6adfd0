//! AdamW: moments over the flat parameter buffer.

use super::LossScale;
use crate::backend::{AdamWStep, BRate, Backend, OptimizerState};
use crate::error::Result;
use crate::model::AdapterLayout;

/// Settings that stay the same over a run; names and meanings as in PyTorch's `AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the running mean of the gradients.
    pub beta1: f64,
    /// Decay of the running mean of their squares.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, times the rate.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; infinite: never.
    pub max_grad_norm: f64,
}

/// AdamW and its state for one flat buffer of parameters.
pub struct AdamW<B: Backend> {
    settings: AdamWSettings,
    parameter_count: usize,
    first_moment: B::Floats,
    second_moment: B::Floats,
    steps: u64,
    loss_scale: LossScale,
    /// B's rate over A's, and where they stand, if the two differ.
    b_rate: Option<(f64, B::Runs)>,
}

/// What an [`AdamW`] goes on from.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamWState {
    /// Updates done so far.
    pub steps: u64,
    /// The running means of the gradients and of their squares, one value a parameter.
    pub moments: [Vec<f32>; 2],
    /// As [`LossScale::state`] tells it.
    pub loss_scale: Option<(f64, u64)>,
}

impl<B: Backend> AdamW<B> {
    /// A fresh optimizer for `parameter_count` parameters.
    pub fn new(backend: &B, parameter_count: usize, settings: AdamWSettings) -> Result<Self> {
        let moments = [vec![0.0; parameter_count], vec![0.0; parameter_count]];
        Self::restore(backend, settings, &AdamWState { steps: 0, moments, loss_scale: None })
    }

    /// An optimizer that goes on from what [`state`](Self::state) told.
    pub fn restore(backend: &B, settings: AdamWSettings, state: &AdamWState) -> Result<Self> {
        let [first, second] = &state.moments;
        Ok(Self {
            settings,
            parameter_count: first.len(),
            first_moment: backend.floats(first)?,
            second_moment: backend.floats(second)?,
            steps: state.steps,
            loss_scale: match state.loss_scale {
                _ if !backend.needs_loss_scale() => LossScale::none(),
                None => LossScale::dynamic(),
                known => LossScale::from_state(known),
            },
            b_rate: None,
        })
    }

    /// Gives every `B` of `layout` a rate of `ratio` times that of the `A`s (LoRA+, Hayou et al. 2024).
    ///
    /// # Errors
    /// A device without room.
    pub fn set_b_rate(&mut self, backend: &B, layout: &AdapterLayout, ratio: f64) -> Result<()> {
        self.b_rate = if ratio == 1.0 { None } else { Some((ratio, backend.runs(&layout.runs())?)) };
        Ok(())
    }

    /// All that an optimizer needs to go on bit for bit.
    pub fn state(&self, backend: &B) -> Result<AdamWState> {
        let read = |floats| {
            let mut values = vec![0.0; self.parameter_count];
            backend.read_floats(floats, &mut values).map(|()| values)
        };
        Ok(AdamWState {
            steps: self.steps,
            moments: [read(&self.first_moment)?, read(&self.second_moment)?],
            loss_scale: self.loss_scale.state(),
        })
    }

    /// Updates done so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The factor that the next update expects its gradients to carry.
    pub fn loss_scale(&self) -> &LossScale {
        &self.loss_scale
    }

    /// After an update that found gradients which are not finite: halves the loss scale, so that they can be computed
    /// again. False where scaling is not the reason.
    pub fn lower_loss_scale(&mut self) -> bool {
        self.loss_scale.lower()
    }

    /// Divides `gradients` by the loss scale, clips them by their global norm and updates `parameters`. Returns the norm
    /// before clipping; when that is not finite, nothing has changed.
    pub fn update(
        &mut self,
        backend: &B,
        parameters: &mut B::Floats,
        gradients: &B::Floats,
        learning_rate: f64,
    ) -> Result<f64> {
        let step = AdamWStep {
            learning_rate,
            beta1: self.settings.beta1,
            beta2: self.settings.beta2,
            epsilon: self.settings.epsilon,
            weight_decay: self.settings.weight_decay,
            step: self.steps + 1,
            max_grad_norm: self.settings.max_grad_norm,
            loss_scale: self.loss_scale.factor(),
        };
        let state = OptimizerState {
            parameters,
            gradients,
            first_moment: &mut self.first_moment,
            second_moment: &mut self.second_moment,
            b_rate: self.b_rate.as_ref().map(|(ratio, runs)| BRate { ratio: *ratio, runs }),
        };
        let norm = backend.adamw(state, step)?;
        if norm.is_finite() {
            self.steps += 1;
            self.loss_scale.raise_in_time();
        }
        Ok(norm)
    }
}
