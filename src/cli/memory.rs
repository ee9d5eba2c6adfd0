//! How much memory a run takes on the chosen device, how much there is, and the largest batch that fits.

use serde_json::{Value, json};

use super::describe::human_bytes;
use super::device::{Chosen, on_backend};
use super::doctor::Memory;
use crate::checkpoint::base::BaseModel;
use crate::config::{ActivationMemory, TrainingConfig};
use crate::error::Result;
use crate::model::{CHOICES, Limits, MemoryPlan, ModelShape, Needs, Purpose, Recompute, decoding_limits};

/// Share of the free memory that a plan may take: drivers and allocators need some besides.
const USABLE_SHARE: f64 = 0.9;

/// The memory of training on `chosen` what `shape` tells: as the configuration says, and where it leaves the choice, what is
/// fastest within `free`. While it is trained the model writes texts of up to `answer_tokens`, if any.
pub(super) fn plan(
    chosen: &Chosen,
    base: &BaseModel,
    shape: &ModelShape,
    config: &TrainingConfig,
    limits: Limits,
    answer_tokens: Option<usize>,
    free: Option<u64>,
) -> Result<MemoryPlan> {
    let limits = limits.union(answer_tokens.map(decoding_limits).unwrap_or_default());
    let needs = Needs { purpose: Purpose::Training, limits, has_dropout: config.lora_dropout > 0.0 };
    let stored = base.embedding()?.dtype();
    let plan = |recompute| -> Result<MemoryPlan> {
        on_backend!(chosen, |backend| {
            let answers = answer_tokens.map_or(0, |tokens| shape.cache_bytes(&**backend, tokens));
            Ok(MemoryPlan { answers, ..shape.plan(&**backend, stored, needs, recompute)? })
        })
    };
    let is_free_to_choose =
        config.activation_memory == ActivationMemory::Auto && !matches!(chosen, Chosen::Cpu(_));
    if !is_free_to_choose {
        let named = CHOICES.iter().find(|(choice, _)| *choice == config.activation_memory);
        return plan(named.map_or(Recompute::default(), |(_, recompute)| *recompute));
    }
    for (_, recompute) in CHOICES {
        let candidate = plan(recompute)?;
        if free.is_none_or(|free| candidate.total() <= usable(free)) {
            return Ok(candidate);
        }
    }
    plan(Recompute::Blocks)
}

fn usable(free: u64) -> u64 {
    (free as f64 * USABLE_SHARE) as u64
}

/// Bytes that are free on the device; none where nobody can tell.
pub(super) fn free_bytes(chosen: &Chosen) -> Option<u64> {
    match chosen {
        Chosen::Cpu(_) => free_host_bytes(),
        Chosen::Cuda(backend) => backend.device().memory_info().ok().map(|(free, _)| free as u64),
        #[cfg(feature = "emulator")]
        Chosen::Emulator(_) => free_host_bytes(),
    }
}

/// What programs can still take, or all that the process's control group may take where that is less.
fn free_host_bytes() -> Option<u64> {
    let memory = Memory::look()?;
    Some(memory.limit.map_or(memory.available, |limit| limit.min(memory.available)))
}

/// The largest of `1..=most` samples a batch for which `plan_of` fits into `free` bytes with some to spare.
pub(super) fn largest_batch(
    free: u64,
    most: usize,
    plan_of: impl Fn(usize) -> Result<MemoryPlan>,
) -> Result<Option<usize>> {
    let usable = usable(free);
    let fits = |batch_size: usize| Ok(plan_of(batch_size)?.total() <= usable);
    let (mut largest, mut too_large) = (0, most.saturating_add(1));
    while too_large - largest > 1 {
        let middle = largest + (too_large - largest) / 2;
        if fits(middle)? {
            largest = middle;
        } else {
            too_large = middle;
        }
    }
    Ok((largest > 0).then_some(largest))
}

/// The categories, one a line.
pub(super) fn plan_text(plan: &MemoryPlan) -> String {
    let rows = [
        ("weights", plan.weights),
        ("adapters and gradients", plan.adapters),
        ("optimizer", plan.optimizer),
        ("activations", plan.activations),
        ("scratch", plan.scratch),
        ("answers (KV cache)", plan.answers),
        ("total", plan.total()),
    ];
    rows.map(|(name, bytes)| format!("  {name:<24}{:>12}  {bytes} bytes\n", human_bytes(bytes))).concat()
}

/// The same as an object, in bytes.
pub(super) fn plan_json(plan: &MemoryPlan) -> Value {
    json!({
        "weights": plan.weights,
        "adapters": plan.adapters,
        "optimizer": plan.optimizer,
        "activations": plan.activations,
        "scratch": plan.scratch,
        "answers": plan.answers,
        "total": plan.total(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_batch_is_the_last_that_fits() {
        let plan_of = |batch_size| {
            Ok(MemoryPlan { weights: 50, activations: 10 * batch_size as u64, ..Default::default() })
        };
        // 90 % of 200 are 180: 50 + 13 · 10.
        assert_eq!(largest_batch(200, 1000, plan_of).unwrap(), Some(13));
        assert_eq!(largest_batch(200, 7, plan_of).unwrap(), Some(7));
        assert_eq!(largest_batch(66, 1000, plan_of).unwrap(), None);
        assert_eq!(largest_batch(67, 1000, plan_of).unwrap(), Some(1));
    }
}
