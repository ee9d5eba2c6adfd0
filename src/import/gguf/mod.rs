//! The GGUF container: header, metadata and tensor table, read with every length checked against the file.
//!
//! Layout (little-endian): magic `GGUF`, version u32, tensor count u64, metadata count u64, the metadata pairs, the tensor
//! table, padding to the alignment, tensor data. Nothing is allocated before the file is known to be long enough for it,
//! and tensor data is read where it is asked for, so memory never grows with the model.
//! Source: the ggml project's `docs/gguf.md`.

mod reader;
mod value;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::dequantize::BlockType;
use crate::error::{Error, Result};
use reader::Reader;
use value::Value;

/// One row of the tensor table.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo {
    pub name: String,
    /// Row-major (the file stores the fastest axis first).
    pub shape: Vec<usize>,
    pub block_type: BlockType,
    /// From the start of the file.
    offset: u64,
    bytes: u64,
}

impl TensorInfo {
    /// Length of the fastest axis.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    fn row_bytes(&self) -> usize {
        self.block_type.bytes_of(self.columns())
    }
}

/// An open GGUF file whose header, metadata and tensor table are valid.
pub(super) struct Gguf<R> {
    source: RefCell<R>,
    /// How errors name the file.
    label: String,
    metadata: BTreeMap<String, Value>,
    pub tensors: Vec<TensorInfo>,
}

impl Gguf<File> {
    /// Opens `path` and reads everything but the tensor data.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::file("open", path, source))?;
        let metadata = file.metadata().map_err(|source| Error::file("read", path, source))?;
        if !metadata.is_file() {
            return Err(
                Error::model("not a regular file; import reads one GGUF file").at(path.display().to_string())
            );
        }
        Self::parse(file, metadata.len(), path.display().to_string())
    }
}

impl<R: Read + Seek> Gguf<R> {
    /// Reads everything but the tensor data of a source of `length` bytes, which errors call `label`.
    pub fn parse(mut source: R, length: u64, label: String) -> Result<Self> {
        let (metadata, tensors) = Reader::new(&mut source, length, &label).read()?;
        Ok(Self { source: RefCell::new(source), label, metadata, tensors })
    }

    /// A model error at `place` in this file.
    pub fn error_at(&self, place: impl fmt::Display, message: impl Into<String>) -> Error {
        Error::model(message).at(format!("{}: {place}", self.label))
    }

    /// The metadata's keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Whether the metadata have `key`.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    fn wrong_kind(&self, key: &str, found: &Value, expected: &str) -> Error {
        self.error_at(key, format!("found {}, expected {expected}", found.kind()))
    }

    fn missing(&self, key: &str) -> Error {
        self.error_at(key, "this metadata key is missing")
    }

    /// A string.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong_kind(key, other, "a string")),
        }
    }

    /// An integer that counts something or is an id.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => u32::try_from(*value)
                .map(|value| Some(value as usize))
                .map_err(|_| self.error_at(key, format!("{value} is out of range (0 to {})", u32::MAX))),
            Some(other) => Err(self.wrong_kind(key, other, "an integer")),
        }
    }

    /// An integer ≥ 1 that must be there.
    pub fn required_count(&self, key: &str) -> Result<usize> {
        match self.count(key)?.ok_or_else(|| self.missing(key))? {
            0 => Err(self.error_at(key, "found 0, expected at least 1")),
            value => Ok(value),
        }
    }

    /// A finite number > 0. A file stores f32: the shortest decimal that reads back as the same f32 is what its author
    /// wrote (1e-5, not 9.999999747378752e-6).
    pub fn positive_number(&self, key: &str) -> Result<Option<f64>> {
        let number = match self.value(key) {
            None => return Ok(None),
            Some(Value::Float(value)) => *value,
            Some(Value::Integer(value)) => *value as f64,
            Some(other) => return Err(self.wrong_kind(key, other, "a number")),
        };
        if !number.is_finite() || number <= 0.0 {
            return Err(self.error_at(key, format!("found {number}, expected a finite number above 0")));
        }
        let single = number as f32;
        let shortest =
            if f64::from(single) == number { single.to_string().parse().unwrap_or(number) } else { number };
        Ok(Some(shortest))
    }

    /// A truth value.
    pub fn truth(&self, key: &str) -> Result<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(self.wrong_kind(key, other, "true or false")),
        }
    }

    /// An array of strings that must be there.
    pub fn strings(&self, key: &str) -> Result<&[String]> {
        match self.value(key).ok_or_else(|| self.missing(key))? {
            Value::Strings(strings) => Ok(strings),
            other => Err(self.wrong_kind(key, other, "an array of strings")),
        }
    }

    /// An array of integers.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i128>>> {
        self.array(key, "an array of integers", |value| match value {
            Value::Integer(value) => Some(*value),
            _ => None,
        })
    }

    /// An array of floating-point numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.array(key, "an array of numbers", |value| match value {
            Value::Float(value) => Some(*value),
            _ => None,
        })
    }

    fn array<T>(
        &self,
        key: &str,
        expected: &str,
        element: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Scalars(scalars)) => scalars
                .iter()
                .map(|value| element(&value).ok_or_else(|| self.wrong_kind(key, &value, expected)))
                .collect::<Result<_>>()
                .map(Some),
            Some(other) => Err(self.wrong_kind(key, other, expected)),
        }
    }

    /// Reads `tensor` some rows at a time: `visit(first_row, values)` gets whole rows as f32, in order.
    pub fn read_rows(
        &self,
        tensor: &TensorInfo,
        mut visit: impl FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        const CHUNK_BYTES: usize = 1 << 20;
        let (columns, row_bytes) = (tensor.columns(), tensor.row_bytes());
        if tensor.elements() == 0 {
            return Ok(());
        }
        let rows = tensor.elements() / columns;
        let rows_per_chunk = (CHUNK_BYTES / row_bytes).clamp(1, rows);
        let mut bytes = vec![0; rows_per_chunk * row_bytes];
        let mut values = vec![0.0; rows_per_chunk * columns];
        let mut source = self.source.borrow_mut();
        let failed = |error| {
            Error::io("cannot read the tensor's data")
                .at(format!("{}: {}", self.label, tensor.name))
                .caused_by(error)
        };
        source.seek(SeekFrom::Start(tensor.offset)).map_err(failed)?;
        for first_row in (0..rows).step_by(rows_per_chunk) {
            let count = rows_per_chunk.min(rows - first_row);
            let bytes = &mut bytes[..count * row_bytes];
            let values = &mut values[..count * columns];
            source.read_exact(bytes).map_err(failed)?;
            tensor.block_type.dequantize(bytes, values);
            visit(first_row, values)?;
        }
        Ok(())
    }
}
