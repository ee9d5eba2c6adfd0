//! Safetensors files: header checked in full before any tensor is used, data memory-mapped.
//!
//! Layout: `u64` header length, JSON header `{name: {dtype, shape, data_offsets}}`, data. The crate `safetensors` keeps
//! the last of duplicate names and reports most faults without the tensor's name, so the header is read here; the tests
//! hold the two against each other.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ::safetensors::Dtype;
use serde::de::value::BorrowedStrDeserializer;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::mapped::MappedFile;
use crate::dtype::DType;
use crate::error::{Error, Result, shorten};
use crate::tensor::{SharedBytes, WeightTensor};

/// Bytes of the length field in front of the header.
const LENGTH_BYTES: usize = 8;
/// The longest header that the format allows.
const LONGEST_HEADER_BYTES: usize = 100_000_000;
/// More axes than any tensor has.
const MOST_AXES: usize = 64;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorEntry {
    /// Element type as stored, one of all that the format knows.
    pub dtype: Dtype,
    /// Axis lengths, outermost first.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub range: Range<usize>,
}

/// An open safetensors file: every entry lies inside the file, has the bytes that its shape needs, and shares them with
/// no other entry.
pub struct SafetensorsFile {
    file: Arc<MappedFile>,
    entries: HashMap<String, TensorEntry>,
}

impl SafetensorsFile {
    /// Maps the file and checks its header.
    ///
    /// # Errors
    /// Model errors that name the file and the tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let parsed = parse(file.bytes());
        // A file cut short while its header was read has a header of zeros: say what is really wrong.
        file.check_intact()?;
        let entries = parsed.map_err(|fault| fault.at_file(path))?;
        Ok(Self { file: Arc::new(file), entries })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The whole file's bytes.
    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    /// The entries by name, in no order.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &TensorEntry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// The entry of that name.
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.entries.get(name)
    }

    /// The stored bytes of an entry.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.entry(name).map(|entry| &self.file.bytes()[entry.range.clone()])
    }

    /// The tensor of that name, over the map.
    ///
    /// # Errors
    /// Model errors: there is none, or its element type is not f32, f16 or bf16.
    pub fn tensor(&self, name: &str) -> Result<WeightTensor> {
        let place = || format!("{}: {name}", self.path().display());
        let entry = self.entry(name).ok_or_else(|| Error::model("the tensor is missing").at(place()))?;
        let dtype = match entry.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::Bf16,
            other => {
                return Err(Error::model(format!(
                    "element type {other} is not supported, expected F32, F16 or BF16"
                ))
                .at(place())
                .hint("convert the weights to one of these"));
            }
        };
        let storage: SharedBytes = self.file.clone();
        Ok(WeightTensor::new(name, dtype, entry.shape.clone(), storage, entry.range.clone()))
    }
}

/// What is wrong with a header, and with which tensor.
#[derive(Debug)]
struct Fault {
    tensor: Option<String>,
    message: String,
    hint: Option<&'static str>,
}

impl Fault {
    fn file(message: impl Into<String>) -> Self {
        Self { tensor: None, message: message.into(), hint: None }
    }

    fn tensor(name: &str, message: impl Into<String>) -> Self {
        Self { tensor: Some(name.to_owned()), message: message.into(), hint: None }
    }

    fn hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }

    fn at_file(self, path: &Path) -> Error {
        // Names and JSON messages come from the file and may be of any length.
        let place = match self.tensor {
            Some(tensor) => format!("{}: {}", path.display(), shorten(&tensor, 200)),
            None => path.display().to_string(),
        };
        let error = Error::model(shorten(&self.message, 400)).at(place);
        match self.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

const CUT_SHORT: &str = "the download or copy was cut short: get the file again";

/// Reads and checks the header of a whole file.
fn parse(file: &[u8]) -> Result<HashMap<String, TensorEntry>, Fault> {
    const LFS_POINTER: &[u8] = b"version https://git-lfs";
    if file.starts_with(LFS_POINTER) {
        let found = "found a Git LFS pointer, expected weights";
        return Err(Fault::file(found).hint("get the file itself with `git lfs pull`"));
    }
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        let found =
            format!("found {} bytes, expected at least the 8 of a safetensors header length", file.len());
        return Err(Fault::file(found).hint(CUT_SHORT));
    };
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_HEADER_BYTES as u64 {
        let message = format!("header length {length}, expected at most {LONGEST_HEADER_BYTES}");
        return Err(Fault::file(message).hint("this is not a safetensors file"));
    }
    let length = length as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        let message =
            format!("a header of {length} bytes ends past the end of the file, {} bytes", file.len());
        return Err(Fault::file(message).hint(CUT_SHORT));
    };
    let header = std::str::from_utf8(header).map_err(|error| {
        Fault::file(format!("header is not UTF-8 at byte {}", LENGTH_BYTES + error.valid_up_to()))
    })?;
    let Header(raw_entries) = serde_json::from_str(header)
        .map_err(|error| Fault::file(format!("header is not a valid safetensors header: {error}")))?;

    let data_start = LENGTH_BYTES + length;
    let mut entries = HashMap::with_capacity(raw_entries.len());
    let mut ends = Vec::with_capacity(raw_entries.len());
    for (name, raw) in raw_entries {
        let entry = check_entry(&name, raw, data_start)?;
        ends.push((entry.range.start, entry.range.end, name.clone()));
        if entries.insert(name.clone(), entry).is_some() {
            return Err(Fault::tensor(&name, "the header has this name twice"));
        }
    }
    ends.sort_unstable();
    check_cover(&ends, data_start, data_start + data.len())?;
    Ok(entries)
}

