//! Decoding: new tokens of one text over a cache of the keys and values of those before.

use super::super::workspace::{HeadBuffers, Limits, Purpose};
use super::Transformer;
use crate::backend::{Backend, Head, KvCache, PassSettings, RmsNorm};
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Rows that a prompt is read in at once, which bounds the memory of long ones.
const PREFILL_ROWS: usize = 512;

/// Keys and values of one text so far, for decoding.
pub struct Cache<B: Backend> {
    layers: Vec<KvCache<B>>,
    length: usize,
    capacity: usize,
}

impl<B: Backend> Cache<B> {
    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets the tokens from `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }
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
        let rows = capacity.min(PREFILL_ROWS);
        self.reserve(Purpose::Inference, Limits { tokens: rows, labelled_rows: 0, positions: capacity })?;
        Ok(Cache { layers, length: 0, capacity })
    }

    /// Reads `tokens` after those in `cache`; `logits [V]` gets the last one's.
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
        if cache.length + tokens.len() > cache.capacity {
            let message =
                format!("{} tokens do not fit the cache of {}", cache.length + tokens.len(), cache.capacity);
            return Err(Error::internal(message));
        }
        for rows in tokens.chunks(PREFILL_ROWS) {
            self.read_rows(rows, cache)?;
        }
        let backend = &*self.backend;
        let workspace = self.workspace.as_mut().expect("reserved with the cache");
        let width = self.config.hidden_size;
        let rows = (tokens.len() - 1) % PREFILL_ROWS + 1;
        let norm = RmsNorm { weight: &self.final_norm, epsilon: self.shape.epsilon, width };
        let (last, HeadBuffers { normed, .. }, _) = workspace.after_blocks();
        backend.rms_norm(norm, rows, last, normed)?;
        logits.resize(self.config.vocabulary, 0.0);
        let head = Head {
            weight: self.head.as_ref().unwrap_or(&self.embedding),
            vocabulary: self.config.vocabulary,
            width,
        };
        backend.head_logits(head, normed, rows - 1, logits)
    }

    fn read_rows(&mut self, tokens: &[u32], cache: &mut Cache<B>) -> Result<()> {
        let batch = Batch {
            token_ids: tokens.to_vec(),
            sample_starts: vec![0, tokens.len()],
            sample_ids: vec![0],
            ..Batch::default()
        };
        self.load_batch(Purpose::Inference, &batch, PassSettings::default())?;
        let position = cache.length;
        self.run_blocks(tokens.len(), |block, layer, pass, buffers| {
            block.forward_cached(pass, position, &mut cache.layers[layer], buffers)
        })?;
        cache.length += tokens.len();
        Ok(())
    }
}
