//! The operations of a LoRA transformer, as a backend must offer them.
//!
//! Axes: `T` rows (tokens of all samples, end to end), `H` hidden width, `I` / `O` a linear's input / output width,
//! `R` the summed ranks of a group's adapters, `L` labelled rows, `V` vocabulary, `D` head width, `Q` / `K` query /
//! key-value heads, `F` width of the gated activation. All matrices are row-major.
//!
//! The operations are as coarse as the fusions need, so that a backend may fuse inside one and the model never
//! changes for it. Each has a forward and a backward; there is no autograd tape.

mod branch;
pub mod cpu;
pub mod cuda;
pub mod dropout;
mod footprint;
mod group;
mod mlp;
pub mod noise;
mod operands;
mod self_attention;
mod weight;
mod work;

pub use branch::{NormedInput, Reach};
pub use footprint::{AdapterShape, Footprint, GroupShape, OperationShapes};
pub use group::{LinearGroup, LinearInput, LoraSlot, PlacedAdapter, Projection, placed_adapters};
pub use mlp::{Mlp, MlpGradient, MlpSaved};
pub use noise::EmbeddingNoise;
pub use operands::{Activation, Attention, Embedding, Head, KvCache, LongTexts, RmsNorm, Rotations};
pub use self_attention::{AttentionGradient, AttentionSaved, SelfAttention};
pub use weight::{MatrixWeight, VectorWeight, Weight};
pub use work::{LinearGradients, LinearShape, Work, attention_pairs};

use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::tensor::WeightTensor;

/// Dropout on an adapter's input: the mask depends on (seed, epoch, sample, position, input, feature) alone, so it
/// is the same on every backend and however the batch is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Chance of a zero; the rest is scaled by `1/(1-p)`.
    pub probability: f32,
    /// The run's seed.
    pub seed: u64,
    /// The pass over the data, from 0.
    pub epoch: u32,
}

/// What a pass over a batch is computed with, besides the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassSettings {
    /// Factor on the gradient of the summed loss.
    pub gradient_scale: f32,
    /// Dropout on the adapters' inputs; none in evaluation.
    pub dropout: Option<Dropout>,
    /// Noise on the embeddings; none in evaluation.
    pub embedding_noise: Option<EmbeddingNoise>,
}

/// One AdamW step with decoupled decay and bias correction (Loshchilov & Hutter 2019; as in PyTorch).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// This step's rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled decay, times the rate.
    pub weight_decay: f64,
    /// This update's number, from 1.
    pub step: u64,
    /// Gradients are scaled down to this global norm; infinite: never.
    pub max_grad_norm: f64,
    /// The gradients are this many times too large: the loss scale they were computed with, a power of two.
    pub loss_scale: f64,
}

/// A rate of its own for every `B` (LoRA+, Hayou et al. 2024).
pub struct BRate<'a, B: Backend + ?Sized> {
    /// B's rate over A's; the decay follows the rate.
    pub ratio: f64,
    /// Which parameters are of an `A` and which of a `B`.
    pub runs: &'a B::Runs,
}

/// The flat f32 buffers of the optimizer, all of one length.
pub struct OptimizerState<'a, B: Backend + ?Sized> {
    /// Adapter parameters, updated.
    pub parameters: &'a mut B::Floats,
    /// Their summed gradients; the update reads them clipped.
    pub gradients: &'a B::Floats,
    /// Running mean of the gradients.
    pub first_moment: &'a mut B::Floats,
    /// Running mean of their squares.
    pub second_moment: &'a mut B::Floats,
    /// None: one rate for all.
    pub b_rate: Option<BRate<'a, B>>,
}

/// A compute device with the operations of a LoRA transformer.
///
/// Buffers may be longer than an operation needs: it reads and writes the first `rows × width` elements. Outputs are
/// overwritten unless the operation says that it adds. An operation allocates nothing after its first call at the
/// largest shape.
pub trait Backend: Footprint + Send + Sync {
    /// A frozen matrix in the form that the products want.
    type Matrix: Send + Sync;
    /// A frozen vector.
    type Vector: Send + Sync;
    /// Activations in the compute type.
    type Buffer: Send + Sync;
    /// f32 values: adapters, gradients, moments, losses, tables.
    type Floats: Send + Sync;
    /// A [`Batch`] on the device, with its [`PassSettings`].
    type Batch: Send + Sync;
    /// Where values read from the device arrive.
    type Landing: Default + Send + Sync;
    /// Work that was recorded, to be started as one.
    type Recordings: Default + Send + Sync;
    /// What a [`LinearGroup`] keeps for its adapters.
    type Group: Send + Sync;
    /// Ends of the stretches of the flat parameter buffer that belong to `A`s and to `B`s.
    type Runs: Send + Sync;

