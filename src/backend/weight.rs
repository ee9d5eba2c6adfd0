//! Weights of norms and heads: frozen, or trained.

use super::Backend;
use crate::error::{Error, Result};

/// A weight that is frozen, or trained: then it is a stretch of the flat parameter buffer.
pub enum Weight<'a, Frozen, Floats> {
    /// In the form that the products want.
    Frozen(&'a Frozen),
    /// f32, from element `offset` on.
    Trained {
        /// The flat parameter buffer.
        parameters: &'a Floats,
        /// The weight's first element.
        offset: usize,
    },
}

// Derived, these would ask for `Frozen: Copy`.
impl<Frozen, Floats> Clone for Weight<'_, Frozen, Floats> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<Frozen, Floats> Copy for Weight<'_, Frozen, Floats> {}

impl<Frozen, Floats> Weight<'_, Frozen, Floats> {
    /// Where a trained weight's gradient goes.
    pub(super) fn trained_offset(&self) -> Result<usize> {
        match self {
            Weight::Trained { offset, .. } => Ok(*offset),
            Weight::Frozen(_) => Err(Error::internal("the gradient of a frozen weight")),
        }
    }
}

/// A vector of a model.
pub type VectorWeight<'a, B> = Weight<'a, <B as Backend>::Vector, <B as Backend>::Floats>;
/// A matrix of a model.
pub type MatrixWeight<'a, B> = Weight<'a, <B as Backend>::Matrix, <B as Backend>::Floats>;
