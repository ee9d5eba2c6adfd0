//! The output folder: checked before the run, and the adapters written into it.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::resume::Start;
use crate::backend::Backend;
use crate::checkpoint::adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, CHAT_TEMPLATE, Companions, replace_adapter_folder,
    write_adapter,
};
use crate::checkpoint::atomic::{parent_of, remove_file, remove_folder, replace_file, sync_folder};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::run::{CHECKPOINTS, Checkpoints};
use crate::checkpoint::volume::check_writable;
use crate::config::TrainingConfig;
use crate::error::{Error, Result, escape_control};
use crate::report::{FAILURE, METRICS, PAGE, PROVENANCE, RESOLVED_CONFIG, SAMPLES, tensorboard};
use crate::tensor::NamedTensor;
use crate::training::{TrainingSummary, ValidationReport};

/// The best adapter by validation loss.
const BEST: &str = "best";

/// Where the checkpoints of a run are.
pub(super) fn checkpoints_folder(config: &TrainingConfig) -> PathBuf {
    config.output_dir.join(CHECKPOINTS)
}

/// Where the best adapter of a run is.
pub(super) fn best_folder(config: &TrainingConfig) -> PathBuf {
    config.output_dir.join(BEST)
}

/// What may become of a run that is in the output folder already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Earlier {
    /// It stays, and the new run is refused.
    Keep,
    /// It goes on.
    Resume,
    /// The new run takes its place.
    Overwrite,
    /// It is nobody's concern, nor is one that goes on now: nothing will be written.
    Ignore,
}

/// The output folder, which no other process writes into while this lives.
pub(super) struct OutputFolder {
    folder: PathBuf,
    earlier: Earlier,
    lock: OnceLock<File>,
}

impl OutputFolder {
    /// Checks the folder, which need not exist, and changes nothing.
    ///
    /// # Errors
    /// A folder that holds anything and must be kept, that another process writes into, or that cannot be written into.
    pub(super) fn check(folder: &Path, earlier: Earlier) -> Result<Self> {
        let output = Self { folder: folder.to_path_buf(), earlier, lock: OnceLock::new() };
        output.check_contents()?;
        check_writable(folder).map_err(|error| error.hint("name another folder with --output-dir"))?;
        if folder.is_dir() && earlier != Earlier::Ignore {
            output.lock()?;
        }
        Ok(output)
    }

    fn check_contents(&self) -> Result<()> {
        let folder = &self.folder;
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Error::file("read", folder, error)),
        };
        if entries.count() == 0 || self.earlier != Earlier::Keep {
            return Ok(());
        }
        Err(Error::config("the output folder is not empty").at(folder.display().to_string()).hint(
            "name another with --output-dir, give --resume to go on with the run in it, or --overwrite to replace it",
        ))
    }

    /// The lock is on the folder itself: it leaves no file, and ends with the process however that ends.
    fn lock(&self) -> Result<()> {
        let folder = &self.folder;
        let file = File::open(folder).map_err(|source| Error::file("open", folder, source))?;
        match file.try_lock() {
            Ok(()) => drop(self.lock.set(file)),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::io("another process trains into this folder")
                    .at(folder.display().to_string())
                    .hint("wait for its end, or name another folder with --output-dir"));
            }
            // Some network file systems have no locks for folders.
            Err(TryLockError::Error(error)) => {
                tracing::warn!("{} cannot be locked against a second run: {error}", folder.display());
            }
        }
        Ok(())
    }

    /// Makes the folder and takes away what an earlier run left in it: all that is its own before a fresh start, what
    /// came after the checkpoint before a resumed one.
    ///
    /// # Errors
    /// A folder that another process took meanwhile, or files that cannot be written.
    pub(super) fn prepare(&self, config: &TrainingConfig, start: &Start) -> Result<()> {
        let folder = &self.folder;
        if !folder.is_dir() {
            std::fs::create_dir_all(folder).map_err(|error| Error::file("create", folder, error))?;
            sync_folder(parent_of(folder))?;
        }
        if self.lock.get().is_none() {
            self.lock()?;
            self.check_contents()?;
        }
        // The weights first: without them the folder is no adapter, whatever else is still there.
        for name in [ADAPTER_WEIGHTS, ADAPTER_CONFIG, CHAT_TEMPLATE, PROVENANCE, FAILURE] {
            remove_file(&folder.join(name))?;
        }
        for name in ["adapter", BEST] {
            remove_folder(&folder.join(format!(".{name}.partial")))?;
        }
        let checkpoints = Checkpoints::new(checkpoints_folder(config));
        match start {
            Start::Resumed(_) => {
                checkpoints.clean()?;
                checkpoints.remove_after(start.steps())?;
            }
            _ => {
                for name in [METRICS, SAMPLES, PAGE] {
                    remove_file(&folder.join(name))?;
                }
                tensorboard::EventFile::remove(folder)?;
                remove_folder(&best_folder(config))?;
                checkpoints.remove_all()?;
            }
        }
        let text = format!("{:#}\n", json!(config));
        replace_file(&folder.join(RESOLVED_CONFIG), text.as_bytes())
    }
}

