//! What lies on the device: stretches of memory, and the tensors cut from them.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::CudaBackend;
use crate::device::{Argument, Device, Memory};
use crate::error::{Error, Result};

/// Bytes of an f16 or bf16.
pub(super) const HALF_BYTES: usize = 2;
/// Bytes of an f32.
pub(super) const FLOAT_BYTES: usize = 4;

/// A stretch of device memory. Clones name the same bytes.
pub struct Region<D: Device> {
    memory: Arc<D::Memory>,
    range: Range<usize>,
}

impl<D: Device> Clone for Region<D> {
    fn clone(&self) -> Self {
        Self { memory: Arc::clone(&self.memory), range: self.range.clone() }
    }
}

impl<D: Device> Region<D> {
    /// New memory of its own.
    pub fn allocate(device: &D, bytes: usize) -> Result<Self> {
        Ok(Self { memory: Arc::new(device.allocate(bytes)?), range: 0..bytes })
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    /// `bytes` from byte `offset` on.
    ///
    /// # Errors
    /// They leave the stretch: a bug of the caller.
    pub fn part(&self, offset: usize, bytes: usize) -> Result<Self> {
        let start = self.range.start + self.check(offset, bytes)?;
        Ok(Self { memory: Arc::clone(&self.memory), range: start..start + bytes })
    }

    /// Byte `offset` as a kernel's argument, of which `bytes` will be used.
    ///
    /// # Errors
    /// As [`part`](Self::part).
    pub fn at(&self, offset: usize, bytes: usize) -> Result<Argument> {
        let offset = self.check(offset, bytes)?;
        Ok(Argument::Address(self.memory.address() + (self.range.start + offset) as u64))
    }

    /// The first `bytes` as a kernel's argument.
    ///
    /// # Errors
    /// As [`part`](Self::part).
    pub fn first(&self, bytes: usize) -> Result<Argument> {
        self.at(0, bytes)
    }

    fn check(&self, offset: usize, bytes: usize) -> Result<usize> {
        if offset.checked_add(bytes).is_some_and(|end| end <= self.bytes()) {
            return Ok(offset);
        }
        let message = format!("{bytes} bytes at byte {offset} of device memory of {}", self.bytes());
        Err(Error::internal(message))
    }

    /// Copies `bytes` to byte `offset`.
    pub fn upload(&self, device: &D, bytes: &[u8], offset: usize) -> Result<()> {
        let offset = self.check(offset, bytes.len())?;
        device.upload(bytes, &self.memory, self.range.start + offset)
    }

    /// Makes the work wait for what was started to arrive in `buffer`, and moves it to the beginning.
    pub fn finish_upload(&self, device: &D, buffer: &mut D::UploadBuffer) -> Result<()> {
        device.finish_upload(buffer, &self.memory, self.range.start)
    }

    /// Waits for the work so far and copies from the beginning.
    pub fn download(&self, device: &D, into: &mut [u8]) -> Result<()> {
        self.check(0, into.len())?;
        device.download(&self.memory, self.range.start, into)
    }

    /// Starts to copy the first `bytes`.
    pub fn start_download(&self, device: &D, bytes: usize, landing: &mut D::Landing) -> Result<()> {
        self.check(0, bytes)?;
        device.start_download(&self.memory, self.range.start, bytes, landing)
    }

    /// Sets the first `bytes` to zero.
    pub fn zero(&self, device: &D, bytes: usize) -> Result<()> {
        self.check(0, bytes)?;
        device.fill(&self.memory, self.range.start..self.range.start + bytes, 0)
    }
}

/// Copies the first `into.len()` bytes that arrived.
pub(super) fn take(arrived: &[u8], into: &mut [u8]) -> Result<()> {
    let first = arrived.get(..into.len()).ok_or_else(|| {
        Error::internal(format!("{} bytes were read, {} are wanted", arrived.len(), into.len()))
    })?;
    into.copy_from_slice(first);
    Ok(())
}

/// Activations, or frozen weights, in the compute type.
pub struct CudaBuffer<D: Device> {
    pub(super) region: Region<D>,
}

impl<D: Device> CudaBuffer<D> {
    /// The first `elements` as a kernel's argument.
    pub(super) fn first(&self, elements: usize) -> Result<Argument> {
        self.region.first(elements * HALF_BYTES)
    }

