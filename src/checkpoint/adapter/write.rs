//! Writing an adapter folder, whole or not at all.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use serde_json::Value;

use super::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, first_non_finite, read_adapter};
use crate::checkpoint::atomic::{Staging, parent_of, write_synced};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::NamedTensor;

/// What belongs to a tokenizer in a model folder; copied where present.
pub const TOKENIZER_FILES: &[&str] = &[
    "added_tokens.json",
    CHAT_TEMPLATE,
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// The chat template's file, in transformers' layout.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// What an adapter folder holds beside the adapter.
#[derive(Clone, Copy, Debug)]
pub struct Companions<'a> {
    /// `fastlora.json`: fingerprints, the configuration as resolved, version, step and losses. PEFT warns about keys
    /// that it does not know, so they have a file of their own.
    pub provenance: &'a Value,
    /// `README.md`: the model card.
    pub model_card: &'a str,
    /// The base model's folder, whose tokenizer files are copied.
    pub base_folder: Option<&'a Path>,
    /// `chat_template.jinja`, instead of the base's.
    pub chat_template: Option<&'a str>,
}

/// Writes the adapter into `folder`, which may hold other files (the output folder with its metrics).
///
/// The weights' file arrives last: a folder that has it is complete. The saved files are read back and compared bit
/// by bit before they take their place.
///
/// # Errors
/// A value that is not finite (nothing is written then), a file that cannot be written; the folder is as before.
pub fn write_adapter(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &[NamedTensor],
    companions: &Companions<'_>,
) -> Result<()> {
    let staging = Staging::new(folder, "adapter")?;
    let names = stage(staging.path(), config, tensors, companions)?;
    staging.move_files(folder, &names)
}

/// Writes the adapter as the folder `folder`, which holds nothing else (`OUTPUT/best`): the folder of before stays
/// until the new one takes its name in one step.
///
/// # Errors
/// As [`write_adapter`].
pub fn replace_adapter_folder(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &[NamedTensor],
    companions: &Companions<'_>,
) -> Result<()> {
    let name = folder
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::config("an adapter folder needs a name").at(folder.display().to_string()))?;
    let staging = Staging::new(parent_of(folder), name)?;
    stage(staging.path(), config, tensors, companions)?;
    staging.replace_folder(folder)
}

impl Companions<'_> {
    /// Bytes of the files that are copied beside every adapter.
    pub fn copied_bytes(base_folder: &Path, chat_template: Option<&str>) -> u64 {
        let copied = TOKENIZER_FILES.iter().filter(|name| **name != CHAT_TEMPLATE || chat_template.is_none());
        let bytes = |name: &&str| fs::metadata(base_folder.join(name)).map_or(0, |metadata| metadata.len());
        copied.map(bytes).sum::<u64>() + chat_template.map_or(0, str::len) as u64
    }
}

fn check_values(tensors: &[NamedTensor]) -> Result<()> {
    for tensor in tensors {
        if let Some((index, value)) = first_non_finite(&tensor.values) {
            return Err(Error::numerical(format!(
                "element {index} of the adapter is {value}; nothing was saved"
            ))
            .at(&*tensor.name)
            .hint("lower learning_rate or max_grad_norm"));
        }
    }
    Ok(())
}

/// Writes all files into `folder` and reads the adapter back, unless a value is not finite. Returns the files' names,
/// the weights last.
pub(in crate::checkpoint) fn stage(
    folder: &Path,
    config: &AdapterConfig,
    tensors: &[NamedTensor],
    companions: &Companions<'_>,
) -> Result<Vec<String>> {
    check_values(tensors)?;
    let mut names = Vec::new();
    let mut write = |name: &str, bytes: &[u8]| {
        names.push(name.to_string());
        write_synced(&folder.join(name), bytes)
    };
    for name in TOKENIZER_FILES {
        let Some(source) = companions.base_folder.map(|base| base.join(name)).filter(|path| path.is_file())
        else {
            continue;
        };
        if *name == CHAT_TEMPLATE && companions.chat_template.is_some() {
            continue;
        }
        let bytes = fs::read(&source).map_err(|error| Error::file("read", &source, error))?;
        write(name, &bytes)?;
    }
    if let Some(template) = companions.chat_template {
        write(CHAT_TEMPLATE, template.as_bytes())?;
    }
    write("README.md", companions.model_card.as_bytes())?;
    write("fastlora.json", pretty(companions.provenance)?.as_bytes())?;
    write(ADAPTER_CONFIG, pretty(&config.to_json())?.as_bytes())?;
    write(ADAPTER_WEIGHTS, &to_safetensors(tensors)?)?;
    compare_saved(folder, config, tensors)?;
    Ok(names)
}

pub(in crate::checkpoint) fn pretty(value: &Value) -> Result<String> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|source| Error::internal("cannot render JSON").caused_by(source))?;
    Ok(text + "\n")
}

pub(in crate::checkpoint) fn to_safetensors(tensors: &[NamedTensor]) -> Result<Vec<u8>> {
    let invalid = |source: safetensors::SafeTensorError| {
        Error::internal("a tensor's values do not fill its shape").caused_by(source)
    };
    let little_endian: Vec<Vec<u8>> = tensors
        .iter()
        .map(|tensor| tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect())
        .collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (tensor, bytes) in tensors.iter().zip(&little_endian) {
        let view = TensorView::new(safetensors::Dtype::F32, tensor.shape.clone(), bytes).map_err(invalid)?;
        views.push((tensor.name.as_str(), view));
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(invalid)
}

/// What is on the disk is what was meant, bit by bit (fault 63).
fn compare_saved(folder: &Path, config: &AdapterConfig, tensors: &[NamedTensor]) -> Result<()> {
    let differs = |what: &str| {
        Error::model(format!("the saved adapter reads back differently: {what}; it was not kept"))
            .at(folder.display().to_string())
            .hint("check the disk and the memory of this machine")
    };
    // What was just written is there and sound: that it cannot be read is the disk's fault.
    let saved = read_adapter(folder).map_err(|error| error.with_kind(ErrorKind::Io))?;
    if saved.config != *config {
        return Err(differs(ADAPTER_CONFIG));
    }
    let mut meant: Vec<&NamedTensor> = tensors.iter().collect();
    meant.sort_by(|left, right| left.name.cmp(&right.name));
    if saved.tensors.len() != meant.len() {
        return Err(differs("the number of tensors"));
    }
    for (saved, meant) in saved.tensors.iter().zip(meant) {
        let same_bits =
            || saved.values.iter().map(|v| v.to_bits()).eq(meant.values.iter().map(|v| v.to_bits()));
        if saved.name != meant.name || saved.shape != meant.shape || !same_bits() {
            return Err(differs(&meant.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_63_a_save_that_reads_back_differently_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let config = super::super::tests::config();
        let mut tensors = super::super::tests::pair();
        let companions =
            Companions { provenance: &Value::Null, model_card: "", base_folder: None, chat_template: None };
        stage(folder.path(), &config, &tensors, &companions).unwrap();
        compare_saved(folder.path(), &config, &tensors).unwrap();

        let weights = folder.path().join(ADAPTER_WEIGHTS);
        let mut bytes = fs::read(&weights).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&weights, &bytes).unwrap();
        let error = compare_saved(folder.path(), &config, &tensors).unwrap_err();
        assert!(error.message().contains("reads back differently"), "{error}");
        assert_eq!(error.kind().exit_code(), 4);

        // The sign of a zero is a bit too.
        tensors[0].values[0] = -0.0;
        assert!(compare_saved(folder.path(), &config, &tensors).is_err());
    }
}
