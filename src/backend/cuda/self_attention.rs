//! The projection of queries, keys and values with the attention that reads them: on Hopper the product itself rotates
//! the heads (linear_sm90a.cu), and attention reads them where it left them.

use super::attention::{self, Projected};
use super::memory::{CudaBuffer, CudaFloats};
use super::products::Rotation;
use super::{CudaBackend, linear};
use crate::backend::{
    Attention, AttentionGradient, AttentionSaved, Backend, LinearInput, NormedInput, Reach, SelfAttention,
    self_attention,
};
use crate::device::Device;
use crate::error::Result;
use crate::range;

impl<D: Device> CudaBackend<D> {
    /// Whether the product rotates the heads: `qkv` then holds them rotated from the forward to the backward.
    pub(super) fn rotates_in_product(&self, attention: &Attention<'_, Self>) -> bool {
        let has_norms = attention.query_norm.is_some() || attention.key_norm.is_some();
        !has_norms && self.kernels.rotates_in_products(attention.head_dim, attention.rotations.width)
    }

    pub(super) fn self_attention_forward(
        &self,
        layer: SelfAttention<'_, Self>,
        parameters: &CudaFloats<D>,
        input: NormedInput<'_, Self>,
        residual: Option<&CudaBuffer<D>>,
        saved: AttentionSaved<'_, Self>,
        y: &mut CudaBuffer<D>,
    ) -> Result<()> {
        let SelfAttention { projection, attention, output } = layer;
        let (rows, batch) = (input.rows, input.batch);
        if rows == 0 || !self.rotates_in_product(attention) {
            return self_attention::forward(self, layer, parameters, input, residual, saved, y);
        }
        let AttentionSaved { projection_s, qkv, log_sum, out, output_s } = saved;
        let input = self.normed_down(projection, parameters, input, projection_s)?;
        {
            let _range = range!("linear"; linear::work_given_s(projection, rows));
            let heads = attention.query_heads + attention.key_value_heads;
            let rotation = Rotation {
                angles: self.batch_positions(attention, batch)?.angles(&attention.rotations)?,
                head_dim: attention.head_dim,
                rotated_columns: heads * attention.head_dim,
            };
            let product = self.forward_product(projection, rows, input.x, None, projection_s, qkv)?;
            // SAFETY: every stretch was asked for by its shape, and the table covers every position.
            unsafe { self.kernels.rotated_forward(&product, &rotation)? };
        }
        {
            let _range = range!("attention"; attention::work(attention, batch, false));
            let projected = Projected { qkv, is_rotated: true };
            self.attention_forward(attention, batch, &projected, log_sum, out)?;
        }
        self.linear(output, parameters, LinearInput { x: out, rows, batch }, residual, output_s, y)
    }

    pub(super) fn self_attention_gradient(
        &self,
        layer: SelfAttention<'_, Self>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        saved: AttentionSaved<'_, Self>,
        gradient: AttentionGradient<'_, Self>,
        gradients: &mut CudaFloats<D>,
    ) -> Result<()> {
        let SelfAttention { projection, attention, output } = layer;
        let reaches_attention = !matches!(gradient.reach, Reach::Second);
        if !reaches_attention || !self.rotates_in_product(attention) {
            return self_attention::backward(self, layer, parameters, input, saved, gradient, gradients);
        }
        let LinearInput { rows, batch, .. } = input;
        let AttentionSaved { projection_s, qkv, log_sum, out, output_s } = saved;
        let AttentionGradient { dy, dout, dqkv, reach } = gradient;
        let of_output = LinearInput { x: out, rows, batch };
        self.linear_backward(output, parameters, of_output, output_s, dy, gradients, Some(&mut *dout))?;
        {
            let _range = range!("attention backward"; attention::work(attention, batch, true));
            let projected = Projected { qkv, is_rotated: true };
            self.attention_gradient(attention, batch, &projected, log_sum, out, dout, dqkv)?;
        }
        let dx = match reach {
            Reach::Input(dx) => Some(dx),
            Reach::First | Reach::Second => None,
        };
        self.linear_backward(projection, parameters, input, projection_s, dqkv, gradients, dx)
    }
}
