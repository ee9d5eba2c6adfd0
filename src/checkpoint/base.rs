//! A base model: configuration and frozen weights of a Hugging Face model folder.
//!
//! Weights stay in their files, memory-mapped and in their stored precision. Opening a model checks everything that can
//! be checked without computing: headers, names, shapes against the configuration, and that every weight is finite.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::finite::check_finite;
use super::folder::file_in_folder;
use super::safetensors::SafetensorsFile;
use super::shard_index::{INDEX, LONGEST_MESSAGE, read_index, shard_names};
use crate::dtype::DType;
use crate::error::{Error, Result, shorten};
use crate::model::config::ModelConfig;
use crate::tensor::WeightTensor;

const WEIGHTS: &str = "model.safetensors";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// In front of every tensor but the head; absent where the decoder was saved without its head.
const PREFIX: &str = "model.";
/// Names listed in one message.
const LISTED: usize = 5;

/// A base model on disk, checked and mapped.
///
/// ```
/// use fastlora::checkpoint::base::BaseModel;
///
/// let base = BaseModel::open("tests/fixtures/tiny_qwen2")?;
/// assert_eq!(base.config().layer_count, 2);
/// assert_eq!(base.tensor("model.layers.1.self_attn.q_proj.bias")?.shape(), [64]);
/// // This model's output head is its embedding.
/// assert_eq!(base.head()?.name(), "model.embed_tokens.weight");
/// # Ok::<(), fastlora::error::Error>(())
/// ```
pub struct BaseModel {
    folder: PathBuf,
    config: ModelConfig,
    shards: Vec<SafetensorsFile>,
    /// Each expected tensor's shard, and whether its name there lacks [`PREFIX`].
    places: HashMap<String, Place>,
}

#[derive(Clone, Copy)]
struct Place {
    shard: usize,
    without_prefix: bool,
}

/// What identifies a weight file for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardFingerprint {
    /// File name inside the model folder.
    pub file: String,
    /// SHA-256 of the whole file, in hexadecimal.
    pub sha256: String,
}

