//! Frozen matrices in place, as stored, and the lookup of embeddings.

use std::sync::Arc;

use half::slice::HalfFloatSliceExt;

use super::matmul::{Elements, MAX_PARTS, Weight};
use super::memory::AlignedFloats;
use super::rows::{Place, places};
use super::{CpuBackend, CpuBatch};
use crate::backend::{Embedding, check_id};
use crate::error::{Error, Result};
use crate::tensor::WeightTensor;

/// A frozen matrix `[rows, columns]`: its parts' rows in turn, read from the memory map where they are aligned.
pub struct CpuMatrix {
    parts: Vec<WeightTensor>,
    rows: usize,
    columns: usize,
}

/// Bytes that start at a cache line.
struct AlignedBytes {
    floats: AlignedFloats,
    length: usize,
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.floats)[..self.length]
    }
}

/// The tensor itself, or a copy where its bytes are not aligned to its elements.
fn aligned(tensor: &WeightTensor) -> WeightTensor {
    if Elements::of(tensor).is_some() {
        return tensor.clone();
    }
    let length = tensor.bytes().len();
    let mut floats = AlignedFloats::zeroed(length.div_ceil(4));
    bytemuck::cast_slice_mut(&mut floats)[..length].copy_from_slice(tensor.bytes());
    let storage = Arc::new(AlignedBytes { floats, length });
    WeightTensor::new(tensor.name(), tensor.dtype(), tensor.shape().to_vec(), storage, 0..length)
}

impl CpuMatrix {
    /// The rows of `parts` in turn.
    ///
    /// # Errors
    /// Parts that are no matrices of one width: a bug of the caller.
    pub fn new(parts: &[WeightTensor]) -> Result<Self> {
        let columns = parts.first().and_then(|part| part.shape().get(1)).copied().unwrap_or(0);
        if columns == 0 || parts.len() > MAX_PARTS {
            let error =
                format!("a matrix of {} parts with {columns} columns; 1 to {MAX_PARTS} parts", parts.len());
            return Err(Error::internal(error));
        }
        if let Some(part) = parts.iter().find(|part| part.shape().len() != 2 || part.shape()[1] != columns) {
            let error = format!("shape {:?} beside rows of {columns} elements", part.shape());
            return Err(Error::internal(error).at(part.name()));
        }
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        Ok(Self { parts: parts.iter().map(aligned).collect(), rows, columns })
    }

    /// Number of rows.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// As it is stored.
    pub(super) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes().len()).sum()
    }

    /// For the products.
    pub fn weight(&self) -> Weight<'_> {
        Weight::new(self.columns, self.elements())
    }

    fn elements(&self) -> impl Iterator<Item = Elements<'_>> {
        self.parts.iter().map(|part| Elements::of(part).expect("parts are aligned when the matrix is made"))
    }

    /// Row `row` as f32.
    pub(super) fn read_row(&self, mut row: usize, into: &mut [f32]) {
        for elements in self.elements() {
            let rows = elements.len() / self.columns;
            if row < rows {
                let part = row * self.columns..(row + 1) * self.columns;
                return match elements {
                    Elements::F32(values) => into.copy_from_slice(&values[part]),
                    Elements::F16(values) => values[part].convert_to_f32_slice(into),
                    Elements::Bf16(values) => values[part].convert_to_f32_slice(into),
                };
            }
            row -= rows;
        }
        unreachable!("rows are checked against the matrix");
    }
}

impl CpuBackend {
    pub(super) fn embed(
        &self,
        batch: &CpuBatch,
        embedding: Embedding<'_, Self>,
        x: &mut [f32],
    ) -> Result<()> {
        let Embedding { table, width, scale } = embedding;
        check_ids("token", &batch.token_ids, table.rows())?;
        self.threads.for_row_blocks(&mut x[..batch.token_count() * width], width, |first, x| {
            for (&id, x) in batch.token_ids[first..].iter().zip(x.chunks_exact_mut(width)) {
                table.read_row(id as usize, x);
                if scale != 1.0 {
                    x.iter_mut().for_each(|x| *x *= scale);
                }
            }
            if let Some(noise) = batch.settings.embedding_noise {
                for (Place { sample, position, length }, x) in
                    places(batch, first).zip(x.chunks_exact_mut(width))
                {
                    noise.add(sample, position, length, x);
                }
            }
        });
        Ok(())
    }
}

/// Refuses ids beyond the rows of a table.
pub(super) fn check_ids<'a>(kind: &str, ids: impl IntoIterator<Item = &'a u32>, rows: usize) -> Result<()> {
    match ids.into_iter().enumerate().find(|(_, id)| **id as usize >= rows) {
        None => Ok(()),
        Some((place, &id)) => check_id(kind, id, place, rows),
    }
}
