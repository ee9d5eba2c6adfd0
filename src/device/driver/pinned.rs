//! Host memory that the GPU copies from and to by itself.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::Inner;

/// Pinned memory, and the event behind the copy that last used it: the bytes are the host's again when it has passed.
pub(super) struct Pinned {
    inner: Arc<Inner>,
    host: *mut c_void,
    pub capacity: usize,
    pub copied: sys::CUevent,
}

// SAFETY: pinned memory and events may be used from any thread with the context current.
unsafe impl Send for Pinned {}
// SAFETY: as above; it is written through exclusive references alone.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// The context is current.
    pub fn new(inner: &Arc<Inner>, capacity: usize) -> Result<Self, DriverError> {
        let copied = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        let mut pinned = Self { inner: Arc::clone(inner), host: ptr::null_mut(), capacity, copied };
        // Flags 0: write-combined memory, cudarc's default, is slow to read back and gains nothing here.
        // SAFETY: the context is current.
        pinned.host = unsafe { result::malloc_host(capacity.max(16), 0) }?;
        Ok(pinned)
    }

    /// The first `bytes`.
    ///
    /// # Safety
    /// There is room for them, they were written, and no copy to them is under way.
    pub unsafe fn first(&self, bytes: usize) -> &[u8] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(self.host.cast(), bytes) }
    }

    /// The same, to be written.
    ///
    /// # Safety
    /// There is room for them, and nobody reads them before their copy is done.
    pub unsafe fn first_mut(&mut self, bytes: usize) -> &mut [u8] {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts_mut(self.host.cast(), bytes) }
    }

    /// Waits for the copy that last used it.
    ///
    /// # Safety
    /// The context is current.
    pub unsafe fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event is ours.
        unsafe { result::event::synchronize(self.copied) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: both are ours and used nowhere after this; a copy under way is waited for.
        unsafe {
            if self.inner.enter().is_ok() {
                let _ = self.wait();
                let _ = result::event::destroy(self.copied);
                if !self.host.is_null() {
                    let _ = result::free_host(self.host);
                }
            }
        }
    }
}
