//! The weights of the folder that import writes.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{Read, Seek};

use safetensors::tensor::{Dtype, View};

use super::architecture::PlannedTensor;
use super::gguf::Gguf;
use crate::checkpoint::model_folder::{NewFolder, encode, fits, stored_type};
use crate::dtype::DType;
use crate::error::{Error, Result};

const WEIGHTS: &str = "model.safetensors";
/// Everything that import writes, and so everything it may replace.
const FILES: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    WEIGHTS,
];

/// Whether import writes a file of this name.
pub(super) fn is_ours(name: &str) -> bool {
    FILES.contains(&name)
}

/// Writes the weights one tensor at a time; `written` hears each name and its number of elements.
pub(super) fn write_weights<R: Read + Seek>(
    folder: &NewFolder,
    gguf: &Gguf<R>,
    tensors: &[PlannedTensor<'_>],
    dtype: DType,
    written: &dyn Fn(&str, usize),
) -> Result<()> {
    let failure = RefCell::new(None);
    let views = tensors
        .iter()
        .map(|tensor| (tensor.name.as_str(), LazyTensor { gguf, tensor, dtype, failure: &failure, written }));
    folder.write_tensors(WEIGHTS, views, &failure)
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
        stored_type(self.dtype)
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
