//! The CUDA backend: the hand-written kernels of `kernels/`, in f16 or bf16 with f32 sums, on a GPU or on the emulator.
//!
//! Activations and frozen weights are in the compute type; adapters, gradients, moments and losses are f32. Every product
//! and sum has an order that depends on shapes alone, so results have the same bits on every run. All work goes to one
//! stream: an operation returns when it is enqueued, and only reading waits. A batch crosses the bus beside it.

mod adapter_gradients;
mod attention;
mod batch;
mod column_sums;
mod element;
mod footprint;
mod head;
mod launch;
mod linear;
mod magnitudes;
mod memory;
mod mlp;
mod normed_down;
mod optimizer;
mod products;
mod recordings;
mod scratch;
mod self_attention;
mod shares_of_s;
pub mod tiles;
mod trial;
mod weights;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

pub use attention::HEAD_DIMS;
pub use batch::CudaBatch;
pub use launch::ComputeType;
pub use linear::CudaGroup;
pub use memory::{CudaBuffer, CudaFloats, CudaMatrix, Region};
pub use optimizer::CudaRuns;
pub use recordings::CudaRecordings;
pub use trial::Trial;

use crate::backend::{
    Activation, AdamWStep, Attention, AttentionGradient, AttentionSaved, Backend, Embedding, Head, KvCache,
    LinearGradients, LinearGroup, LinearInput, Mlp, MlpGradient, MlpSaved, NormedInput, OptimizerState,
    PassSettings, Projection, RmsNorm, SelfAttention, Work,
};
use crate::batch::Batch;
use crate::device::Device;
use crate::error::Result;
use crate::range;
use crate::tensor::WeightTensor;
use attention::Projected;
use footprint::Arena;
use head::HeadGradients;
use launch::Kernels;
use memory::{FLOAT_BYTES, HALF_BYTES};
use scratch::{Scratch, lock};
use tiles::Tiles;

/// The kernels on one device, and scratch memory that grows to the largest shape seen.
pub struct CudaBackend<D: Device> {
    kernels: Kernels<D>,
    scratch: Mutex<Scratch<D>>,
    /// Set while buffers are cut from it.
    arena: Mutex<Option<Arena<D>>>,
    is_profiled: AtomicBool,
}

impl<D: Device> CudaBackend<D> {
    /// The kernels of `compute` on `device`: those of its own generation where there are some.
    pub fn new(device: D, compute: ComputeType) -> Self {
        let uses_hopper = device.limits().is_hopper();
        Self {
            kernels: Kernels { device, compute, uses_hopper, tiles: Tiles::default() },
            scratch: Mutex::default(),
            arena: Mutex::new(None),
            is_profiled: AtomicBool::new(false),
        }
    }

    /// The kernels that every GPU from Ampere on runs, alone.
    pub fn with_portable_kernels(mut self) -> Self {
        self.kernels.uses_hopper = false;
        self
    }

    /// The tiles of Hopper's products, instead of those by the rule.
    pub fn with_tiles(mut self, tiles: Tiles) -> Self {
        self.kernels.tiles = tiles;
        self
    }

    /// Whether there are tiles to choose from: on Hopper, with its kernels.
    pub fn has_choice_of_tiles(&self) -> bool {
        self.kernels.uses_hopper
    }

    /// Where the work runs.
    pub fn device(&self) -> &D {
        &self.kernels.device
    }

    /// What activations and weights are.
    pub fn compute(&self) -> ComputeType {
        self.kernels.compute
    }

    /// Whether nothing is recorded and replayed from now on.
    pub fn start_operations_singly(&self, is_on: bool) {
        self.is_profiled.store(is_on, Ordering::Relaxed);
    }

    fn is_profiled(&self) -> bool {
        self.is_profiled.load(Ordering::Relaxed)
    }
}

