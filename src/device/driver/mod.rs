//! An NVIDIA GPU through the CUDA driver, loaded at run time: the binary builds and starts without it.
//!
//! The only folder that names `cudarc`. Its functions panic where the driver library or a symbol is missing, so
//! `check_library` asks first.

mod graph;
mod landing;
mod launch;
mod library;
mod memory;
mod pinned;
mod staging;
mod survey;
mod tensor_map;
mod upload_buffer;

use std::collections::HashMap;
use std::ffi::CString;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction_attribute};

pub use graph::DriverGraph;
pub use landing::DriverLanding;
pub use memory::{DriverEvent, DriverMemory};
pub use survey::{GpuSummary, KernelBuild, Survey, kernel_build, survey};
pub use upload_buffer::DriverUploadBuffer;

use super::boxes::Values;
use super::{Device, Launch, Limits, check_range, check_room, nothing_started};
use crate::error::{Error, Result};
use launch::LastLaunch;
use library::{check_library, check_version, failed};
use staging::Staging;
use tensor_map::tensor_map;

/// The kernels that the build script compiled: `CUDA_VERSION`, `TARGETS` and `MODULES`.
mod compiled {
    include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));
}

/// What the oldest supported GPU, Ampere, calls its compute capability.
const OLDEST_COMPUTE_CAPABILITY: (u32, u32) = (8, 0);

/// True if the binary holds GPU kernels.
pub fn is_compiled_in() -> bool {
    !compiled::MODULES.is_empty()
}

/// A GPU, a stream for its work, and one for copies from the host beside it.
#[derive(Clone)]
pub struct Driver {
    inner: Arc<Inner>,
}

struct Inner {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    copy_stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<String, Function>>,
    /// The latest launch: a fault inside a kernel surfaces in a later call, whose error names it.
    last_launch: Mutex<LastLaunch>,
    staging: Mutex<Staging>,
    allocations: AtomicU64,
    is_recording: AtomicBool,
    name: String,
    limits: Limits,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

// SAFETY: CUDA handles may be used from any thread once the context is current there, which every method sees to.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Inner {}

fn check_capability(name: &str, limits: Limits) -> Result<()> {
    let (major, minor) = limits.compute_capability;
    if limits.compute_capability >= OLDEST_COMPUTE_CAPABILITY {
        return Ok(());
    }
    Err(Error::device(format!("{name} has compute capability {major}.{minor}; 8.0 (Ampere) is needed")))
}

impl Driver {
    /// Opens GPU `index` among those that `CUDA_VISIBLE_DEVICES` shows.
    pub fn new(index: u32) -> Result<Self> {
        if !is_compiled_in() {
            return Err(Error::device(
                "this build has no CUDA kernels: nvcc was not found when it was compiled",
            )
            .hint("build again with nvcc (scripts/get-nvcc gets it), or use `--device cpu`"));
        }
        check_library()?;
        check_version()?;
        result::init().map_err(|error| failed("start CUDA", error))?;
        let count = result::device::get_count().map_err(|error| failed("count the GPUs", error))?;
        let ordinal = i32::try_from(index).ok().filter(|&ordinal| ordinal < count).ok_or_else(|| {
            Error::device(format!("there is no GPU {index}: CUDA shows {count}"))
                .hint("they count from 0; CUDA_VISIBLE_DEVICES may hide some")
        })?;
        let device = result::device::get(ordinal).map_err(|error| failed("open the GPU", error))?;
        let name = result::device::get_name(device).map_err(|error| failed("read the GPU's name", error))?;
        let limits = read_limits(device).map_err(|error| failed("read the GPU's properties", error))?;
        check_capability(&name, limits)?;
        let inner = open(device, name, limits)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Free and total device memory in bytes.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        self.enter()?;
        result::mem_get_info().map_err(|error| failed("read the free memory", error))
    }

    /// Makes the context current on this thread.
    fn enter(&self) -> Result<()> {
        self.inner.enter().map_err(|error| failed("use the GPU", error))
    }

