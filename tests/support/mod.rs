//! What several test files share: fixtures and their tensors.
#![allow(dead_code)] // Each test file uses its part.

pub mod golden;

use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};

/// A folder or file under `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Tensors of a safetensors file, as float64.
pub struct Tensors {
    bytes: Vec<u8>,
}

impl Tensors {
    /// Reads `path` whole.
    pub fn open(path: PathBuf) -> Self {
        Self { bytes: std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())) }
    }

    /// Shape and elements of `name`.
    pub fn get(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let values = match view.dtype() {
            Dtype::F64 => {
                view.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
            }
            Dtype::F32 => view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            Dtype::I32 => view
                .data()
                .chunks_exact(4)
                .map(|b| i32::from_le_bytes(b.try_into().unwrap()).into())
                .collect(),
            other => panic!("{name}: {other:?}"),
        };
        (view.shape().to_vec(), values)
    }

    /// Every tensor's name, element type and shape, sorted, and the file's metadata.
    pub fn described(&self) -> (Vec<String>, Option<std::collections::HashMap<String, String>>) {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let mut tensors: Vec<String> =
            file.iter().map(|(name, view)| format!("{name} {:?} {:?}", view.dtype(), view.shape())).collect();
        tensors.sort();
        let (_, header) = SafeTensors::read_metadata(&self.bytes).unwrap();
        (tensors, header.metadata().clone())
    }

    /// Names of all tensors.
    pub fn names(&self) -> Vec<String> {
        SafeTensors::deserialize(&self.bytes)
            .unwrap()
            .names()
            .into_iter()
            .map(|name| name.to_string())
            .collect()
    }
}

/// Largest difference of two slices, with its place.
pub fn largest_difference(found: &[f64], expected: &[f64]) -> (f64, usize) {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(one, other)| (one - other).abs());
    differences.enumerate().fold((0.0, 0), |(worst, place), (index, difference)| {
        if difference > worst || difference.is_nan() { (difference, index) } else { (worst, place) }
    })
}
