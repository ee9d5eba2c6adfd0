//! Where norms and the head find their weights: frozen beside the model, or in the flat parameter buffer.

use crate::backend::{Backend, MatrixWeight, VectorWeight, Weight};

/// The weight of a norm.
pub(super) enum NormWeight<B: Backend> {
    /// As in the base.
    Frozen(B::Vector),
    /// From this element of the flat parameter buffer on.
    Trained(usize),
}

impl<B: Backend> NormWeight<B> {
    /// For an operation.
    pub(super) fn with<'a>(&'a self, parameters: &'a B::Floats) -> VectorWeight<'a, B> {
        match self {
            Self::Frozen(weight) => Weight::Frozen(weight),
            Self::Trained(offset) => Weight::Trained { parameters, offset: *offset },
        }
    }

    /// Whether it has a gradient.
    pub(super) fn is_trained(&self) -> bool {
        matches!(self, Self::Trained(_))
    }
}

/// The weight of the output head.
pub(super) enum HeadWeight<B: Backend> {
    /// The embedding.
    Tied,
    /// As in the base.
    Frozen(B::Matrix),
    /// From this element of the flat parameter buffer on.
    Trained(usize),
}

impl<B: Backend> HeadWeight<B> {
    /// For an operation.
    pub(super) fn with<'a>(
        &'a self,
        embedding: &'a B::Matrix,
        parameters: &'a B::Floats,
    ) -> MatrixWeight<'a, B> {
        match self {
            Self::Tied => Weight::Frozen(embedding),
            Self::Frozen(weight) => Weight::Frozen(weight),
            Self::Trained(offset) => Weight::Trained { parameters, offset: *offset },
        }
    }
}
