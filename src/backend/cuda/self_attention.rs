//! The projection of queries, keys and values with the attention that reads them: on Hopper the product itself rotates
//! the heads (linear_sm90a.cu), and attention reads them where it left them.

use super::attention::{self, Projected};
use super::memory::CudaFloats;
use super::products::Rotation;
use super::{CudaBackend, linear};
use crate::backend::{AttentionGradients, AttentionResults, Backend, LinearInput, SelfAttention};
use crate::device::Device;
use crate::error::Result;
use crate::range;

impl<D: Device> CudaBackend<D> {
    /// Whether the product rotates the heads: `qkv` then holds them rotated from the forward to the backward.
    pub(super) fn rotates_in_product(&self, layer: &SelfAttention<'_, Self>) -> bool {
        let attention = &layer.attention;
        let has_norms = attention.query_norm.is_some() || attention.key_norm.is_some();
        !has_norms && self.kernels.rotates_in_products(attention.head_dim, attention.rotations.width)
    }

    pub(super) fn self_attention_forward(
        &self,
        layer: &SelfAttention<'_, Self>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        results: AttentionResults<'_, Self>,
    ) -> Result<()> {
        let SelfAttention { projection, attention } = layer;
        let (rows, batch) = (input.rows, input.batch);
        if rows == 0 || !self.rotates_in_product(layer) {
            let AttentionResults { s, qkv, log_sum, out } = results;
            self.linear(projection, parameters, input, None, s, qkv)?;
            return self.attention(attention, batch, qkv, log_sum, out);
        }
        let AttentionResults { s, qkv, log_sum, out } = results;
        {
            let _range = range!("linear"; linear::work(projection, rows));
            let heads = attention.query_heads + attention.key_value_heads;
            let rotation = Rotation {
                angles: self.batch_positions(attention, batch)?.angles(&attention.rotations)?,
                head_dim: attention.head_dim,
                rotated_columns: heads * attention.head_dim,
            };
            self.adapter_down(projection, parameters, &input, s)?;
            let product = self.forward_product(projection, rows, input.x, None, s, qkv)?;
            // SAFETY: every stretch was asked for by its shape, and the table covers every position.
            unsafe { self.kernels.rotated_forward(&product, &rotation)? };
        }
        let _range = range!("attention"; attention::work(attention, batch, false));
        self.attention_forward(attention, batch, &Projected { qkv, is_rotated: true }, log_sum, out)
    }

    pub(super) fn self_attention_gradient(
        &self,
        layer: &SelfAttention<'_, Self>,
        parameters: &CudaFloats<D>,
        input: LinearInput<'_, Self>,
        results: AttentionResults<'_, Self>,
        gradients: AttentionGradients<'_, Self>,
    ) -> Result<()> {
        let SelfAttention { projection, attention } = layer;
        let AttentionResults { s, qkv, log_sum, out } = results;
        let AttentionGradients { dout, dqkv, adapters, dx } = gradients;
        {
            let batch = input.batch;
            let _range = range!("attention backward"; attention::work(attention, batch, true));
            let projected = Projected { qkv, is_rotated: self.rotates_in_product(layer) };
            self.attention_gradient(attention, batch, &projected, log_sum, out, dout, dqkv)?;
        }
        self.linear_backward(projection, parameters, input, s, dqkv, adapters, dx)
    }
}
