//! One transformer block: attention and gated MLP, each behind a norm and added to the residual stream.
//!
//! ```text
//! qkv      = linear(norm(x_in))            middle = x_in   + linear(attention(qkv))
//! gate|up  = linear(norm(middle))          x_out  = middle + linear(activation(gate)·up)
//! ```
//!
//! Where the model has norms behind attention and MLP, what is added to the stream is `norm(linear(…))`.
//!
//! Kept for the backward: `x_in`, `qkv`, the attention's output and softmax sums, `middle`, `gate|up`, every adapter's `s` and
//! the inputs of the norms behind. The other norms' outputs and the activation are cheap: where the backward reads them they are
//! kept if there is room, else computed again.

mod buffers;

use std::collections::HashMap;

pub(super) use buffers::{BackwardBuffers, ForwardBuffers, GradientScratch, Inputs, Saved};

use super::config::{GROUP_COUNT, ModelConfig};
use super::layout::AdapterLayout;
use super::lora::AdaptedLinear;
use super::weights::NormWeight;
use super::whole::BlockNorm;
use crate::backend::{
    Activation, Attention, AttentionGradient, AttentionSaved, Backend, KvCache, LinearGroup, LinearInput,
    Mlp, MlpGradient, MlpSaved, NormedInput, Projection, Reach, RmsNorm, Rotations, SelfAttention,
    VectorWeight, Weight,
};
use crate::checkpoint::base::BaseModel;
use crate::error::Result;
use crate::tensor::WeightTensor;

/// Places of the four linear groups within a block, in the order of the forward.
pub(super) const QKV: usize = 0;
pub(super) const OUTPUT: usize = 1;
pub(super) const GATE_UP: usize = 2;
pub(super) const DOWN: usize = 3;

/// Weights of one block, and which of its linears have adapters.
pub(super) struct Block<B: Backend> {
    input_norm: NormWeight<B>,
    qkv: LinearGroup<B>,
    query_norm: Option<B::Vector>,
    key_norm: Option<B::Vector>,
    output: LinearGroup<B>,
    /// Behind attention, before its output is added to the stream.
    attention_norm: Option<NormWeight<B>>,
    middle_norm: NormWeight<B>,
    gate_up: LinearGroup<B>,
    down: LinearGroup<B>,
    /// The same behind the MLP.
    mlp_norm: Option<NormWeight<B>>,
    shape: BlockShape,
    window: Option<usize>,
}

/// Widths and constants shared by all blocks of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct BlockShape {
    /// Width of the residual stream, H.
    pub hidden_size: usize,
    /// Width of the gated activation, F.
    pub intermediate_size: usize,
    /// Query heads, Q.
    pub query_heads: usize,
    /// Key-value heads, K.
    pub key_value_heads: usize,
    /// Width of a head, D.
    pub head_dim: usize,
    /// ε of every norm.
    pub epsilon: f32,
    /// Added to the weight of every norm.
    pub norm_weight_offset: f32,
    /// Whether there are norms behind attention and MLP.
    pub post_norms: bool,
    /// Of the gate.
    pub activation: Activation,
    /// Factor on the products of queries and keys.
    pub softmax_scale: f32,
    /// Soft cap of attention's scores.
    pub soft_cap: Option<f32>,
}

impl BlockShape {
    pub(super) fn new(config: &ModelConfig) -> Self {
        Self {
            hidden_size: config.hidden_size,
            intermediate_size: config.intermediate_size,
            query_heads: config.query_heads,
            key_value_heads: config.key_value_heads,
            head_dim: config.head_dim,
            epsilon: config.rms_norm_epsilon,
            norm_weight_offset: config.norm_weight_offset,
            post_norms: config.post_norms,
            activation: config.activation,
            softmax_scale: config.softmax_scale,
            soft_cap: config.attention_soft_cap,
        }
    }

