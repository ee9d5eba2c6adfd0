//! The adapter folder in PEFT's layout: `adapter_model.safetensors`, `adapter_config.json`, and beside them
//! `fastlora.json` (where it came from), the tokenizer and a model card.

mod config;
mod write;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

pub use self::config::AdapterConfig;
pub use self::write::{CHAT_TEMPLATE, Companions, TOKENIZER_FILES, replace_adapter_folder, write_adapter};
pub(super) use self::write::{pretty, stage, to_safetensors};
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::error::{Error, Result};
use crate::tensor::NamedTensor;

/// The weights' file in an adapter folder.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// The hyper-parameters' file in an adapter folder.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// A LoRA adapter: its hyper-parameters, and `lora_A [r, in]` and `lora_B [out, r]` of every target by full name; with DoRA
/// `lora_magnitude_vector [out]` as well, with `modules_to_save` the weights of those.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// `adapter_config.json`.
    pub config: AdapterConfig,
    /// `adapter_model.safetensors`, sorted by name.
    pub tensors: Vec<NamedTensor>,
}

impl Adapter {
    /// The tensors in the order of `expected` (names and shapes that a model has).
    ///
    /// # Errors
    /// Keys or shapes of another base (fault 61), with the first few of each.
    pub fn match_to(&self, expected: &[(String, Vec<usize>)]) -> Result<Vec<NamedTensor>> {
        let mut found: BTreeMap<&str, &NamedTensor> =
            self.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut matched = Vec::with_capacity(expected.len());
        let (mut missing, mut reshaped) = (Vec::new(), Vec::new());
        for (name, shape) in expected {
            match found.remove(name.as_str()) {
                None => missing.push(name.clone()),
                Some(tensor) if tensor.shape != *shape => {
                    reshaped.push(format!("{name} {:?} for {shape:?}", tensor.shape));
                }
                Some(tensor) => matched.push(tensor.clone()),
            }
        }
        let unknown: Vec<String> = found.keys().map(|name| name.to_string()).collect();
        let problems: Vec<String> = [
            ("not in the model", unknown),
            ("missing in the adapter", missing),
            ("of another shape than the model's", reshaped),
        ]
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(problem, names)| format!("{} {problem}: {}", names.len(), first_few(&names)))
        .collect();
        if problems.is_empty() {
            return Ok(matched);
        }
        let base = self.config.base_model.as_deref().unwrap_or("an unnamed model");
        Err(Error::model(format!("the adapter belongs to another base; tensors {}", problems.join("; ")))
            .hint(format!("it was trained on {base}: load it with that model")))
    }

    /// The module that a tensor belongs to: `model.layers.0.self_attn.q_proj`.
    pub fn module_of(name: &str) -> Option<&str> {
        let name = name.strip_prefix("base_model.model.")?;
        [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"]
            .into_iter()
            .find_map(|end| name.strip_suffix(end))
    }

    /// Whether a tensor is the weight of one of the modules that `modules_to_save` means.
    fn is_whole_module(&self, name: &str) -> bool {
        let module = name.strip_prefix("base_model.model.").and_then(|name| name.strip_suffix(".weight"));
        let is_meant = |module: &str| self.config.modules_to_save.iter().any(|entry| module.ends_with(entry));
        Self::module_of(name).is_none() && module.is_some_and(is_meant)
    }

    /// Every tensor is half of a LoRA pair of the configured rank, magnitudes or a module's whole weight, and finite.
    fn check(&self) -> Result<()> {
        if self.tensors.is_empty() {
            return Err(Error::model("the adapter holds no tensors").hint("save the adapter again"));
        }
        let ranks = self.config.rank_pattern.compile()?;
        for tensor in &self.tensors {
            if let Some((index, value)) = first_non_finite(&tensor.values) {
                return Err(Error::model(format!("element {index} is {value}")).at(&*tensor.name));
            }
            let is_magnitude = self.config.use_dora && tensor.name.ends_with(".lora_magnitude_vector");
            if is_magnitude || self.is_whole_module(&tensor.name) {
                continue;
            }
            let [rows, columns] = tensor.shape[..] else {
                return Err(
                    Error::model(format!("shape {:?}, expected a matrix", tensor.shape)).at(&*tensor.name)
                );
            };
            let found_rank = if tensor.name.ends_with(".lora_A.weight") {
                rows
            } else if tensor.name.ends_with(".lora_B.weight") {
                columns
            } else {
                return Err(Error::model(
                    "not a tensor of a plain LoRA adapter (lora_A.weight or lora_B.weight)",
                )
                .at(&*tensor.name)
                .hint("DoRA's magnitudes go with use_dora, whole modules with modules_to_save; embedding adapters are not supported"));
            };
            let module = Self::module_of(&tensor.name).unwrap_or_default();
            let rank = ranks.value(module)?.unwrap_or(self.config.rank);
            if found_rank != rank {
                return Err(Error::model(format!("rank {found_rank}, but {ADAPTER_CONFIG} says r = {rank}"))
                    .at(&*tensor.name));
            }
        }
        Ok(())
    }
}

