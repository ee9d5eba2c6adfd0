//! Every activation buffer of a model, planned once from the longest batch.

use super::block::{BackwardBuffers, ForwardBuffers, GradientScratch, Inputs, Saved};
use super::config::GROUP_COUNT;
use super::memory::{ModelShape, Recompute};
use crate::backend::{Backend, Footprint, GroupShape};
use crate::batch::BatchRows;
use crate::error::Result;

/// The largest shapes that a workspace serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of one micro-batch.
    pub tokens: usize,
    /// Labelled rows of one micro-batch.
    pub labelled_rows: usize,
    /// Tokens of one sample: positions that the rotation table covers.
    pub positions: usize,
}

impl Limits {
    /// With the rows to which `backend` fills up batches.
    pub(super) fn padded(self, backend: &impl Footprint) -> Self {
        let BatchRows { tokens, labelled } =
            backend.padded(BatchRows { tokens: self.tokens, labelled: self.labelled_rows });
        Self { tokens, labelled_rows: labelled, ..self }
    }

    /// The larger of both in every respect.
    pub fn union(self, other: Self) -> Self {
        Self {
            tokens: self.tokens.max(other.tokens),
            labelled_rows: self.labelled_rows.max(other.labelled_rows),
            positions: self.positions.max(other.positions),
        }
    }
}

/// What the buffers are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Forward only: blocks share their buffers.
    Inference,
    /// Forward and backward: what a backward reads is kept for each block from the lowest that trains anything up.
    Training,
}

/// What a group's forward leaves for its backward, in elements a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// `s [T, R]`.
    pub rank: usize,
    /// `v [T, O]` of groups with magnitudes.
    pub outputs: usize,
}

impl Kept {
    /// Of a group of this shape.
    pub fn of(group: &GroupShape) -> Self {
        Self { rank: group.rank(), outputs: if group.has_magnitudes { group.out_features } else { 0 } }
    }

    /// What serves both.
    fn union(self, other: Self) -> Self {
        Self { rank: self.rank.max(other.rank), outputs: self.outputs.max(other.outputs) }
    }
}

/// Where buffers come from: the backend, or nowhere where only their size is asked for.
pub(super) struct Allocator<'a, B: Backend> {
    backend: &'a B,
    only_counts: bool,
    bytes: u64,
}

impl<'a, B: Backend> Allocator<'a, B> {
    /// Makes them.
    pub fn new(backend: &'a B) -> Self {
        Self { backend, only_counts: false, bytes: 0 }
    }

    /// Makes empty ones and adds up what they would take.
    pub fn counting(backend: &'a B) -> Self {
        Self { backend, only_counts: true, bytes: 0 }
    }

    /// Bytes asked for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Activations of `elements`.
    pub fn buffer(&mut self, elements: usize) -> Result<B::Buffer> {
        self.bytes += self.backend.buffer_bytes(elements);
        self.backend.buffer(if self.only_counts { 0 } else { elements })
    }

    /// A group's `s`, and `v` if it has one, for `tokens` rows.
    pub fn low_rank_buffer(&mut self, tokens: usize, kept: Kept) -> Result<B::Buffer> {
        self.buffer(tokens * (self.backend.low_rank_stride(kept.rank) + kept.outputs))
    }

    /// f32 zeros.
    pub fn floats(&mut self, elements: usize) -> Result<B::Floats> {
        self.bytes += self.backend.floats_bytes(elements);
        self.backend.floats(&vec![0.0; if self.only_counts { 0 } else { elements }])
    }
}

/// Place of the activations among the inputs of linears.
const ACT: usize = 2;

/// The buffers of one model.
pub(super) struct Workspace<B: Backend> {
    pub limits: Limits,
    pub purpose: Purpose,
    recompute: Recompute,
    /// First block whose activations are kept; the number of blocks in inference.
    first_kept: usize,
    layer_count: usize,
    residual: Vec<B::Buffer>,
    /// One for each kept block, or one for all.
    saved: Vec<Saved<B>>,
    /// Those of q, k and v, of gate and up, and of down: one for each kept block where its backward reads them, or one for all.
    inputs: [Vec<B::Buffer>; 3],
    head: HeadBuffers<B>,
    gradient: Option<Gradient<B>>,
}

/// Buffers between the last block and the loss.
pub(super) struct HeadBuffers<B: Backend> {
    /// Labelled rows of the last block's output, `[L, H]`.
    pub packed: B::Buffer,
    /// Those after the final norm, `[L, H]`; in decoding all new rows.
    pub normed: B::Buffer,
    /// Losses and hits, `[2, L]`.
    pub losses: B::Floats,
}

/// Buffers of the backward.
pub(super) struct Gradient<B: Backend> {
    /// Gradient of the residual stream, `[T, H]`.
    pub dx: B::Buffer,
    /// Gradient of the labelled rows before the final norm, `[L, H]`.
    pub dpacked: B::Buffer,
    /// Gradient of the labelled rows after the final norm, `[L, H]`.
    pub dnormed: B::Buffer,
    pub scratch: GradientScratch<B>,
}