    /// A norm over rows of the residual stream.
    pub(super) fn norm<'a, B: Backend>(&self, weight: VectorWeight<'a, B>) -> RmsNorm<'a, B> {
        self.norm_over(weight, self.hidden_size)
    }

    fn norm_over<'a, B: Backend>(&self, weight: VectorWeight<'a, B>, width: usize) -> RmsNorm<'a, B> {
        RmsNorm { weight, weight_offset: self.norm_weight_offset, epsilon: self.epsilon, width }
    }

    /// Width of all query heads, `Q·D`.
    pub(super) fn query_width(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Width of all key heads, `K·D`; the values' as well.
    pub(super) fn key_value_width(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    /// Width of queries, keys and values side by side.
    pub(super) fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.key_value_width()
    }
}

/// What a pass over the blocks reads besides their weights.
pub(super) struct Pass<'a, B: Backend> {
    pub backend: &'a B,
    pub adapters: &'a B::Floats,
    pub batch: &'a B::Batch,
    /// Of layers without and with a window.
    pub rotations: [Rotations<'a, B>; 2],
    pub tokens: usize,
}

impl<B: Backend> Clone for Pass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Pass<'_, B> {}

impl<'a, B: Backend> Pass<'a, B> {
    fn input(&self, x: &'a B::Buffer) -> LinearInput<'a, B> {
        LinearInput { x, rows: self.tokens, batch: self.batch }
    }

    fn normed_input(
        &self,
        norm: RmsNorm<'a, B>,
        x: &'a B::Buffer,
        normed: &'a mut B::Buffer,
    ) -> NormedInput<'a, B> {
        NormedInput { norm, x, rows: self.tokens, batch: self.batch, normed }
    }
}

impl<B: Backend> Block<B> {
    /// Loads layer `layer` of `base`, and gives the targets among its linears a place in `layout`. `linears` are the
    /// layer's by what they read, each with its adapter; what `residuals` has
    /// takes the place of the base's weight.
    pub(super) fn load(
        backend: &B,
        base: &BaseModel,
        layer: usize,
        linears: [&[AdaptedLinear]; GROUP_COUNT],
        layout: &mut AdapterLayout,
        residuals: &HashMap<String, WeightTensor>,
    ) -> Result<Self> {
        let config = base.config();
        let prefix = format!("model.layers.{layer}");
        let vector = |name: &str| backend.vector(&[base.tensor(&format!("{prefix}.{name}.weight"))?]);
        let mut group = |place: usize, linears: &[AdaptedLinear]| -> Result<LinearGroup<B>> {
            let parts = |suffix: &str| -> Result<Vec<_>> {
                let part = |(linear, _): &AdaptedLinear| {
                    let name = format!("{}.{suffix}", linear.name);
                    residuals.get(&name).map_or_else(|| base.tensor(&name), |residual| Ok(residual.clone()))
                };
                linears.iter().map(part).collect()
            };
            let first = &linears[0].0;
            let slots = layout.push_group(linears);
            let projection = |((linear, _), lora): (&AdaptedLinear, _)| Projection {
                out_features: linear.out_features,
                lora,
            };
            LinearGroup::new(
                backend,
                (layer * GROUP_COUNT + place) as u32,
                backend.matrix(&parts("weight")?)?,
                if first.bias { Some(backend.vector(&parts("bias")?)?) } else { None },
                first.in_features,
                linears.iter().zip(slots).map(projection).collect(),
            )
        };
        let norm = |norm: BlockNorm| vector(norm.name(config)).map(NormWeight::Frozen);
        let vector_if = |is_there: bool, name: &str| is_there.then(|| vector(name)).transpose();
        let norm_behind = |place| config.post_norms.then(|| norm(place)).transpose();
        Ok(Self {
            input_norm: norm(BlockNorm::Input)?,
            qkv: group(QKV, linears[QKV])?,
            query_norm: vector_if(config.qk_norm, "self_attn.q_norm")?,
            key_norm: vector_if(config.qk_norm, "self_attn.k_norm")?,
            output: group(OUTPUT, linears[OUTPUT])?,
            attention_norm: norm_behind(BlockNorm::Attention)?,
            middle_norm: norm(BlockNorm::Middle)?,
            gate_up: group(GATE_UP, linears[GATE_UP])?,
            down: group(DOWN, linears[DOWN])?,
            mlp_norm: norm_behind(BlockNorm::Mlp)?,
            window: config.windows[layer],
            shape: BlockShape::new(config),
        })
    }

