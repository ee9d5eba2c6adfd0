//! The CPU backend: f32 arithmetic on all cores, frozen weights read where they lie, as they are stored.
//!
//! Deterministic: work is cut by shape and every sum has a fixed order, so results have the same bits on any number of
//! threads. Kernels are written once and compiled for each level of [`simd::Simd`].

mod activation;
mod adapter;
mod attention;
mod footprint;
mod head;
mod linear;
mod magnitude;
pub mod matmul;
mod memory;
mod norm;
mod optimizer;
pub mod principal;
mod product;
mod rows;
pub mod simd;
pub mod team;
mod threads;
mod weights;

use std::sync::{Mutex, MutexGuard};

pub use magnitude::CpuGroup;
pub use memory::AlignedFloats;
pub use weights::CpuMatrix;

use crate::backend::{
    Activation, AdamWStep, Attention, Backend, Embedding, Head, KvCache, LinearGradients, LinearGroup,
    LinearInput, OptimizerState, PassSettings, Projection, RmsNorm, Work,
};
use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::range;
use crate::tensor::WeightTensor;
use attention::AttentionScratch;
use linear::LinearScratch;
use simd::Simd;
use threads::Threads;

const FLOAT_BYTES: usize = size_of::<f32>();

/// A pool of threads and its scratch memory, which grows to the largest shape seen and is then kept.
pub struct CpuBackend {
    threads: Threads,
    simd: Simd,
    attention: Mutex<AttentionScratch>,
    linear: Mutex<LinearScratch>,
    logits: Mutex<AlignedFloats>,
    block_sums: Mutex<Vec<f64>>,
}

impl CpuBackend {
    /// A backend of `threads` threads, or one for each core that the process may use, with the best instructions that
    /// this CPU has.
    ///
    /// # Errors
    /// Zero threads, or the system starts none.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        Self::with_simd(threads, Simd::detect())
    }

    /// As [`new`](Self::new), at a given level of instructions. (The products of [`matmul`] choose theirs alone.)
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_simd(threads: Option<usize>, simd: Simd) -> Result<Self> {
        Ok(Self {
            threads: Threads::new(threads)?,
            simd,
            attention: Mutex::default(),
            linear: Mutex::default(),
            logits: Mutex::default(),
            block_sums: Mutex::default(),
        })
    }

    fn attention_scratch(&self) -> MutexGuard<'_, AttentionScratch> {
        lock(&self.attention)
    }

    fn linear_scratch(&self) -> MutexGuard<'_, LinearScratch> {
        lock(&self.linear)
    }

    fn logits_scratch(&self) -> MutexGuard<'_, AlignedFloats> {
        lock(&self.logits)
    }
}

/// A [`Batch`] with what a pass over it is computed with.
#[derive(Debug, Default)]
pub struct CpuBatch {
    batch: Batch,
    settings: PassSettings,
}

impl std::ops::Deref for CpuBatch {
    type Target = Batch;

    fn deref(&self) -> &Batch {
        &self.batch
    }
}

/// Scratch has no invariant that a panic could break.
fn lock<T>(scratch: &Mutex<T>) -> MutexGuard<'_, T> {
    scratch.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The range of the first `elements` of `length`.
fn first_elements(elements: usize, length: usize) -> Result<std::ops::Range<usize>> {
    if elements > length {
        return Err(Error::internal(format!("{elements} elements of a buffer of {length}")));
    }
    Ok(0..elements)
}

impl Backend for CpuBackend {
    type Matrix = CpuMatrix;
    type Vector = AlignedFloats;
    type Buffer = AlignedFloats;
    type Floats = AlignedFloats;
    type Batch = CpuBatch;
    type Group = CpuGroup;
    type Runs = Vec<usize>;
    type Landing = Vec<f32>;
    type Recordings = ();

    fn description(&self) -> String {
        let count = self.threads.count();
        format!("cpu, {count} thread{}, {}", if count == 1 { "" } else { "s" }, self.simd)
    }