/// Reads an adapter folder as PEFT or this program writes it; f16 and bf16 weights are widened to f32.
///
/// # Errors
/// A missing or broken file, an adapter that is not plain LoRA, tensors that are not finite or not of the configured
/// rank, an empty adapter.
pub fn read_adapter(folder: &Path) -> Result<Adapter> {
    let config_path = folder.join(ADAPTER_CONFIG);
    let text = fs::read_to_string(&config_path).map_err(|source| {
        let hint = "name a folder that holds adapter_config.json and adapter_model.safetensors";
        Error::model("cannot read the adapter")
            .at(config_path.display().to_string())
            .caused_by(source)
            .hint(hint)
    })?;
    let in_config = |error: Error| match error.location() {
        None => error.at(config_path.display().to_string()),
        Some(_) => error,
    };
    let config = AdapterConfig::from_json(&text).map_err(in_config)?;

    let weights_path = folder.join(ADAPTER_WEIGHTS);
    if !weights_path.is_file() {
        let error = Error::model(format!("there is no {ADAPTER_WEIGHTS}")).at(folder.display().to_string());
        return Err(if folder.join("adapter_model.bin").is_file() {
            error.hint(
                "adapter_model.bin is a pickle, which can run code: in PEFT, load it and call \
                 save_pretrained(folder, safe_serialization=True)",
            )
        } else {
            error.hint("save the adapter again")
        });
    }
    let adapter = Adapter { config, tensors: read_tensors(&weights_path)? };
    adapter.check().map_err(|error| {
        let file = weights_path.display();
        let place = error.location().map_or(file.to_string(), |tensor| format!("{file}: {tensor}"));
        error.at(place)
    })?;
    Ok(adapter)
}

/// Every tensor of a file, sorted by name, widened to f32.
pub(super) fn read_tensors(path: &Path) -> Result<Vec<NamedTensor>> {
    let file = SafetensorsFile::open(path)?;
    let mut names: Vec<&str> = file.entries().map(|(name, _)| name).collect();
    names.sort_unstable();
    let mut tensors = Vec::with_capacity(names.len());
    for name in names {
        let tensor = file.tensor(name)?;
        let (name, shape) = (name.to_string(), tensor.shape().to_vec());
        tensors.push(NamedTensor { name, shape, values: tensor.to_f32() });
    }
    file.file().check_intact()?;
    Ok(tensors)
}

/// Index and value of the first NaN or infinity.
fn first_non_finite(values: &[f32]) -> Option<(usize, f32)> {
    values.iter().copied().enumerate().find(|(_, value)| !value.is_finite())
}

fn first_few(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN { format!("{shown}, …") } else { shown }
}

#[cfg(test)]
mod tests;
