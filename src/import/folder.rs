//! The Hugging Face folder that import writes: staged beside its destination, so that it appears whole or not at all.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, View};
use serde_json::Value as Json;

use super::architecture::PlannedTensor;
use super::gguf::Gguf;
use crate::checkpoint::atomic::{self, Staging};
use crate::dtype::DType;
use crate::error::{Error, Result};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
/// Everything that import writes, and so everything it may replace.
const FILES: [&str; 6] = [
    CONFIG,
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    WEIGHTS,
];

/// Checks that `destination` may become the folder: it is absent, empty, or (with `overwrite`) holds nothing but the files
/// of an earlier import.
pub(super) fn check_destination(destination: &Path, overwrite: bool) -> Result<()> {
    let place = || destination.display().to_string();
    let entries = match fs::read_dir(destination) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            return Err(Error::config("a file is there; the output must be a folder").at(place()));
        }
        Err(error) => return Err(Error::file("read the folder", destination, error)),
    };
    for entry in entries {
        let entry = entry.map_err(|error| Error::file("read the folder", destination, error))?;
        if !overwrite {
            return Err(Error::config("the output folder is not empty")
                .at(place())
                .hint("choose another with -o, or replace it with --overwrite"));
        }
        let name = entry.file_name();
        if !FILES.iter().any(|&file| name == file) {
            let message = format!("it holds `{}`, which import did not write", name.to_string_lossy());
            return Err(Error::config(message).at(place()).hint("choose another folder, or move that away"));
        }
    }
    Ok(())
}

/// A folder in the making; dropped before [`Self::publish`], it leaves nothing behind.
pub(super) struct NewFolder {
    staging: Staging,
    destination: PathBuf,
}

impl NewFolder {
    /// Starts a folder beside `destination`.
    pub fn create(destination: &Path) -> Result<Self> {
        // A link to a folder stays a link: what it points to is replaced.
        let destination = fs::canonicalize(destination).unwrap_or_else(|_| destination.to_path_buf());
        let name =
            destination.file_name().map(|name| name.to_string_lossy().into_owned()).ok_or_else(|| {
                Error::config("not a folder that can be made").at(destination.display().to_string())
            })?;
        let staging = Staging::new(atomic::parent_of(&destination), &name)?;
        Ok(Self { staging, destination })
    }

    /// Writes one JSON file.
    pub fn write_json(&self, name: &str, value: &Json) -> Result<()> {
        debug_assert!(FILES.contains(&name));
        let mut text = serde_json::to_vec_pretty(value)
            .map_err(|error| Error::internal(format!("{name} cannot be written as JSON")).caused_by(error))?;
        text.push(b'\n');
        atomic::write_synced(&self.staging.path().join(name), &text)
    }

    /// Writes the weights one tensor at a time; `written` hears each name and its number of elements.
    pub fn write_weights<R: Read + Seek>(
        &self,
        gguf: &Gguf<R>,
        tensors: &[PlannedTensor<'_>],
        dtype: DType,
        written: &dyn Fn(&str, usize),
    ) -> Result<()> {
        let failure = RefCell::new(None);
        let views = tensors.iter().map(|tensor| {
            (tensor.name.as_str(), LazyTensor { gguf, tensor, dtype, failure: &failure, written })
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let path = self.staging.path().join(WEIGHTS);
        let result = safetensors::serialize_to_file(views, Some(metadata), &path);
        // The crate's views cannot fail: the first failure waits here, and what was written goes with the folder.
        if let Some(error) = failure.into_inner() {
            return Err(error);
        }
        result.map_err(|error| match error {
            SafeTensorError::IoError(error) => Error::file("write", &path, error),
            other => {
                Error::model("the weights cannot be written").at(path.display().to_string()).caused_by(other)
            }
        })?;
        // The crate makes its file private and leaves it in the page cache: give it the rights of the others, and sync.
        fs::metadata(self.staging.path().join(CONFIG))
            .and_then(|config| fs::set_permissions(&path, config.permissions()))
            .and_then(|()| File::open(&path)?.sync_all())
            .map_err(|error| Error::file("finish", &path, error))
    }

    /// Puts the folder in its place.
    pub fn publish(self) -> Result<()> {
        self.staging.replace_folder(&self.destination)
    }
}

/// A tensor that is read and converted when the writer asks for it.
struct LazyTensor<'a, R> {
    gguf: &'a Gguf<R>,
    tensor: &'a PlannedTensor<'a>,
    dtype: DType,
    failure: &'a RefCell<Option<Error>>,
    written: &'a dyn Fn(&str, usize),
}

impl<R: Read + Seek> View for LazyTensor<'_, R> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::Bf16 => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.source.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.failure.borrow().is_some() {
            return Cow::Borrowed(&[]);
        }
        match convert(self.gguf, self.tensor, self.dtype) {
            Ok(bytes) => {
                (self.written)(&self.tensor.name, self.tensor.source.elements());
                Cow::Owned(bytes)
            }
            Err(error) => {
                *self.failure.borrow_mut() = Some(error);
                Cow::Borrowed(&[])
            }
        }
    }

    fn data_len(&self) -> usize {
        self.tensor.source.elements() * self.dtype.bytes()
    }
}

