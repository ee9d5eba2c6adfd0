//! The GGUF container: header, metadata and tensor table, read with every length checked against the file.
//!
//! Layout (little-endian): magic `GGUF`, version u32, tensor count u64, metadata count u64, the metadata pairs, the tensor
//! table, padding to the alignment, tensor data. Nothing is allocated before the file is known to be long enough for it,
//! and tensor data is read where it is asked for, so memory never grows with the model.
//! Source: the ggml project's `docs/gguf.md`.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use super::dequantize::BlockType;
use crate::error::{Error, Result};

/// A file names at most this many axes for a tensor.
const MAX_AXES: u32 = 4;
/// Tensor data starts at multiples of this, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// Scalar types of metadata, numbered as in the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ScalarType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl ScalarType {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    const fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// The value in `bytes`, which holds exactly [`Self::bytes`] bytes.
    fn decode(self, bytes: &[u8]) -> Value {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(word);
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Value::Integer(unsigned.into()),
            Self::I8 => Value::Integer((unsigned as i8).into()),
            Self::I16 => Value::Integer((unsigned as i16).into()),
            Self::I32 => Value::Integer((unsigned as i32).into()),
            Self::I64 => Value::Integer((unsigned as i64).into()),
            Self::F32 => Value::Float(f32::from_bits(unsigned as u32).into()),
            Self::F64 => Value::Float(f64::from_bits(unsigned)),
            Self::Bool => Value::Bool(unsigned != 0),
        }
    }
}

/// Format code of a string and of an array.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    /// Kept as stored, so that an array costs the memory it takes in the file.
    Scalars(Scalars),
}

/// An array of numbers or truth values, as stored.
#[derive(Clone, Debug, PartialEq)]
struct Scalars {
    scalar: ScalarType,
    bytes: Vec<u8>,
}

impl Scalars {
    fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        self.bytes.chunks_exact(self.scalar.bytes()).map(|bytes| self.scalar.decode(bytes))
    }
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Bool(_) => "true or false",
            Value::String(_) => "a string",
            Value::Strings(_) => "an array of strings",
            Value::Scalars(_) => "an array of numbers",
        }
    }
}

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
    pub fn parse(source: R, length: u64, label: String) -> Result<Self> {
        let mut reader = Reader { source: BufReader::new(source), position: 0, length, label: &label };
        let (tensor_count, metadata_count) = reader.header()?;
        let metadata = reader.metadata(metadata_count)?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(value)) => u64::try_from(*value)
                .ok()
                .filter(|value| value.is_power_of_two() && *value <= 1 << 30)
                .ok_or_else(|| reader.error(format!("general.alignment is {value}, not a power of two")))?,
            Some(other) => {
                return Err(reader.error(format!("general.alignment is {}, not an integer", other.kind())));
            }
        };
        let tensors = reader.tensor_table(tensor_count, alignment)?;
        let source = RefCell::new(reader.source.into_inner());
        Ok(Self { source, label, metadata, tensors })
    }

    /// A model error at `place` in this file.
    pub fn error_at(&self, place: impl fmt::Display, message: impl Into<String>) -> Error {
        Error::model(message).at(format!("{}: {place}", self.label))
    }

    /// The metadata's keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
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
        let expected = "an array of integers";
        match self.value(key) {
            None => Ok(None),
            Some(Value::Scalars(scalars)) => scalars
                .iter()
                .map(|value| match value {
                    Value::Integer(value) => Ok(value),
                    other => Err(self.wrong_kind(key, &other, expected)),
                })
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

/// A cursor that never reads or allocates past the end of the file.
struct Reader<'a, R> {
    source: BufReader<R>,
    position: u64,
    length: u64,
    label: &'a str,
}

