//! Base + adapter → a Hugging Face folder that needs no adapter: `W + scale·B·A`, with DoRA its rows at their magnitudes, and the weights of modules that were
//! trained whole.

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;

use rayon::prelude::*;
use safetensors::tensor::{Dtype, View};
use serde_json::{Map, Value, json};

use crate::checkpoint::adapter::{Adapter, TOKENIZER_FILES};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::model_folder::{NewFolder, check_destination, encode, fits, stored_type};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::model::LoraConfig;
use crate::tensor::{NamedTensor, WeightTensor};

/// Files beside the weights that belong to a model.
const CONFIGS: [&str; 2] = ["config.json", "generation_config.json"];
const INDEX: &str = "model.safetensors.index.json";

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeReport {
    /// Weight files.
    pub shards: usize,
    /// Tensors.
    pub tensors: usize,
    /// Of these, the ones that an adapter changed.
    pub changed: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Writes `base` with `adapter` applied to its weights as the folder `destination`, in shards of at most
/// `max_shard_bytes` where no single tensor is larger. Each tensor keeps its element type; the addition is done in f32
/// and rounded once. Memory holds one tensor at a time; the folder appears whole or not at all.
///
/// # Errors
/// An adapter of another base (fault 61); a sum that is not finite in the tensor's type; a destination that is not
/// empty, unless `overwrite` allows to replace what a merge wrote.
pub fn merge(
    base: &BaseModel,
    adapter: &Adapter,
    destination: &Path,
    max_shard_bytes: u64,
    overwrite: bool,
) -> Result<MergeReport> {
    check_destination(destination, overwrite, "merge", is_ours)?;
    adapter.check_base(base.config())?;
    let scales = LoraConfig::from(&adapter.config).scales()?;
    let find = |module: &str, end: &str| {
        let name = format!("base_model.model.{module}.{end}");
        adapter.tensors.iter().find(|tensor| tensor.name == name)
    };
    let failure = RefCell::new(None);
    let tensors: Vec<Merged<'_>> = base
        .config()
        .expected_tensors()
        .map(|(name, _)| {
            let module = name.strip_suffix(".weight").unwrap_or(&name);
            let scale = scales.of(module)?.scale;
            let pair = find(module, "lora_A.weight").zip(find(module, "lora_B.weight"));
            let magnitudes = find(module, "lora_magnitude_vector");
            let sum = pair.map(|(a, b)| Update::Sum { a, b, scale, magnitudes });
            let update = sum.or_else(|| find(module, "weight").map(Update::Whole));
            Ok(Merged { weight: base.tensor(&name)?, name, update, failure: &failure })
        })
        .collect::<Result<_>>()?;
    let changed = tensors.iter().filter(|tensor| tensor.update.is_some()).count();
    let bytes = tensors.iter().map(|tensor| tensor.data_len() as u64).sum();
    let count = tensors.len();

    let folder = NewFolder::create(destination)?;
    let copy = |name: &str| match std::fs::read(base.folder().join(name)) {
        Ok(content) => folder.write(name, &content),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::file("read", base.folder().join(name), error)),
    };
    for name in CONFIGS.iter().chain(TOKENIZER_FILES) {
        copy(name)?;
    }
    let shards = cut(&tensors, max_shard_bytes);
    let shard_count = shards.len();
    let mut weight_map = Map::new();

    for (number, shard) in shards.into_iter().enumerate() {
        let file = match shard_count {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{shard_count:05}.safetensors", number + 1),
        };
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), Value::String(file.clone()))));
        let views = shard.iter().map(|tensor| (tensor.name.as_str(), tensor));
        folder.write_tensors(&file, views, &failure)?;
    }
    if shard_count > 1 {
        folder
            .write_json(INDEX, &json!({ "metadata": { "total_size": bytes }, "weight_map": weight_map }))?;
    }
    folder.publish()?;
    Ok(MergeReport { shards: shard_count, tensors: count, changed, bytes })
}

fn is_ours(name: &str) -> bool {
    CONFIGS.contains(&name)
        || TOKENIZER_FILES.contains(&name)
        || name == INDEX
        || name.starts_with("model") && name.ends_with(".safetensors")
}

