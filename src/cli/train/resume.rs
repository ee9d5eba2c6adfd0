//! `--resume`: where a run goes on, and whether it is the same run.

use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use serde_json::Value;
use tracing::{info, warn};

use super::checkpointer::restore;
use super::output::checkpoints_folder;
use crate::checkpoint::adapter::ADAPTER_WEIGHTS;
use crate::checkpoint::run::{Checkpoints, STATE, read_checkpoint, read_json};
use crate::cli::signals::Interrupts;
use crate::config::{Options, TrainingConfig};
use crate::error::{Error, Result};
use crate::report::PROVENANCE;
use crate::training::{TrainingState, TrainingSummary};

/// The argument of `--resume`.
pub(super) enum Resume {
    /// The newest checkpoint of the output folder.
    Newest,
    /// This checkpoint.
    Checkpoint(PathBuf),
}

/// Where a run begins.
pub(super) enum Start {
    /// With its first step.
    Fresh,
    /// After a checkpoint.
    Resumed(Box<Resumed>),
    /// Nowhere: all steps are done.
    Complete(Box<TrainingSummary>),
}

/// A run that goes on.
pub(super) struct Resumed {
    pub state: TrainingState,
    /// `fastlora.json` of the checkpoint.
    provenance: Value,
    folder: PathBuf,
}

impl Start {
    /// The state that the run goes on from.
    pub(super) fn state(&self) -> Option<&TrainingState> {
        match self {
            Start::Resumed(resumed) => Some(&resumed.state),
            _ => None,
        }
    }

    /// Steps that are done.
    pub(super) fn steps(&self) -> u64 {
        self.state().map_or(0, |state| state.summary.steps)
    }
}

impl Resume {
    /// What `argument` names, and the output folder if it names that.
    ///
    /// # Errors
    /// Something that is neither `auto` nor a folder.
    pub(super) fn parse(argument: &str) -> Result<(Self, Option<PathBuf>)> {
        if argument == "auto" {
            return Ok((Self::Newest, None));
        }
        let path = Path::new(argument);
        if !path.is_dir() {
            return Err(Error::config(format!("`{argument}` is no folder")).at("--resume").hint(
                "name an output folder or a checkpoint, or `auto`; a configuration stands before --resume",
            ));
        }
        if !path.join(STATE).exists() {
            return Ok((Self::Newest, Some(path.to_path_buf())));
        }
        // OUTPUT/checkpoints/step-N, however it is written.
        let checkpoint = path.canonicalize().map_err(|source| Error::file("open", path, source))?;
        let output = checkpoint.ancestors().nth(2).map(Path::to_path_buf);
        Ok((Self::Checkpoint(path.to_path_buf()), output))
    }

    /// Finds where the run of `config` goes on.
    ///
    /// # Errors
    /// Checkpoints of which none is valid (corrupt), or a run that was started with another configuration.
    pub(super) fn find(&self, config: &TrainingConfig, interrupts: &Interrupts) -> Result<Start> {
        let (folder, checkpoint) = match self {
            Self::Checkpoint(path) => {
                interrupts.is_resumable();
                let read = read_checkpoint(path)
                    .map_err(|error| error.hint("--resume auto takes the newest valid checkpoint"))?;
                (path.clone(), read)
            }
            Self::Newest => {
                if let Some(summary) = finished(config)? {
                    return Ok(Start::Complete(Box::new(summary)));
                }
                let checkpoints = Checkpoints::new(checkpoints_folder(config));
                if !checkpoints.steps()?.is_empty() {
                    interrupts.is_resumable();
                }
                match checkpoints.newest()? {
                    Some((step, read)) => (checkpoints.path(step), read),
                    None => {
                        info!("no checkpoint in {}: the run begins anew", config.output_dir.display());
                        return Ok(Start::Fresh);
                    }
                }
            }
        };
        check_config(&checkpoint.provenance, config, &folder)?;
        let provenance = checkpoint.provenance.clone();
        let state = restore(checkpoint).map_err(|error| error.at(folder.display().to_string()))?;
        info!("resuming after step {} from {}", state.summary.steps, folder.display());
        Ok(Start::Resumed(Box::new(Resumed { state, provenance, folder })))
    }
}

/// The figures of the run in the output folder, if it has come to its end.
fn finished(config: &TrainingConfig) -> Result<Option<TrainingSummary>> {
    let folder = &config.output_dir;
    if !folder.join(ADAPTER_WEIGHTS).exists() || !folder.join(PROVENANCE).exists() {
        return Ok(None);
    }
    let provenance = read_json(&folder.join(PROVENANCE))?;
    let summary = serde_json::from_value(provenance["summary"].clone()).map_err(|source| {
        Error::config("the folder holds an adapter that is no finished run")
            .at(folder.display().to_string())
            .caused_by(source)
            .hint("name another with --output-dir, or give --overwrite to replace it")
    })?;
    check_config(&provenance, config, folder)?;
    Ok(Some(summary))
}

/// Keys that a resumed run may change: they say where things are (their contents are compared instead), what computes,
/// how often the run is saved, and what shows it.
pub(super) const FREE_KEYS: [&str; 15] = [
    "model_name",
    "train_data",
    "val_data",
    "token_cache",
    "output_dir",
    "init_adapter",
    "save_every",
    "keep_checkpoints",
    "report",
    "test_cases",
    "sample_every",
    "device",
    "threads",
    "tiles",
    "activation_memory",
];

/// What of a device's description says which bits it computes: not the number of threads.
pub(super) fn device_kind(description: &str) -> String {
    description.split(", ").filter(|part| !part.contains("thread")).collect::<Vec<_>>().join(", ")
}

