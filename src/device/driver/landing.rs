//! Where copies to the host arrive, so that the host waits for the copy alone.

use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::Inner;
use super::pinned::Pinned;

/// Pinned memory that grows to the largest copy, made with the first.
#[derive(Default)]
pub struct DriverLanding {
    pinned: Option<Pinned>,
    /// Of the latest copy.
    bytes: usize,
}

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
        if self.pinned.as_ref().is_none_or(|pinned| pinned.capacity < bytes) {
            self.pinned = None;
            self.pinned = Some(Pinned::new(inner, bytes)?);
        }
        let pinned = self.pinned.as_mut().expect("just made");
        self.bytes = bytes;
        // SAFETY: the memory holds `capacity`; nobody looks at it before the event has passed.
        unsafe {
            result::memcpy_dtoh_async(pinned.first_mut(bytes), source, inner.stream)?;
            result::event::record(pinned.copied, inner.stream)
        }
    }

    /// Waits for the copy; no bytes where none was started.
    pub(super) fn wait(&self) -> Result<&[u8], DriverError> {
        let Some(pinned) = &self.pinned else { return Ok(&[]) };
        // SAFETY: the event is recorded behind the copy, which has written `bytes` when it has passed.
        unsafe {
            pinned.wait()?;
            Ok(pinned.first(self.bytes))
        }
    }
}
