//! A model measured on all samples of a split, by one process or by several.

use super::Split;
use super::peers::Peers;
use crate::backend::Backend;
use crate::batch::Batch;
use crate::checkpoint::mapped;
use crate::error::Result;
use crate::evaluation::Evaluation;
use crate::model::{Purpose, Transformer};
use crate::tokens::{Step, Visit};

/// Loss, perplexity and accuracy of `model` on every sample, overall and by hash.
///
/// # Errors
/// A loss that is not finite, or a device error.
pub fn evaluate<B: Backend>(model: &mut Transformer<B>, split: &Split<'_>) -> Result<Evaluation> {
    Ok(evaluate_unless(model, split, &mut Peers::default(), |_| Ok(false))?.unwrap_or_default())
}

/// The same, or none where `is_unwanted` says so before a micro-batch of each process.
pub(super) fn evaluate_unless<B: Backend>(
    model: &mut Transformer<B>,
    split: &Split<'_>,
    peers: &mut Peers<'_>,
    mut is_unwanted: impl FnMut(&mut Peers<'_>) -> Result<bool>,
) -> Result<Option<Evaluation>> {
    model.reserve(Purpose::Inference, split.limits())?;
    let mut evaluation = Evaluation::default();
    let mut batch = Batch::default();
    let order = split.plan().epoch(0);
    let steps: Vec<Step<'_>> = order.steps().collect();
    let micro_batches: Vec<&[Visit]> = steps.iter().flat_map(Step::micro_batches).collect();
    for round in micro_batches.chunks(peers.count()) {
        if is_unwanted(peers)? {
            return Ok(None);
        }
        let Some(&micro_batch) = round.get(peers.rank()) else { continue };
        split.plan().fill(micro_batch, &mut batch);
        let scores = model.evaluate(&batch)?;
        evaluation
            .add(&batch, &scores.losses, &scores.correct, |sample| split.hash_of(sample))
            .map_err(|error| error.at(split.origins(micro_batch)))?;
    }
    mapped::check_intact()?;
    peers.merge(evaluation).map(Some)
}
