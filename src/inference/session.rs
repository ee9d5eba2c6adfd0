//! A model and the text that it has read.

use super::NextTokenLogits;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::{Cache, Transformer};

/// A [`Transformer`] with the keys and values of the text so far.
pub struct Session<'a, B: Backend> {
    model: &'a mut Transformer<B>,
    cache: Cache<B>,
}

impl<'a, B: Backend> Session<'a, B> {
    /// An empty text of at most `capacity` tokens, or fewer where the model's positions end before.
    ///
    /// # Errors
    /// A device without room for the cache.
    pub fn new(model: &'a mut Transformer<B>, capacity: usize) -> Result<Self> {
        let capacity = capacity.min(model.config().max_positions);
        let cache = model.new_cache(capacity)?;
        Ok(Self { model, cache })
    }

    /// Forgets the text and keeps the memory.
    pub fn clear(&mut self) {
        self.cache.truncate(0);
    }
}

impl<B: Backend> NextTokenLogits for Session<'_, B> {
    fn room(&self) -> usize {
        self.cache.capacity() - self.cache.len()
    }

    fn next_token_logits(&mut self, token_ids: &[u32], logits: &mut Vec<f32>) -> Result<()> {
        self.model.forward_cached(token_ids, &mut self.cache, logits)
    }
}
