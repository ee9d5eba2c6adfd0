//! The attention of a block with the linears around it as one operation, and of what it is composed where a backend fuses
//! nothing.

use super::{Attention, Backend, LinearGroup, LinearInput, NormedInput, Reach};
use crate::error::Result;

/// Self-attention: `output(attention(projection(x)))`.
pub struct SelfAttention<'a, B: Backend + ?Sized> {
    /// Of queries, keys and values, from `[T, H]` to `[T, (Q + 2K)·D]`.
    pub projection: &'a LinearGroup<B>,
    /// What reads them.
    pub attention: &'a Attention<'a, B>,
    /// From `[T, Q·D]` to `[T, H]`.
    pub output: &'a LinearGroup<B>,
}

// Derived, these would ask for `B: Copy`.
impl<B: Backend + ?Sized> Clone for SelfAttention<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend + ?Sized> Copy for SelfAttention<'_, B> {}

/// What the forward of a [`SelfAttention`] leaves for its backward.
pub struct AttentionSaved<'a, B: Backend + ?Sized> {
    /// `s` of the projection, as [`linear`](Backend::linear) leaves it.
    pub projection_s: &'a mut B::Buffer,
    /// `[T, (Q + 2K)·D]`, in a form that is the backend's own.
    pub qkv: &'a mut B::Buffer,
    /// `[T, Q]` logarithms of the softmax's sums.
    pub log_sum: &'a mut B::Floats,
    /// Input of the output's linear, `[T, Q·D]`.
    pub out: &'a mut B::Buffer,
    /// `s` of the output's linear.
    pub output_s: &'a mut B::Buffer,
}

/// Where the backward of a [`SelfAttention`] begins and ends.
pub struct AttentionGradient<'a, B: Backend + ?Sized> {
    /// The gradient at the end, `[T, H]`.
    pub dy: &'a B::Buffer,
    /// Room for the gradient of `out`, `[T, Q·D]`.
    pub dout: &'a mut B::Buffer,
    /// Room for the gradient of the projection's output, `[T, (Q + 2K)·D]`.
    pub dqkv: &'a mut B::Buffer,
    /// How far gradients are wanted.
    pub reach: Reach<'a, B>,
}

/// [`Backend::self_attention`] of other operations.
pub(super) fn forward<B: Backend + ?Sized>(
    backend: &B,
    layer: SelfAttention<'_, B>,
    adapters: &B::Floats,
    input: NormedInput<'_, B>,
    residual: Option<&B::Buffer>,
    saved: AttentionSaved<'_, B>,
    y: &mut B::Buffer,
) -> Result<()> {
    let (rows, batch) = (input.rows, input.batch);
    let AttentionSaved { projection_s, qkv, log_sum, out, output_s } = saved;
    backend.normed_linear(layer.projection, adapters, input, projection_s, qkv)?;
    backend.attention(layer.attention, batch, qkv, log_sum, out)?;
    backend.linear(layer.output, adapters, LinearInput { x: out, rows, batch }, residual, output_s, y)
}

/// [`Backend::self_attention_backward`] of other operations.
pub(super) fn backward<B: Backend + ?Sized>(
    backend: &B,
    layer: SelfAttention<'_, B>,
    adapters: &B::Floats,
    input: LinearInput<'_, B>,
    saved: AttentionSaved<'_, B>,
    gradient: AttentionGradient<'_, B>,
    gradients: &mut B::Floats,
) -> Result<()> {
    let LinearInput { rows, batch, .. } = input;
    let AttentionSaved { projection_s, qkv, log_sum, out, output_s } = saved;
    let AttentionGradient { dy, dout, dqkv, reach } = gradient;
    let wanted = if matches!(reach, Reach::Second) { None } else { Some(&mut *dout) };
    let of_output = LinearInput { x: out, rows, batch };
    backend.linear_backward(layer.output, adapters, of_output, output_s, dy, gradients, wanted)?;
    let dx = match reach {
        Reach::Second => return Ok(()),
        Reach::First => None,
        Reach::Input(dx) => Some(dx),
    };
    backend.attention_backward(layer.attention, batch, qkv, log_sum, out, dout, dqkv)?;
    backend.linear_backward(layer.projection, adapters, input, projection_s, dqkv, gradients, dx)
}
