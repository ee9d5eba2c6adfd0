//! Where copies to the host arrive: pinned memory, and the event behind the copy, so that the host waits for the copy alone.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::Inner;

/// Pinned memory that grows to the largest copy, made with the first.
#[derive(Default)]
pub struct DriverLanding(Option<Pinned>);

struct Pinned {
    inner: Arc<Inner>,
    host: *mut c_void,
    capacity: usize,
    bytes: usize,
    copied: sys::CUevent,
}

// SAFETY: pinned memory and events may be used from any thread with the context current.
unsafe impl Send for Pinned {}
// SAFETY: as above; it is written through exclusive references alone.
unsafe impl Sync for Pinned {}

impl DriverLanding {
    /// Starts a copy in the order of the stream.
    ///
    /// # Safety
    /// The context is current, and `bytes` from `source` on are memory of the device.
    pub(super) unsafe fn copy(
        &mut self,
        inner: &Arc<Inner>,
        source: sys::CUdeviceptr,
        bytes: usize,
    ) -> Result<(), DriverError> {
        if self.0.as_ref().is_none_or(|pinned| pinned.capacity < bytes) {
            self.0 = None;
            self.0 = Some(Pinned::new(inner, bytes)?);
        }
        let pinned = self.0.as_mut().expect("just made");
        pinned.bytes = bytes;
        // SAFETY: the memory holds `capacity`; nobody looks at it before the event has passed.
        unsafe {
            let target = std::slice::from_raw_parts_mut(pinned.host.cast::<u8>(), bytes);
            result::memcpy_dtoh_async(target, source, inner.stream)?;
            result::event::record(pinned.copied, inner.stream)
        }
    }

    /// Waits for the copy; no bytes where none was started.
    pub(super) fn wait(&self) -> Result<&[u8], DriverError> {
        let Some(pinned) = &self.0 else { return Ok(&[]) };
        // SAFETY: the event is recorded behind the copy, which has written `bytes` when it has passed.
        unsafe {
            result::event::synchronize(pinned.copied)?;
            Ok(std::slice::from_raw_parts(pinned.host.cast(), pinned.bytes))
        }
    }
}

impl Pinned {
    fn new(inner: &Arc<Inner>, capacity: usize) -> Result<Self, DriverError> {
        let copied = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        let mut pinned = Self { inner: Arc::clone(inner), host: ptr::null_mut(), capacity, bytes: 0, copied };
        // SAFETY: the context is current.
        pinned.host = unsafe { result::malloc_host(capacity.max(16), 0) }?;
        Ok(pinned)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: both are ours and used nowhere after this; a copy under way is waited for.
        unsafe {
            if self.inner.enter().is_ok() {
                let _ = result::event::synchronize(self.copied);
                let _ = result::event::destroy(self.copied);
                if !self.host.is_null() {
                    let _ = result::free_host(self.host);
                }
            }
        }
    }
}
