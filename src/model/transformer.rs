//! The whole model: embedding, blocks, final norm and head; forward and backward.

mod decoding;
mod parameters;
mod scores;

use std::collections::HashMap;
use std::sync::Arc;

pub use decoding::{Cache, decoding_limits};
pub use scores::TokenScores;

use super::block::{Block, BlockShape, ForwardBuffers, Pass};
use super::config::ModelConfig;
use super::factors::Factors;
use super::layout::AdapterLayout;
use super::lora::{LoraConfig, adapted_linears, layer_groups};
use super::memory::{MemoryPlan, ModelShape, Needs, choose_plan};
use super::weights::{HeadWeight, NormWeight};
use super::whole::{WholeModule, WholePlace};
use super::workspace::{Allocator, Gradient, HeadBuffers, Limits, Purpose, Workspace};
use crate::backend::{Backend, Embedding, Head, LongTexts, MatrixWeight, PassSettings, Rotations};
use crate::batch::{Batch, BatchRows, NO_ROW};
use crate::checkpoint::base::BaseModel;
use crate::config::ActivationMemory;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::range;
use crate::tensor::WeightTensor;

/// A frozen base model with adapters.
pub struct Transformer<B: Backend> {
    backend: Arc<B>,
    config: ModelConfig,
    shape: BlockShape,
    model_shape: ModelShape,
    stored: DType,
    activation_memory: ActivationMemory,
    has_dropout: bool,
    embedding: B::Matrix,
    blocks: Vec<Block<B>>,
    final_norm: NormWeight<B>,
    head: HeadWeight<B>,
    layout: AdapterLayout,
    /// What was taken out of the targets' weights.
    factors: Option<Factors>,
    parameters: B::Floats,
    /// Whether groups have been told of them.
    is_renewed: bool,
    gradients: B::Floats,
    rope: B::Floats,
    rope_positions: usize,
    batch: B::Batch,
    /// A batch filled up to a shape that comes again.
    padded: Batch,
    recordings: B::Recordings,
    losses: B::Landing,
    workspace: Option<Workspace<B>>,
    plan: Option<MemoryPlan>,
    /// Of the cache that was made last.
    cache_bytes: u64,
    scores: TokenScores,
}

impl<B: Backend> Transformer<B> {
    /// Puts `base` on `backend`, with adapters on the targets of `lora`; all that is trained is zero until
    /// [`start`](Self::start) or [`set_parameters`](Self::set_parameters).
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use fastlora::backend::cpu::CpuBackend;
    /// use fastlora::checkpoint::base::BaseModel;
    /// use fastlora::config::TargetModules;
    /// use fastlora::model::{LoraConfig, Transformer};
    ///
    /// let base = BaseModel::open("tests/fixtures/tiny_qwen2")?;
    /// let target_modules = TargetModules::Pattern("all-linear".into());
    /// let lora = LoraConfig::new(4, 8.0, target_modules);
    /// let mut model = Transformer::load(Arc::new(CpuBackend::new(None)?), &base, Some(&lora))?;
    /// // PEFT's start: A random, B zero, so the model computes what its base computes.
    /// model.start(&base, 42)?;
    /// assert_eq!(model.layout().tensors()[0].name, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
    /// assert_eq!(model.layout().tensors()[0].shape, [4, 64]);
    /// # Ok::<(), fastlora::error::Error>(())
    /// ```
    ///
    /// # Errors
    /// Targets that match no module, a tensor that is missing, something that the backend cannot train, or a device without
    /// room.
    pub fn load(backend: Arc<B>, base: &BaseModel, lora: Option<&LoraConfig>) -> Result<Self> {
        Self::load_on(backend, base, lora, &HashMap::new())
    }

