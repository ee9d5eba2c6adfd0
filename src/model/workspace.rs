//! Every activation buffer of a model, planned once from the longest batch.

use super::block::{
    BackwardBuffers, BlockShape, ForwardBuffers, GROUP_COUNT, GradientScratch, Saved, Scratch,
};
use super::memory::Allocator;
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
    /// Forward and backward: what a backward reads is kept for each block from the lowest adapter up.
    Training,
}

/// The buffers of one model.
pub(super) struct Workspace<M: Allocator> {
    pub limits: Limits,
    pub purpose: Purpose,
    /// First block whose activations are kept; the number of blocks in inference.
    first_kept: usize,
    layer_count: usize,
    residual: Vec<M::Buffer>,
    saved: Vec<Saved<M>>,
    scratch: Scratch<M>,
    head: HeadBuffers<M>,
    gradient: Option<Gradient<M>>,
}

/// Buffers between the last block and the loss.
pub(super) struct HeadBuffers<M: Allocator> {
    /// Labelled rows of the last block's output, `[L, H]`.
    pub packed: M::Buffer,
    /// Those after the final norm, `[L, H]`; in decoding all new rows.
    pub normed: M::Buffer,
    /// Losses and hits, `[2, L]`.
    pub losses: M::Floats,
}

/// Buffers of the backward.
pub(super) struct Gradient<M: Allocator> {
    /// Gradient of the residual stream, `[T, H]`.
    pub dx: M::Buffer,
    /// Gradient of the labelled rows before the final norm, `[L, H]`.
    pub dpacked: M::Buffer,
    /// Gradient of the labelled rows after the final norm, `[L, H]`.
    pub dnormed: M::Buffer,
    pub scratch: GradientScratch<M>,
}

impl<M: Allocator> Workspace<M> {
    pub(super) fn new(
        memory: &M,
        shape: &BlockShape,
        ranks: &[[usize; GROUP_COUNT]],
        purpose: Purpose,
        limits: Limits,
    ) -> Result<Self> {
        let Limits { tokens, labelled_rows, .. } = limits;
        let hidden = shape.hidden_size;
        let layer_count = ranks.len();
        let lowest_adapted = ranks.iter().position(|ranks| ranks.iter().any(|rank| *rank > 0));
        let first_kept = match purpose {
            Purpose::Training => lowest_adapted.unwrap_or(layer_count),
            Purpose::Inference => layer_count,
        };
        let passing_buffers = if first_kept > 0 { 2 } else { 0 };
        let residual_count = layer_count - first_kept + 1 + passing_buffers;
        // A shared one must fit the widest adapters.
        let mut shared_ranks = [0; GROUP_COUNT];
        for block_ranks in &ranks[..(first_kept + 1).min(layer_count)] {
            for (shared, rank) in shared_ranks.iter_mut().zip(block_ranks) {
                *shared = (*rank).max(*shared);
            }
        }
        let mut saved = vec![Saved::new(memory, shape, shared_ranks, tokens)?];
        for block_ranks in ranks.iter().skip(first_kept + 1) {
            saved.push(Saved::new(memory, shape, *block_ranks, tokens)?);
        }
        let head = HeadBuffers {
            packed: memory.buffer(labelled_rows * hidden)?,
            normed: memory.buffer(labelled_rows.max(tokens) * hidden)?,
            losses: memory.zeros(2 * labelled_rows)?,
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
            first_kept,
            layer_count,
            residual: (0..residual_count).map(|_| memory.buffer(tokens * hidden)).collect::<Result<_>>()?,
            saved,
            scratch: Scratch::new(memory, shape, tokens)?,
            head,
            gradient,
        })
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
    pub(super) fn first_residual(&mut self) -> &mut M::Buffer {
        let slot = self.residual_slot(0);
        &mut self.residual[slot]
    }

    /// The last block's output, and the buffers behind it.
    pub(super) fn after_blocks(&mut self) -> (&M::Buffer, &mut HeadBuffers<M>, Option<&mut Gradient<M>>) {
        let slot = self.residual_slot(self.layer_count);
        (&self.residual[slot], &mut self.head, self.gradient.as_mut())
    }

    /// Input, saved activations, scratch and output of `layer`.
    pub(super) fn layer(&mut self, layer: usize) -> ForwardBuffers<'_, M> {
        let slots = [self.residual_slot(layer), self.residual_slot(layer + 1)];
        let [x_in, x_out] = self.residual.get_disjoint_mut(slots).expect("neighbours never share a buffer");
        let saved = &mut self.saved[layer.saturating_sub(self.first_kept)];
        ForwardBuffers { x_in, saved, scratch: &mut self.scratch, x_out }
    }

    /// The same with the backward's buffers instead of the output.
    ///
    /// # Panics
    /// When the workspace is not for training.
    pub(super) fn layer_backward(&mut self, layer: usize) -> BackwardBuffers<'_, M> {
        let x_in = &self.residual[self.residual_slot(layer)];
        let Gradient { dx, scratch: gradient, .. } =
            self.gradient.as_mut().expect("a workspace for training");
        let saved = &mut self.saved[layer - self.first_kept];
        BackwardBuffers { x_in, saved, scratch: &mut self.scratch, gradient, dx }
    }
}