impl BaseModel {
    /// Opens a model folder and checks all of its weights.
    ///
    /// # Errors
    /// Model errors that name the file and the tensor: anything malformed, missing, of another shape than the
    /// configuration says, or not finite.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        if folder.is_dir() {
            file_in_folder(folder, "config.json")?;
            file_in_folder(folder, "generation_config.json")?;
        }
        let config = ModelConfig::from_folder(folder)?;
        let shards = open_shards(folder)?;
        let places = locate(folder, &config, &shards)?;
        let base = Self { folder: folder.to_owned(), config, shards: shards.files, places };
        base.check_tied_head()?;
        base.check_weights()?;
        Ok(base)
    }

    /// The folder as it was named.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// One of [`ModelConfig::expected_tensors`] by its full name.
    ///
    /// # Errors
    /// A model error for any other name.
    pub fn tensor(&self, name: &str) -> Result<WeightTensor> {
        let place = self.places.get(name).ok_or_else(|| {
            Error::model(format!("a model of this shape has no tensor `{name}`"))
                .at(self.folder.display().to_string())
        })?;
        self.shards[place.shard].tensor(stored_name(name, place.without_prefix))
    }

    /// The token embedding `[V, H]`.
    ///
    /// # Errors
    /// None after a successful [`BaseModel::open`].
    pub fn embedding(&self) -> Result<WeightTensor> {
        self.tensor(EMBEDDING)
    }

    /// The output head `[V, H]`: the embedding where the two are tied.
    ///
    /// # Errors
    /// None after a successful [`BaseModel::open`].
    pub fn head(&self) -> Result<WeightTensor> {
        self.tensor(if self.config.tied_embeddings { EMBEDDING } else { HEAD })
    }

    /// Number of parameters; a tied head counts once.
    pub fn parameter_count(&self) -> u64 {
        self.config.parameter_count()
    }

    /// Element type of the embedding, which is that of all matrices in files written by transformers.
    ///
    /// # Errors
    /// None after a successful [`BaseModel::open`].
    pub fn dtype(&self) -> Result<DType> {
        Ok(self.embedding()?.dtype())
    }

    /// Bytes of all weight files.
    pub fn stored_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.file().bytes().len() as u64).sum()
    }

    /// SHA-256 of every weight file, sorted by name; reads all of them, in parallel.
    ///
    /// # Errors
    /// A model error when a file was truncated meanwhile.
    pub fn fingerprint(&self) -> Result<Vec<ShardFingerprint>> {
        let mut fingerprints = self
            .shards
            .par_iter()
            .map(|shard| {
                let sha256 = format!("{:x}", Sha256::digest(shard.file().bytes()));
                shard.file().check_intact()?;
                let file = shard.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
                Ok(ShardFingerprint { file, sha256 })
            })
            .collect::<Result<Vec<_>>>()?;
        fingerprints.sort_by(|left, right| left.file.cmp(&right.file));
        Ok(fingerprints)
    }

    /// A tied model's file may carry its head once more, but not another one: transformers 4 would ignore it and
    /// transformers 5 would use it.
    fn check_tied_head(&self) -> Result<()> {
        if !self.config.tied_embeddings {
            return Ok(());
        }
        let Some(shard) = self.shards.iter().find(|shard| shard.entry(HEAD).is_some()) else { return Ok(()) };
        let (head, embedding) = (shard.tensor(HEAD)?, self.embedding()?);
        if head.shape() == embedding.shape()
            && head.dtype() == embedding.dtype()
            && head.bytes() == embedding.bytes()
        {
            return Ok(());
        }
        Err(Error::model(format!("`tie_word_embeddings` is true, but this tensor differs from {EMBEDDING}"))
            .at(format!("{}: {HEAD}", shard.path().display()))
            .hint("set tie_word_embeddings to false to use this head, or remove the tensor"))
    }

    fn check_weights(&self) -> Result<()> {
        self.shards.iter().for_each(|shard| shard.file().read_ahead());
        let mut names: Vec<&String> = self.places.keys().collect();
        names.sort_unstable();
        let tensors = names.iter().map(|name| self.tensor(name)).collect::<Result<Vec<_>>>()?;
        let finite = check_finite(&tensors);
        // Zero pages in place of lost ones look finite.
        self.shards.iter().try_for_each(|shard| shard.file().check_intact())?;
        finite.map_err(|(name, message)| {
            let file =
                self.places.get(&name).map(|place| self.shards[place.shard].path().display().to_string());
            Error::model(message)
                .at(format!("{}: {name}", file.unwrap_or_default()))
                .hint("the weights are damaged: get the file again")
        })
    }
}

fn stored_name(name: &str, without_prefix: bool) -> &str {
    match name.strip_prefix(PREFIX) {
        Some(short) if without_prefix => short,
        _ => name,
    }
}

/// The open shards, and the index's opinion on which tensor is where.
struct Shards {
    files: Vec<SafetensorsFile>,
    weight_map: Option<HashMap<String, usize>>,
}

fn open_shards(folder: &Path) -> Result<Shards> {
    if let Some(path) = file_in_folder(folder, WEIGHTS)? {
        return Ok(Shards { files: vec![SafetensorsFile::open(&path)?], weight_map: None });
    }
    let Some(index_path) = file_in_folder(folder, INDEX)? else { return Err(no_weights(folder)) };
    let weight_map = read_index(&index_path)?;
    let names = shard_names(&weight_map);

    let place = || index_path.display().to_string();
    let mut paths = Vec::with_capacity(names.len());
    let mut missing = Vec::new();
    for &name in &names {
        // The name comes from the index, so the index is at fault when it leaves the folder.
        let path = file_in_folder(folder, name)
            .map_err(|error| Error::model(shorten(error.message(), LONGEST_MESSAGE)).at(place()))?;
        match path {
            Some(path) => paths.push(path),
            None => missing.push(name),
        }
    }
    if !missing.is_empty() {
        return Err(Error::model(format!(
            "{} of {} shards are missing: {}",
            missing.len(),
            names.len(),
            list(&missing)
        ))
        .at(place())
        .hint("get the missing files, or the whole model again"));
    }
    let files = paths.iter().map(|path| SafetensorsFile::open(path)).collect::<Result<Vec<_>>>()?;
    let numbers: HashMap<&str, usize> =
        names.iter().enumerate().map(|(number, &name)| (name, number)).collect();
    let weight_map =
        weight_map.iter().map(|(tensor, shard)| (tensor.clone(), numbers[shard.as_str()])).collect();
    Ok(Shards { files, weight_map: Some(weight_map) })
}