    /// The same on what `factors` leave of the targets' weights (PiSSA); [`start`](Self::start) begins with them.
    ///
    /// # Errors
    /// As [`load`](Self::load); factors of other targets.
    pub fn load_residual(
        backend: Arc<B>,
        base: &BaseModel,
        lora: &LoraConfig,
        factors: Factors,
    ) -> Result<Self> {
        let lora = LoraConfig { has_residuals: true, ..lora.clone() };
        let mut model = Self::load_on(backend, base, Some(&lora), &factors.residuals(base, &lora)?)?;
        model.factors = Some(factors);
        Ok(model)
    }

    fn load_on(
        backend: Arc<B>,
        base: &BaseModel,
        lora: Option<&LoraConfig>,
        residuals: &HashMap<String, WeightTensor>,
    ) -> Result<Self> {
        let config = base.config().clone();
        backend.check_heads(config.head_dim, config.rotary_width)?;
        let linears = adapted_linears(&config, lora)?;
        let mut layout = AdapterLayout::default();
        let mut blocks: Vec<Block<B>> = layer_groups(&config, &linears)
            .enumerate()
            .map(|(layer, linears)| Block::load(&*backend, base, layer, linears, &mut layout, residuals))
            .collect::<Result<_>>()?;
        let mut final_norm = NormWeight::Frozen(backend.vector(&[base.tensor("model.norm.weight")?])?);
        let whole = lora.map_or(Ok(Vec::new()), |lora| lora.whole_modules(&config))?;
        let mut head = match whole.iter().any(|module| module.place == WholePlace::Head) {
            _ if config.tied_embeddings => HeadWeight::Tied,
            false => HeadWeight::Frozen(backend.matrix(&[base.head()?])?),
            true => HeadWeight::Trained(0),
        };
        for module @ WholeModule { place, .. } in &whole {
            let offset = layout.push_whole(module);
            match *place {
                WholePlace::Norm(layer, norm) => blocks[layer].train_norm(norm, offset),
                WholePlace::FinalNorm => final_norm = NormWeight::Trained(offset),
                WholePlace::Head => head = HeadWeight::Trained(offset),
            }
        }
        let zeros = vec![0.0; layout.parameter_count()];
        Ok(Self {
            embedding: backend.matrix(&[base.embedding()?])?,
            final_norm,
            head,
            blocks,
            layout,
            factors: None,
            parameters: backend.floats(&zeros)?,
            is_renewed: false,
            gradients: backend.floats(&zeros)?,
            rope: backend.floats(&[])?,
            rope_positions: 0,
            batch: backend.new_batch()?,
            padded: Batch::default(),
            recordings: B::Recordings::default(),
            losses: B::Landing::default(),
            workspace: None,
            plan: None,
            cache_bytes: 0,
            scores: TokenScores::default(),
            shape: BlockShape::new(&config),
            model_shape: ModelShape::new(&config, lora)?,
            stored: base.embedding()?.dtype(),
            activation_memory: ActivationMemory::Auto,
            has_dropout: false,
            config,
            backend,
        })
    }

    /// The base model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Names, shapes and places of what is trained.
    pub fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    /// What computes.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }

    /// [`reserve`](Self::reserve) for training, with a say in which activations are kept, and memory for dropout.
    ///
    /// # Errors
    /// A device without room, with the sizes and what would fit (fault 59).
    pub fn reserve_training(
        &mut self,
        limits: Limits,
        activation_memory: ActivationMemory,
        has_dropout: bool,
    ) -> Result<()> {
        (self.activation_memory, self.has_dropout) = (activation_memory, has_dropout);
        self.reserve(Purpose::Training, limits)
    }

