//! Named tensors on the host: frozen weights inside a memory-mapped file, and small owned f32 ones.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::dtype::DType;

/// Bytes that outlive every tensor cut from them: a memory map, or a plain vector.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A frozen tensor: row-major, little-endian elements inside shared bytes. Cloning is cheap.
#[derive(Clone)]
pub struct WeightTensor {
    name: Arc<str>,
    dtype: DType,
    shape: Vec<usize>,
    storage: SharedBytes,
    range: Range<usize>,
}

impl WeightTensor {
    /// A tensor over `storage[range]`.
    ///
    /// # Panics
    /// When the range is outside the storage or its length is not `shape × dtype`; files are validated before.
    pub fn new(
        name: &str,
        dtype: DType,
        shape: Vec<usize>,
        storage: SharedBytes,
        range: Range<usize>,
    ) -> Self {
        let elements: usize = shape.iter().product();
        assert_eq!(range.len(), elements * dtype.bytes(), "{name}: bytes of shape {shape:?}");
        assert!(range.end <= (*storage).as_ref().len(), "{name}: range inside the storage");
        Self { name: name.into(), dtype, shape, storage, range }
    }

    /// An owned f32 tensor, for tests and for values made in memory.
    pub fn from_f32(name: &str, shape: Vec<usize>, values: &[f32]) -> Self {
        let bytes: Vec<u8> = bytemuck::cast_slice(values).to_vec();
        let range = 0..bytes.len();
        Self::new(name, DType::F32, shape, Arc::new(bytes), range)
    }

    /// The tensor's full name in its file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Element type as stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Axis lengths, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn element_count(&self) -> usize {
        self.shape.iter().product()
    }

    /// The stored bytes. Alignment is the file's: as little as one byte.
    pub fn bytes(&self) -> &[u8] {
        &(*self.storage).as_ref()[self.range.clone()]
    }

    /// All elements converted to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.bytes();
        match self.dtype {
            DType::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            DType::F16 => {
                bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            DType::Bf16 => {
                bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
        }
    }
}

impl fmt::Debug for WeightTensor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {:?}", self.name, self.dtype, self.shape)
    }
}

/// A small owned f32 tensor with its name: adapter parameters and their gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Full name, as in the adapter file.
    pub name: String,
    /// Axis lengths, outermost first.
    pub shape: Vec<usize>,
    /// Row-major elements.
    pub values: Vec<f32>,
}
