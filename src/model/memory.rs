//! What a model takes in memory, by category, before any of it is allocated; and which activations are worth keeping.

use std::fmt;

use indicatif::HumanBytes;

use super::block::{BlockShape, DOWN, GATE_UP, OUTPUT, QKV};
use super::config::{GROUP_COUNT, ModelConfig};
use super::layout::AdapterLayout;
use super::lora::{AdaptedLinear, LoraConfig, adapted_linears, layer_groups};
use super::whole::WholePlace;
use super::workspace::{Allocator, Kept, Limits, Purpose, Workspace};
use crate::backend::{AdapterShape, Backend, Footprint, GroupShape, OperationShapes};
use crate::config::ActivationMemory;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What the backward computes again instead of keeping it from the forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing that costs a kernel: every input that a linear's backward reads is kept.
    Nothing,
    /// The outputs of norms and of the gated activation.
    #[default]
    Inputs,
    /// Whole blocks: only the residual stream between them is kept.
    Blocks,
}

/// Bytes by category.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Frozen weights.
    pub weights: u64,
    /// Adapters, their gradients, and copies in the compute type.
    pub adapters: u64,
    /// AdamW's moments.
    pub optimizer: u64,
    /// Activations of the longest batch, kept and shared, and the table of rotations.
    pub activations: u64,
    /// What operations use in turn.
    pub scratch: u64,
    /// Keys and values of a text that is generated.
    pub answers: u64,
    /// What the activations leave out.
    pub recompute: Recompute,
    /// Of them what is cut from one allocation: all but the table of rotations.
    pub arena: u64,
}

impl MemoryPlan {
    /// All categories.
    pub fn total(&self) -> u64 {
        self.weights + self.adapters + self.optimizer + self.activations + self.scratch + self.answers
    }

    /// What is allocated for the batches, after model and optimizer are there.
    pub fn of_batches(&self) -> u64 {
        self.arena + self.scratch
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recomputed = match self.recompute {
            Recompute::Nothing => "all that the backward reads is kept",
            Recompute::Inputs => "norms and activations are computed again",
            Recompute::Blocks => "blocks are computed again",
        };
        let answers = match self.answers {
            0 => String::new(),
            bytes => format!(", keys and values of answers {}", HumanBytes(bytes)),
        };
        let [weights, adapters, optimizer, activations, scratch, total] =
            [self.weights, self.adapters, self.optimizer, self.activations, self.scratch, self.total()]
                .map(HumanBytes);
        write!(
            formatter,
            "memory: weights {weights}, adapters {adapters}, optimizer {optimizer}, activations {activations} \
             ({recomputed}), scratch {scratch}{answers}: {total}"
        )
    }
}

/// What the memory of batches depends on, besides the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Forward alone, or backward too.
    pub purpose: Purpose,
    /// The largest batch.
    pub limits: Limits,
    /// Whether adapters' inputs pass through dropout.
    pub has_dropout: bool,
}

/// The shapes of a model that its memory depends on; needs no weights.
#[derive(Clone, Debug)]
pub struct ModelShape {
    pub(super) block: BlockShape,
    /// What every block's groups leave for the backward.
    pub(super) kept: Vec<[Kept; GROUP_COUNT]>,
    /// The lowest block that trains anything; the number of blocks where none does.
    pub(super) lowest_trained: usize,
    groups: Vec<GroupShape>,
    vocabulary: usize,
    trains_norms: bool,
    parameter_count: usize,
    /// Frozen elements as they are stored, and those that are f32 whatever was stored.
    frozen_count: [u64; 2],
    /// Elements of the table of rotations for each position.
    rotations_per_position: usize,
}