    /// Allocates every buffer that batches within `limits` need. Larger batches enlarge them later.
    pub fn reserve(&mut self, purpose: Purpose, limits: Limits) -> Result<()> {
        if limits.positions > self.rope_positions {
            self.rope = self.backend.floats(&self.config.rope_table(limits.positions))?;
            self.rope_positions = limits.positions;
        }
        let fits = self.workspace.as_ref().is_some_and(|workspace| {
            workspace.purpose >= purpose
                && workspace.limits.union(limits.padded(&*self.backend)) == workspace.limits
        });
        if !fits {
            // The old one goes first: the two need not fit together.
            let old = self.workspace.take().map(|old| (old.purpose, old.limits));
            let (purpose, limits) = match old {
                Some((old_purpose, old_limits)) => (old_purpose.max(purpose), old_limits.union(limits)),
                None => (purpose, limits),
            };
            let needs = Needs { purpose, limits, has_dropout: self.has_dropout };
            let backend = &*self.backend;
            let plan = choose_plan(backend, &self.model_shape, self.stored, needs, self.activation_memory)?;
            let limits = limits.padded(backend);
            backend.reserve_scratch(&self.model_shape.operations(Needs { limits, ..needs }))?;
            let make = || {
                let mut memory = Allocator::new(backend);
                Workspace::new(&mut memory, &self.model_shape, purpose, plan.recompute, limits)
            };
            self.workspace = Some(backend.in_arena(plan.arena, make)?);
            self.plan = Some(plan);
        }
        Ok(())
    }

    /// Bytes of the model and of the batches that it is ready for; none before [`reserve`](Self::reserve).
    pub fn memory_plan(&self) -> Option<MemoryPlan> {
        self.plan.map(|plan| MemoryPlan { answers: self.cache_bytes, ..plan })
    }

    fn load_batch(&mut self, purpose: Purpose, batch: &Batch, settings: PassSettings) -> Result<()> {
        let vocabulary = self.config.vocabulary;
        let targets = batch.targets.iter().filter(|target| **target != NO_ROW);
        if let Some(id) = batch.token_ids.iter().chain(targets).find(|id| **id as usize >= vocabulary) {
            let message = format!("token id {id}, but the embedding has {vocabulary} rows");
            return Err(Error::data(message));
        }
        let sample_lengths = batch.sample_starts.windows(2).map(|pair| pair[1] - pair[0]);
        let limits = Limits {
            tokens: batch.token_count(),
            labelled_rows: batch.labelled_count(),
            positions: sample_lengths.max().unwrap_or(0),
        };
        self.reserve(purpose, limits)?;
        self.backend.load_batch(&mut self.batch, batch, settings)?;
        if !self.is_renewed {
            let no_shape = [0; 6];
            self.repeat("renewal", no_shape, |model| {
                model.blocks.iter().try_for_each(|block| block.renew(&model.backend, &model.parameters))
            })?;
            self.is_renewed = true;
        }
        Ok(())
    }

    /// Loads a batch that has tokens, filled up to a shape that comes again, and tells its rows.
    fn load_padded(&mut self, purpose: Purpose, batch: &Batch, settings: PassSettings) -> Result<BatchRows> {
        let rows = self.backend.padded(batch.rows());
        if rows == batch.rows() {
            self.load_batch(purpose, batch, settings)?;
            return Ok(rows);
        }
        let mut padded = std::mem::take(&mut self.padded);
        padded.copy_from(batch);
        padded.pad(rows);
        let loaded = self.load_batch(purpose, &padded, settings);
        self.padded = padded;
        loaded.map(|()| rows)
    }

    /// Runs `work`, or what was recorded of it.
    fn repeat(
        &mut self,
        name: &'static str,
        shape: [u64; 6],
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let backend = Arc::clone(&self.backend);
        let mut recordings = std::mem::take(&mut self.recordings);
        let done = backend.repeat(&mut recordings, name, shape, || work(self));
        self.recordings = recordings;
        done
    }

    /// The same over the loaded batch.
    fn repeat_pass(&mut self, name: &'static str, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.repeat(name, self.backend.shape_of(&self.batch), work)
    }