    /// What computes, for the log: "cpu, 2 threads, avx512".
    fn description(&self) -> String;
    /// Runs `work`, which calls many operations, where they start fastest.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R
    where
        Self: Sized,
    {
        work()
    }
    /// Runs `work`, which asks for the same operations on the same buffers whenever `name` and `shape` (of the batch that is
    /// loaded, as [`shape_of`](Self::shape_of) tells it) are the same. A backend may record them, and start the recording
    /// the next time without calling `work`.
    fn repeat(
        &self,
        recordings: &mut Self::Recordings,
        name: &'static str,
        shape: [u64; 6],
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()>
    where
        Self: Sized,
    {
        let _ = (recordings, name, shape);
        work()
    }
    /// All that the shapes and constants of operations over a resident batch depend on.
    fn shape_of(&self, batch: &Self::Batch) -> [u64; 6] {
        let _ = batch;
        [0; 6]
    }
    /// Runs `make`, whose buffers are then cut from one allocation of `bytes` where the backend cuts memory itself.
    fn in_arena<R>(&self, bytes: u64, make: impl FnOnce() -> Result<R>) -> Result<R>
    where
        Self: Sized,
    {
        let _ = bytes;
        make()
    }
    /// Opens or closes the window of a GPU profiler (`nsys --capture-range=cudaProfilerApi`).
    ///
    /// # Errors
    /// A backend that no such profiler sees.
    fn profile(&self, is_open: bool) -> Result<()> {
        let _ = is_open;
        Err(Error::device(format!("no GPU profiler sees {}", self.description())).hint("use `--device cuda`"))
    }
    /// Whether gradients must be scaled up to stay inside the compute type's range (f16).
    fn needs_loss_scale(&self) -> bool {
        false
    }
    /// Refuses heads of a width, or with so many columns that are rotated, that attention has no kernel for.
    fn check_heads(&self, head_dim: usize, rotated: usize) -> Result<()> {
        let _ = (head_dim, rotated);
        Ok(())
    }
    /// Elements from one row of a group's `s [T, R]` to the next; `R` or more.
    fn low_rank_stride(&self, rank: usize) -> usize {
        rank
    }
    /// What the adapters of a [`LinearGroup`] need besides their parameters.
    fn prepare_group(&self, in_features: usize, projections: &[Projection]) -> Result<Self::Group>;
    /// Computes what a group keeps that depends on its adapters: before it is used, and whenever they have changed.
    fn renew_group(&self, group: &LinearGroup<Self>, adapters: &Self::Floats) -> Result<()> {
        let _ = (group, adapters);
        Ok(())
    }

    /// A frozen matrix: the rows of `parts` (each `[rows, columns]`, equal columns) in turn.
    fn matrix(&self, parts: &[WeightTensor]) -> Result<Self::Matrix>;
    /// A frozen vector: the elements of `parts` in turn.
    fn vector(&self, parts: &[WeightTensor]) -> Result<Self::Vector>;
    /// Activations of `elements`, contents undefined.
    fn buffer(&self, elements: usize) -> Result<Self::Buffer>;
    /// A copy of `values`.
    fn floats(&self, values: &[f32]) -> Result<Self::Floats>;
    /// Replaces the first `values.len()` elements.
    fn write_floats(&self, floats: &mut Self::Floats, values: &[f32]) -> Result<()>;
    /// Reads the first `into.len()` elements.
    fn read_floats(&self, floats: &Self::Floats, into: &mut [f32]) -> Result<()>;
    /// Keeps the ends of the flat buffer's runs, in order: of `A`s and of `B`s in turn, the first of `A`s.
    fn runs(&self, ends: &[usize]) -> Result<Self::Runs>;
    /// Starts to read the first `count` elements, in the order of the work, and returns.
    fn start_reading(&self, floats: &Self::Floats, count: usize, landing: &mut Self::Landing) -> Result<()>;
    /// Waits for that read alone, while work behind it goes on, and copies the first `into.len()` elements.
    fn finish_reading(&self, landing: &Self::Landing, into: &mut [f32]) -> Result<()>;
    /// Sets every element to zero.
    fn zero_floats(&self, floats: &mut Self::Floats) -> Result<()>;
    /// Replaces the first `values.len()` elements (tests, and values made on the host).
    fn write_buffer(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Result<()>;
    /// Reads the first `into.len()` elements as f32.
    fn read_buffer(&self, buffer: &Self::Buffer, into: &mut [f32]) -> Result<()>;
    /// Sets the first `elements` to zero.
    fn zero_buffer(&self, buffer: &mut Self::Buffer, elements: usize) -> Result<()>;
    /// An empty resident batch.
    fn new_batch(&self) -> Result<Self::Batch>;
    /// Replaces the resident batch and its settings.
    fn load_batch(&self, resident: &mut Self::Batch, batch: &Batch, settings: PassSettings) -> Result<()>;

    /// `x[t] = scale · table[token_ids[t]]`: `x [T, H]`; plus the noise of the batch's settings, if any.
    fn embedding(
        &self,
        batch: &Self::Batch,
        embedding: Embedding<'_, Self>,
        x: &mut Self::Buffer,
    ) -> Result<()>;

    /// `y = residual + norm(x)`, all `[rows, width]`.
    fn rms_norm(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &Self::Buffer,
        residual: Option<&Self::Buffer>,
        y: &mut Self::Buffer,
    ) -> Result<()>;
    /// Adds to `dx` the gradient through the norm of `x`, given `dy`; all `[rows, width]`.
    fn rms_norm_backward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &Self::Buffer,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
    ) -> Result<()>;
    /// Adds the gradient of a trained norm's weight, `Σ_t dy·x·rstd [width]`, to `gradients`, where the weight stands in the
    /// parameters; `x` and `dy` are `[rows, width]`.
    fn rms_norm_weight_backward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &Self::Buffer,
        dy: &Self::Buffer,
        gradients: &mut Self::Floats,
    ) -> Result<()>;

