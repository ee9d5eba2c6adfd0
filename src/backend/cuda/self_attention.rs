//! Attention with the linears around it. On Hopper the projection itself rotates the heads (linear_sm90a.cu), attention reads
//! them where it left them and takes the `s` of the adapter that reads its result (attention_sm90a.cu), and on the way back the
//! gradients of queries and keys are rotated back before they leave (attention_backward_sm90a.cu).

use super::attention::{self, Projected};
use super::linear::{shapes_of, work_given_s};
use super::magnitudes::magnitudes_of;
use super::memory::{CudaBuffer, CudaFloats, HALF_BYTES};
use super::products::Rotation;
use super::shares_of_s::SharesOfS;
use super::{CudaBackend, lock};
use crate::backend::{
    AdapterShape, Attention, AttentionGradient, AttentionSaved, Backend, LinearGroup, LinearInput,
    NormedInput, Reach, SelfAttention, Work, self_attention,
};
use crate::device::Device;
use crate::error::Result;
use crate::range;

/// The shares of the `s` of an adapter that reads `heads` heads, one of each, where Hopper's kernels take them for less than
/// it costs to read the heads again. Counted for a token, these are `2·Q·D` bytes; the shares, written and read, `8·Q·r̄`.
fn shares_of_heads(
    adapters: &[AdapterShape],
    [heads, head_dim]: [usize; 2],
    tokens: usize,
) -> Option<SharesOfS> {
    let reading_again = tokens * heads * head_dim * HALF_BYTES;
    SharesOfS::on_hopper(adapters, heads, tokens).filter(|shares| 2 * shares.bytes() < reading_again)
}

impl<D: Device> CudaBackend<D> {
    /// Whether the product rotates the heads: `qkv` then holds them rotated from the forward to the backward.
    pub(super) fn rotates_in_product(&self, layer: SelfAttention<'_, Self>) -> bool {
        let SelfAttention { projection, attention, .. } = layer;
        let has_norms = attention.query_norm.is_some() || attention.key_norm.is_some();
        // Magnitudes come between the product and the rotation.
        let is_plain = !has_norms && magnitudes_of(projection).is_none();
        is_plain && self.kernels.rotates_in_products(attention.head_dim, attention.rotations.width)
    }

    /// The shares of the output's `s` that attention over `tokens` takes; none where it is computed from the heads.
    pub(super) fn shares_of_output(
        &self,
        output: &[AdapterShape],
        [heads, head_dim]: [usize; 2],
        tokens: usize,
    ) -> Option<SharesOfS> {
        match self.is_for_hopper(head_dim) {
            true => shares_of_heads(output, [heads, head_dim], tokens),
            false => None,
        }
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
        if rows == 0 {
            return self_attention::forward(self, layer, parameters, input, residual, saved, y);
        }
        let AttentionSaved { projection_s, qkv, log_sum, out, output_s } = saved;
        let is_rotated = self.rotates_in_product(layer);
        if is_rotated {
            let input = self.normed_down(projection, parameters, input, projection_s)?;
            self.rotated_projection(projection, attention, input, projection_s, qkv)?;
        } else {
            self.normed_linear(projection, parameters, input, projection_s, qkv)?;
        }
        let heads = [attention.query_heads, attention.head_dim];
        let shares = match batch.dropout {
            None if magnitudes_of(output).is_none() => self.shares_of_output(shapes_of(output), heads, rows),
            _ => None,
        };
        {
            let rank = shares.map_or(0, |shares| shares.rank);
            let of_s = || Work::of_s(rows, output.in_features, rank, HALF_BYTES);
            let _range = range!("attention"; attention::work(attention, batch, false) + of_s());
            let projected = Projected { qkv, is_rotated };
            let mut scratch = lock(&self.scratch);
            let operands = |shares| self.share_operands(shares, output, parameters, &mut scratch);
            let operands = shares.map(operands).transpose()?;
            let of_output = operands.as_ref();
            self.attention_forward(attention, batch, &projected, log_sum, out, of_output, &mut scratch)?;
            if let Some(of_output) = of_output {
                self.sum_shares(of_output, output_s)?;
            }
        }
        let input = LinearInput { x: out, rows, batch };
        match shares {
            None => self.linear(output, parameters, input, residual, output_s, y),
            Some(_) => self.linear_given_s(output, input, residual, output_s, y),
        }
    }

    /// The projection, given its `s`, with its heads rotated as attention reads them.
    fn rotated_projection(
        &self,
        projection: &LinearGroup<Self>,
        attention: &Attention<'_, Self>,
        input: LinearInput<'_, Self>,
        s: &CudaBuffer<D>,
        qkv: &CudaBuffer<D>,
    ) -> Result<()> {
        let _range = range!("linear"; work_given_s(projection, input.rows));
        let heads = attention.query_heads + attention.key_value_heads;
        let rotation = Rotation {
            angles: self.batch_positions(attention, input.batch)?.angles(&attention.rotations)?,
            head_dim: attention.head_dim,
            rotated_columns: heads * attention.head_dim,
        };
        let product = self.forward_product(projection, input.rows, input.x, None, s, qkv)?;
        // SAFETY: every stretch was asked for by its shape, and the table covers every position.
        unsafe { self.kernels.rotated_forward(&product, &rotation) }
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
        if !reaches_attention || !self.rotates_in_product(layer) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_taken_where_they_are_less_than_the_heads() {
        let stretches = |ranks: &[usize], heads, head_dim| {
            let shape = |&rank: &usize| AdapterShape { out_features: 64, rank };
            let adapters: Vec<_> = ranks.iter().map(shape).collect();
            shares_of_heads(&adapters, [heads, head_dim], 100).map(|shares| shares.stretches)
        };
        // Qwen2.5-1.5B, 1536 bytes for 3072, and Llama-3-8B, 4096 for 8192.
        assert_eq!(stretches(&[16], 12, 128), Some(12));
        assert_eq!(stretches(&[16], 32, 128), Some(32));
        // SmolLM2-135M: 1152 bytes for as many.
        assert_eq!(stretches(&[16], 9, 64), None);
        assert_eq!(stretches(&[8], 9, 64), Some(9));
        assert_eq!(stretches(&[24], 12, 128), Some(12));
        assert_eq!(stretches(&[25], 12, 128), None);
        assert_eq!(stretches(&[], 12, 128), None);
    }
}