    /// On a thread of the pool. Operations may be called from any thread, but from one of the pool they start without
    /// waking another: with short batches a training step is 10 % faster inside.
    fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.threads.pool().install(work)
    }

    fn prepare_group(&self, _: usize, projections: &[Projection]) -> Result<CpuGroup> {
        Ok(CpuGroup::new(projections))
    }

    fn renew_group(&self, group: &LinearGroup<Self>, adapters: &Self::Floats) -> Result<()> {
        self.renew_norms(group, adapters)
    }

    fn matrix(&self, parts: &[WeightTensor]) -> Result<Self::Matrix> {
        CpuMatrix::new(parts)
    }

    fn vector(&self, parts: &[WeightTensor]) -> Result<Self::Vector> {
        let values: Vec<f32> = parts.iter().flat_map(WeightTensor::to_f32).collect();
        Ok(AlignedFloats::copy_of(&values))
    }

    fn buffer(&self, elements: usize) -> Result<Self::Buffer> {
        Ok(AlignedFloats::zeroed(elements))
    }

    fn floats(&self, values: &[f32]) -> Result<Self::Floats> {
        Ok(AlignedFloats::copy_of(values))
    }

    fn write_floats(&self, floats: &mut Self::Floats, values: &[f32]) -> Result<()> {
        let part = first_elements(values.len(), floats.len())?;
        floats[part].copy_from_slice(values);
        Ok(())
    }

    fn read_floats(&self, floats: &Self::Floats, into: &mut [f32]) -> Result<()> {
        into.copy_from_slice(&floats[first_elements(into.len(), floats.len())?]);
        Ok(())
    }

    fn runs(&self, ends: &[usize]) -> Result<Vec<usize>> {
        Ok(ends.to_vec())
    }

    fn start_reading(&self, floats: &Self::Floats, count: usize, landing: &mut Vec<f32>) -> Result<()> {
        landing.clear();
        landing.extend_from_slice(&floats[first_elements(count, floats.len())?]);
        Ok(())
    }

    fn finish_reading(&self, landing: &Vec<f32>, into: &mut [f32]) -> Result<()> {
        into.copy_from_slice(&landing[first_elements(into.len(), landing.len())?]);
        Ok(())
    }

    fn zero_floats(&self, floats: &mut Self::Floats) -> Result<()> {
        floats.fill(0.0);
        Ok(())
    }

    fn write_buffer(&self, buffer: &mut Self::Buffer, values: &[f32]) -> Result<()> {
        self.write_floats(buffer, values)
    }

    fn read_buffer(&self, buffer: &Self::Buffer, into: &mut [f32]) -> Result<()> {
        self.read_floats(buffer, into)
    }

    fn zero_buffer(&self, buffer: &mut Self::Buffer, elements: usize) -> Result<()> {
        let part = first_elements(elements, buffer.len())?;
        buffer[part].fill(0.0);
        Ok(())
    }

    fn new_batch(&self) -> Result<Self::Batch> {
        Ok(CpuBatch::default())
    }

    fn load_batch(&self, resident: &mut Self::Batch, batch: &Batch, settings: PassSettings) -> Result<()> {
        resident.batch.copy_from(batch);
        resident.settings = settings;
        Ok(())
    }

    fn embedding(
        &self,
        batch: &Self::Batch,
        embedding: Embedding<'_, Self>,
        x: &mut Self::Buffer,
    ) -> Result<()> {
        let _range =
            range!("embedding"; Work::of_moving(2 * batch.token_count() * embedding.width, FLOAT_BYTES));
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
        let _range = range!("rms_norm"; Work::of_rms_norm(rows * norm.width, FLOAT_BYTES, false));
        self.norm_forward(norm, rows, x, residual.map(|residual| &residual[..]), y);
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        norm: RmsNorm<'_, Self>,
        rows: usize,
        x: &Self::Buffer,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("rms_norm backward"; Work::of_rms_norm(rows * norm.width, FLOAT_BYTES, true));
        self.norm_backward(norm, rows, x, dy, dx);
        Ok(())
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
        let _range = range!("rms_norm weight backward"; Work::of_moving(2 * rows * norm.width, FLOAT_BYTES));
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
        let has_dropout = input.batch.settings.dropout.is_some();
        let shape = || group.shape(input.rows, group.weight.bytes()).with_dropout(has_dropout);
        let _range = range!("linear"; Work::of_linear(shape(), FLOAT_BYTES));
        self.linear_forward(group, adapters, input, residual.map(|residual| &residual[..]), s, y)
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
        let has_dropout = input.batch.settings.dropout.is_some();
        let shape = || group.shape(input.rows, group.weight.bytes()).with_dropout(has_dropout);
        let wanted = LinearGradients::with_dx(dx.is_some());
        let _range = range!("linear backward"; Work::of_linear_backward(shape(), FLOAT_BYTES, wanted));
        self.linear_gradient(group, adapters, input, s, dy, gradients, dx.map(|dx| &mut dx[..]))
    }

    fn attention(
        &self,
        attention: &Attention<'_, Self>,
        batch: &Self::Batch,
        qkv: &Self::Buffer,
        log_sum: &mut Self::Floats,
        out: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("attention"; attention.work(batch.sample_lengths(), batch.token_count(), FLOAT_BYTES, false));
        self.attention_forward(attention, batch, qkv, log_sum, out)
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
        let _range = range!("attention backward"; attention.work(batch.sample_lengths(), batch.token_count(), FLOAT_BYTES, true));
        self.attention_gradient(attention, batch, qkv, log_sum, out, dout, dqkv)
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
        let _range = range!("gated"; Work::of_gated(rows * width, FLOAT_BYTES, false));
        self.gated_forward(activation, rows, width, gate_up, act);
        Ok(())
    }

    fn gated_backward(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        dact: &Self::Buffer,
        gate_up: &mut Self::Buffer,
    ) -> Result<()> {
        let _range = range!("gated backward"; Work::of_gated(rows * width, FLOAT_BYTES, true));
        self.gated_gradient(activation, rows, width, dact, gate_up);
        Ok(())
    }

    fn gather_labelled(
        &self,
        batch: &Self::Batch,
        width: usize,
        x: &Self::Buffer,
        packed: &mut Self::Buffer,
    ) -> Result<()> {
        let _range =
            range!("gather labelled"; Work::of_moving(2 * batch.labelled_count() * width, FLOAT_BYTES));
        self.gather_rows(batch, width, x, packed);
        Ok(())
    }

    fn scatter_labelled(
        &self,
        batch: &Self::Batch,
        width: usize,
        packed: &Self::Buffer,
        dx: &mut Self::Buffer,
    ) -> Result<()> {
        let rows = || batch.token_count() + 2 * batch.labelled_count();
        let _range = range!("scatter labelled"; Work::of_moving(rows() * width, FLOAT_BYTES));
        self.scatter_rows(batch, width, packed, dx);
        Ok(())
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
        let _range =
            range!("head loss"; head.work(batch.labelled_count(), FLOAT_BYTES, CpuMatrix::bytes, wanted));
        let gradients = gradients.map(|gradients| &mut gradients[..]);
        self.cross_entropy(head, batch, x, losses, dx.map(|dx| &mut dx[..]), gradients)
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
        let _range = range!("adamw"; Work::of_adamw(state.parameters.len(), 0));
        Ok(self.adamw_update(state, step))
    }
}
