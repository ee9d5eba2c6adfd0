//! The operations as they are checked and timed: inputs on the host, the same on the backend, figures of float64.

mod attention;
mod head;
mod linear;
mod mlp;
mod optimizer;
mod rows;

pub use attention::{AttentionCase, CachedCase};
pub use linear::LinearCase;
pub(super) use linear::large_product;
pub use mlp::MlpCase;

use super::comparison::Outcome;
use super::precision::Precision;
use crate::backend::{Activation, Backend, PassSettings};
use crate::batch::Batch;
use crate::error::Result;

pub use crate::backend::Work;

/// An operation with its inputs on the host.
pub trait Operation<B: Backend + 'static>: Send + Sync {
    /// "linear backward".
    fn name(&self) -> &'static str;
    /// "2048 × 1536 → 2048, r 16".
    fn shape(&self) -> String;
    /// What a run takes at least.
    fn work(&self) -> Work;
    /// Bytes that its inputs and outputs take on the backend.
    fn resident_bytes(&self) -> f64 {
        self.work().bytes
    }
    /// Inputs on the backend, and outputs that hold NaN.
    ///
    /// # Errors
    /// The device's.
    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>>;
}

/// An operation ready to run.
pub trait Prepared<B: Backend + 'static>: Send {
    /// Runs it; on a device it may still be running afterwards.
    ///
    /// # Errors
    /// The operation's.
    fn run(&mut self, backend: &B) -> Result<()>;
    /// Puts back inputs that a run overwrote.
    ///
    /// # Errors
    /// The device's.
    fn restore(&mut self, backend: &B) -> Result<()>;
    /// Compares the outputs of the first run with float64's.
    ///
    /// # Errors
    /// The device's.
    fn check(&self, backend: &B) -> Result<Vec<Outcome>>;
}

/// [`Prepared`] from closures over what lies on the backend.
struct Ready<S, R, P, C> {
    state: S,
    run: R,
    restore: P,
    check: C,
}

impl<B, S, R, P, C> Prepared<B> for Ready<S, R, P, C>
where
    B: Backend + 'static,
    S: Send,
    R: Fn(&B, &mut S) -> Result<()> + Send,
    P: Fn(&B, &mut S) -> Result<()> + Send,
    C: Fn(&B, &S) -> Result<Vec<Outcome>> + Send,
{
    fn run(&mut self, backend: &B) -> Result<()> {
        (self.run)(backend, &mut self.state)
    }

    fn restore(&mut self, backend: &B) -> Result<()> {
        (self.restore)(backend, &mut self.state)
    }

    fn check(&self, backend: &B) -> Result<Vec<Outcome>> {
        (self.check)(backend, &self.state)
    }
}

/// One that overwrites no input.
fn ready<'a, B, S>(
    state: S,
    run: impl Fn(&B, &mut S) -> Result<()> + Send + 'a,
    check: impl Fn(&B, &S) -> Result<Vec<Outcome>> + Send + 'a,
) -> Box<dyn Prepared<B> + 'a>
where
    B: Backend + 'static,
    S: Send + 'a,
{
    Box::new(Ready { state, run, restore: |_: &B, _: &mut S| Ok(()), check })
}

/// An operation of some sizes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Case {
    /// Forward and backward over `[rows, width]`.
    RmsNorm {
        /// Rows.
        rows: usize,
        /// Row length.
        width: usize,
    },
    /// Forward and backward of `[rows, width]`.
    Gated {
        /// Of the gate.
        activation: Activation,
        /// Rows.
        rows: usize,
        /// `F`.
        width: usize,
    },
    /// Embedding, and the labelled rows' gather and scatter.
    Rows {
        /// Tokens of each sample.
        lengths: &'static [usize],
        /// `H`.
        width: usize,
        /// `V`.
        vocabulary: usize,
    },
    /// A linear group with adapters, forward and backward.
    Linear(LinearCase),
    /// A gated MLP, forward and backward.
    Mlp(MlpCase),
    /// Attention over packed samples, forward and backward.
    Attention(AttentionCase),
    /// Attention of new rows over a cache.
    Cached(CachedCase),
    /// Loss, alone and with its gradient.
    Head {
        /// Tokens, about two thirds of which are labelled.
        tokens: usize,
        /// `V`.
        vocabulary: usize,
        /// `H`.
        width: usize,
        /// Soft cap of the logits.
        soft_cap: Option<f32>,
    },
    /// The optimizer's step.
    AdamW {
        /// Parameters.
        count: usize,
    },
}

