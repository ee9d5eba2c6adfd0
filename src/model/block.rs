//! One transformer block: attention and gated MLP, each behind a norm and added to the residual stream.
//!
//! ```text
//! qkv      = linear(norm(x_in))            middle = x_in   + linear(attention(qkv))
//! gate|up  = linear(norm(middle))          x_out  = middle + linear(silu(gate)·up)
//! ```
//!
//! Kept for the backward: `x_in`, `qkv`, the attention's output and softmax sums, `middle`, `gate|up` and every
//! adapter's `s`. The norms' outputs and the activation are cheap: they are kept where there is room, else computed again.

use super::config::ModelConfig;
use super::lora::{AdaptedLinear, AdapterLayout};
use super::workspace::Allocator;
use crate::backend::{Attention, Backend, KvCache, LinearGroup, LinearInput, Projection, RmsNorm};
use crate::checkpoint::base::BaseModel;
use crate::error::Result;

/// Places of the four linear groups within a block, in the order of the forward.
const QKV: usize = 0;
const OUTPUT: usize = 1;
const GATE_UP: usize = 2;
const DOWN: usize = 3;
pub(super) const GROUP_COUNT: usize = 4;

/// Frozen weights of one block, and which of its linears have adapters.
pub(super) struct Block<B: Backend> {
    input_norm: B::Vector,
    qkv: LinearGroup<B>,
    query_norm: Option<B::Vector>,
    key_norm: Option<B::Vector>,
    output: LinearGroup<B>,
    post_attention_norm: B::Vector,
    gate_up: LinearGroup<B>,
    down: LinearGroup<B>,
    shape: BlockShape,
    window: Option<usize>,
}

/// Widths shared by all blocks of a model.
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
        }
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

/// What one block's forward leaves for its backward; in inference all blocks share one.
pub(super) struct Saved<B: Backend> {
    qkv: B::Buffer,
    log_sum: B::Floats,
    attended: B::Buffer,
    middle: B::Buffer,
    gate_up: B::Buffer,
    s: [B::Buffer; GROUP_COUNT],
}

impl<B: Backend> Saved<B> {
    pub(super) fn new(
        memory: &mut Allocator<'_, B>,
        shape: &BlockShape,
        ranks: [usize; GROUP_COUNT],
        tokens: usize,
    ) -> Result<Self> {
        let [qkv, output, gate_up, down] = ranks.map(|rank| memory.low_rank_buffer(tokens, rank));
        Ok(Self {
            qkv: memory.buffer(tokens * shape.qkv_width())?,
            log_sum: memory.floats(tokens * shape.query_heads)?,
            attended: memory.buffer(tokens * shape.query_width())?,
            middle: memory.buffer(tokens * shape.hidden_size)?,
            gate_up: memory.buffer(tokens * 2 * shape.intermediate_size)?,
            s: [qkv?, output?, gate_up?, down?],
        })
    }
}

/// Inputs of linears that are cheap to compute again; shared by all blocks, or one for each.
pub(super) struct Inputs<B: Backend> {
    /// Input of q, k and v, `[T, H]`.
    normed_input: B::Buffer,
    /// Input of gate and up, `[T, H]`.
    normed_middle: B::Buffer,
    /// Output of the gated activation, `[T, F]`.
    act: B::Buffer,
}

impl<B: Backend> Inputs<B> {
    pub(super) fn new(memory: &mut Allocator<'_, B>, shape: &BlockShape, tokens: usize) -> Result<Self> {
        Ok(Self {
            normed_input: memory.buffer(tokens * shape.hidden_size)?,
            normed_middle: memory.buffer(tokens * shape.hidden_size)?,
            act: memory.buffer(tokens * shape.intermediate_size)?,
        })
    }
}

/// Gradients that every block's backward uses in turn.
pub(super) struct GradientScratch<B: Backend> {
    dnormed: B::Buffer,
    dqkv: B::Buffer,
    dattended: B::Buffer,
    dact: B::Buffer,
}

impl<B: Backend> GradientScratch<B> {
    pub(super) fn new(memory: &mut Allocator<'_, B>, shape: &BlockShape, tokens: usize) -> Result<Self> {
        Ok(Self {
            dnormed: memory.buffer(tokens * shape.hidden_size)?,
            dqkv: memory.buffer(tokens * shape.qkv_width())?,
            dattended: memory.buffer(tokens * shape.query_width())?,
            dact: memory.buffer(tokens * shape.intermediate_size)?,
        })
    }
}

/// What a pass over the blocks reads besides their weights.
pub(super) struct Pass<'a, B: Backend> {
    pub backend: &'a B,
    pub adapters: &'a B::Floats,
    pub batch: &'a B::Batch,
    pub rope: &'a B::Floats,
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
}