/// Runs of tensors of at most `most` bytes each, or of one that is larger.
fn cut<'t, 'a>(tensors: &'t [Merged<'a>], most: u64) -> Vec<&'t [Merged<'a>]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (place, tensor) in tensors.iter().enumerate() {
        let length = tensor.data_len() as u64;
        if place > start && bytes + length > most {
            shards.push(&tensors[start..place]);
            (start, bytes) = (place, 0);
        }
        bytes += length;
    }
    shards.push(&tensors[start..]);
    shards
}

/// What an adapter does to a tensor.
enum Update<'a> {
    /// Adds `scale·B·A`.
    Sum {
        /// `[r, in]`.
        a: &'a NamedTensor,
        /// `[out, r]`.
        b: &'a NamedTensor,
        scale: f32,
        /// `[out]`: what the norms of the sum's rows then become.
        magnitudes: Option<&'a NamedTensor>,
    },
    /// Takes its place.
    Whole(&'a NamedTensor),
}

/// A tensor that is computed when the writer asks for it.
struct Merged<'a> {
    name: String,
    weight: WeightTensor,
    update: Option<Update<'a>>,
    failure: &'a RefCell<Option<Error>>,
}

impl View for &Merged<'_> {
    fn dtype(&self) -> Dtype {
        stored_type(self.weight.dtype())
    }

    fn shape(&self) -> &[usize] {
        self.weight.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.update {
            None => Cow::Borrowed(self.weight.bytes()),
            Some(update) => match update.applied_to(&self.weight) {
                Ok(bytes) => Cow::Owned(bytes),
                Err(error) => {
                    self.failure.borrow_mut().get_or_insert(error);
                    Cow::Borrowed(&[])
                }
            },
        }
    }

    fn data_len(&self) -> usize {
        Merged::data_len(self)
    }
}

impl Merged<'_> {
    fn data_len(&self) -> usize {
        self.weight.bytes().len()
    }
}

impl Update<'_> {
    /// The tensor that comes of it, in f32, rounded to the weight's type.
    fn applied_to(&self, weight: &WeightTensor) -> Result<Vec<u8>> {
        let columns = weight.shape().last().copied().unwrap_or(1);
        let dtype = weight.dtype();
        let mut sum = match self {
            Self::Sum { .. } => weight.to_f32(),
            Self::Whole(tensor) => tensor.values.clone(),
        };
        let mut bytes = vec![0; weight.bytes().len()];
        let rows = sum.par_chunks_mut(columns).zip(bytes.par_chunks_mut(columns * dtype.bytes())).enumerate();
        rows.try_for_each(|(row, (sum, bytes))| {
            if let Self::Sum { a, b, scale, magnitudes } = self {
                let rank = a.shape[0];
                for (b, a) in b.values[row * rank..][..rank].iter().zip(a.values.chunks_exact(columns)) {
                    let factor = scale * b;
                    for (sum, a) in sum.iter_mut().zip(a) {
                        *sum += factor * a;
                    }
                }
                let norm = sum.iter().map(|&value| f64::from(value) * f64::from(value)).sum::<f64>().sqrt();
                if let Some(magnitudes) = magnitudes.filter(|_| norm > 0.0) {
                    let gain = f64::from(magnitudes.values[row]) / norm;
                    sum.iter_mut().for_each(|value| *value = (gain * f64::from(*value)) as f32);
                }
            }
            if let Some(column) = sum.iter().position(|value| !fits(*value, dtype)) {
                return Err(not_finite(weight, row, column, sum[column], dtype));
            }
            encode(sum, dtype, bytes);
            Ok(())
        })?;
        Ok(bytes)
    }
}

fn not_finite(weight: &WeightTensor, row: usize, column: usize, value: f32, dtype: DType) -> Error {
    Error::numerical(format!("element [{row}, {column}] would be {value}, not a finite number in {dtype}"))
        .at(weight.name())
        .hint("the adapter is too large for the base's element type: use it unmerged")
}