impl<D: Device> Backend for CudaBackend<D> {
    type Matrix = CudaMatrix<D>;
    type Vector = CudaBuffer<D>;
    type Buffer = CudaBuffer<D>;
    type Floats = CudaFloats<D>;
    type Batch = CudaBatch<D>;
    type Group = CudaGroup<D>;
    type Runs = CudaRuns<D>;
    type Landing = D::Landing;
    type Recordings = CudaRecordings<D>;

    fn description(&self) -> String {
        let kernels = if self.kernels.uses_hopper { ", kernels for sm_90a" } else { "" };
        format!("{}, {}{kernels}", self.device().description(), self.compute())
    }

    fn in_arena<R>(&self, bytes: u64, make: impl FnOnce() -> Result<R>) -> Result<R> {
        self.cut_from_arena(bytes, make)
    }

    fn repeat(
        &self,
        recordings: &mut CudaRecordings<D>,
        name: &'static str,
        shape: [u64; 6],
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.repeat_work(recordings, (name, shape), work)
    }

    fn shape_of(&self, batch: &CudaBatch<D>) -> [u64; 6] {
        batch.shape()
    }

    fn profile(&self, is_open: bool) -> Result<()> {
        self.start_operations_singly(is_open);
        self.device().profile(is_open)
    }

    fn needs_loss_scale(&self) -> bool {
        self.compute() == ComputeType::F16
    }

    fn check_heads(&self, head_dim: usize, rotated: usize) -> Result<()> {
        attention::check_heads(head_dim, rotated)
    }

    fn low_rank_stride(&self, rank: usize) -> usize {
        linear::rank_leading(rank)
    }

    fn prepare_group(&self, in_features: usize, projections: &[Projection]) -> Result<Self::Group> {
        self.make_group(in_features, projections)
    }

    fn renew_group(&self, group: &LinearGroup<Self>, adapters: &Self::Floats) -> Result<()> {
        self.pack(group, adapters)
    }

    fn matrix(&self, parts: &[WeightTensor]) -> Result<Self::Matrix> {
        self.make_matrix(parts)
    }

    fn vector(&self, parts: &[WeightTensor]) -> Result<Self::Vector> {
        self.upload_weights(parts)
    }

    fn buffer(&self, elements: usize) -> Result<Self::Buffer> {
        Ok(CudaBuffer { region: self.cut(elements * HALF_BYTES)? })
    }

    fn floats(&self, values: &[f32]) -> Result<Self::Floats> {
        let mut floats = CudaFloats::new(self.cut(size_of_val(values))?);
        self.write_floats(&mut floats, values)?;
        Ok(floats)
    }

    fn write_floats(&self, floats: &mut Self::Floats, values: &[f32]) -> Result<()> {
        floats.region.upload(self.device(), bytemuck::cast_slice(values), 0)?;
        self.renew_half(floats)
    }

    fn read_floats(&self, floats: &Self::Floats, into: &mut [f32]) -> Result<()> {
        floats.region.download(self.device(), bytemuck::cast_slice_mut(into))
    }

    fn runs(&self, ends: &[usize]) -> Result<CudaRuns<D>> {
        self.upload_runs(ends)
    }

    fn start_reading(&self, floats: &Self::Floats, count: usize, landing: &mut D::Landing) -> Result<()> {
        floats.region.start_download(self.device(), count * FLOAT_BYTES, landing)
    }

    fn finish_reading(&self, landing: &D::Landing, into: &mut [f32]) -> Result<()> {
        memory::take(self.device().finish_download(landing)?, bytemuck::cast_slice_mut(into))
    }

    fn zero_floats(&self, floats: &mut Self::Floats) -> Result<()> {
        floats.region.zero(self.device(), floats.elements() * FLOAT_BYTES)?;
        self.renew_half(floats)
    }

