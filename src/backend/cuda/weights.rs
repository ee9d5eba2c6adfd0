//! Frozen weights: from the memory map to the device, converted there where the compute type differs.

use super::CudaBackend;
use super::launch::Shape;
use super::memory::{CudaBuffer, CudaMatrix, HALF_BYTES, Region};
use crate::device::{Argument, Device};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::WeightTensor;

/// Rows must begin at 16 bytes: the kernels read eight halves at once.
pub(super) const WIDTH_MULTIPLE: usize = 8;

/// Bytes that are converted at once.
const STAGED_BYTES: usize = 64 << 20;

/// Refuses a width that the kernels cannot read eight at a time.
pub(super) fn check_width(what: &str, width: usize) -> Result<()> {
    if width > 0 && width.is_multiple_of(WIDTH_MULTIPLE) {
        return Ok(());
    }
    Err(Error::device(format!("{what} of {width}: the CUDA kernels need a multiple of {WIDTH_MULTIPLE}"))
        .hint("use `--device cpu`"))
}

impl<D: Device> CudaBackend<D> {
    /// The elements of `parts` in turn, in the compute type.
    pub(super) fn upload_weights(&self, parts: &[WeightTensor]) -> Result<CudaBuffer<D>> {
        let elements: usize = parts.iter().map(WeightTensor::element_count).sum();
        let region = Region::allocate(self.device(), elements * HALF_BYTES)?;
        let mut offset = 0;
        for part in parts {
            if part.dtype() == self.compute().dtype() {
                region.upload(self.device(), part.bytes(), offset)?;
            } else {
                self.upload_converted(part, &region, offset).map_err(|error| error.at(part.name()))?;
            }
            offset += part.element_count() * HALF_BYTES;
        }
        Ok(CudaBuffer { region })
    }

    fn upload_converted(&self, part: &WeightTensor, region: &Region<D>, mut offset: usize) -> Result<()> {
        let stored = part.dtype();
        let name = format!("convert_{stored}_to_{}", self.compute());
        let staged = Region::allocate(self.device(), part.bytes().len().min(STAGED_BYTES))?;
        for bytes in part.bytes().chunks(STAGED_BYTES) {
            staged.upload(self.device(), bytes, 0)?;
            let count = bytes.len() / stored.bytes();
            let target = region.at(offset, count * HALF_BYTES)?;
            let arguments = [staged.first(bytes.len())?, target, Argument::I64(count as i64)];
            // SAFETY: both stretches hold `count` elements.
            unsafe { self.kernels.launch(&name, self.stride_shape(count), &arguments)? };
            offset += count * HALF_BYTES;
        }
        Ok(())
    }

    /// A grid-stride loop over `count` elements.
    pub(super) fn stride_shape(&self, count: usize) -> Shape {
        let blocks_at_once = self.device().limits().multiprocessor_count as usize * 8;
        Shape::blocks(count.div_ceil(256).min(blocks_at_once), 256)
    }

    pub(super) fn make_matrix(&self, parts: &[WeightTensor]) -> Result<CudaMatrix<D>> {
        let columns = parts.first().and_then(|part| part.shape().get(1)).copied().unwrap_or(0);
        for part in parts {
            if part.shape().len() != 2 || part.shape()[1] != columns {
                let message = format!("shape {:?} beside rows of {columns} elements", part.shape());
                return Err(Error::internal(message).at(part.name()));
            }
            check_width("a row", columns).map_err(|error| error.at(part.name()))?;
        }
        let rows = parts.iter().map(|part| part.shape()[0]).sum();
        Ok(CudaMatrix { elements: self.upload_weights(parts)?, rows, columns })
    }

    /// The values of `floats` in the compute type: what the products read of adapters.
    pub(super) fn half_copy(&self, floats: &super::CudaFloats<D>) -> Result<CudaBuffer<D>> {
        let mut half = super::lock(&floats.half);
        if half.is_none() {
            let region = Region::allocate(self.device(), floats.elements() * HALF_BYTES)?;
            self.convert(floats, &region)?;
            *half = Some(region);
        }
        Ok(CudaBuffer { region: half.clone().expect("just made") })
    }

    /// A weight that is trained, in the compute type: that stretch of the parameters' copy.
    pub(super) fn trained_weight(
        &self,
        parameters: &super::CudaFloats<D>,
        offset: usize,
        elements: usize,
    ) -> Result<Argument> {
        if !offset.is_multiple_of(WIDTH_MULTIPLE) {
            return Err(Error::internal(format!("a trained weight at {offset}, where no vector begins")));
        }
        self.half_copy(parameters)?.at(offset, elements)
    }

    /// After the host wrote values: at once, since recorded work takes the copy as it is.
    pub(super) fn renew_half(&self, floats: &super::CudaFloats<D>) -> Result<()> {
        super::lock(&floats.half).as_ref().map_or(Ok(()), |half| self.convert(floats, half))
    }

    fn convert(&self, floats: &super::CudaFloats<D>, half: &Region<D>) -> Result<()> {
        let count = floats.elements();
        let name = format!("convert_{}_to_{}", DType::F32, self.compute());
        let target = half.first(count * HALF_BYTES)?;
        let arguments = [floats.first(count)?, target, Argument::I64(count as i64)];
        // SAFETY: both stretches hold `count` elements.
        unsafe { self.kernels.launch(&name, self.stride_shape(count), &arguments) }
    }
}