/// The tensor's little-endian bytes as `dtype`, rows in Hugging Face's order.
pub(super) fn convert<R: Read + Seek>(
    gguf: &Gguf<R>,
    tensor: &PlannedTensor<'_>,
    dtype: DType,
) -> Result<Vec<u8>> {
    let source = tensor.source;
    let columns = source.columns();
    // A bias is one row in the file, but what its heads order are its elements.
    let (rows, row_length) = match source.shape[..] {
        [rows, columns] => (rows, columns),
        _ => (source.elements(), 1),
    };
    let mut bytes = vec![0; source.elements() * dtype.bytes()];
    gguf.read_rows(source, |first_row, values| {
        let start = first_row * columns;
        if let Some(offset) = values.iter().position(|value| !fits(*value, dtype)) {
            let (row, column) = ((start + offset) / columns, (start + offset) % columns);
            let message =
                format!("element [{row}, {column}] is {}, not a finite number in {dtype}", values[offset]);
            let error = gguf.error_at(format!("tensor {}", source.name), message);
            let hint = "choose --dtype bf16 or f32, which reach further than f16";
            return Err(if values[offset].is_finite() { error.hint(hint) } else { error });
        }
        match tensor.interleaved_heads {
            None => {
                encode(values, dtype, &mut bytes[start * dtype.bytes()..][..values.len() * dtype.bytes()])
            }
            Some(heads) => {
                let row_bytes = row_length * dtype.bytes();
                for (row, values) in (start / row_length..).zip(values.chunks_exact(row_length)) {
                    let row = deinterleaved(row, rows / heads);
                    encode(values, dtype, &mut bytes[row * row_bytes..][..row_bytes]);
                }
            }
        }
        Ok(())
    })?;
    Ok(bytes)
}

/// Where a row of the file belongs: 0, 1, 2, 3 … of a head are 0, half, 1, half + 1 ….
fn deinterleaved(row: usize, head_length: usize) -> usize {
    let (head, within) = (row / head_length, row % head_length);
    head * head_length + within % 2 * (head_length / 2) + within / 2
}

/// Whether `value` is finite once rounded to `dtype`: half a unit of the last place above the largest number is too much.
fn fits(value: f32, dtype: DType) -> bool {
    const F16_LIMIT: f32 = 65520.0;
    const BF16_LIMIT: f32 = f32::from_bits(0x7f7f_8000);
    match dtype {
        DType::F32 => value.is_finite(),
        DType::F16 => value.abs() < F16_LIMIT,
        DType::Bf16 => value.abs() < BF16_LIMIT,
    }
}

/// Rounds `values` to nearest, ties to even, into `bytes`.
fn encode(values: &[f32], dtype: DType, bytes: &mut [u8]) {
    fn store<const N: usize>(words: impl Iterator<Item = [u8; N]>, bytes: &mut [u8]) {
        for (word, bytes) in words.zip(bytes.chunks_exact_mut(N)) {
            bytes.copy_from_slice(&word);
        }
    }
    // Slice conversions use the CPU's own instructions; this many values stay in its nearest cache.
    const BLOCK: usize = 1024;
    for (values, bytes) in values.chunks(BLOCK).zip(bytes.chunks_mut(BLOCK * dtype.bytes())) {
        match dtype {
            DType::F32 => store(values.iter().map(|value| value.to_le_bytes()), bytes),
            DType::F16 => {
                let mut rounded = [f16::ZERO; BLOCK];
                rounded[..values.len()].convert_from_f32_slice(values);
                store(rounded.iter().map(|value| value.to_le_bytes()), bytes);
            }
            DType::Bf16 => {
                let mut rounded = [bf16::ZERO; BLOCK];
                rounded[..values.len()].convert_from_f32_slice(values);
                store(rounded.iter().map(|value| value.to_le_bytes()), bytes);
            }
        }
    }
}