impl Case {
    /// Its operations on a backend of these numbers.
    pub fn operations<B: Backend + 'static>(self, precision: Precision) -> Vec<Box<dyn Operation<B>>> {
        match self {
            Case::RmsNorm { rows, width } => rows::norm(precision, rows, width),
            Case::Gated { activation, rows, width } => rows::gated(precision, activation, rows, width),
            Case::Rows { lengths, width, vocabulary } => rows::moves(precision, lengths, width, vocabulary),
            Case::Linear(case) => linear::operations(precision, case),
            Case::Mlp(case) => mlp::operations(precision, case),
            Case::Attention(case) => attention::operations(precision, case),
            Case::Cached(case) => attention::cached(precision, case),
            Case::Head { tokens, vocabulary, width, soft_cap } => {
                head::operations(precision, tokens, vocabulary, width, soft_cap)
            }
            Case::AdamW { count } => optimizer::operations(precision, count),
        }
    }
}

/// Activations that hold `values`.
fn upload<B: Backend>(backend: &B, values: &[f32]) -> Result<B::Buffer> {
    let mut buffer = backend.buffer(values.len())?;
    backend.write_buffer(&mut buffer, values)?;
    Ok(buffer)
}

/// Activations that hold NaN, for an output.
fn poisoned<B: Backend>(backend: &B, elements: usize) -> Result<B::Buffer> {
    upload(backend, &vec![f32::NAN; elements])
}

/// f32 values that hold NaN, for an output.
fn poisoned_floats<B: Backend>(backend: &B, elements: usize) -> Result<B::Floats> {
    backend.floats(&vec![f32::NAN; elements])
}

fn read<B: Backend>(backend: &B, buffer: &B::Buffer, elements: usize) -> Result<Vec<f32>> {
    let mut values = vec![0.0; elements];
    backend.read_buffer(buffer, &mut values)?;
    Ok(values)
}

fn read_floats<B: Backend>(backend: &B, floats: &B::Floats, elements: usize) -> Result<Vec<f32>> {
    let mut values = vec![0.0; elements];
    backend.read_floats(floats, &mut values)?;
    Ok(values)
}

/// A group's `s [T, R]` without what stands between its rows.
fn read_s<B: Backend>(backend: &B, s: &B::Buffer, rows: usize, ranks: usize) -> Result<Vec<f32>> {
    if ranks == 0 {
        return Ok(Vec::new());
    }
    let stride = backend.low_rank_stride(ranks);
    let padded = read(backend, s, rows * stride)?;
    Ok(padded.chunks(stride).flat_map(|row| &row[..ranks]).copied().collect())
}

/// A batch on the backend.
fn resident<B: Backend>(backend: &B, batch: &Batch, settings: PassSettings) -> Result<B::Batch> {
    let mut resident = backend.new_batch()?;
    backend.load_batch(&mut resident, batch, settings)?;
    Ok(resident)
}

/// The rows of `sample` with what `row` computes for each, on all cores.
fn expect(sample: Vec<usize>, row: impl Fn(usize) -> Vec<f64> + Sync) -> Vec<(usize, Vec<f64>)> {
    use rayon::prelude::*;
    sample.into_par_iter().with_max_len(1).map(|place| (place, row(place))).collect()
}

/// Row `row` of `values [_, width]` in float64.
fn wide_row(values: &[f32], row: usize, width: usize) -> Vec<f64> {
    super::inputs::widen(&values[row * width..(row + 1) * width])
}