/// The error for a folder without safetensors: other formats are named with the way out.
fn no_weights(folder: &Path) -> Error {
    let names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let with_suffix = |suffixes: &[&str]| {
        names
            .iter()
            .find(|name| suffixes.iter().any(|suffix| name.ends_with(suffix)) && *name != "training_args.bin")
    };
    let error = |found: String| Error::model(found).at(folder.display().to_string());
    if let Some(name) = with_suffix(&[".bin", ".bin.index.json", ".pt", ".pth"]) {
        return error(format!("found pickled weights, {name}, expected {WEIGHTS}: pickle can run code when it is read"))
            .hint(
                "if you trust them, convert in Python: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(\
                 NEW_FOLDER, safe_serialization=True)",
            );
    }
    if let Some(name) = with_suffix(&[".gguf"]) {
        return error(format!("found {name}, expected {WEIGHTS}"))
            .hint("turn it into a model folder with `fastlora import FILE.gguf -o FOLDER`");
    }
    error(format!("neither {WEIGHTS} nor {INDEX} is there"))
}

/// Finds every expected tensor and checks its shape and type; a complete list of what is missing, else.
fn locate(folder: &Path, config: &ModelConfig, shards: &Shards) -> Result<HashMap<String, Place>> {
    let place = |name: &str| match &shards.weight_map {
        Some(weight_map) => {
            weight_map.get(name).copied().filter(|&shard| shards.files[shard].entry(name).is_some())
        }
        None => shards.files[0].entry(name).map(|_| 0),
    };
    // As transformers does: a decoder saved without its head has names without the prefix.
    let without_prefix = place(EMBEDDING).is_none() && place(stored_name(EMBEDDING, true)).is_some();
    let mut places = HashMap::new();
    let mut missing = Vec::new();
    for (name, shape) in config.expected_tensors() {
        let stored = stored_name(&name, without_prefix);
        let Some(shard) = place(stored) else {
            // The header's size bounds the list, not the configuration's layers.
            missing.push(name);
            if missing.len() > MOST_MISSING {
                break;
            }
            continue;
        };
        let tensor = shards.files[shard].tensor(stored)?;
        if tensor.shape() != shape {
            return Err(Error::model(format!(
                "shape {:?}, expected {shape:?} by config.json",
                tensor.shape()
            ))
            .at(format!("{}: {stored}", shards.files[shard].path().display())));
        }
        places.insert(name, Place { shard, without_prefix });
    }
    if !missing.is_empty() {
        let names: Vec<&str> = missing.iter().map(String::as_str).collect();
        return Err(Error::model(format!("{} are missing: {}", tensors(names.len()), list(&names)))
            .at(folder.display().to_string())
            .hint("the weights belong to another configuration, or a part of them is not there"));
    }
    report_unused(&places, shards);
    Ok(places)
}

/// Missing tensors counted before giving up.
const MOST_MISSING: usize = 10_000;

fn tensors(count: usize) -> String {
    match count {
        1 => "1 tensor".to_owned(),
        count if count > MOST_MISSING => format!("more than {MOST_MISSING} tensors"),
        count => format!("{count} tensors"),
    }
}

fn list(names: &[&str]) -> String {
    let shown: Vec<_> = names.iter().take(LISTED).map(|name| shorten(name, 100)).collect();
    let shown = shown.join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn report_unused(places: &HashMap<String, Place>, shards: &Shards) {
    let used: HashSet<&str> =
        places.iter().map(|(name, place)| stored_name(name, place.without_prefix)).collect();
    let mut unused: Vec<&str> = shards
        .files
        .iter()
        .flat_map(|file| file.entries().map(|(name, _)| name))
        // Old files carry the frequencies that RoPE computes; a tied head is checked by itself.
        .filter(|name| !used.contains(name) && *name != HEAD && !name.ends_with("rotary_emb.inv_freq"))
        .collect();
    if !unused.is_empty() {
        unused.sort_unstable();
        tracing::warn!("{} of the weight files are not used: {}", tensors(unused.len()), list(&unused));
    }
}