    /// `elements` from element `start` on.
    pub(super) fn at(&self, start: usize, elements: usize) -> Result<Argument> {
        self.region.at(start * HALF_BYTES, elements * HALF_BYTES)
    }
}

/// A frozen matrix in the compute type.
pub struct CudaMatrix<D: Device> {
    pub(super) elements: CudaBuffer<D>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl<D: Device> CudaMatrix<D> {
    pub(super) fn bytes(&self) -> usize {
        self.rows * self.columns * HALF_BYTES
    }

    /// The whole matrix as a kernel's argument.
    ///
    /// # Errors
    /// Another shape: a bug of the caller.
    pub(super) fn shaped(&self, rows: usize, columns: usize) -> Result<Argument> {
        if (self.rows, self.columns) != (rows, columns) {
            let message =
                format!("a matrix [{}, {}] where [{rows}, {columns}] is needed", self.rows, self.columns);
            return Err(Error::internal(message));
        }
        self.elements.first(rows * columns)
    }
}

/// f32 values. Adapters also have a copy in the compute type, which the products read.
pub struct CudaFloats<D: Device> {
    pub(super) region: Region<D>,
    /// The copy, made when it is first asked for and up to date from then on.
    pub(super) half: Mutex<Option<Region<D>>>,
}

impl<D: Device> CudaFloats<D> {
    pub(super) fn new(region: Region<D>) -> Self {
        Self { region, half: Mutex::new(None) }
    }

    /// The first `elements` as a kernel's argument.
    pub(super) fn first(&self, elements: usize) -> Result<Argument> {
        self.region.first(elements * FLOAT_BYTES)
    }

    /// `elements` from element `start` on.
    pub(super) fn at(&self, start: usize, elements: usize) -> Result<Argument> {
        self.region.at(start * FLOAT_BYTES, elements * FLOAT_BYTES)
    }

    /// Values that fit.
    pub(super) fn elements(&self) -> usize {
        self.region.bytes() / FLOAT_BYTES
    }
}

impl<D: Device> CudaBackend<D> {
    pub(super) fn zero(&self, buffer: &CudaBuffer<D>, elements: usize) -> Result<()> {
        buffer.region.zero(self.device(), elements * HALF_BYTES)
    }

    /// The first `into.len()` elements of the compute type, as f32.
    pub(super) fn download_halves(&self, region: &Region<D>, into: &mut [f32]) -> Result<()> {
        let mut bytes = vec![0; into.len() * HALF_BYTES];
        region.download(self.device(), &mut bytes)?;
        for (value, bytes) in into.iter_mut().zip(bytes.chunks_exact(HALF_BYTES)) {
            *value = self.compute().decode([bytes[0], bytes[1]]);
        }
        Ok(())
    }
}

/// A region that grows to the largest size asked for and is then kept; its contents do not survive growth.
pub(super) struct Growing<D: Device>(Option<Region<D>>);

impl<D: Device> Default for Growing<D> {
    fn default() -> Self {
        Self(None)
    }
}

impl<D: Device> Growing<D> {
    /// What there is.
    pub fn region(&self) -> Option<&Region<D>> {
        self.0.as_ref()
    }

    /// At least `bytes`.
    pub fn reserve(&mut self, device: &D, bytes: usize) -> Result<&Region<D>> {
        if self.0.as_ref().is_none_or(|region| region.bytes() < bytes) {
            // The old one first: both may not fit.
            self.0 = None;
            self.0 = Some(Region::allocate(device, bytes)?);
        }
        Ok(self.0.as_ref().expect("just made"))
    }
}
