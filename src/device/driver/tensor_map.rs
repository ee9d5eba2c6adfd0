//! Tensor maps, encoded by the driver.

use std::ffi::c_void;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};

use super::library::failed;
use crate::device::{BOX_COLUMNS, Boxes};
use crate::error::Result;

/// The map of `boxes` for a launch.
pub(super) fn tensor_map(boxes: &Boxes) -> Result<CUtensorMap> {
    let mut map = CUtensorMap { opaque: [0; 16] };
    // The innermost dimension first; its stride is the element's size.
    let extents = [boxes.columns as u64, boxes.rows as u64];
    let strides = [boxes.row_bytes()];
    let box_extents = [BOX_COLUMNS as u32, boxes.box_rows];
    let steps = [1u32; 2];
    // SAFETY: map is writable and aligned; the arrays are as long as the two dimensions say. The driver checks the numbers.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            // Bits are copied: the type would matter only for another filling than zeros.
            CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            extents.len() as u32,
            boxes.address as *mut c_void,
            extents.as_ptr(),
            strides.as_ptr(),
            box_extents.as_ptr(),
            steps.as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(|error| failed("encode a tensor map", error).at(boxes.to_string()))?;
    Ok(map)
}