impl ModelShape {
    /// Of a model with adapters on the targets of `lora`.
    ///
    /// # Errors
    /// Targets that match no module.
    pub fn new(config: &ModelConfig, lora: Option<&LoraConfig>) -> Result<Self> {
        let linears = adapted_linears(config, lora)?;
        let mut layout = AdapterLayout::default();
        let (mut kept, mut groups) = (Vec::new(), Vec::new());
        for layer in layer_groups(config, &linears) {
            let of_layer: [GroupShape; GROUP_COUNT] = layer.map(|group| GroupShape {
                in_features: group[0].0.in_features,
                out_features: group.iter().map(|(linear, _)| linear.out_features).sum(),
                adapters: group
                    .iter()
                    .filter_map(|(linear, lora)| {
                        let rank = (*lora)?.rank;
                        Some(AdapterShape { out_features: linear.out_features, rank })
                    })
                    .collect(),
                has_magnitudes: group.iter().any(|(_, lora)| lora.is_some_and(|lora| lora.has_magnitude)),
            });
            layer.iter().for_each(|group| drop(layout.push_group(group)));
            kept.push(of_layer.each_ref().map(Kept::of));
            groups.extend(of_layer);
        }
        let is_residual =
            |adapted: &&AdaptedLinear| adapted.1.is_some() && lora.is_some_and(|lora| lora.has_residuals);
        let elements = |(linear, _): &AdaptedLinear| (linear.in_features * linear.out_features) as u64;
        let residual_count: u64 = linears.iter().filter(is_residual).map(elements).sum();
        let is_adapted = |kept: &[Kept; GROUP_COUNT]| kept.iter().any(|kept| kept.rank > 0);
        let mut lowest_trained = kept.iter().position(is_adapted).unwrap_or(config.layer_count);
        let (mut whole_count, mut trains_norms) = (0, false);
        for module in lora.map_or(Ok(Vec::new()), |lora| lora.whole_modules(config))? {
            layout.push_whole(&module);
            whole_count += module.shape.iter().product::<usize>() as u64;
            trains_norms |= module.place != WholePlace::Head;
            if let WholePlace::Norm(layer, _) = module.place {
                lowest_trained = lowest_trained.min(layer);
            }
        }
        Ok(Self {
            block: BlockShape::new(config),
            kept,
            lowest_trained,
            groups,
            vocabulary: config.vocabulary,
            trains_norms,
            parameter_count: layout.parameter_count(),
            frozen_count: [config.parameter_count() - whole_count - residual_count, residual_count],
            rotations_per_position: config.rope_table_length(1),
        })
    }

    /// Trainable parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameter_count
    }

    /// Its linear groups, layer by layer.
    pub fn groups(&self) -> &[GroupShape] {
        &self.groups
    }

    /// Whether some block's backward reads what its forward left of the inputs of q, k and v, of gate and up, and of down.
    pub(super) fn reads(&self, backend: &impl Footprint) -> [bool; 3] {
        let any = |reads: &dyn Fn(&[GroupShape]) -> bool| self.groups.chunks(GROUP_COUNT).any(reads);
        [
            any(&|groups| groups[QKV].rank() > 0),
            any(&|groups| groups[GATE_UP].rank() > 0),
            any(&|groups| backend.reads_activation(&groups[GATE_UP], &groups[DOWN])),
        ]
    }

    pub(super) fn operations(&self, needs: Needs) -> OperationShapes {
        let Needs { purpose, limits, has_dropout } = needs;
        let of_layers = || self.groups.chunks(GROUP_COUNT);
        OperationShapes {
            tokens: limits.tokens,
            labelled_rows: limits.labelled_rows,
            vocabulary: self.vocabulary,
            hidden: self.block.hidden_size,
            query_heads: self.block.query_heads,
            key_value_heads: self.block.key_value_heads,
            head_dim: self.block.head_dim,
            groups: self.groups.clone(),
            attention_outputs: of_layers().map(|of_layer| of_layer[OUTPUT].clone()).collect(),
            mlps: of_layers().map(|of_layer| [of_layer[GATE_UP].clone(), of_layer[DOWN].clone()]).collect(),
            trains_norms: self.trains_norms,
            has_dropout,
            is_training: purpose == Purpose::Training,
        }
    }

    /// Bytes of a model whose weights are `stored`, for batches within `limits`.
    pub fn plan<B: Backend>(
        &self,
        backend: &B,
        stored: DType,
        needs: Needs,
        recompute: Recompute,
    ) -> Result<MemoryPlan> {
        let limits = needs.limits.padded(backend);
        let needs = Needs { limits, ..needs };
        let mut counter = Allocator::counting(backend);
        Workspace::new(&mut counter, self, needs.purpose, recompute, limits)?;
        let moments = if needs.purpose == Purpose::Training { 2 } else { 0 };
        Ok(MemoryPlan {
            weights: backend.weight_bytes(self.frozen_count[0], stored)
                + backend.weight_bytes(self.frozen_count[1], DType::F32),
            adapters: backend.adapter_bytes(self.parameter_count, &self.groups),
            optimizer: moments * backend.floats_bytes(self.parameter_count),
            activations: counter.bytes()
                + backend.floats_bytes(limits.positions * self.rotations_per_position),
            arena: counter.bytes(),
            scratch: backend.scratch_bytes(&self.operations(needs)),
            answers: 0,
            recompute,
        })
    }

    /// Bytes of the keys and values of a text of `capacity` tokens.
    pub fn cache_bytes<B: Backend>(&self, backend: &B, capacity: usize) -> u64 {
        2 * self.kept.len() as u64 * backend.buffer_bytes(capacity * self.block.key_value_width())
    }
}

