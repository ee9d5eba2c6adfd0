//! A model and the text that it has read.

use super::NextTokenLogits;
use crate::backend::Backend;
use crate::checkpoint::mapped;
use crate::error::Result;
use crate::model::{Cache, Transformer};

/// A [`Transformer`] with the keys and values of the text so far.
///
/// ```
/// use std::ops::ControlFlow;
/// use std::sync::Arc;
///
/// use fastlora::backend::cpu::CpuBackend;
/// use fastlora::checkpoint::adapter::read_adapter;
/// use fastlora::checkpoint::base::BaseModel;
/// use fastlora::inference::{Sampler, SamplingParameters, Session, StopConditions, generate};
/// use fastlora::model::Transformer;
///
/// let base = BaseModel::open("tests/fixtures/tiny_qwen2")?;
/// let adapter = read_adapter("tests/fixtures/tiny_qwen2/adapter_final_b0".as_ref())?;
/// let mut model = Transformer::load_with_adapter(Arc::new(CpuBackend::new(None)?), &base, &adapter)?;
/// let mut session = Session::new(&mut model, 64)?;
/// let mut sampler = Sampler::new(SamplingParameters::default())?;
/// let stop = StopConditions { max_new_tokens: 8, eos_token_ids: base.config().eos_token_ids.clone() };
/// let generation = generate(&mut session, &[5, 6, 7], &mut sampler, &stop, |_| ControlFlow::Continue(()))?;
/// assert!((1..=8).contains(&generation.token_ids.len()));
/// # Ok::<(), fastlora::error::Error>(())
/// ```
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

    /// An empty text in a cache that was made before.
    pub fn with_cache(model: &'a mut Transformer<B>, cache: Cache<B>) -> Self {
        let mut session = Self { model, cache };
        session.clear();
        session
    }

    /// The cache, for another text later.
    pub fn into_cache(self) -> Cache<B> {
        self.cache
    }

    /// Forgets the text and keeps the memory.
    pub fn clear(&mut self) {
        self.keep(0);
    }

    /// Forgets all but the first `length` tokens.
    pub fn keep(&mut self, length: usize) {
        self.cache.truncate(length);
    }
}

impl<B: Backend> NextTokenLogits for Session<'_, B> {
    fn room(&self) -> usize {
        self.cache.capacity() - self.cache.len()
    }

    fn next_token_logits(&mut self, token_ids: &[u32], logits: &mut Vec<f32>) -> Result<()> {
        self.model.forward_cached(token_ids, &mut self.cache, logits)?;
        mapped::check_intact()
    }
}