/// Buffers of one block's forward.
pub(super) struct ForwardBuffers<'a, B: Backend> {
    pub x_in: &'a B::Buffer,
    pub saved: &'a mut Saved<B>,
    pub inputs: &'a mut Inputs<B>,
    pub x_out: &'a mut B::Buffer,
}

/// Buffers of one block's backward.
pub(super) struct BackwardBuffers<'a, B: Backend> {
    pub x_in: &'a B::Buffer,
    pub saved: &'a mut Saved<B>,
    pub inputs: &'a mut Inputs<B>,
    /// Whether `inputs` still are what the forward left.
    pub inputs_are_kept: bool,
    pub gradient: &'a mut GradientScratch<B>,
    /// Gradient of the residual stream: at the block's output before, at its input after.
    pub dx: &'a mut B::Buffer,
}

impl<B: Backend> Block<B> {
    /// Loads layer `layer` of `base`, and gives the targets among its linears a place in `layout`. `linears` are the
    /// layer's seven, in the order of [`ModelConfig::linear_modules`], each with its adapter.
    pub(super) fn load(
        backend: &B,
        base: &BaseModel,
        layer: usize,
        linears: &[AdaptedLinear],
        layout: &mut AdapterLayout,
    ) -> Result<Self> {
        let config = base.config();
        let prefix = format!("model.layers.{layer}");
        let norm = |name: &str| backend.vector(&[base.tensor(&format!("{prefix}.{name}.weight"))?]);
        let mut group = |place: usize, linears: &[AdaptedLinear]| -> Result<LinearGroup<B>> {
            let parts = |suffix: &str| -> Result<Vec<_>> {
                linears.iter().map(|(linear, _)| base.tensor(&format!("{}.{suffix}", linear.name))).collect()
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
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            qkv: group(QKV, &linears[0..3])?,
            query_norm: if config.qk_norm { Some(norm("self_attn.q_norm")?) } else { None },
            key_norm: if config.qk_norm { Some(norm("self_attn.k_norm")?) } else { None },
            output: group(OUTPUT, &linears[3..4])?,
            post_attention_norm: norm("post_attention_layernorm")?,
            gate_up: group(GATE_UP, &linears[4..6])?,
            down: group(DOWN, &linears[6..7])?,
            window: config.windows[layer],
            shape: BlockShape::new(config),
        })
    }

    /// Summed ranks of each group's adapters.
    pub(super) fn ranks(&self) -> [usize; GROUP_COUNT] {
        [&self.qkv, &self.output, &self.gate_up, &self.down].map(LinearGroup::total_rank)
    }

    /// Place of the first group with an adapter; `GROUP_COUNT` when there is none.
    fn first_adapted(&self) -> usize {
        self.ranks().iter().position(|rank| *rank > 0).unwrap_or(GROUP_COUNT)
    }

