//! A GGUF file becomes a Hugging Face model folder: weights dequantised, tokenizer included.
//!
//! Reads GGUF 2 and 3 with F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K tensors of the architectures
//! llama and qwen2, with byte-level or SentencePiece BPE tokenizers. Anything else is refused by name before anything is
//! written. Memory holds one tensor at a time, and the folder appears whole or not at all.

mod architecture;
mod dequantize;
mod folder;
mod gguf;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::checkpoint::model_folder::{NewFolder, check_destination};
use crate::dtype::DType;
use crate::error::Result;
use architecture::Plan;
use gguf::Gguf;

/// How to import.
#[derive(Clone, Copy, Debug)]
pub struct ImportOptions {
    /// Element type of the new weights.
    pub dtype: DType,
    /// Replace a folder that an earlier import wrote.
    pub overwrite: bool,
}

impl Default for ImportOptions {
    fn default() -> Self {
        Self { dtype: DType::F16, overwrite: false }
    }
}

/// What was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportReport {
    /// `llama` or `qwen2`.
    pub architecture: &'static str,
    /// Number of tensors.
    pub tensors: usize,
    /// Number of weights.
    pub parameters: usize,
}

/// What [`import_gguf`] tells while it works.
#[derive(Clone, Copy, Debug)]
pub struct ImportProgress<'a> {
    /// The tensor that was just converted.
    pub tensor: &'a str,
    /// Its number of elements.
    pub elements: usize,
    /// Elements of all tensors together.
    pub total_elements: usize,
}

/// Imports the GGUF file `source` as the folder `destination`: `config.json`, `generation_config.json`,
/// `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` (with the chat template) and `special_tokens_map.json`.
///
/// `progress` hears of each tensor. The model must be complete and supported, and its tokenizer must load, before anything
/// is written.
///
/// # Errors
/// A model error that names the file and the place in it; an I/O error; a configuration error if `destination` is not empty
/// and [`ImportOptions::overwrite`] is not set, or holds files that import did not write.
///
/// ```no_run
/// use fastlora::import::{ImportOptions, import_gguf};
/// use std::path::Path;
///
/// # fn main() -> fastlora::error::Result<()> {
/// let options = ImportOptions::default();
/// let report = import_gguf(Path::new("model.gguf"), Path::new("models/mine"), options, &|progress| {
///     println!("{}: {} elements", progress.tensor, progress.elements);
/// })?;
/// println!("{} parameters", report.parameters);
/// # Ok(())
/// # }
/// ```
pub fn import_gguf(
    source: &Path,
    destination: &Path,
    options: ImportOptions,
    progress: &dyn Fn(ImportProgress<'_>),
) -> Result<ImportReport> {
    check_destination(destination, options.overwrite, "import", folder::is_ours)?;
    let gguf = Gguf::open(source)?;
    let mut plan = Plan::new(&gguf, options.dtype)?;
    let tokenizer = tokenizer::convert(&gguf, plan.vocabulary, plan.context)?;
    plan.config.extend(tokenizer.ids);
    let generation_config: Map<String, Json> = [("_from_model_config".to_owned(), Json::Bool(true))]
        .into_iter()
        .chain(tokenizer.generation_ids)
        .collect();
    let total_elements = plan.tensors.iter().map(|tensor| tensor.source.elements()).sum();

    let staged = NewFolder::create(destination)?;
    staged.write_json("config.json", &Json::Object(plan.config))?;
    staged.write_json("generation_config.json", &Json::Object(generation_config))?;
    staged.write_json("tokenizer.json", &tokenizer.tokenizer)?;
    staged.write_json("tokenizer_config.json", &tokenizer.config)?;
    staged.write_json("special_tokens_map.json", &tokenizer.special_tokens)?;
    folder::write_weights(&staged, &gguf, &plan.tensors, options.dtype, &|tensor, elements| {
        progress(ImportProgress { tensor, elements, total_elements });
    })?;
    staged.publish()?;
    Ok(ImportReport {
        architecture: plan.architecture,
        tensors: plan.tensors.len(),
        parameters: total_elements,
    })
}