fn check_entry(name: &str, raw: RawEntry<'_>, data_start: usize) -> Result<TensorEntry, Fault> {
    let dtype = Dtype::deserialize(BorrowedStrDeserializer::<serde::de::value::Error>::new(&raw.dtype))
        .map_err(|_| Fault::tensor(name, format!("unknown element type \"{}\"", raw.dtype)))?;
    let [begin, end] = raw.data_offsets;
    if begin > end {
        return Err(Fault::tensor(name, format!("data offsets {begin}..{end} are reversed")));
    }
    if raw.shape.len() > MOST_AXES {
        return Err(Fault::tensor(name, format!("{} axes, expected at most {MOST_AXES}", raw.shape.len())));
    }
    let overflow = || Fault::tensor(name, format!("the product of shape {:?} overflows", raw.shape));
    let bits = raw
        .shape
        .iter()
        .try_fold(1_u64, |product, &length| product.checked_mul(length))
        .and_then(|elements| elements.checked_mul(dtype.bitsize() as u64))
        .ok_or_else(overflow)?;
    if bits != (end - begin).saturating_mul(8) {
        return Err(Fault::tensor(
            name,
            format!(
                "{dtype} of shape {:?} needs {} bytes, found {}",
                raw.shape,
                bits.div_ceil(8),
                end - begin
            ),
        ));
    }
    let place = |offset: u64| usize::try_from(offset).ok().and_then(|offset| offset.checked_add(data_start));
    let shape = raw.shape.iter().map(|&length| usize::try_from(length).ok()).collect::<Option<Vec<_>>>();
    match (place(begin), place(end), shape) {
        (Some(start), Some(end), Some(shape)) => Ok(TensorEntry { dtype, shape, range: start..end }),
        _ => Err(Fault::tensor(name, format!("data offsets {begin}..{end} overflow"))),
    }
}

/// Entries, sorted by place, must cover the data without gap or overlap up to the end of the file.
fn check_cover(entries: &[(usize, usize, String)], data_start: usize, file_end: usize) -> Result<(), Fault> {
    let mut covered = data_start;
    let mut before = "the header";
    for (start, end, name) in entries {
        match start.cmp(&covered) {
            std::cmp::Ordering::Less => {
                let message = format!(
                    "its data begins at byte {start}, inside that of {before}, which ends at {covered}"
                );
                return Err(Fault::tensor(name, message));
            }
            std::cmp::Ordering::Greater => {
                let message = format!(
                    "its data begins at byte {start}, leaving a gap after {before}, which ends at {covered}"
                );
                return Err(Fault::tensor(name, message));
            }
            std::cmp::Ordering::Equal => {}
        }
        if *end > file_end {
            let message = format!("its data ends at byte {end}, past the end of the file, {file_end} bytes");
            return Err(Fault::tensor(name, message).hint(CUT_SHORT));
        }
        (covered, before) = (*end, name);
    }
    if covered < file_end {
        let message = format!("{} bytes follow the last tensor's data, expected none", file_end - covered);
        return Err(Fault::file(message));
    }
    Ok(())
}

/// The header's entries in file order, duplicates kept.
struct Header<'a>(Vec<(String, RawEntry<'a>)>);

#[derive(serde::Deserialize)]
struct RawEntry<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de: 'a, 'a> Deserialize<'de> for Header<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                let mut metadata_seen = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut metadata_seen, true) {
                            return Err(A::Error::custom("`__metadata__` is there twice"));
                        }
                        map.next_value::<HashMap<String, IgnoredAny>>()?;
                        continue;
                    }
                    let entry = map
                        .next_value()
                        .map_err(|error| A::Error::custom(format!("tensor `{name}`: {error}")))?;
                    entries.push((name, entry));
                }
                Ok(Header(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}