    /// Tells the groups that the adapters have changed.
    pub(super) fn renew(&self, backend: &B, adapters: &B::Floats) -> Result<()> {
        let groups = [&self.qkv, &self.output, &self.gate_up, &self.down];
        groups.into_iter().try_for_each(|group| backend.renew_group(group, adapters))
    }

    /// Summed ranks of each group's adapters.
    pub(super) fn ranks(&self) -> [usize; GROUP_COUNT] {
        [&self.qkv, &self.output, &self.gate_up, &self.down].map(LinearGroup::total_rank)
    }

    /// Trains this norm, whose weight is at `offset` of the flat parameter buffer.
    pub(super) fn train_norm(&mut self, norm: BlockNorm, offset: usize) {
        let trained = NormWeight::Trained(offset);
        match norm {
            BlockNorm::Input => self.input_norm = trained,
            BlockNorm::Attention => self.attention_norm = Some(trained),
            BlockNorm::Middle => self.middle_norm = trained,
            BlockNorm::Mlp => self.mlp_norm = Some(trained),
        }
    }

    /// Whether anything in front of this group, within the block, is trained: then the gradient of the group's input is
    /// wanted.
    fn trains_before(&self, group: usize) -> bool {
        let has_trained_attention_norm = self.attention_norm.as_ref().is_some_and(NormWeight::is_trained);
        self.ranks()[..group].iter().any(|rank| *rank > 0)
            || self.input_norm.is_trained()
            || group > OUTPUT && (has_trained_attention_norm || self.middle_norm.is_trained())
    }

