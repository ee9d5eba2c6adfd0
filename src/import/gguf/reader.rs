//! Header, metadata and tensor table: a cursor that never reads or allocates past the end of the file.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufReader, Read};

use super::TensorInfo;
use super::value::{ARRAY, STRING, ScalarType, Scalars, Value};
use crate::error::{Error, Result};
use crate::import::dequantize::BlockType;

/// A file names at most this many axes for a tensor.
const MAX_AXES: u32 = 4;
/// Tensor data starts at multiples of this, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;

/// The cursor.
pub(super) struct Reader<'a, R> {
    source: BufReader<R>,
    position: u64,
    length: u64,
    label: &'a str,
}

impl<'a, R: Read> Reader<'a, R> {
    /// A cursor at the start of a file of `length` bytes, which errors call `label`.
    pub fn new(source: R, length: u64, label: &'a str) -> Self {
        Self { source: BufReader::new(source), position: 0, length, label }
    }

    /// The metadata and the tensor table.
    pub fn read(mut self) -> Result<(BTreeMap<String, Value>, Vec<TensorInfo>)> {
        let (tensor_count, metadata_count) = self.header()?;
        let metadata = self.metadata(metadata_count)?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(value)) => u64::try_from(*value)
                .ok()
                .filter(|value| value.is_power_of_two() && *value <= 1 << 30)
                .ok_or_else(|| self.error(format!("general.alignment is {value}, not a power of two")))?,
            Some(other) => {
                return Err(self.error(format!("general.alignment is {}, not an integer", other.kind())));
            }
        };
        let tensors = self.tensor_table(tensor_count, alignment)?;
        Ok((metadata, tensors))
    }

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