    /// Forward without gradients: loss and hit of every labelled row.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<&TokenScores> {
        if batch.labelled_count() == 0 {
            self.scores = TokenScores::default();
            return Ok(&self.scores);
        }
        let rows = self.load_padded(Purpose::Inference, batch, PassSettings::default())?;
        self.repeat_pass("evaluation", |model| {
            model.forward(rows.tokens)?;
            model.head_loss(rows.labelled, false)
        })?;
        self.start_reading(rows)?;
        self.read_scores(batch, rows)
    }

    /// Forward and backward: adds `gradient_scale · d(Σ loss)/d(adapters)` to the gradients. With one over the
    /// labelled tokens of a whole step as the scale, the sum over its micro-batches is the mean's gradient.
    ///
    /// Returns when the losses are known, while the backward may still run: what follows is enqueued behind it.
    pub fn accumulate_gradients(&mut self, batch: &Batch, settings: PassSettings) -> Result<&TokenScores> {
        if batch.labelled_count() == 0 {
            self.scores = TokenScores::default();
            return Ok(&self.scores);
        }
        let rows = self.load_padded(Purpose::Training, batch, settings)?;
        self.repeat_pass("forward", |model| {
            model.forward(rows.tokens)?;
            model.head_loss(rows.labelled, true)
        })?;
        // Two recordings, with the losses' event between them. With the event inside one, the host would read the losses of an
        // earlier start unless every start arms it anew, which only a GPU can show; and one saves a start, made while the
        // forward runs.
        self.start_reading(rows)?;
        self.repeat_pass("backward", |model| model.backward(rows.tokens))?;
        self.read_scores(batch, rows)
    }

    /// The first block, and of that the first row, whose output is not finite in a forward pass over `batch`; none
    /// where all blocks' are. Runs and reads block by block, which is slow: for looking into a failure.
    pub fn first_not_finite(
        &mut self,
        batch: &Batch,
        settings: PassSettings,
    ) -> Result<Option<(usize, usize)>> {
        self.load_batch(Purpose::Inference, batch, settings)?;
        let width = self.config.hidden_size;
        let mut output = vec![0.0; batch.token_count() * width];
        let mut found = None;
        self.run_blocks(batch.token_count(), None, |block, layer, pass, buffers| {
            if found.is_none() {
                let ForwardBuffers { x_in, saved, inputs, x_out } = buffers;
                block.forward(pass, ForwardBuffers { x_in, saved, inputs, x_out: &mut *x_out })?;
                pass.backend.read_buffer(x_out, &mut output)?;
                found =
                    output.iter().position(|value| !value.is_finite()).map(|place| (layer, place / width));
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn forward(&mut self, tokens: usize) -> Result<()> {
        self.run_blocks(tokens, None, |block, _, pass, buffers| block.forward(pass, buffers))
    }

    /// Embeds the loaded batch and hands every block, with its place and buffers, to `run`. Whether the batch is of long texts
    /// say their lengths, unless it is only a part of one.
    fn run_blocks(
        &mut self,
        tokens: usize,
        is_long: Option<bool>,
        mut run: impl FnMut(&Block<B>, usize, Pass<'_, B>, ForwardBuffers<'_, B>) -> Result<()>,
    ) -> Result<()> {
        let workspace = self.workspace.as_mut().expect("reserved with the batch");
        let backend = &*self.backend;
        let x = workspace.first_residual();
        let embedding = Embedding {
            table: &self.embedding,
            width: self.config.hidden_size,
            scale: self.config.embedding_scale,
        };
        backend.embedding(&self.batch, embedding, x)?;
        let rotations = rotations(&self.config, &self.rope, self.rope_positions, is_long);
        let pass = Pass { backend, adapters: &self.parameters, batch: &self.batch, rotations, tokens };
        for (layer, block) in self.blocks.iter().enumerate() {
            let _range = range!("layer", number = layer);
            run(block, layer, pass, workspace.layer(layer))?;
        }
        Ok(())
    }

    /// Loss of the labelled `rows` and, where wanted, the gradient at the last block's output.
    fn head_loss(&mut self, rows: usize, wants_gradient: bool) -> Result<()> {
        let _range = range!("head");
        let backend = &*self.backend;
        let width = self.config.hidden_size;
        let norm = self.shape.norm(self.final_norm.with(&self.parameters));
        let head = head(&self.config, self.head.with(&self.embedding, &self.parameters));
        let workspace = self.workspace.as_mut().expect("reserved with the batch");
        let (last, HeadBuffers { packed, normed, losses }, gradient) = workspace.after_blocks();
        backend.gather_labelled(&self.batch, width, last, packed)?;
        backend.rms_norm(norm, rows, packed, None, normed)?;
        match gradient.filter(|_| wants_gradient) {
            None => backend.head_loss(head, &self.batch, normed, losses, None, None)?,
            Some(Gradient { dx, dpacked, dnormed, .. }) => {
                let gradients = match self.head {
                    HeadWeight::Trained(_) => Some(&mut self.gradients),
                    _ => None,
                };
                backend.head_loss(head, &self.batch, normed, losses, Some(dnormed), gradients)?;
                backend.zero_buffer(dpacked, rows * width)?;
                backend.rms_norm_backward(norm, rows, packed, dnormed, dpacked)?;
                if self.final_norm.is_trained() {
                    backend.rms_norm_weight_backward(norm, rows, packed, dnormed, &mut self.gradients)?;
                }
                backend.scatter_labelled(&self.batch, width, dpacked, dx)?;
            }
        }
        Ok(())
    }

    fn start_reading(&mut self, rows: BatchRows) -> Result<()> {
        let workspace = self.workspace.as_mut().expect("reserved with the batch");
        let (_, HeadBuffers { losses, .. }, _) = workspace.after_blocks();
        self.backend.start_reading(losses, 2 * rows.labelled, &mut self.losses)
    }

    fn read_scores(&mut self, batch: &Batch, rows: BatchRows) -> Result<&TokenScores> {
        self.scores.read(&*self.backend, &self.losses, batch.labelled_count(), rows.labelled)?;
        Ok(&self.scores)
    }

    /// From the gradient at the last block's output down to the lowest block that trains anything.
    fn backward(&mut self, tokens: usize) -> Result<()> {
        let workspace = self.workspace.as_mut().expect("reserved with the batch");
        let pass = Pass {
            backend: &*self.backend,
            adapters: &self.parameters,
            batch: &self.batch,
            rotations: rotations(&self.config, &self.rope, self.rope_positions, None),
            tokens,
        };
        let lowest = workspace.first_kept();
        for (layer, block) in self.blocks.iter().enumerate().skip(lowest).rev() {
            let _range = range!("layer backward", number = layer);
            if workspace.is_overwritten(layer) {
                block.forward(pass, workspace.layer(layer))?;
            }
            block.backward(pass, layer > lowest, workspace.layer_backward(layer), &mut self.gradients)?;
        }
        Ok(())
    }
}

/// Of layers without and with a window. `table` has a stretch of `positions` rows for each of
/// [`ModelConfig::rope_table`]'s rotary embeddings. Where part of a text is computed, the whole text may be a long one.
fn rotations<'a, B: Backend>(
    config: &ModelConfig,
    table: &'a B::Floats,
    positions: usize,
    is_long: Option<bool>,
) -> [Rotations<'a, B>; 2] {
    let long = config.rope.original_max_positions().map(|most| LongTexts {
        longer_than: match is_long {
            None => most,
            Some(true) => 0,
            Some(false) => usize::MAX,
        },
        first_row: positions,
    });
    let rotations = Rotations { table, width: config.rotary_width, first_row: 0, long };
    match &config.local_rope {
        None => [rotations, rotations],
        Some(_) => {
            let first_row = if long.is_some() { 2 * positions } else { positions };
            [rotations, Rotations { first_row, long: None, ..rotations }]
        }
    }
}

fn head<'a, B: Backend>(config: &ModelConfig, weight: MatrixWeight<'a, B>) -> Head<'a, B> {
    Head { weight, vocabulary: config.vocabulary, width: config.hidden_size, soft_cap: config.logit_soft_cap }
}