    /// `s = dropout(x)·Aᵀ [T, R]` and `y = residual + bias + x·Wᵀ + scale·s·Bᵀ [T, O]`. The rows of `s` stand
    /// [`low_rank_stride`](Self::low_rank_stride) apart.
    ///
    /// Of a group with magnitudes `s` holds `v = x̃·(W + scale·B·A)ᵀ [T, O]` behind its rows, where `x̃ = dropout(x)`, and
    /// `y = residual + bias + x·Wᵀ − x̃·Wᵀ + g∘v` with `g = m/‖W + scale·B·A‖`; where a projection has no magnitude `g` is 1.
    fn linear(
        &self,
        group: &LinearGroup<Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        residual: Option<&Self::Buffer>,
        s: &mut Self::Buffer,
        y: &mut Self::Buffer,
    ) -> Result<()>;
    /// [`linear`](Self::linear) of `norm(x)`, which it leaves in `input.normed`.
    fn normed_linear(
        &self,
        group: &LinearGroup<Self>,
        adapters: &Self::Floats,
        input: NormedInput<'_, Self>,
        s: &mut Self::Buffer,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        let input = input.normalise(self)?;
        self.linear(group, adapters, input, None, s, y)
    }
    /// Given `dy [T, O]` and the forward's `x` and `s`: adds the gradients of every `A` and `B` to `gradients`
    /// (same offsets as `adapters`), and writes `dx = dy·W + dropout'(scale·dy·B·A) [T, I]` where it is wanted.
    ///
    /// Of a group with magnitudes it adds `dm = Σ_t dy·v/‖W + scale·B·A‖` too; the norm is a constant, so that the adapters see
    /// `g∘dy` in place of `dy`, and `dx = dy·W + dropout'((g∘dy − dy)·W + scale·(g∘dy)·B·A)`.
    #[allow(clippy::too_many_arguments)]
    fn linear_backward(
        &self,
        group: &LinearGroup<Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        s: &Self::Buffer,
        dy: &Self::Buffer,
        gradients: &mut Self::Floats,
        dx: Option<&mut Self::Buffer>,
    ) -> Result<()>;

