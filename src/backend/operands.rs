//! What the operations are given besides rows: norms, heads and their rotations, the embedding, the output head.

use super::{Backend, MatrixWeight, VectorWeight, Weight, Work, attention_pairs};

// Derived, these would ask for `B: Copy`.
macro_rules! copy {
    ($($name:ident),*) => {$(
        impl<B: Backend + ?Sized> Clone for $name<'_, B> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<B: Backend + ?Sized> Copy for $name<'_, B> {}
    )*};
}

copy!(RmsNorm, Rotations, Attention, Embedding, Head);

/// Root-mean-square norm: `y = x · rstd · (offset + w)`, `rstd = 1/√(mean(x²) + ε)` over each row (Zhang & Sennrich 2019).
pub struct RmsNorm<'a, B: Backend + ?Sized> {
    /// `[width]`.
    pub weight: VectorWeight<'a, B>,
    /// Added to the weight: 0, or 1 where it is stored as its distance from 1 (Gemma).
    pub weight_offset: f32,
    /// ε inside the root.
    pub epsilon: f32,
    /// Row length.
    pub width: usize,
}

/// Activation of a gate (Shazeer 2020).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x·σ(x)`.
    Silu,
    /// GELU by tanh, `x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks & Gimpel 2016).
    GeluTanh,
}

/// The rotation of queries and keys by their positions (Su et al. 2021), as a table of angles.
pub struct Rotations<'a, B: Backend + ?Sized> {
    /// `[rows, 2, width / 2]`: cosines, then sines.
    pub table: &'a B::Floats,
    /// `R`: the columns of a head from its first that are rotated, in pairs `(i, i + R/2)`; even, at most `D`.
    pub width: usize,
    /// Row of position 0.
    pub first_row: usize,
    /// Another row for long texts.
    pub long: Option<LongTexts>,
}

impl<B: Backend + ?Sized> Rotations<'_, B> {
    /// Row of position 0 of a text of `length` tokens.
    pub fn row_of(&self, length: usize) -> usize {
        match self.long {
            Some(LongTexts { longer_than, first_row }) if length > longer_than => first_row,
            _ => self.first_row,
        }
    }
}

/// Texts whose positions have rows of their own in a table of [`Rotations`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongTexts {
    /// Those of more tokens.
    pub longer_than: usize,
    /// Row of their position 0.
    pub first_row: usize,
}

/// Causal attention with grouped heads over `qkv [T, (Q + 2K)·D]` (queries, keys, values side by side).
///
/// Queries and keys are first normalised head by head where norms are given (Qwen3, Gemma 3), then rotated.
pub struct Attention<'a, B: Backend + ?Sized> {
    /// `Q`.
    pub query_heads: usize,
    /// `K`; `Q` is a multiple of it.
    pub key_value_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// Factor on `q·k` before the softmax.
    pub softmax_scale: f32,
    /// `c`: scores are `c·tanh(score/c)` (Gemma 2).
    pub soft_cap: Option<f32>,
    /// A query at position `p` sees keys at positions `> p - window`.
    pub window: Option<usize>,
    /// `[D]` norm over each query head.
    pub query_norm: Option<RmsNorm<'a, B>>,
    /// `[D]` norm over each key head.
    pub key_norm: Option<RmsNorm<'a, B>>,
    /// Of queries and keys; over a cache, the text's length is that to the end of the new rows.
    pub rotations: Rotations<'a, B>,
}

impl<B: Backend + ?Sized> Attention<'_, B> {
    /// What it takes on samples of these lengths, with activations of `element` bytes.
    pub(super) fn work(
        &self,
        lengths: impl IntoIterator<Item = usize>,
        rows: usize,
        element: usize,
        is_backward: bool,
    ) -> Work {
        let query = self.query_heads * self.head_dim;
        let qkv = query + 2 * self.key_value_heads * self.head_dim;
        let pairs = attention_pairs(lengths, self.window);
        Work::of_attention(rows, query, qkv, pairs, element, is_backward)
    }
}

/// Keys (rotated) and values of earlier positions of one layer: each `[capacity, K·D]`.
pub struct KvCache<B: Backend + ?Sized> {
    /// Rotated keys.
    pub keys: B::Buffer,
    /// Values.
    pub values: B::Buffer,
    /// Positions that fit.
    pub capacity: usize,
}

/// Token embedding `[V, H]`.
pub struct Embedding<'a, B: Backend + ?Sized> {
    /// `[V, H]` frozen weight.
    pub table: &'a B::Matrix,
    /// `H`.
    pub width: usize,
    /// Factor on every row, rounded to the compute type as transformers does: 1, or √H (Gemma).
    pub scale: f32,
}

/// Output head `[V, H]` and the labelled rows' targets.
pub struct Head<'a, B: Backend + ?Sized> {
    /// `[V, H]`; the embedding where the two are tied.
    pub weight: MatrixWeight<'a, B>,
    /// `V`.
    pub vocabulary: usize,
    /// `H`.
    pub width: usize,
    /// `c`: logits are `c·tanh(logit/c)` (Gemma 2).
    pub soft_cap: Option<f32>,
}

impl<B: Backend + ?Sized> Head<'_, B> {
    /// What it takes on `rows` rows with activations of `element` bytes, and whether the gradients of its input and of its
    /// weight are wanted.
    pub(super) fn work(
        &self,
        rows: usize,
        element: usize,
        stored_bytes: impl FnOnce(&B::Matrix) -> usize,
        gradients: [bool; 2],
    ) -> Work {
        let weight_bytes = match self.weight {
            Weight::Frozen(matrix) => stored_bytes(matrix),
            Weight::Trained { .. } => self.vocabulary * self.width * size_of::<f32>(),
        };
        Work::of_head(rows, self.width, self.vocabulary, weight_bytes, element, gradients)
    }

    /// Caps logits on the host.
    pub(super) fn cap(&self, logits: &mut [f32]) {
        if let Some(cap) = self.soft_cap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
    }
}