    fn write_buffer(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Result<()> {
        let mut bytes = Vec::with_capacity(values.len() * HALF_BYTES);
        self.compute().encode(values, &mut bytes);
        buffer.region.upload(self.device(), &bytes, 0)
    }

    fn read_buffer(&self, buffer: &Self::Buffer, into: &mut [f32]) -> Result<()> {
        self.download_halves(&buffer.region, into)
    }

    fn zero_buffer(&self, buffer: &mut Self::Buffer, elements: usize) -> Result<()> {
        self.zero(buffer, elements)
    }

    fn new_batch(&self) -> Result<Self::Batch> {
        Ok(CudaBatch::new())
    }

    fn load_batch(&self, resident: &mut Self::Batch, batch: &Batch, settings: PassSettings) -> Result<()> {
        resident.load(self, batch, settings)
    }

    fn embedding(
        &self,
        batch: &Self::Batch,
        embedding: Embedding<'_, Self>,
        x: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("embedding"; Work::of_moving(2 * batch.tokens * embedding.width, HALF_BYTES));
        self.embed(batch, embedding, x)
    }

    fn rms_norm(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &Self::Buffer,
        residual: Option<&Self::Buffer>,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("rms_norm"; Work::of_rms_norm(rows * norm.width, HALF_BYTES, false));
        self.norm_forward(norm, rows, x, residual, y)
    }

    fn rms_norm_backward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &Self::Buffer,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("rms_norm backward"; Work::of_rms_norm(rows * norm.width, HALF_BYTES, true));
        self.norm_backward(norm, rows, x, dy, dx)
    }