/// Refuses a configuration that is not the run's.
fn check_config(provenance: &Value, config: &TrainingConfig, folder: &Path) -> Result<()> {
    let current = serde_json::json!(config);
    let saved = &provenance["config"];
    let defaults = serde_json::json!(TrainingConfig::resolve(&Options::default())?);
    let mut differences = Vec::new();
    for (key, value) in current.as_object().into_iter().flatten() {
        // A date that is not given is that of the first start.
        if FREE_KEYS.contains(&key.as_str()) || (key == "chat_date" && value.is_null()) {
            continue;
        }
        // A key that an older version did not have was at its default.
        let before = saved.get(key).unwrap_or(&defaults[key]);
        if before != value {
            differences.push(format!("{key} is {value}, was {before}"));
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    Err(another_run(Error::config, &differences, folder))
}

fn another_run(error: fn(String) -> Error, differences: &[String], folder: &Path) -> Error {
    error(format!("this is not the run that was begun: {}", differences.join("; ")))
        .at(folder.display().to_string())
        .hint("take that back to resume, or begin another run with --overwrite or --output-dir")
}

impl Resumed {
    /// The date that the run began with, where its chat template writes one.
    pub(super) fn chat_date(&self) -> Option<NaiveDate> {
        serde_json::from_value(self.provenance["config"]["chat_date"].clone()).ok()
    }

    /// Refuses data, a base or a tokenizer that is not the run's. `current` is the provenance of the run as it would go
    /// on.
    ///
    /// # Errors
    /// A data error where the same files hold other samples, else a config error; each with all differences.
    pub(super) fn check_files(&self, current: &Value) -> Result<()> {
        let saved = &self.provenance;
        let differs = |pointer: &str| saved.pointer(pointer) != current.pointer(pointer);
        let path = |value: &Value, key: &str| value["config"][key].to_string();
        let mut differences = Vec::new();
        if differs("/base_sha256") {
            let (now, before) = (path(current, "model_name"), path(saved, "model_name"));
            differences.push(format!("the base model is {now}, was {before} with other weights"));
        }
        if differs("/tokenizer_sha256") {
            differences.push("the tokenizer is another one".into());
        }
        // An older version did not write that all are 1.
        let has_other_weights = saved["weights"] != current["weights"];
        if has_other_weights {
            let weights = |provenance: &Value| match &provenance["weights"] {
                Value::Null => "all 1".to_string(),
                weights => weights.to_string(),
            };
            differences.push(format!(
                "the weights of train_data are {}, were {}",
                weights(current),
                weights(saved)
            ));
        }
        let mut kind: fn(String) -> Error = if differences.is_empty() { Error::data } else { Error::config };
        for (name, key, pointer) in [
            ("training", "train_data", "/data_sha256/train"),
            ("validation", "val_data", "/data_sha256/validation"),
            ("training", "train_data", "/data_sha256/order"),
        ] {
            // Other samples or weights have another order anyway.
            let follows = pointer.ends_with("order") && (has_other_weights || differs("/data_sha256/train"));
            if !differs(pointer) || follows {
                continue;
            }
            let (now, before) = (path(current, key), path(saved, key));
            if now == before {
                let what = if pointer.ends_with("order") { "order of the samples" } else { "samples" };
                differences.push(format!("the {name} {what} of {now} changed since the checkpoint"));
            } else {
                kind = Error::config;
                differences.push(format!("{key} is {now}, was {before} with other samples"));
            }
        }
        if !differences.is_empty() {
            return Err(another_run(kind, &differences, &self.folder));
        }
        let version = &saved["fastlora_version"];
        if *version != current["fastlora_version"] {
            warn!("the run was begun by fastlora {version}: its bits may differ from here on");
        }
        Ok(())
    }

    /// Warns where another kind of device goes on. The number of threads changes no bit.
    pub(super) fn compare_device(&self, description: &str) {
        let before = self.provenance["computed_by"].as_str().unwrap_or_default();
        if device_kind(before) != device_kind(description) {
            warn!("the run was begun on {before}: its bits may differ from here on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[&str]) -> TrainingConfig {
        let pairs: Vec<String> = pairs.iter().map(|pair| pair.to_string()).collect();
        TrainingConfig::resolve(&Options::from_pairs(&pairs).unwrap()).unwrap()
    }

    #[test]
    fn fault_47_every_difference_of_the_configuration_is_listed() {
        let saved = serde_json::json!({ "config": config(&["lora_r=4", "seed=1"]) });
        let folder = Path::new("out/checkpoints/step-3");
        let moved = ["lora_r=4", "seed=1", "model_name=elsewhere", "threads=1", "save_every=3", "device=cpu"];
        check_config(&saved, &config(&moved), folder).unwrap();
        let mut older = saved.clone();
        older["config"].as_object_mut().unwrap().remove("rank_pattern");
        check_config(&older, &config(&moved), folder).unwrap();
        let ranks = [&moved[..], &["rank_pattern={\"q_proj\": 2}"]].concat();
        let error = check_config(&older, &config(&ranks), folder).unwrap_err();
        assert!(error.to_string().contains(r#"rank_pattern is {"q_proj":2}, was {}"#), "{error}");
        let error = check_config(&saved, &config(&["lora_r=8", "max_steps=3"]), folder).unwrap_err();
        assert_eq!(error.kind().exit_code(), 2);
        for part in ["lora_r is 8, was 4", "seed is 42, was 1", "max_steps is 3, was null", "step-3"] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn free_keys_are_keys() {
        let keys = Options::keys();
        for key in FREE_KEYS {
            assert!(keys.iter().any(|known| known == key), "{key}");
        }
    }
}