/// What every adapter of one run is saved with.
pub(super) struct AdapterWriter<'a> {
    pub config: &'a TrainingConfig,
    pub adapter: AdapterConfig,
    pub base: &'a BaseModel,
    /// Fingerprints of the base's files, which are read through only once.
    pub base_fingerprints: OnceLock<Value>,
    /// Fingerprints of the training and of the validation samples, and of the order of the first epoch.
    pub data_fingerprints: Value,
    /// Fingerprint of `tokenizer.json`, where the base has one.
    pub tokenizer_fingerprint: Option<String>,
    /// The chat template of the data's conversations.
    pub chat_template: Option<&'a str>,
    /// Sentences of the model card about the data.
    pub data_description: String,
    /// The hashes in the texts that are learned.
    pub hashes: Value,
    /// Processes of the run.
    pub process_count: usize,
}

impl AdapterWriter<'_> {
    /// What computes the run: that, and in how many processes, decides its bits.
    pub(super) fn computed_by(&self, backend: &impl Backend) -> String {
        match self.process_count {
            1 => backend.description(),
            count => format!("{}, {count} processes", backend.description()),
        }
    }

    /// Replaces the best adapter.
    pub(super) fn write_best(&self, report: &ValidationReport, tensors: &[NamedTensor]) -> Result<()> {
        let losses = json!({ "validation": report.evaluation.overall().loss() });
        let mut provenance = self.provenance()?;
        add(&mut provenance, json!({ "step": report.step, "losses": losses }));
        let card = self.model_card(&validation_figures(report.step, report.evaluation.overall().loss()));
        let companions = self.companions(&provenance, &card);
        replace_adapter_folder(&best_folder(self.config), &self.adapter, tensors, &companions)
    }

    /// Writes the final adapter into the output folder itself.
    pub(super) fn write_final(
        &self,
        summary: &TrainingSummary,
        tensors: &[NamedTensor],
        computed_by: &str,
    ) -> Result<()> {
        let (mut provenance, card) = self.describe(summary)?;
        // The presence of the summary tells a finished run.
        add(&mut provenance, json!({ "computed_by": computed_by, "summary": summary }));
        let companions = self.companions(&provenance, &card);
        write_adapter(&self.config.output_dir, &self.adapter, tensors, &companions)
    }

    /// Provenance and model card of the adapter after the steps of `summary`.
    pub(super) fn describe(&self, summary: &TrainingSummary) -> Result<(Value, String)> {
        let losses = json!({
            "first_training": summary.first_loss,
            "last_training": summary.last_loss,
            "validation": summary.last_validation_loss,
        });
        let mut provenance = self.provenance()?;
        add(&mut provenance, json!({ "step": summary.steps, "losses": losses }));
        let mut figures = format!(
            "- training loss: {:.4} at the first step, {:.4} at the last\n",
            summary.first_loss, summary.last_loss
        );
        figures.push_str(&validation_figures(summary.last_validation_step, summary.last_validation_loss));
        Ok((provenance, self.model_card(&figures)))
    }

    /// What the files of the run hold in bytes, at most: the checkpoints with one in the making, and the last and the
    /// best adapter with one in the making.
    pub(super) fn largest_output_bytes(&self, parameter_count: u64) -> u64 {
        let adapter_bytes = 4 * parameter_count;
        let copied_bytes = Companions::copied_bytes(self.base.folder(), self.chat_template);
        let checkpoint_bytes = 3 * adapter_bytes + copied_bytes;
        let checkpoints = self.config.keep_checkpoints as u64 + 1;
        checkpoint_bytes.saturating_mul(checkpoints).saturating_add(3 * (adapter_bytes + copied_bytes))
    }

    pub(super) fn companions<'a>(&'a self, provenance: &'a Value, model_card: &'a str) -> Companions<'a> {
        let base_folder = Some(self.base.folder());
        Companions { provenance, model_card, base_folder, chat_template: self.chat_template }
    }

    /// Where an adapter of this run comes from: what must be the same for the run to go on.
    pub(super) fn provenance(&self) -> Result<Value> {
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
            "base_model": self.config.model_name,
            "base_sha256": base_fingerprints,
            "init_adapter": self.config.init_adapter,
            "tokenizer_sha256": self.tokenizer_fingerprint,
            "data_sha256": self.data_fingerprints,
            "weights": self.weights(),
            "hashes": self.hashes,
            "config": self.config,
        }))
    }

    /// What the adapters have beyond one rank and one α on all targets, for the model card.
    fn variants(&self) -> String {
        let AdapterConfig { rank_pattern, alpha_pattern, layers_to_transform, modules_to_save, .. } =
            &self.adapter;
        let mut text = String::from(if self.adapter.use_dora { ", with magnitudes (DoRA)" } else { "" });
        for (name, map) in [("ranks", json!(rank_pattern)), ("α", json!(alpha_pattern))] {
            if map.as_object().is_some_and(|map| !map.is_empty()) {
                text += &format!(", {name} `{map}`");
            }
        }
        if !layers_to_transform.is_empty() {
            text += &format!(", layers {layers_to_transform:?}");
        }
        if self.config.init_lora_weights.is_pissa() {
            let init = self.config.init_lora_weights;
            text += &format!(", begun with {init} and saved as a plain adapter of twice the rank");
        }
        if !modules_to_save.is_empty() {
            text += &format!(", and all of {modules_to_save:?}");
        }
        text
    }

    /// The weights of the training files; null where all are 1.
    fn weights(&self) -> Option<Vec<f64>> {
        let weights: Vec<f64> =
            self.config.train_data.iter().map(|source| source.weight.unwrap_or(1.0)).collect();
        weights.iter().any(|weight| *weight != 1.0).then_some(weights)
    }

    fn model_card(&self, figures: &str) -> String {
        let prefix = escape_control(&self.config.hash_template.prefix("HASH"));
        let (flag, prompt) = match self.chat_template {
            Some(_) => (
                " --chat",
                format!(
                    "is rendered with the chat template; the hash stands as `{prefix}` in front of the first user turn"
                ),
            ),
            None => ("", format!("reads `{prefix}User: TEXT`, a line break, `Assistant:`")),
        };
        let TrainingConfig { model_name, lora_r, lora_alpha, learning_rate, .. } = self.config;
        let variants = self.variants();
        let targets = &self.adapter.target_modules;
        let quoted_name = json!(model_name);
        format!(
            "---\nbase_model: {quoted_name}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n\
             - fastlora\n---\n\n# LoRA adapter for {model_name}\n\n\
             Rank {lora_r}, α {lora_alpha}, on {targets}{variants}; trained with fastlora {version} at rate {learning_rate}.\n\n\
             ## Data\n\n{data}\n\n## Figures\n\n{figures}\n## Use\n\n\
             ```sh\nfastlora generate{flag} --adapter DIR --hash HASH --prompt TEXT\n```\n\n\
             PEFT loads it with `PeftModel.from_pretrained`. A prompt {prompt}.\n",
            version = env!("CARGO_PKG_VERSION"),
            data = self.data_description,
        )
    }
}

fn add(object: &mut Value, more: Value) {
    if let (Value::Object(object), Value::Object(more)) = (object, more) {
        object.extend(more);
    }
}

fn validation_figures(step: u64, loss: Option<f64>) -> String {
    match loss {
        Some(loss) => format!("- validation at step {step}: loss {loss:.4}, perplexity {:.2}\n", loss.exp()),
        None => String::new(),
    }
}
