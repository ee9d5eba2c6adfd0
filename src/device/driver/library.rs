//! The driver library: whether it is there and new enough, and our words for its errors.

use std::ffi::{CStr, c_void};

use cudarc::driver::result::DriverError;
use cudarc::driver::sys;

use super::compiled;
use crate::error::{Error, Result};

/// Every driver function used below (cudarc looks them up one by one, and panics).
const SYMBOLS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamDestroy_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuModuleUnload",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemGetInfo_v2",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuLaunchKernelEx",
    "cuTensorMapEncodeTiled",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuProfilerStart",
    "cuProfilerStop",
    "cuGetErrorName",
    "cuGetErrorString",
];

/// Faults 58: no driver library, or one that lacks what is needed.
pub(super) fn check_library() -> Result<()> {
    // SAFETY: loading libcuda runs its initialisers, as any CUDA program does.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::device("no NVIDIA driver: libcuda.so.1 cannot be loaded")
            .hint("install the NVIDIA driver, or use `--device cpu`"));
    }
    for symbol in SYMBOLS {
        // SAFETY: the library is there; the symbol is only looked up, not called.
        let found = unsafe { sys::culib().get::<*const c_void>(symbol.as_bytes()).is_ok() };
        if !found {
            return Err(Error::device(format!("the NVIDIA driver library has no `{symbol}`")).hint(
                "it is a stub or too old: install a current driver, and keep stubs off LD_LIBRARY_PATH",
            ));
        }
    }
    Ok(())
}

/// "13.0" for 13000.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The newest CUDA that the driver supports.
pub(super) fn supported_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one int; needs no initialisation.
    unsafe { sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| failed("read the driver's version", error))?;
    Ok(version)
}

pub(super) fn check_version() -> Result<()> {
    let version = supported_version()?;
    if version >= compiled::CUDA_VERSION {
        return Ok(());
    }
    let (found, wanted) = (version_text(version), version_text(compiled::CUDA_VERSION));
    Err(Error::device(format!("the NVIDIA driver supports CUDA {found}, and this build needs {wanted}"))
        .hint("install a newer driver, or build with an older nvcc"))
}

/// Our words for a driver's error.
pub(super) fn failed(action: &str, error: DriverError) -> Error {
    // SAFETY of the reads: both functions return static strings.
    let text = |found: std::result::Result<&CStr, DriverError>| {
        found.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    let message = format!("cannot {action}: {} ({})", text(error.error_string()), text(error.error_name()));
    match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Error::device(message).hint("use a smaller batch or a larger GPU")
        }
        sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            Error::device(message).hint("check nvidia-smi and CUDA_VISIBLE_DEVICES")
        }
        _ => Error::device(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_people_write_them() {
        assert_eq!(version_text(13000), "13.0");
        assert_eq!(version_text(12080), "12.8");
    }
}