/// What the device is left for itself: its allocations are rounded, and launches may need some.
const HEADROOM_BYTES: u64 = 128 << 20;

/// What each choice computes again, the fastest first.
pub const CHOICES: [(ActivationMemory, Recompute); 3] = [
    (ActivationMemory::Fast, Recompute::Nothing),
    (ActivationMemory::Balanced, Recompute::Inputs),
    (ActivationMemory::Small, Recompute::Blocks),
];

/// The plan that `choice` stands for; `auto` takes the fastest that fits into the memory still free, and where nobody counts
/// that (the CPU) the balanced one.
///
/// # Errors
/// None fits, or the one chosen does not (fault 59): the message has the sizes, and what would fit.
pub fn choose_plan<B: Backend>(
    backend: &B,
    shape: &ModelShape,
    stored: DType,
    needs: Needs,
    choice: ActivationMemory,
) -> Result<MemoryPlan> {
    let plan = |recompute| shape.plan(backend, stored, needs, recompute);
    let free = backend.free_bytes()?;
    let fits = |plan: &MemoryPlan| free.is_none_or(|free| plan.of_batches() + HEADROOM_BYTES <= free);
    let allowed = CHOICES.iter().filter(|(name, _)| match choice {
        ActivationMemory::Auto => free.is_some() || *name == ActivationMemory::Balanced,
        named => named == *name,
    });
    let mut smallest = None;
    for (_, recompute) in allowed {
        let candidate = plan(*recompute)?;
        if needs.purpose == Purpose::Inference || fits(&candidate) {
            return Ok(candidate);
        }
        smallest = Some(candidate);
    }
    let wanted = smallest.expect("every choice allows a plan");
    let (free, small) = (free.unwrap_or(0), plan(Recompute::Blocks)?);
    let tokens = largest_fitting(needs.limits.tokens, |tokens| {
        let scaled = |count: usize| count * tokens / needs.limits.tokens.max(1);
        let limits = Limits { tokens, labelled_rows: scaled(needs.limits.labelled_rows), ..needs.limits };
        Ok(fits(&shape.plan(backend, stored, Needs { limits, ..needs }, Recompute::Blocks)?))
    })?;
    let advice = match (fits(&small), tokens) {
        (true, _) => format!(
            "set activation_memory to small ({}), or use a smaller batch",
            HumanBytes(small.of_batches())
        ),
        (false, 0) => "use a smaller model or a larger GPU".to_string(),
        (false, tokens) => format!(
            "with activation_memory small, batches of up to {tokens} tokens fit (the longest has {}): lower batch_size or \
             max_length, and raise gradient_accumulation_steps",
            needs.limits.tokens
        ),
    };
    let message = format!(
        "training needs {} more device memory and {} are free: activations of the longest batch {}, scratch {}; weights, \
         adapters and optimizer take {}",
        HumanBytes(wanted.of_batches()),
        HumanBytes(free),
        HumanBytes(wanted.arena),
        HumanBytes(wanted.scratch),
        HumanBytes(wanted.total() - wanted.of_batches())
    );
    Err(Error::device(message).hint(advice))
}

/// The largest number up to `most` that `fits`; 0 if none does.
fn largest_fitting(most: usize, fits: impl Fn(usize) -> Result<bool>) -> Result<usize> {
    let (mut good, mut bad) = (0, most + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle)? { good = middle } else { bad = middle }
    }
    Ok(good)
}
