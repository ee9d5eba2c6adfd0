//! What the two branches of a block have in common: a norm, a first linear that reads it, something between, and a second
//! linear that ends the branch.

use super::{Backend, LinearInput, RmsNorm};
use crate::error::Result;

/// The input of a branch: rows of the residual stream, which its first linear reads through a norm.
pub struct NormedInput<'a, B: Backend + ?Sized> {
    /// In front of the first linear.
    pub norm: RmsNorm<'a, B>,
    /// `[T, H]`.
    pub x: &'a B::Buffer,
    /// `T`.
    pub rows: usize,
    /// As in [`LinearInput`].
    pub batch: &'a B::Batch,
    /// Receives `norm(x) [T, H]`, what the first linear reads: its backward wants it again.
    pub normed: &'a mut B::Buffer,
}

impl<'a, B: Backend + ?Sized> NormedInput<'a, B> {
    /// Normalises, and returns what the first linear reads.
    pub(super) fn normalise(self, backend: &B) -> Result<LinearInput<'a, B>> {
        let Self { norm, x, rows, batch, normed } = self;
        backend.rms_norm(norm, rows, x, None, normed)?;
        Ok(LinearInput { x: normed, rows, batch })
    }
}

/// How far down the backward of a branch goes.
pub enum Reach<'a, B: Backend + ?Sized> {
    /// To the adapters of the second linear.
    Second,
    /// To those of the first as well.
    First,
    /// To the input of the first, whose gradient `[T, H]` is written here.
    Input(&'a mut B::Buffer),
}