    fn norm<'a>(&self, weight: &'a B::Vector) -> RmsNorm<'a, B> {
        RmsNorm { weight, epsilon: self.shape.epsilon, width: self.shape.hidden_size }
    }

    fn attention<'a>(&'a self, rope: &'a B::Floats) -> Attention<'a, B> {
        let head_norm = |weight| RmsNorm { weight, epsilon: self.shape.epsilon, width: self.shape.head_dim };
        Attention {
            query_heads: self.shape.query_heads,
            key_value_heads: self.shape.key_value_heads,
            head_dim: self.shape.head_dim,
            softmax_scale: (1.0 / (self.shape.head_dim as f64).sqrt()) as f32,
            window: self.window,
            query_norm: self.query_norm.as_ref().map(head_norm),
            key_norm: self.key_norm.as_ref().map(head_norm),
            rope,
        }
    }

    /// `x_out` from `x_in`, both `[T, H]`, with attention inside each sample.
    pub(super) fn forward(&self, pass: Pass<'_, B>, mut buffers: ForwardBuffers<'_, B>) -> Result<()> {
        self.project_qkv(pass, &mut buffers)?;
        let attention = self.attention(pass.rope);
        let Saved { qkv, log_sum, attended, .. } = &mut *buffers.saved;
        pass.backend.attention(&attention, pass.batch, qkv, log_sum, attended)?;
        self.after_attention(pass, &mut buffers)
    }

    /// The same for new tokens from `position` on, whose attention goes over `cache`.
    pub(super) fn forward_cached(
        &self,
        pass: Pass<'_, B>,
        position: usize,
        cache: &mut KvCache<B>,
        mut buffers: ForwardBuffers<'_, B>,
    ) -> Result<()> {
        self.project_qkv(pass, &mut buffers)?;
        let attention = self.attention(pass.rope);
        let Saved { qkv, attended, .. } = &mut *buffers.saved;
        pass.backend.attention_cached(&attention, pass.tokens, position, qkv, cache, attended)?;
        self.after_attention(pass, &mut buffers)
    }

    fn project_qkv(&self, pass: Pass<'_, B>, buffers: &mut ForwardBuffers<'_, B>) -> Result<()> {
        let ForwardBuffers { x_in, saved, inputs, .. } = buffers;
        pass.backend.rms_norm(self.norm(&self.input_norm), pass.tokens, x_in, &mut inputs.normed_input)?;
        let input = pass.input(&inputs.normed_input);
        pass.backend.linear(&self.qkv, pass.adapters, input, None, &mut saved.s[QKV], &mut saved.qkv)
    }

    fn after_attention(&self, pass: Pass<'_, B>, buffers: &mut ForwardBuffers<'_, B>) -> Result<()> {
        let Pass { backend, adapters, tokens, .. } = pass;
        let ForwardBuffers { x_in, saved, inputs, x_out } = buffers;
        let Inputs { normed_middle, act, .. } = &mut **inputs;
        let Saved { attended, middle, gate_up, s, .. } = &mut **saved;
        backend.linear(&self.output, adapters, pass.input(attended), Some(x_in), &mut s[OUTPUT], middle)?;
        backend.rms_norm(self.norm(&self.post_attention_norm), tokens, middle, normed_middle)?;
        backend.linear(&self.gate_up, adapters, pass.input(normed_middle), None, &mut s[GATE_UP], gate_up)?;
        backend.gated_silu(tokens, self.shape.intermediate_size, gate_up, act)?;
        backend.linear(&self.down, adapters, pass.input(act), Some(middle), &mut s[DOWN], x_out)
    }

    /// Turns `dx`, the gradient at `x_out`, into the gradient at `x_in`, and adds the adapters' gradients.
    ///
    /// With `has_adapters_below` false nothing is computed that only lower blocks would need; `dx` is then undefined.
    pub(super) fn backward(
        &self,
        pass: Pass<'_, B>,
        has_adapters_below: bool,
        buffers: BackwardBuffers<'_, B>,
        gradients: &mut B::Floats,
    ) -> Result<()> {
        let Pass { backend, adapters, tokens, .. } = pass;
        let BackwardBuffers { x_in, saved, inputs, inputs_are_kept, gradient, dx } = buffers;
        let Saved { qkv, log_sum, attended, middle, gate_up, s } = saved;
        let Inputs { normed_input, normed_middle, act } = inputs;
        let GradientScratch { dnormed, dqkv, dattended, dact } = gradient;
        let shape = &self.shape;
        let ranks = self.ranks();
        let first_adapted = self.first_adapted();
        let must_recompute = |group: usize| !inputs_are_kept && ranks[group] > 0;
        let needs_dx = |group: usize| has_adapters_below || first_adapted < group;

        if must_recompute(DOWN) {
            backend.gated_silu(tokens, shape.intermediate_size, gate_up, act)?;
        }
        let wanted = needs_dx(DOWN).then_some(&mut *dact);
        backend.linear_backward(&self.down, adapters, pass.input(act), &s[DOWN], dx, gradients, wanted)?;
        if !needs_dx(DOWN) {
            return Ok(());
        }
        backend.gated_silu_backward(tokens, shape.intermediate_size, dact, gate_up)?;
        let norm = self.norm(&self.post_attention_norm);
        if must_recompute(GATE_UP) {
            backend.rms_norm(norm, tokens, middle, normed_middle)?;
        }
        let wanted = needs_dx(GATE_UP).then_some(&mut *dnormed);
        let input = pass.input(normed_middle);
        backend.linear_backward(&self.gate_up, adapters, input, &s[GATE_UP], gate_up, gradients, wanted)?;
        if !needs_dx(GATE_UP) {
            return Ok(());
        }
        backend.rms_norm_backward(norm, tokens, middle, dnormed, dx)?;

        let wanted = needs_dx(OUTPUT).then_some(&mut *dattended);
        backend.linear_backward(
            &self.output,
            adapters,
            pass.input(attended),
            &s[OUTPUT],
            dx,
            gradients,
            wanted,
        )?;
        if !needs_dx(OUTPUT) {
            return Ok(());
        }
        let attention = self.attention(pass.rope);
        backend.attention_backward(&attention, pass.batch, qkv, log_sum, attended, dattended, dqkv)?;
        let norm = self.norm(&self.input_norm);
        if must_recompute(QKV) {
            backend.rms_norm(norm, tokens, x_in, normed_input)?;
        }
        let wanted = needs_dx(QKV).then_some(&mut *dnormed);
        backend.linear_backward(
            &self.qkv,
            adapters,
            pass.input(normed_input),
            &s[QKV],
            dqkv,
            gradients,
            wanted,
        )?;
        if !needs_dx(QKV) {
            return Ok(());
        }
        backend.rms_norm_backward(norm, tokens, x_in, dnormed, dx)
    }
}
