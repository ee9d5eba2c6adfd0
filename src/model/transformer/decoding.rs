//! Decoding: new tokens of one text over a cache of the keys and values of those before.

use super::super::workspace::{HeadBuffers, Limits, Purpose};
use super::{Transformer, head};
use crate::backend::{Backend, KvCache, PassSettings};
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Rows that a prompt is read in at once, which bounds the memory of long ones.
const PREFILL_ROWS: usize = 512;

/// Keys and values of one text so far, for decoding.
pub struct Cache<B: Backend> {
    layers: Vec<KvCache<B>>,
    /// Tokens that were read; kept to read them again where their rotation changes.
    tokens: Vec<u32>,
    /// Whether they were rotated as those of a long text.
    is_long: bool,
    capacity: usize,
}

impl<B: Backend> Cache<B> {
    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the tokens from `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.tokens.truncate(length);
    }
}

/// What reading a text of up to `capacity` tokens needs of the memory of batches.
pub fn decoding_limits(capacity: usize) -> Limits {
    Limits { tokens: capacity.min(PREFILL_ROWS), labelled_rows: 0, positions: capacity }
}

impl<B: Backend> Transformer<B> {
    /// An empty cache for `capacity` tokens.
    pub fn new_cache(&mut self, capacity: usize) -> Result<Cache<B>> {
        let width = self.shape.key_value_width();
        let layer = |_| {
            Ok(KvCache {
                keys: self.backend.buffer(capacity * width)?,
                values: self.backend.buffer(capacity * width)?,
                capacity,
            })
        };
        let layers = (0..self.config.layer_count).map(layer).collect::<Result<_>>()?;
        self.reserve(Purpose::Inference, decoding_limits(capacity))?;
        self.cache_bytes = self.model_shape.cache_bytes(&*self.backend, capacity);
        Ok(Cache { layers, tokens: Vec::with_capacity(capacity), is_long: false, capacity })
    }

    /// Reads `tokens` after those in `cache`; `logits [V]` gets the last one's. Where they make a text so long that its tokens
    /// are rotated otherwise (Phi-3 beyond its original context), those in the cache are read again.
    ///
    /// # Errors
    /// No tokens, an id outside the vocabulary, or a cache without room.
    pub fn forward_cached(
        &mut self,
        tokens: &[u32],
        cache: &mut Cache<B>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::data("the prompt is empty: at least one token is needed"));
        }
        let length = cache.len() + tokens.len();
        if length > cache.capacity {
            return Err(Error::internal(format!(
                "{length} tokens do not fit the cache of {}",
                cache.capacity
            )));
        }
        let is_long = self.config.rope.original_max_positions().is_some_and(|most| length > most);
        if is_long != cache.is_long {
            cache.is_long = is_long;
            let earlier = std::mem::take(&mut cache.tokens);
            self.read(&earlier, cache)?;
        }
        self.read(tokens, cache)?;
        let backend = &*self.backend;
        let workspace = self.workspace.as_mut().expect("reserved with the cache");
        let rows = (tokens.len() - 1) % PREFILL_ROWS + 1;
        let (last, HeadBuffers { normed, .. }, _) = workspace.after_blocks();
        let norm = self.shape.norm(self.final_norm.with(&self.parameters));
        backend.rms_norm(norm, rows, last, None, normed)?;
        logits.resize(self.config.vocabulary, 0.0);
        let head = head(&self.config, self.head.with(&self.embedding, &self.parameters));
        backend.head_logits(head, normed, rows - 1, logits)
    }

    fn read(&mut self, tokens: &[u32], cache: &mut Cache<B>) -> Result<()> {
        tokens.chunks(PREFILL_ROWS).try_for_each(|rows| self.read_rows(rows, cache))
    }

    fn read_rows(&mut self, tokens: &[u32], cache: &mut Cache<B>) -> Result<()> {
        let batch = Batch {
            token_ids: tokens.to_vec(),
            sample_starts: vec![0, tokens.len()],
            sample_ids: vec![0],
            ..Batch::default()
        };
        self.load_batch(Purpose::Inference, &batch, PassSettings::default())?;
        let (position, is_long) = (cache.len(), cache.is_long);
        self.run_blocks(tokens.len(), Some(is_long), |block, layer, pass, buffers| {
            block.forward_cached(pass, position, &mut cache.layers[layer], buffers)
        })?;
        cache.tokens.extend_from_slice(tokens);
        Ok(())
    }
}
