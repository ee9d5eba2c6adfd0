//! A base model with an adapter that was trained before.

use std::sync::Arc;

use super::config::ModelConfig;
use super::{LoraConfig, Transformer};
use crate::backend::Backend;
use crate::checkpoint::adapter::{Adapter, AdapterConfig};
use crate::checkpoint::base::BaseModel;
use crate::error::{ErrorKind, Result};

impl From<&AdapterConfig> for LoraConfig {
    fn from(config: &AdapterConfig) -> Self {
        Self {
            rank: config.rank,
            alpha: config.alpha,
            use_rslora: config.use_rslora,
            use_dora: config.use_dora,
            target_modules: config.target_modules.clone(),
            rank_pattern: config.rank_pattern.clone(),
            alpha_pattern: config.alpha_pattern.clone(),
            layers_to_transform: config.layers_to_transform.clone(),
            modules_to_save: config.modules_to_save.clone(),
            has_residuals: false,
        }
    }
}

impl Adapter {
    /// Checks that every tensor belongs to `model`; needs no weights.
    ///
    /// # Errors
    /// An adapter of another base (fault 61): a target, name or shape that the model does not have.
    pub fn check_base(&self, model: &ModelConfig) -> Result<()> {
        let expected = LoraConfig::from(&self.config).expected_tensors(model).map_err(|error| {
            // Targets that match nothing are the adapter's fault here, not the configuration's.
            if error.kind() == ErrorKind::Config { error.with_kind(ErrorKind::Model) } else { error }
        })?;
        self.match_to(&expected).map(drop)
    }
}

impl<B: Backend> Transformer<B> {
    /// Puts `base` on `backend` with the parameters of `adapter`.
    ///
    /// # Errors
    /// An adapter of another base (fault 61), or a device without room.
    pub fn load_with_adapter(backend: Arc<B>, base: &BaseModel, adapter: &Adapter) -> Result<Self> {
        adapter.check_base(base.config())?;
        let mut model = Self::load(backend, base, Some(&LoraConfig::from(&adapter.config)))?;
        let matched = adapter.match_to(&model.layout().expected())?;
        let parameters = model.layout().to_flat(&matched)?;
        model.set_parameters(&parameters)?;
        Ok(model)
    }
}
