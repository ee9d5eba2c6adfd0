//! The activations and gradients of one block.

use super::super::config::GROUP_COUNT;
use super::super::workspace::{Allocator, Kept};
use super::BlockShape;
use crate::backend::Backend;
use crate::error::Result;

/// What one block's forward leaves for its backward; in inference all blocks share one.
pub(in crate::model) struct Saved<B: Backend> {
    pub(super) qkv: B::Buffer,
    pub(super) log_sum: B::Floats,
    pub(super) attended: B::Buffer,
    pub(super) middle: B::Buffer,
    pub(super) gate_up: B::Buffer,
    pub(super) s: [B::Buffer; GROUP_COUNT],
    /// Inputs `[T, H]` of the norms behind attention and MLP.
    pub(super) branches: Option<[B::Buffer; 2]>,
}

impl<B: Backend> Saved<B> {
    pub(in crate::model) fn new(
        memory: &mut Allocator<'_, B>,
        shape: &BlockShape,
        kept: [Kept; GROUP_COUNT],
        tokens: usize,
    ) -> Result<Self> {
        let [qkv, output, gate_up, down] = kept.map(|kept| memory.low_rank_buffer(tokens, kept));
        let mut branch = || memory.buffer(tokens * shape.hidden_size);
        let branches = if shape.post_norms { Some([branch()?, branch()?]) } else { None };
        Ok(Self {
            branches,
            qkv: memory.buffer(tokens * shape.qkv_width())?,
            log_sum: memory.floats(tokens * shape.query_heads)?,
            attended: memory.buffer(tokens * shape.query_width())?,
            middle: memory.buffer(tokens * shape.hidden_size)?,
            gate_up: memory.buffer(tokens * 2 * shape.intermediate_size)?,
            s: [qkv?, output?, gate_up?, down?],
        })
    }
}

/// Inputs of linears that are cheap to compute again: one block's own, or shared.
pub(in crate::model) struct Inputs<'a, B: Backend> {
    /// Input of q, k and v, `[T, H]`.
    pub normed_input: &'a mut B::Buffer,
    /// Input of gate and up, `[T, H]`.
    pub normed_middle: &'a mut B::Buffer,
    /// Output of the gated activation, `[T, F]`.
    pub act: &'a mut B::Buffer,
}

/// Gradients that every block's backward uses in turn.
pub(in crate::model) struct GradientScratch<B: Backend> {
    pub(super) dnormed: B::Buffer,
    pub(super) dqkv: B::Buffer,
    pub(super) dattended: B::Buffer,
    pub(super) dact: B::Buffer,
    /// `[T, H]` behind the linear that ends a branch, where there is a norm behind it.
    pub(super) dbranch: Option<B::Buffer>,
}

impl<B: Backend> GradientScratch<B> {
    pub(in crate::model) fn new(
        memory: &mut Allocator<'_, B>,
        shape: &BlockShape,
        tokens: usize,
    ) -> Result<Self> {
        Ok(Self {
            dnormed: memory.buffer(tokens * shape.hidden_size)?,
            dqkv: memory.buffer(tokens * shape.qkv_width())?,
            dattended: memory.buffer(tokens * shape.query_width())?,
            dact: memory.buffer(tokens * shape.intermediate_size)?,
            dbranch: shape.post_norms.then(|| memory.buffer(tokens * shape.hidden_size)).transpose()?,
        })
    }
}

/// Buffers of one block's forward.
pub(in crate::model) struct ForwardBuffers<'a, B: Backend> {
    pub x_in: &'a B::Buffer,
    pub saved: &'a mut Saved<B>,
    pub inputs: Inputs<'a, B>,
    pub x_out: &'a mut B::Buffer,
}

/// Buffers of one block's backward.
pub(in crate::model) struct BackwardBuffers<'a, B: Backend> {
    pub x_in: &'a B::Buffer,
    pub saved: &'a mut Saved<B>,
    pub inputs: Inputs<'a, B>,
    /// Whether the outputs of the norms still are what the forward left, where a linear with adapters read them.
    pub norms_are_kept: bool,
    /// Whether that of the activation is.
    pub act_is_kept: bool,
    pub gradient: &'a mut GradientScratch<B>,
    /// Gradient of the residual stream: at the block's output before, at its input after.
    pub dx: &'a mut B::Buffer,
}