    fn rms_norm_weight_backward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &Self::Buffer,
        dy: &Self::Buffer,
        gradients: &mut Self::Floats,
    ) -> Result<()> {
        // The weight's gradient is far smaller than what it is the sum of.
        let _range = range!("rms_norm weight backward"; Work::of_moving(2 * rows * norm.width, HALF_BYTES));
        self.norm_weight_gradient(norm, rows, x, dy, gradients)
    }

    fn linear(
        &self,
        group: &LinearGroup<Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        residual: Option<&Self::Buffer>,
        s: &mut Self::Buffer,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        let shape =
            || group.shape(input.rows, group.weight.bytes()).with_dropout(input.batch.dropout.is_some());
        let _range = range!("linear"; Work::of_linear(shape(), HALF_BYTES));
        self.linear_forward(group, adapters, input, residual, s, y)
    }

    fn normed_linear(
        &self,
        group: &LinearGroup<Self>,
        adapters: &Self::Floats,
        input: NormedInput<'_, Self>,
        s: &mut Self::Buffer,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        self.normed_linear_forward(group, adapters, input, s, y)
    }

    fn linear_backward(
        &self,
        group: &LinearGroup<Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        s: &Self::Buffer,
        dy: &Self::Buffer,
        gradients: &mut Self::Floats,
        dx: Option<&mut Self::Buffer>,
    ) -> Result<()> {
        let shape =
            || group.shape(input.rows, group.weight.bytes()).with_dropout(input.batch.dropout.is_some());
        let wanted = LinearGradients::with_dx(dx.is_some());
        let _range = range!("linear backward"; Work::of_linear_backward(shape(), HALF_BYTES, wanted));
        self.linear_gradient(group, adapters, input, s, dy, gradients, dx.map(|dx| &*dx))
    }

    fn attention(
        &self,
        attention: &Attention<'_, Self>,
        batch: &Self::Batch,
        qkv: &Self::Buffer,
        log_sum: &mut Self::Floats,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("attention"; attention::work(attention, batch, false));
        let (projected, mut scratch) = (Projected { qkv, is_rotated: false }, lock(&self.scratch));
        self.attention_forward(attention, batch, &projected, log_sum, out, None, &mut scratch)
    }

    fn attention_backward(
        &self,
        attention: &Attention<'_, Self>,
        batch: &Self::Batch,
        qkv: &Self::Buffer,
        log_sum: &Self::Floats,
        out: &Self::Buffer,
        dout: &Self::Buffer,
        dqkv: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("attention backward"; attention::work(attention, batch, true));
        let projected = Projected { qkv, is_rotated: false };
        self.attention_gradient(attention, batch, &projected, log_sum, out, dout, dqkv)
    }

    fn self_attention(
        &self,
        layer: SelfAttention<'_, Self>,
        adapters: &Self::Floats,
        input: NormedInput<'_, Self>,
        residual: Option<&Self::Buffer>,
        saved: AttentionSaved<'_, Self>,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        self.self_attention_forward(layer, adapters, input, residual, saved, y)
    }

    fn self_attention_backward(
        &self,
        layer: SelfAttention<'_, Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        saved: AttentionSaved<'_, Self>,
        gradient: AttentionGradient<'_, Self>,
        gradients: &mut Self::Floats,
    ) -> Result<()> {
        self.self_attention_gradient(layer, adapters, input, saved, gradient, gradients)
    }

    fn attention_cached(
        &self,
        attention: &Attention<'_, Self>,
        rows: usize,
        position: usize,
        qkv: &Self::Buffer,
        cache: &mut KvCache<Self>,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("attention cached");
        self.attention_over_cache(attention, rows, position, qkv, cache, out)
    }

    fn gated(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        gate_up: &Self::Buffer,
        act: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("gated"; Work::of_gated(rows * width, HALF_BYTES, false));
        self.gated_forward(activation, rows, width, gate_up, act)
    }

    fn gated_backward(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        dact: &Self::Buffer,
        gate_up: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("gated backward"; Work::of_gated(rows * width, HALF_BYTES, true));
        self.gated_gradient(activation, rows, width, dact, gate_up)
    }

    fn mlp(
        &self,
        mlp: Mlp<'_, Self>,
        adapters: &Self::Floats,
        input: NormedInput<'_, Self>,
        residual: Option<&Self::Buffer>,
        saved: MlpSaved<'_, Self>,
        y: &mut Self::Buffer,
    ) -> Result<()> {
        self.mlp_forward(mlp, adapters, input, residual, saved, y)
    }

    fn mlp_backward(
        &self,
        mlp: Mlp<'_, Self>,
        adapters: &Self::Floats,
        input: LinearInput<'_, Self>,
        saved: MlpSaved<'_, Self>,
        gradient: MlpGradient<'_, Self>,
        gradients: &mut Self::Floats,
    ) -> Result<()> {
        self.mlp_gradient(mlp, adapters, input, saved, gradient, gradients)
    }

    fn gather_labelled(
        &self,
        batch: &Self::Batch,
        width: usize,
        x: &Self::Buffer,
        packed: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("gather labelled"; Work::of_moving(2 * batch.labelled * width, HALF_BYTES));
        self.gather_rows(batch, width, x, packed)
    }

    fn scatter_labelled(
        &self,
        batch: &Self::Batch,
        width: usize,
        packed: &Self::Buffer,
        dx: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("scatter labelled"; Work::of_moving((batch.tokens + 2 * batch.labelled) * width, HALF_BYTES));
        self.scatter_rows(batch, width, packed, dx)
    }

    fn head_loss(
        &self,
        head: Head<'_, Self>,
        batch: &Self::Batch,
        x: &Self::Buffer,
        losses: &mut Self::Floats,
        dx: Option<&mut Self::Buffer>,
        gradients: Option<&mut Self::Floats>,
    ) -> Result<()> {
        let wanted = [dx.is_some(), gradients.is_some()];
        let _range = range!("head loss"; head.work(batch.labelled, HALF_BYTES, CudaMatrix::bytes, wanted));
        let gradients =
            HeadGradients { dx: dx.map(|dx| &*dx), of_weight: gradients.map(|gradients| &*gradients) };
        self.cross_entropy(head, batch, x, losses, gradients)
    }

    fn head_logits(
        &self,
        head: Head<'_, Self>,
        x: &Self::Buffer,
        row: usize,
        logits: &mut [f32],
    ) -> Result<()> {
        let _range = range!("head logits");
        self.logits_of_row(head, x, row, logits)
    }

    fn adamw(&self, state: OptimizerState<'_, Self>, step: AdamWStep) -> Result<f64> {
        let _range = range!("adamw"; Work::of_adamw(state.parameters.elements(), HALF_BYTES));
        self.adamw_update(state, step)
    }
}
