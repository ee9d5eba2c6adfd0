//! A Hugging Face model folder in the making: staged beside its destination, so that it appears whole or not at all.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, View};
use serde_json::Value;

use super::atomic::{self, Staging};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Checks that `destination` may become the folder: it is absent, empty, or (with `overwrite`) holds nothing but what
/// `verb` writes, told by `is_ours`.
///
/// # Errors
/// A configuration error that names what is there.
pub fn check_destination(
    destination: &Path,
    overwrite: bool,
    verb: &str,
    is_ours: impl Fn(&str) -> bool,
) -> Result<()> {
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
        if !name.to_str().is_some_and(&is_ours) {
            let message = format!("it holds `{}`, which {verb} did not write", name.to_string_lossy());
            return Err(Error::config(message).at(place()).hint("choose another folder, or move that away"));
        }
    }
    Ok(())
}

/// A folder in the making; dropped before [`Self::publish`], it leaves nothing behind.
pub struct NewFolder {
    staging: Staging,
    destination: PathBuf,
}

impl NewFolder {
    /// Starts a folder beside `destination`.
    ///
    /// # Errors
    /// A name that no folder can have, or a parent that cannot be written into.
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

    /// Writes one file.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        atomic::write_synced(&self.staging.path().join(name), bytes)
    }

    /// Writes one JSON file.
    pub fn write_json(&self, name: &str, value: &Value) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(value)
            .map_err(|error| Error::internal(format!("{name} cannot be written as JSON")).caused_by(error))?;
        text.push(b'\n');
        self.write(name, &text)
    }

    /// Writes tensors one at a time, as they are computed. A view cannot fail: it puts what happened into `failure` and
    /// gives nothing.
    ///
    /// # Errors
    /// The first failure of a view, or of the file. What was written goes with the folder.
    pub fn write_tensors<'n, V: View>(
        &self,
        name: &str,
        tensors: impl IntoIterator<Item = (&'n str, V)>,
        failure: &RefCell<Option<Error>>,
    ) -> Result<()> {
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let path = self.staging.path().join(name);
        let result = safetensors::serialize_to_file(tensors, Some(metadata), &path);
        if let Some(error) = failure.borrow_mut().take() {
            return Err(error);
        }
        result.map_err(|error| match error {
            SafeTensorError::IoError(error) => Error::file("write", &path, error),
            other => {
                Error::model("the weights cannot be written").at(path.display().to_string()).caused_by(other)
            }
        })?;
        // The crate makes its file private and leaves it in the page cache: give it the rights of the others, and sync.
        let others = self.staging.path().join("config.json");
        fs::metadata(others)
            .and_then(|config| fs::set_permissions(&path, config.permissions()))
            .and_then(|()| File::open(&path)?.sync_all())
            .map_err(|error| Error::file("finish", &path, error))
    }

    /// Puts the folder in its place.
    ///
    /// # Errors
    /// A destination that cannot be replaced; it is as before.
    pub fn publish(self) -> Result<()> {
        self.staging.replace_folder(&self.destination)
    }
}

/// The type's name in safetensors files.
pub fn stored_type(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
    }
}

/// Whether `value` is finite once rounded to `dtype`: half a unit of the last place above the largest number is too much.
pub fn fits(value: f32, dtype: DType) -> bool {
    const F16_LIMIT: f32 = 65520.0;
    const BF16_LIMIT: f32 = f32::from_bits(0x7f7f_8000);
    match dtype {
        DType::F32 => value.is_finite(),
        DType::F16 => value.abs() < F16_LIMIT,
        DType::Bf16 => value.abs() < BF16_LIMIT,
    }
}

/// Rounds `values` to nearest, ties to even, into `bytes`.
pub fn encode(values: &[f32], dtype: DType, bytes: &mut [u8]) {
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
