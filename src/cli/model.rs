//! Which model: base and adapter, shared by the verbs that use one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::Cli;
use crate::backend::Backend;
use crate::checkpoint::adapter::{Adapter, AdapterConfig, read_adapter};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::hub::{HubSettings, ResolvedModel, resolve_with};
use crate::error::{Error, Result};
use crate::model::Transformer;

/// Arguments that choose a model.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// Base model: a folder, or a hub id `org/name[@revision]`; without it, the one that the adapter names.
    #[arg(short, long, value_name = "MODEL", required_unless_present = "adapter")]
    pub model: Option<String>,
    /// Adapter folder, as fastlora or PEFT writes it.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

/// The files of a model, read and checked.
pub(super) struct ModelFiles {
    pub name: String,
    pub base: BaseModel,
    pub adapter: Option<Adapter>,
}

impl ModelArgs {
    /// Reads the adapter, finds the base (downloading it if need be) and opens it.
    pub(super) fn open(&self, cli: &Cli) -> Result<ModelFiles> {
        let adapter = self.adapter.as_deref().map(read_adapter).transpose()?;
        let name = match (&self.model, &adapter) {
            (Some(name), _) => name.clone(),
            (None, Some(adapter)) => base_of(adapter)?,
            (None, None) => return Err(Error::config("no model was named").hint("name it with -m MODEL")),
        };
        let resolved = resolve_model(&name, cli).map_err(|error| match error.hint_text() {
            None if self.model.is_none() => {
                error.hint("the adapter names this base; name another with -m MODEL")
            }
            _ => error,
        })?;
        let base = BaseModel::open(resolved.folder)?;
        Ok(ModelFiles { name, base, adapter })
    }

    /// Base and adapter as they were named, for `--json`.
    pub(super) fn to_json(&self, files: &ModelFiles) -> Value {
        json!({ "model": files.name, "adapter": self.adapter })
    }
}

/// The folder of a named model; a download shows its progress unless all is quiet.
pub(super) fn resolve_model(name: &str, cli: &Cli) -> Result<ResolvedModel> {
    resolve_with(name, &HubSettings { progress: !cli.quiet, ..HubSettings::from_env() })
}

/// The base that an adapter names, as [`resolve_model`] takes it.
fn base_of(adapter: &Adapter) -> Result<String> {
    let AdapterConfig { base_model, revision, .. } = &adapter.config;
    match (base_model, revision) {
        (None, _) => {
            Err(Error::model("the adapter does not name its base model").hint("name it with -m MODEL"))
        }
        (Some(name), Some(revision)) if !Path::new(name).is_dir() => Ok(format!("{name}@{revision}")),
        (Some(name), _) => Ok(name.clone()),
    }
}

impl ModelFiles {
    /// Puts the model on `backend`.
    pub(super) fn load<B: Backend>(&self, backend: Arc<B>) -> Result<Transformer<B>> {
        match &self.adapter {
            Some(adapter) => Transformer::load_with_adapter(backend, &self.base, adapter),
            None => Transformer::load(backend, &self.base, None),
        }
    }
}
