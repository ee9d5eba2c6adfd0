//! Where a number stopped being finite, found after the fact.

use super::Split;
use super::peers::Peers;
use crate::backend::{Backend, PassSettings};
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::tokens::Step;

/// Loss and gradient norm of a step that cannot be used.
#[derive(Clone, Copy, Debug)]
pub(super) struct BadStep<'a> {
    pub number: u64,
    pub step: &'a Step<'a>,
    pub loss: f64,
    pub grad_norm: f64,
    pub settings: PassSettings,
}

impl BadStep<'_> {
    /// The error that names step and records, and the layer: the first block whose output is not finite, or else the
    /// adapter tensor whose gradient is not, nearest to the loss. Reads the gradients, then runs the step's forward
    /// again. Each process of a run looks at its own micro-batches; all give the same error.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn explain<B: Backend>(
        &self,
        model: &mut Transformer<B>,
        training: &Split<'_>,
        peers: &mut Peers<'_>,
    ) -> Result<Error> {
        let (what, value) = match self.loss.is_finite() {
            true => ("gradient norm", self.grad_norm),
            false => ("loss", self.loss),
        };
        let gradient = bad_gradient(model)?;
        let output = self.bad_output(model, training, peers)?;
        let place = match (peers.first_found(output)?, gradient) {
            (Some(output), _) => format!(": {output}"),
            (None, Some(tensor)) if self.loss.is_finite() => {
                format!(": the gradient of {tensor} is not finite")
            }
            _ => String::new(),
        };
        let origins = training.origins(self.step.visits());
        let message = format!("the {what} is {value}{place}; nothing was updated in this step");
        Ok(Error::numerical(message)
            .at(format!("step {} ({origins})", self.number))
            .hint("look at these records, lower learning_rate or max_grad_norm, or add warmup_steps"))
    }

    /// The first block of the first micro-batch that overflows, with the record.
    fn bad_output<B: Backend>(
        &self,
        model: &mut Transformer<B>,
        training: &Split<'_>,
        peers: &Peers<'_>,
    ) -> Result<Option<String>> {
        let mut batch = Batch::default();
        for micro_batch in peers.share(self.step.micro_batches()) {
            training.plan().fill(micro_batch, &mut batch);
            let Some((layer, row)) = model.first_not_finite(&batch, self.settings)? else { continue };
            let sample = batch.sample_starts.partition_point(|&start| start <= row).saturating_sub(1);
            let position = row - batch.sample_starts[sample];
            let record = training.origins(&micro_batch[sample..=sample]);
            return Ok(Some(format!(
                "the output of layer {layer} is not finite at token {position} of {record}"
            )));
        }
        Ok(None)
    }
}

/// The adapter tensor, nearest to the loss, whose gradient is not finite.
fn bad_gradient<B: Backend>(model: &Transformer<B>) -> Result<Option<String>> {
    let gradients = model.gradients()?;
    let is_bad = |range: std::ops::Range<usize>| gradients[range].iter().any(|value| !value.is_finite());
    // The backward goes from the last layer to the first.
    let bad = model.layout().tensors().iter().rev().find(|tensor| is_bad(tensor.range()));
    Ok(bad.map(|tensor| tensor.name.clone()))
}