impl<R: Read> Reader<'_, R> {
    fn error(&self, message: impl Into<String>) -> Error {
        Error::model(message).at(format!("{}: byte {}", self.label, self.position))
    }

    /// Checks that `bytes` more are there, before anything is allocated for `what`.
    fn check(&self, bytes: u64, what: &str) -> Result<()> {
        let left = self.length - self.position;
        if bytes > left {
            return Err(self
                .error(format!("{what} needs {bytes} bytes, the file has {left} left"))
                .hint("the file is cut short or damaged; download it again"));
        }
        Ok(())
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<()> {
        self.check(bytes.len() as u64, what)?;
        self.source.read_exact(bytes).map_err(|error| {
            Error::io(format!("cannot read {what}"))
                .at(format!("{}: byte {}", self.label, self.position))
                .caused_by(error)
        })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes, what)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes, what)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let length = self.u64(what)?;
        self.check(length, what)?;
        let start = self.position;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|error| {
            Error::model(format!("{what} is not UTF-8"))
                .at(format!("{}: byte {start}", self.label))
                .caused_by(error)
        })
    }

    /// Tensor count and metadata count.
    fn header(&mut self) -> Result<(u64, u64)> {
        let mut magic = [0; 4];
        self.fill(&mut magic, "the GGUF magic")?;
        if &magic != b"GGUF" {
            return Err(self.error(format!("not a GGUF file: it starts with \"{}\"", magic.escape_ascii())));
        }
        match self.u32("the version")? {
            2 | 3 => {}
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(self.error("a big-endian GGUF file; only little-endian files are read"));
            }
            version => return Err(self.error(format!("GGUF version {version}; versions 2 and 3 are read"))),
        }
        Ok((self.u64("the tensor count")?, self.u64("the metadata count")?))
    }

    fn metadata(&mut self, count: u64) -> Result<BTreeMap<String, Value>> {
        const SMALLEST_PAIR_BYTES: u64 = 8 + 4 + 1;
        self.check(count.saturating_mul(SMALLEST_PAIR_BYTES), "the metadata")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.string("a metadata key")?;
            let value = self.value(&key)?;
            if metadata.contains_key(&key) {
                return Err(self.error(format!("metadata key `{key}` appears twice")));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let what = format!("the value of `{key}`");
        match self.u32(&what)? {
            STRING => Ok(Value::String(self.string(&what)?)),
            ARRAY => {
                let element_code = self.u32(&what)?;
                let count = self.u64(&what)?;
                if element_code == STRING {
                    self.check(count.saturating_mul(8), &what)?;
                    return Ok(Value::Strings(
                        (0..count).map(|_| self.string(&what)).collect::<Result<_>>()?,
                    ));
                }
                let scalar = self.scalar_type(element_code, key)?;
                self.check(count.saturating_mul(scalar.bytes() as u64), &what)?;
                let mut bytes = vec![0; count as usize * scalar.bytes()];
                self.fill(&mut bytes, &what)?;
                Ok(Value::Scalars(Scalars { scalar, bytes }))
            }
            code => {
                let scalar = self.scalar_type(code, key)?;
                let mut bytes = [0; 8];
                let bytes = &mut bytes[..scalar.bytes()];
                self.fill(bytes, &what)?;
                Ok(scalar.decode(bytes))
            }
        }
    }

    fn scalar_type(&self, code: u32, key: &str) -> Result<ScalarType> {
        ScalarType::from_code(code).ok_or_else(|| {
            let found =
                if code == ARRAY { "an array of arrays".into() } else { format!("unknown type {code}") };
            self.error(format!("metadata key `{key}` has {found}"))
        })
    }

    fn tensor_table(&mut self, count: u64, alignment: u64) -> Result<Vec<TensorInfo>> {
        const SMALLEST_ENTRY_BYTES: u64 = 8 + 4 + 4 + 8;
        self.check(count.saturating_mul(SMALLEST_ENTRY_BYTES), "the tensor table")?;
        let mut names = HashSet::new();
        let mut tensors = Vec::new();
        for _ in 0..count {
            let tensor = self.tensor_info(alignment)?;
            if !names.insert(tensor.name.clone()) {
                return Err(self.error(format!("tensor `{}` appears twice", tensor.name)));
            }
            tensors.push(tensor);
        }
        self.place(&mut tensors, alignment)?;
        Ok(tensors)
    }

    /// One row of the table; its offset is still relative to the start of the data.
    fn tensor_info(&mut self, alignment: u64) -> Result<TensorInfo> {
        let name = self.string("a tensor name")?;
        let axes = self.u32("a tensor's axes")?;
        if axes > MAX_AXES {
            return Err(
                self.error(format!("tensor `{name}` has {axes} axes; at most {MAX_AXES} are possible"))
            );
        }
        let mut shape = (0..axes).map(|_| self.u64("a tensor's shape")).collect::<Result<Vec<_>>>()?;
        shape.reverse();
        let code = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let block_type = BlockType::from_code(code).map_err(|found| {
            self.error(format!("tensor `{name}` is stored as {found}"))
                .hint(format!("import reads {}", BlockType::supported_names()))
        })?;
        let elements = shape.iter().try_fold(1_u64, |product, &length| product.checked_mul(length));
        let columns = shape.last().copied().unwrap_or(1);
        let bytes = elements
            .filter(|_| columns % block_type.elements() as u64 == 0)
            .and_then(|elements| {
                (elements / block_type.elements() as u64).checked_mul(block_type.bytes() as u64)
            })
            .ok_or_else(|| {
                self.error(format!("tensor `{name}` has an impossible shape {shape:?} for {block_type}"))
            })?;
        if !offset.is_multiple_of(alignment) {
            return Err(
                self.error(format!("tensor `{name}` starts at {offset}, not a multiple of {alignment}"))
            );
        }
        let shape = shape.into_iter().map(|length| length as usize).collect();
        Ok(TensorInfo { name, shape, block_type, offset, bytes })
    }

    /// Makes offsets absolute and checks that the data lies inside the file and no two tensors share a byte.
    fn place(&self, tensors: &mut [TensorInfo], alignment: u64) -> Result<()> {
        let data_start = self.position.next_multiple_of(alignment);
        for tensor in tensors.iter_mut() {
            let end = data_start
                .checked_add(tensor.offset)
                .and_then(|start| start.checked_add(tensor.bytes))
                .filter(|&end| end <= self.length);
            if end.is_none() {
                return Err(Error::model(format!(
                    "the data ({} bytes at {data_start} + {}) ends past the file's {} bytes",
                    tensor.bytes, tensor.offset, self.length
                ))
                .at(format!("{}: tensor {}", self.label, tensor.name))
                .hint("the file is cut short or damaged; download it again"));
            }
            tensor.offset += data_start;
        }
        let mut by_offset: Vec<&TensorInfo> = tensors.iter().filter(|tensor| tensor.bytes > 0).collect();
        by_offset.sort_by_key(|tensor| tensor.offset);
        for pair in by_offset.windows(2) {
            if pair[0].offset + pair[0].bytes > pair[1].offset {
                return Err(Error::model(format!("its data overlaps that of `{}`", pair[0].name))
                    .at(format!("{}: tensor {}", self.label, pair[1].name)));
            }
        }
        Ok(())
    }
}
