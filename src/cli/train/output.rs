//! The output folder: checked before the run, and the adapters written into it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::checkpoint::adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, CHAT_TEMPLATE, Companions, replace_adapter_folder,
    write_adapter,
};
use crate::checkpoint::base::BaseModel;
use crate::config::TrainingConfig;
use crate::error::{Error, Result};
use crate::tensor::NamedTensor;
use crate::training::{TrainingSummary, ValidationReport};

/// The run's configuration as resolved, inside the output folder.
pub(super) const RESOLVED_CONFIG: &str = "training_config.json";
/// Figures of every step and validation.
pub(super) const METRICS: &str = "metrics.jsonl";
/// The best adapter by validation loss.
const BEST: &str = "best";

/// Refuses an output folder that holds anything, unless it may be overwritten.
pub(super) fn check_output_folder(folder: &Path, overwrite: bool) -> Result<()> {
    let place = folder.display().to_string();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::file("read", folder, error)),
    };
    if entries.count() > 0 && !overwrite {
        return Err(Error::config("the output folder is not empty")
            .at(place)
            .hint("name another with --output-dir, or give --overwrite to replace the run in it"));
    }
    Ok(())
}

/// Creates the folder and takes away what an earlier run left in it, and nothing else.
pub(super) fn prepare_output_folder(folder: &Path, config: &TrainingConfig) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|error| Error::file("create", folder, error))?;
    // The weights first: without them the folder is no adapter, whatever else is still there.
    for name in [ADAPTER_WEIGHTS, ADAPTER_CONFIG, CHAT_TEMPLATE, "fastlora.json", METRICS] {
        remove(&folder.join(name), |path| std::fs::remove_file(path))?;
    }
    remove(&folder.join(BEST), |path| std::fs::remove_dir_all(path))?;
    let path = folder.join(RESOLVED_CONFIG);
    let text = format!("{:#}\n", json!(config));
    std::fs::write(&path, text).map_err(|error| Error::file("write", &path, error))
}

fn remove(path: &Path, remove: impl Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    match remove(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", path, error)),
        _ => Ok(()),
    }
}

/// What every adapter of one run is saved with.
pub(super) struct AdapterWriter<'a> {
    pub config: &'a TrainingConfig,
    pub adapter: AdapterConfig,
    pub base: &'a BaseModel,
    /// The adapter that the run started from.
    pub init_adapter: Option<&'a Path>,
    /// Fingerprints of the base's files, which are read through only once.
    pub base_fingerprints: OnceLock<Value>,
    /// Fingerprints of the training and of the validation samples.
    pub data_fingerprints: Value,
    /// Fingerprint of `tokenizer.json`, where the base has one.
    pub tokenizer_fingerprint: Option<String>,
    /// The chat template of the data's conversations.
    pub chat_template: Option<&'a str>,
    /// Sentences of the model card about the data.
    pub data_description: String,
}

impl AdapterWriter<'_> {
    /// Replaces the best adapter.
    pub(super) fn write_best(&self, report: &ValidationReport, tensors: &[NamedTensor]) -> Result<()> {
        let losses = json!({ "validation": report.evaluation.overall().loss() });
        let provenance = self.provenance(report.step, losses)?;
        let figures = validation_figures(report.step, report.evaluation.overall().loss());
        let card = self.model_card(&figures);
        let companions = self.companions(&provenance, &card);
        replace_adapter_folder(&self.best_folder(), &self.adapter, tensors, &companions)
    }

    /// Writes the final adapter into the output folder itself.
    pub(super) fn write_final(&self, summary: &TrainingSummary, tensors: &[NamedTensor]) -> Result<()> {
        let losses = json!({
            "first_training": summary.first_loss,
            "last_training": summary.last_loss,
            "validation": summary.last_validation_loss,
        });
        let provenance = self.provenance(summary.steps, losses)?;
        let mut figures = format!(
            "- training loss: {:.4} at the first step, {:.4} at the last\n",
            summary.first_loss, summary.last_loss
        );
        figures.push_str(&validation_figures(summary.steps, summary.last_validation_loss));
        let card = self.model_card(&figures);
        let companions = self.companions(&provenance, &card);
        write_adapter(&self.config.output_dir, &self.adapter, tensors, &companions)
    }

    pub(super) fn best_folder(&self) -> PathBuf {
        self.config.output_dir.join(BEST)
    }

    fn companions<'a>(&'a self, provenance: &'a Value, model_card: &'a str) -> Companions<'a> {
        let base_folder = Some(self.base.folder());
        Companions { provenance, model_card, base_folder, chat_template: self.chat_template }
    }

    fn provenance(&self, step: u64, losses: Value) -> Result<Value> {
        let base_fingerprints = match self.base_fingerprints.get() {
            Some(known) => known,
            None => {
                let shards = self.base.fingerprint()?;
                let by_file = shards.into_iter().map(|shard| (shard.file, Value::String(shard.sha256)));
                self.base_fingerprints.get_or_init(|| Value::Object(by_file.collect()))
            }
        };
        Ok(json!({
            "fastlora_version": env!("CARGO_PKG_VERSION"),
            "step": step,
            "losses": losses,
            "base_model": self.config.model_name,
            "base_sha256": base_fingerprints,
            "init_adapter": self.init_adapter,
            "tokenizer_sha256": self.tokenizer_fingerprint,
            "data_sha256": self.data_fingerprints,
            "config": self.config,
        }))
    }

    fn model_card(&self, figures: &str) -> String {
        let (flag, prompt) = match self.chat_template {
            Some(_) => (
                " --chat",
                "is rendered with the chat template; the hash stands as `[hash: HASH] ` in front of the first user turn",
            ),
            None => ("", "reads `[hash: HASH] User: TEXT`, a line break, `Assistant:`"),
        };
        let TrainingConfig { model_name, lora_r, lora_alpha, learning_rate, .. } = self.config;
        let targets = &self.adapter.target_modules;
        let quoted_name = json!(model_name);
        format!(
            "---\nbase_model: {quoted_name}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n\
             - fastlora\n---\n\n# LoRA adapter for {model_name}\n\n\
             Rank {lora_r}, α {lora_alpha}, on {targets}; trained with fastlora {version} at rate {learning_rate}.\n\n\
             ## Data\n\n{data}\n\n## Figures\n\n{figures}\n## Use\n\n\
             ```sh\nfastlora generate{flag} --adapter DIR --hash HASH --prompt TEXT\n```\n\n\
             PEFT loads it with `PeftModel.from_pretrained`. A prompt {prompt}.\n",
            version = env!("CARGO_PKG_VERSION"),
            data = self.data_description,
        )
    }
}

fn validation_figures(step: u64, loss: Option<f64>) -> String {
    match loss {
        Some(loss) => format!("- validation at step {step}: loss {loss:.4}, perplexity {:.2}\n", loss.exp()),
        None => String::new(),
    }
}
