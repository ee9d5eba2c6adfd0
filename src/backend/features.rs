//! What a model may train beyond plain LoRA, for backends that cannot.

use crate::error::{Error, Result};

/// What of a model is trained besides the `A`s and `B`s of its adapters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Magnitudes of adapters (DoRA).
    pub magnitudes: bool,
    /// Weights of norms.
    pub trained_norms: bool,
    /// The weight of the output head.
    pub trained_head: bool,
}

impl Features {
    /// Refuses all of them, for a backend that has none.
    ///
    /// # Errors
    /// A device error for the first that is wanted.
    pub(super) fn refuse_all(self, backend: &str) -> Result<()> {
        let wanted = [
            (self.magnitudes, "the magnitudes of DoRA", "use_dora"),
            (self.trained_norms, "trained norms", "modules_to_save"),
            (self.trained_head, "a trained head", "modules_to_save"),
        ];
        match wanted.into_iter().find(|(is_wanted, ..)| *is_wanted) {
            None => Ok(()),
            Some((_, what, key)) => Err(Error::device(format!("{backend} has no kernels for {what}"))
                .at(key)
                .hint("use `--device cpu`, or leave it out")),
        }
    }
}
