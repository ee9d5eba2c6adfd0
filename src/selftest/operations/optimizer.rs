//! AdamW: norm, clip and update.

use super::super::comparison::Comparison;
use super::super::inputs::values;
use super::super::precision::{Precision, Tolerance};
use super::{Operation, Prepared, Work, read_floats, ready};
use crate::backend::{AdamWStep, Backend, OptimizerState};
use crate::dtype::DType;
use crate::error::Result;

const STEP: AdamWStep = AdamWStep {
    learning_rate: 1e-2,
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.1,
    step: 3,
    max_grad_norm: 0.5,
    loss_scale: 8.0,
};

struct AdamW {
    precision: Precision,
    parameters: Vec<f32>,
    gradients: Vec<f32>,
    first_moment: Vec<f32>,
    second_moment: Vec<f32>,
}

pub(super) fn operations<B: Backend + 'static>(
    precision: Precision,
    count: usize,
) -> Vec<Box<dyn Operation<B>>> {
    vec![Box::new(AdamW {
        precision,
        parameters: values(count, 60),
        gradients: values(count, 61),
        first_moment: values(count, 62),
        second_moment: values(count, 63).iter().map(|v| v.abs()).collect(),
    })]
}

/// What lies on the backend, and the norm that the latest run found.
struct State<B: Backend> {
    parameters: B::Floats,
    gradients: B::Floats,
    first_moment: B::Floats,
    second_moment: B::Floats,
    norm: f64,
}

impl AdamW {
    /// `(norm, [parameter, first moment, second moment] of each)` after a step from the start.
    fn expected(&self) -> (f64, [Vec<f64>; 3]) {
        let g = |place: usize| f64::from(self.gradients[place]) / STEP.loss_scale;
        let norm = (0..self.gradients.len()).map(|place| g(place) * g(place)).sum::<f64>().sqrt();
        let clip = (STEP.max_grad_norm / (norm + 1e-6)).min(1.0);
        let corrections = [STEP.beta1, STEP.beta2].map(|beta| 1.0 - beta.powi(STEP.step as i32));
        let mut after = [const { Vec::new() }; 3];
        for place in 0..self.parameters.len() {
            let g = g(place) * clip;
            let m = STEP.beta1 * f64::from(self.first_moment[place]) + (1.0 - STEP.beta1) * g;
            let v = STEP.beta2 * f64::from(self.second_moment[place]) + (1.0 - STEP.beta2) * g * g;
            let decayed = f64::from(self.parameters[place]) * (1.0 - STEP.learning_rate * STEP.weight_decay);
            let update = m / corrections[0] / ((v / corrections[1]).sqrt() + STEP.epsilon);
            let values = [decayed - STEP.learning_rate * update, m, v];
            after.iter_mut().zip(values).for_each(|(after, value)| after.push(value));
        }
        (norm, after)
    }
}

impl<B: Backend + 'static> Operation<B> for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn shape(&self) -> String {
        self.parameters.len().to_string()
    }

    fn work(&self) -> Work {
        let copy = if self.precision.compute == DType::F32 { 0 } else { self.precision.compute.bytes() };
        Work::of_adamw(self.parameters.len(), copy)
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let state = State::<B> {
            parameters: backend.floats(&self.parameters)?,
            gradients: backend.floats(&self.gradients)?,
            first_moment: backend.floats(&self.first_moment)?,
            second_moment: backend.floats(&self.second_moment)?,
            norm: f64::NAN,
        };
        let count = self.parameters.len();
        Ok(ready(
            state,
            move |backend: &B, state: &mut State<B>| {
                let optimizer = OptimizerState {
                    parameters: &mut state.parameters,
                    gradients: &state.gradients,
                    first_moment: &mut state.first_moment,
                    second_moment: &mut state.second_moment,
                    b_rate: None,
                };
                state.norm = backend.adamw(optimizer, STEP)?;
                Ok(())
            },
            move |backend: &B, state: &State<B>| {
                let (norm, after) = self.expected();
                // A block's partial sum takes more terms where there are more values than 512 blocks of 256 threads.
                let terms = 12 + count / (512 * 256);
                let tolerance = Tolerance::sum(DType::F32, terms);
                let compute = DType::F32;
                let mut outcomes = vec![
                    Comparison { output: "norm", compute, tolerance, columns: 1 }
                        .compare(&[state.norm as f32], &[(0, vec![norm])]),
                ];
                let found = [
                    ("parameters", &state.parameters),
                    ("first moment", &state.first_moment),
                    ("second moment", &state.second_moment),
                ];
                for ((output, found), expected) in found.into_iter().zip(after) {
                    let tolerance = Tolerance { roundings: 2, ..Tolerance::sum(DType::F32, 8) };
                    let found = read_floats(backend, found, count)?;
                    let comparison = Comparison { output, compute, tolerance, columns: count };
                    outcomes.push(comparison.compare(&found, &[(0, expected)]));
                }
                Ok(outcomes)
            },
        ))
    }
}