    /// An error of a call that may report an earlier launch's fault.
    fn failed_after_launch(&self, action: &str, error: DriverError) -> Error {
        let last = self.inner.last_launch.lock().unwrap_or_else(PoisonError::into_inner);
        let error = failed(action, error);
        match last.get() {
            Some(launch) => error.at(format!("after {launch}")),
            None => error,
        }
    }

    fn function(&self, name: &str) -> Result<Function> {
        let mut functions = self.inner.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = functions.get(name) {
            return Ok(*found);
        }
        let c_name = CString::new(name).map_err(|_| Error::internal("a kernel's name holds NUL"))?;
        let function = self
            .inner
            .modules
            .iter()
            // SAFETY: the modules are loaded as long as Inner lives.
            .find_map(|&module| unsafe { result::module::get_function(module, c_name.clone()) }.ok())
            .ok_or_else(|| Error::internal(format!("there is no kernel `{name}`")))?;
        allow_all_shared_memory(function, self.inner.limits)
            .map_err(|error| failed("prepare a kernel", error).at(name))?;
        functions.insert(name.to_owned(), Function(function));
        Ok(Function(function))
    }
}

impl Inner {
    fn enter(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the context is retained until Inner drops.
        unsafe { result::ctx::set_current(self.context) }
    }
}

fn read_limits(device: sys::CUdevice) -> std::result::Result<Limits, DriverError> {
    // SAFETY: the device handle comes from cuDeviceGet.
    let attribute =
        |which| unsafe { result::device::get_attribute(device, which) }.map(|value| value.max(0) as u32);
    Ok(Limits {
        compute_capability: (
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessor_count: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes_per_block: attribute(
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?,
        // SAFETY: as above.
        total_memory_bytes: unsafe { result::device::total_mem(device) }? as u64,
    })
}

/// Retains the primary context, loads every module and makes the streams.
fn open(device: sys::CUdevice, name: String, limits: Limits) -> Result<Inner> {
    // SAFETY: the device handle is valid; Inner's drop releases what was retained, also when a later step fails.
    let context = unsafe { result::primary_ctx::retain(device) }
        .map_err(|error| failed("make a CUDA context", error))?;
    let mut inner = Inner {
        device,
        context,
        stream: std::ptr::null_mut(),
        copy_stream: std::ptr::null_mut(),
        modules: Vec::new(),
        functions: Mutex::default(),
        last_launch: Mutex::default(),
        staging: Mutex::default(),
        allocations: AtomicU64::new(0),
        is_recording: AtomicBool::new(false),
        name,
        limits,
    };
    inner.enter().map_err(|error| failed("use the GPU", error))?;
    for stream in [&mut inner.stream, &mut inner.copy_stream] {
        *stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|error| failed("make a CUDA stream", error))?;
    }
    let modules =
        compiled::MODULES.iter().filter(|(_, is_for_hopper, _)| !is_for_hopper || limits.is_hopper());
    for (module_name, _, image) in modules {
        // SAFETY: the image is a whole fatbin written by nvcc.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }
            .map_err(|error| failed("load compiled kernels", error).at(*module_name))?;
        inner.modules.push(module);
    }
    Ok(inner)
}

/// Above 48 KiB a kernel must ask for dynamic shared memory: allow what the device has.
fn allow_all_shared_memory(
    function: sys::CUfunction,
    limits: Limits,
) -> std::result::Result<(), DriverError> {
    use CUfunction_attribute::{
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    };
    // SAFETY: the function comes from a loaded module.
    unsafe {
        let fixed = result::function::get_function_attribute(function, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        let dynamic = limits.shared_bytes_per_block as i32 - fixed;
        result::function::set_function_attribute(
            function,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            dynamic,
        )
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Errors are ignored: after a lost device nothing can be released, and there is nobody left to tell.
        // SAFETY: all handles are ours and used nowhere after this; the streams are idle before they go.
        unsafe {
            if self.enter().is_ok() {
                for stream in [self.copy_stream, self.stream].into_iter().filter(|stream| !stream.is_null()) {
                    let _ = result::stream::synchronize(stream);
                    let _ = result::stream::destroy(stream);
                }
                self.staging.get_mut().unwrap_or_else(PoisonError::into_inner).free();
                for &module in &self.modules {
                    let _ = result::module::unload(module);
                }
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Device for Driver {
    type Memory = DriverMemory;
    type Event = DriverEvent;
    type Graph = DriverGraph;
    type Landing = DriverLanding;
    type UploadBuffer = DriverUploadBuffer;
    const IS_REAL: bool = true;

    fn name(&self) -> String {
        self.inner.name.clone()
    }

    fn description(&self) -> String {
        let (major, minor) = self.inner.limits.compute_capability;
        let gibibytes = self.inner.limits.total_memory_bytes as f64 / (1u64 << 30) as f64;
        format!("{} (compute capability {major}.{minor}, {gibibytes:.0} GiB)", self.inner.name)
    }

    fn limits(&self) -> Limits {
        self.inner.limits
    }

    fn free_memory_bytes(&self) -> Result<Option<u64>> {
        Ok(Some(self.memory_info()?.0 as u64))
    }

    fn guards_allocations(&self) -> bool {
        false
    }

    fn allocation_count(&self) -> u64 {
        self.inner.allocations.load(Ordering::Relaxed)
    }

    fn allocate(&self, bytes: usize) -> Result<DriverMemory> {
        self.not_while_recording("allocate")?;
        self.inner.allocations.fetch_add(1, Ordering::Relaxed);
        self.enter()?;
        // The driver refuses zero bytes.
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_sync(bytes.max(16)) }.map_err(|error| {
            self.failed_after_launch(&format!("allocate {bytes} bytes of GPU memory"), error)
        })?;
        Ok(DriverMemory { inner: self.inner.clone(), address, bytes })
    }

    fn upload(&self, bytes: &[u8], memory: &DriverMemory, offset: usize) -> Result<()> {
        check_range(memory, offset, bytes.len())?;
        self.not_while_recording("take bytes from the host")?;
        self.enter()?;
        let mut staging = self.inner.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the range is inside the allocation, the context is current, and the stream is alive.
        unsafe { staging.copy(bytes, memory.address + offset as u64, self.inner.stream) }
            .map_err(|error| self.failed_after_launch("copy to the GPU", error))
    }

    fn allocate_upload_buffer(&self, bytes: usize) -> Result<DriverUploadBuffer> {
        DriverUploadBuffer::new(&self.inner, self.allocate(bytes)?).map_err(|error| {
            self.failed_after_launch(&format!("allocate {bytes} bytes of pinned memory"), error)
        })
    }

    fn start_upload(&self, bytes: &[u8], buffer: &mut DriverUploadBuffer) -> Result<()> {
        check_room(bytes.len(), buffer.capacity())?;
        self.not_while_recording("take bytes from the host")?;
        self.enter()?;
        // SAFETY: there is room, and the context is current.
        unsafe { buffer.start(bytes, &self.inner) }
            .map_err(|error| self.failed_after_launch("copy to the GPU", error))
    }

    fn finish_upload(
        &self,
        buffer: &mut DriverUploadBuffer,
        memory: &DriverMemory,
        offset: usize,
    ) -> Result<()> {
        let bytes = buffer.take_started().ok_or_else(nothing_started)?;
        check_range(memory, offset, bytes)?;
        self.not_while_recording("take bytes from the host")?;
        self.enter()?;
        // SAFETY: the bytes were started, the range is inside the allocation, and the context is current.
        unsafe { buffer.finish(bytes, memory.address + offset as u64, &self.inner) }
            .map_err(|error| self.failed_after_launch("copy inside the GPU", error))
    }

    fn download(&self, memory: &DriverMemory, offset: usize, into: &mut [u8]) -> Result<()> {
        check_range(memory, offset, into.len())?;
        self.not_while_recording("be read")?;
        self.enter()?;
        // SAFETY: as in upload.
        unsafe {
            result::memcpy_dtoh_async(into, memory.address + offset as u64, self.inner.stream)
                .and_then(|()| result::stream::synchronize(self.inner.stream))
        }
        .map_err(|error| self.failed_after_launch("copy from the GPU", error))
    }

    fn start_download(
        &self,
        memory: &DriverMemory,
        offset: usize,
        bytes: usize,
        landing: &mut DriverLanding,
    ) -> Result<()> {
        check_range(memory, offset, bytes)?;
        self.not_while_recording("be read")?;
        self.enter()?;
        // SAFETY: the range is inside the allocation, and the context is current.
        unsafe { landing.copy(&self.inner, memory.address + offset as u64, bytes) }
            .map_err(|error| self.failed_after_launch("copy from the GPU", error))
    }

    fn finish_download<'a>(&self, landing: &'a DriverLanding) -> Result<&'a [u8]> {
        self.enter()?;
        landing.wait().map_err(|error| self.failed_after_launch("copy from the GPU", error))
    }

    fn fill(&self, memory: &DriverMemory, range: Range<usize>, byte: u8) -> Result<()> {
        check_range(memory, range.start, range.len())?;
        self.enter()?;
        let address = memory.address + range.start as u64;
        // SAFETY: the range is inside the allocation; memory that is freed later waits for the stream.
        unsafe { result::memset_d8_async(address, byte, range.len(), self.inner.stream) }
            .map_err(|error| self.failed_after_launch("fill GPU memory", error))
    }

    fn copy(&self, from: &DriverMemory, range: Range<usize>, to: &DriverMemory, offset: usize) -> Result<()> {
        check_range(from, range.start, range.len())?;
        check_range(to, offset, range.len())?;
        self.enter()?;
        let (target, source) = (to.address + offset as u64, from.address + range.start as u64);
        // SAFETY: as in fill.
        unsafe { result::memcpy_dtod_async(target, source, range.len(), self.inner.stream) }
            .map_err(|error| self.failed_after_launch("copy inside the GPU", error))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.enter()?;
        let function = self.function(launch.kernel)?;
        let values = Values::new(launch.arguments, tensor_map)?;
        // SAFETY: the caller vouches for the addresses.
        unsafe { launch::start(function.0, launch, &mut values.pointers(), self.inner.stream) }
            .map_err(|error| failed("launch", error).at(launch.to_string()))?;
        self.inner.last_launch.lock().unwrap_or_else(PoisonError::into_inner).set(launch);
        Ok(())
    }

    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<DriverGraph> {
        self.record_graph(work)
    }

    unsafe fn replay(&self, graph: &DriverGraph) -> Result<()> {
        self.enter()?;
        // SAFETY: both are alive; the caller vouches for the addresses recorded.
        unsafe { result::graph::launch(graph.executable, self.inner.stream) }
            .map_err(|error| self.failed_after_launch("start recorded work", error))
    }

    fn record_event(&self) -> Result<DriverEvent> {
        self.enter()?;
        // Not CU_EVENT_DISABLE_TIMING: these events measure time.
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|error| failed("make a CUDA event", error))?;
        let event = DriverEvent { inner: self.inner.clone(), event };
        // SAFETY: both handles are alive.
        unsafe { result::event::record(event.event, self.inner.stream) }
            .map_err(|error| self.failed_after_launch("record a CUDA event", error))?;
        Ok(event)
    }

    fn milliseconds_between(&self, start: &DriverEvent, end: &DriverEvent) -> Result<f32> {
        self.enter()?;
        // SAFETY: both events are recorded and alive.
        unsafe {
            result::event::synchronize(end.event)
                .and_then(|()| result::event::elapsed(start.event, end.event))
        }
        .map_err(|error| self.failed_after_launch("read a CUDA event", error))
    }

    fn profile(&self, is_open: bool) -> Result<()> {
        // What was enqueued before belongs to the other side of the border.
        self.synchronize()?;
        // SAFETY: the context is current.
        unsafe { if is_open { sys::cuProfilerStart() } else { sys::cuProfilerStop() } }
            .result()
            .map_err(|error| failed("open or close the profiler's window", error))
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.inner.stream) }
            .map_err(|error| self.failed_after_launch("finish the GPU's work", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn fault_58_without_a_driver_the_error_says_what_to_do() {
        match Driver::new(0) {
            Ok(driver) => assert!(driver.limits().compute_capability >= OLDEST_COMPUTE_CAPABILITY),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Device);
                assert!(error.hint_text().is_some(), "{error}");
            }
        }
    }
}