    /// Attention inside each sample of `batch`: `out [T, Q·D]` from the projections `qkv`; keeps the logarithm of
    /// each softmax's sum in `log_sum [T, Q]` for the backward.
    fn attention(
        &self,
        attention: &Attention<'_, Self>,
        batch: &Self::Batch,
        qkv: &Self::Buffer,
        log_sum: &mut Self::Floats,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `dqkv [T, (Q + 2K)·D]` from `dout` and what the forward read and wrote.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        attention: &Attention<'_, Self>,
        batch: &Self::Batch,
        qkv: &Self::Buffer,
        log_sum: &Self::Floats,
        out: &Self::Buffer,
        dout: &Self::Buffer,
        dqkv: &mut Self::Buffer,
    ) -> Result<()>;
    /// Attention of `rows` new positions, the first at `position`, over the cache, which gains their keys and values.
    fn attention_cached(
        &self,
        attention: &Attention<'_, Self>,
        rows: usize,
        position: usize,
        qkv: &Self::Buffer,
        cache: &mut KvCache<Self>,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// `y = residual + output(attention(projection(norm(x))))`, attention inside each sample of the input's batch; keeps in
    /// `saved` what the backward reads.
    fn self_attention(
        &self,
        layer: SelfAttention<'_, Self>,
        adapters: &Self::Floats,
        input: NormedInput<'_, Self>,
        residual: Option<&Self::Buffer>,
        saved: AttentionSaved<'_, Self>,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        self_attention::forward(self, layer, adapters, input, residual, saved, y)
    }
    /// Given `gradient.dy` and what the projection read and the forward left: adds the gradients of every `A` and `B` to
    /// `gradients`, as far as `gradient.reach` says, and no further.
    fn self_attention_backward(
        &self,
        layer: SelfAttention<'_, Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        saved: AttentionSaved<'_, Self>,
        gradient: AttentionGradient<'_, Self>,
        gradients: &mut Self::Floats,
    ) -> Result<()> {
        self_attention::backward(self, layer, adapters, input, saved, gradient, gradients)
    }

    /// `act = activation(gate)·up [rows, F]` from the gate|up group's output (Shazeer 2020).
    fn gated(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        gate_up: &Self::Buffer,
        act: &mut Self::Buffer,
    ) -> Result<()>;
    /// Replaces `gate_up` by its gradient, given `dact`.
    fn gated_backward(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        dact: &Self::Buffer,
        gate_up: &mut Self::Buffer,
    ) -> Result<()>;

    /// `y = residual + down(act)` with `act = activation(gate)·up` and `gate|up = gate_up(norm(x))`; keeps in `saved` what the
    /// backward reads.
    fn mlp(
        &self,
        mlp: Mlp<'_, Self>,
        adapters: &Self::Floats,
        input: NormedInput<'_, Self>,
        residual: Option<&Self::Buffer>,
        saved: MlpSaved<'_, Self>,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        mlp::forward(self, mlp, adapters, input, residual, saved, y)
    }
    /// Given `gradient.dy`, what gate and up read and what the forward left: adds the gradients of every `A` and `B` to
    /// `gradients`, as far as `gradient.reach` says, and no further. What `saved` holds is undefined afterwards, but for both `s`.
    fn mlp_backward(
        &self,
        mlp: Mlp<'_, Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        saved: MlpSaved<'_, Self>,
        gradient: MlpGradient<'_, Self>,
        gradients: &mut Self::Floats,
    ) -> Result<()> {
        mlp::backward(self, mlp, adapters, input, saved, gradient, gradients)
    }

    /// The labelled rows of `x [T, width]`, packed: `[L, width]`; zeros for [`NO_ROW`](crate::batch::NO_ROW).
    fn gather_labelled(
        &self,
        batch: &Self::Batch,
        width: usize,
        x: &Self::Buffer,
        packed: &mut Self::Buffer,
    ) -> Result<()>;
    /// The opposite for gradients: `dx [T, width]`, zero in rows without a label.
    fn scatter_labelled(
        &self,
        batch: &Self::Batch,
        width: usize,
        packed: &Self::Buffer,
        dx: &mut Self::Buffer,
    ) -> Result<()>;
    /// Cross-entropy of the labelled rows `x [L, H]`: `losses [2, L]` gets each row's loss in nats, then 1 where the
    /// target has the highest logit and else 0 (as rows of length `L`; both 0 for a target that is none). With `dx`, writes
    /// `gradient_scale · d(Σ loss)/dx`; with `gradients` as well, adds that of a trained head's weight there, where it stands
    /// in the parameters. The `[L, V]` logits never exist as a whole.
    fn head_loss(
        &self,
        head: Head<'_, Self>,
        batch: &Self::Batch,
        x: &Self::Buffer,
        losses: &mut Self::Floats,
        dx: Option<&mut Self::Buffer>,
        gradients: Option<&mut Self::Floats>,
    ) -> Result<()>;
    /// Logits of one row: `logits [V]` from row `row` of `x [_, H]`, on the host.
    fn head_logits(
        &self,
        head: Head<'_, Self>,
        x: &Self::Buffer,
        row: usize,
        logits: &mut [f32],
    ) -> Result<()>;

    /// Clips by the global norm, updates, and returns the norm before clipping. A norm that is not finite changes
    /// nothing.
    fn adamw(&self, state: OptimizerState<'_, Self>, step: AdamWStep) -> Result<f64>;
}

/// Refuses an id beyond the rows of a table; `place` is its place in the batch. Backends share it, since their kernels do
/// not look.
fn check_id(kind: &str, id: u32, place: usize, rows: usize) -> Result<()> {
    if (id as usize) < rows {
        return Ok(());
    }
    let message = format!("{kind} id {id} (number {place} of its batch); the table has {rows} rows");
    Err(Error::model(message).hint("use the tokenizer of this model"))
}