impl<B: Backend> Workspace<B> {
    pub(super) fn new(
        memory: &mut Allocator<'_, B>,
        model: &ModelShape,
        purpose: Purpose,
        recompute: Recompute,
        limits: Limits,
    ) -> Result<Self> {
        let Limits { tokens, labelled_rows, .. } = limits;
        let ModelShape { block: shape, kept, lowest_trained, .. } = model;
        let hidden = shape.hidden_size;
        let layer_count = kept.len();
        let first_kept = match purpose {
            Purpose::Training => *lowest_trained,
            Purpose::Inference => layer_count,
        };
        let passing_buffers = if first_kept > 0 { 2 } else { 0 };
        let residual_count = layer_count - first_kept + 1 + passing_buffers;
        let kept_count = (layer_count - first_kept).max(1);
        let saved_count = if recompute == Recompute::Blocks { 1 } else { kept_count };
        // One that blocks share must fit the widest adapters.
        let sharing = if saved_count == 1 { layer_count } else { (first_kept + 1).min(layer_count) };
        let mut shared = [Kept::default(); GROUP_COUNT];
        for of_block in &kept[..sharing] {
            shared.iter_mut().zip(of_block).for_each(|(shared, kept)| *shared = shared.union(*kept));
        }
        let mut saved = vec![Saved::new(memory, shape, shared, tokens)?];
        for of_block in kept.iter().skip(first_kept + 1).take(saved_count - 1) {
            saved.push(Saved::new(memory, shape, *of_block, tokens)?);
        }
        let [reads_input, reads_middle, reads_act] = model.reads(memory.backend);
        let mut inputs = |width: usize, are_read: bool| -> Result<Vec<B::Buffer>> {
            let count = if are_read && recompute == Recompute::Nothing { kept_count } else { 1 };
            (0..count).map(|_| memory.buffer(tokens * width)).collect()
        };
        let inputs = [
            inputs(hidden, reads_input)?,
            inputs(hidden, reads_middle)?,
            inputs(shape.intermediate_size, reads_act)?,
        ];
        let head = HeadBuffers {
            packed: memory.buffer(labelled_rows * hidden)?,
            normed: memory.buffer(labelled_rows.max(tokens) * hidden)?,
            losses: memory.floats(2 * labelled_rows)?,
        };
        let gradient = match purpose {
            Purpose::Inference => None,
            Purpose::Training => Some(Gradient {
                dx: memory.buffer(tokens * hidden)?,
                dpacked: memory.buffer(labelled_rows * hidden)?,
                dnormed: memory.buffer(labelled_rows * hidden)?,
                scratch: GradientScratch::new(memory, shape, tokens)?,
            }),
        };
        Ok(Self {
            limits,
            purpose,
            recompute,
            first_kept,
            layer_count,
            residual: (0..residual_count).map(|_| memory.buffer(tokens * hidden)).collect::<Result<_>>()?,
            saved,
            inputs,
            head,
            gradient,
        })
    }

    /// Whether `layer`'s forward must run again before its backward: a later block's used the same memory.
    pub(super) fn is_overwritten(&self, layer: usize) -> bool {
        self.recompute == Recompute::Blocks && layer + 1 < self.layer_count
    }

    /// Blocks from here up keep their activations.
    pub(super) fn first_kept(&self) -> usize {
        self.first_kept
    }

    /// Place of the residual stream at the input of `layer`; below the kept blocks two buffers take turns.
    fn residual_slot(&self, layer: usize) -> usize {
        match layer.checked_sub(self.first_kept) {
            Some(kept) => kept,
            None => self.layer_count - self.first_kept + 1 + layer % 2,
        }
    }

    /// The embeddings' output.
    pub(super) fn first_residual(&mut self) -> &mut B::Buffer {
        let slot = self.residual_slot(0);
        &mut self.residual[slot]
    }

    /// The last block's output, and the buffers behind it.
    pub(super) fn after_blocks(&mut self) -> (&B::Buffer, &mut HeadBuffers<B>, Option<&mut Gradient<B>>) {
        let slot = self.residual_slot(self.layer_count);
        (&self.residual[slot], &mut self.head, self.gradient.as_mut())
    }

    /// Input, saved activations, recomputable inputs and output of `layer`.
    pub(super) fn layer(&mut self, layer: usize) -> ForwardBuffers<'_, B> {
        let slots = [self.residual_slot(layer), self.residual_slot(layer + 1)];
        let [x_in, x_out] = self.residual.get_disjoint_mut(slots).expect("neighbours never share a buffer");
        let kept = layer.saturating_sub(self.first_kept);
        ForwardBuffers {
            x_in,
            saved: own_or_shared(&mut self.saved, kept),
            inputs: inputs_of(&mut self.inputs, kept),
            x_out,
        }
    }

    /// The same with the backward's buffers instead of the output.
    ///
    /// # Panics
    /// When the workspace is not for training.
    pub(super) fn layer_backward(&mut self, layer: usize) -> BackwardBuffers<'_, B> {
        let x_in = &self.residual[self.residual_slot(layer)];
        let Gradient { dx, scratch: gradient, .. } =
            self.gradient.as_mut().expect("a workspace for training");
        let kept = layer - self.first_kept;
        let act_is_kept = match self.recompute {
            Recompute::Nothing => self.inputs[ACT].len() == self.saved.len(),
            Recompute::Inputs => false,
            Recompute::Blocks => true,
        };
        BackwardBuffers {
            x_in,
            saved: own_or_shared(&mut self.saved, kept),
            // A block that has just run again left its inputs as well.
            norms_are_kept: self.recompute != Recompute::Inputs,
            act_is_kept,
            inputs: inputs_of(&mut self.inputs, kept),
            gradient,
            dx,
        }
    }
}

fn inputs_of<B: Backend>(inputs: &mut [Vec<B::Buffer>; 3], kept: usize) -> Inputs<'_, B> {
    let [normed_input, normed_middle, act] = inputs.each_mut().map(|inputs| own_or_shared(inputs, kept));
    Inputs { normed_input, normed_middle, act }
}

/// A block's own buffers, where each has some.
fn own_or_shared<T>(buffers: &mut [T], kept: usize) -> &mut T {
    let place = if buffers.len() == 1 { 0 } else { kept };
    &mut buffers[place]
}