    fn attention<'a>(&'a self, rotations: [Rotations<'a, B>; 2]) -> Attention<'a, B> {
        let head_norm = |weight| self.shape.norm_over(Weight::Frozen(weight), self.shape.head_dim);
        Attention {
            query_heads: self.shape.query_heads,
            key_value_heads: self.shape.key_value_heads,
            head_dim: self.shape.head_dim,
            softmax_scale: self.shape.softmax_scale,
            soft_cap: self.shape.soft_cap,
            window: self.window,
            query_norm: self.query_norm.as_ref().map(head_norm),
            key_norm: self.key_norm.as_ref().map(head_norm),
            rotations: rotations[usize::from(self.window.is_some())],
        }
    }

    /// `x_out` from `x_in`, both `[T, H]`, with attention inside each sample.
    pub(super) fn forward(&self, pass: Pass<'_, B>, mut buffers: ForwardBuffers<'_, B>) -> Result<()> {
        let ForwardBuffers { x_in, saved, inputs, .. } = &mut buffers;
        let input = pass.normed_input(self.norm(&self.input_norm, pass), x_in, inputs.normed_input);
        let Saved { qkv, log_sum, attended, middle, s: [projection_s, output_s, ..], branches, .. } =
            &mut **saved;
        let attention = self.attention(pass.rotations);
        let layer = self.self_attention(&attention);
        let behind = self.attention_norm.as_ref().zip(split(branches)[0].take());
        self.add_branch(pass, behind, x_in, middle, |residual, y| {
            let saved = AttentionSaved { projection_s, qkv, log_sum, out: attended, output_s };
            pass.backend.self_attention(layer, pass.adapters, input, residual, saved, y)
        })?;
        self.mlp_forward(pass, buffers)
    }

    /// The same for new tokens from `position` on, whose attention goes over `cache`.
    pub(super) fn forward_cached(
        &self,
        pass: Pass<'_, B>,
        position: usize,
        cache: &mut KvCache<B>,
        mut buffers: ForwardBuffers<'_, B>,
    ) -> Result<()> {
        let Pass { backend, adapters, tokens, .. } = pass;
        let ForwardBuffers { x_in, saved, inputs, .. } = &mut buffers;
        let input = pass.normed_input(self.norm(&self.input_norm, pass), x_in, inputs.normed_input);
        let Saved { qkv, attended, middle, s: [projection_s, output_s, ..], branches, .. } = &mut **saved;
        backend.normed_linear(&self.qkv, adapters, input, projection_s, qkv)?;
        backend.attention_cached(&self.attention(pass.rotations), tokens, position, qkv, cache, attended)?;
        let behind = self.attention_norm.as_ref().zip(split(branches)[0].take());
        self.add_branch(pass, behind, x_in, middle, |residual, y| {
            backend.linear(&self.output, adapters, pass.input(attended), residual, output_s, y)
        })?;
        self.mlp_forward(pass, buffers)
    }

    fn mlp_forward(&self, pass: Pass<'_, B>, buffers: ForwardBuffers<'_, B>) -> Result<()> {
        let ForwardBuffers { saved, inputs: Inputs { normed_middle, act, .. }, x_out, .. } = buffers;
        let Saved { middle, gate_up, s: [.., gate_up_s, down_s], branches, .. } = saved;
        let input = pass.normed_input(self.norm(&self.middle_norm, pass), middle, normed_middle);
        let behind = self.mlp_norm.as_ref().zip(split(branches)[1].take());
        self.add_branch(pass, behind, middle, x_out, |residual, y| {
            let saved = MlpSaved { gate_up, gate_up_s, act, down_s };
            pass.backend.mlp(self.mlp(), pass.adapters, input, residual, saved, y)
        })
    }

    fn norm<'a>(&'a self, weight: &'a NormWeight<B>, pass: Pass<'a, B>) -> RmsNorm<'a, B> {
        self.shape.norm(weight.with(pass.adapters))
    }

    fn self_attention<'a>(&'a self, attention: &'a Attention<'a, B>) -> SelfAttention<'a, B> {
        SelfAttention { projection: &self.qkv, attention, output: &self.output }
    }

    fn mlp(&self) -> Mlp<'_, B> {
        Mlp { gate_up: &self.gate_up, down: &self.down, activation: self.shape.activation }
    }

    /// `sum = residual + branch`; `write` computes the branch, and adds the residual if it is given. Where there is a norm
    /// behind, with a buffer for its input, the branch is normalised first.
    fn add_branch(
        &self,
        pass: Pass<'_, B>,
        behind: Option<(&NormWeight<B>, &mut B::Buffer)>,
        residual: &B::Buffer,
        sum: &mut B::Buffer,
        write: impl FnOnce(Option<&B::Buffer>, &mut B::Buffer) -> Result<()>,
    ) -> Result<()> {
        let Some((weight, branch)) = behind else { return write(Some(residual), sum) };
        write(None, branch)?;
        let norm = self.norm(weight, pass);
        pass.backend.rms_norm(norm, pass.tokens, branch, Some(residual), sum)
    }

    /// The gradient at the output of a branch's linear, given `dx` at the stream: `dx` itself, or, where there is a norm behind
    /// the linear, what that leaves of it in `dbranch`. Adds the gradient of the norm's weight if it is trained.
    fn branch_gradient<'a>(
        &self,
        pass: Pass<'_, B>,
        behind: Option<(&NormWeight<B>, &B::Buffer)>,
        dx: &'a B::Buffer,
        dbranch: Option<&'a mut B::Buffer>,
        gradients: &mut B::Floats,
    ) -> Result<&'a B::Buffer> {
        let Some(((weight, branch), dbranch)) = behind.zip(dbranch) else { return Ok(dx) };
        let Pass { backend, tokens, .. } = pass;
        let norm = self.norm(weight, pass);
        backend.zero_buffer(dbranch, tokens * self.shape.hidden_size)?;
        backend.rms_norm_backward(norm, tokens, branch, dx, dbranch)?;
        if weight.is_trained() {
            backend.rms_norm_weight_backward(norm, tokens, branch, dx, gradients)?;
        }
        Ok(dbranch)
    }

    /// Turns `dx`, the gradient at `x_out`, into the gradient at `x_in`, and adds the adapters' gradients.
    ///
    /// With `trains_below` false nothing is computed that only lower blocks would need; `dx` is then undefined.
    pub(super) fn backward(
        &self,
        pass: Pass<'_, B>,
        trains_below: bool,
        buffers: BackwardBuffers<'_, B>,
        gradients: &mut B::Floats,
    ) -> Result<()> {
        let Pass { backend, adapters, tokens, .. } = pass;
        let BackwardBuffers { x_in, saved, inputs, norms_are_kept, act_is_kept, gradient, dx } = buffers;
        let Saved { qkv, log_sum, attended, middle, gate_up, s, branches } = saved;
        let [projection_s, output_s, gate_up_s, down_s] = s;
        let [attention_branch, mlp_branch] = split(branches).map(|branch| branch.map(|branch| &*branch));
        let Inputs { normed_input, normed_middle, act } = inputs;
        let GradientScratch { dnormed, dqkv, dattended, dact, dbranch } = gradient;
        let ranks = self.ranks();
        let must_recompute = |group: usize| !norms_are_kept && ranks[group] > 0;
        let needs_dx = |group: usize| trains_below || self.trains_before(group);

        let norm = self.norm(&self.middle_norm, pass);
        if must_recompute(GATE_UP) {
            backend.rms_norm(norm, tokens, middle, None, normed_middle)?;
        }
        let behind = self.mlp_norm.as_ref().zip(mlp_branch);
        let dy = self.branch_gradient(pass, behind, dx, dbranch.as_mut(), gradients)?;
        let reach = match (needs_dx(DOWN), needs_dx(GATE_UP)) {
            (false, _) => Reach::Second,
            (true, false) => Reach::First,
            (true, true) => Reach::Input(&mut *dnormed),
        };
        let saved = MlpSaved { gate_up, gate_up_s, act, down_s };
        let gradient = MlpGradient { dy, act_is_kept, dact, reach };
        backend.mlp_backward(self.mlp(), adapters, pass.input(normed_middle), saved, gradient, gradients)?;
        if !needs_dx(GATE_UP) {
            return Ok(());
        }
        backend.rms_norm_backward(norm, tokens, middle, dnormed, dx)?;
        if self.middle_norm.is_trained() {
            backend.rms_norm_weight_backward(norm, tokens, middle, dnormed, gradients)?;
        }

        let norm = self.norm(&self.input_norm, pass);
        if must_recompute(QKV) {
            backend.rms_norm(norm, tokens, x_in, None, normed_input)?;
        }
        let behind = self.attention_norm.as_ref().zip(attention_branch);
        let dy = self.branch_gradient(pass, behind, dx, dbranch.as_mut(), gradients)?;
        let reach = match (needs_dx(OUTPUT), needs_dx(QKV)) {
            (false, _) => Reach::Second,
            (true, false) => Reach::First,
            (true, true) => Reach::Input(&mut *dnormed),
        };
        let attention = self.attention(pass.rotations);
        let layer = self.self_attention(&attention);
        let saved = AttentionSaved { projection_s, qkv, log_sum, out: attended, output_s };
        let gradient = AttentionGradient { dy, dout: dattended, dqkv, reach };
        let input = pass.input(normed_input);
        backend.self_attention_backward(layer, adapters, input, saved, gradient, gradients)?;
        if !needs_dx(QKV) {
            return Ok(());
        }
        if self.input_norm.is_trained() {
            backend.rms_norm_weight_backward(norm, tokens, x_in, dnormed, gradients)?;
        }
        if !trains_below {
            return Ok(());
        }
        backend.rms_norm_backward(norm, tokens, x_in, dnormed, dx)
    }
}

/// Both buffers, where they are.
fn split<T>(buffers: &mut Option<[T; 2]>) -> [Option<&mut T>; 2] {
    match buffers {
        Some([first, second]) => [Some(first), Some(second)],
        None => [None, None],
    }
}
