//! Copies from the host beside the work: on a stream of their own into memory of their own, from where the work takes them.
//!
//! Two events keep the streams in order, on the device alone. The work waits for the copy's before it reads what arrived; the
//! next copy waits for the work's before it writes over that.

use std::sync::Arc;

use cudarc::driver::result::stream::wait_event;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::Inner;
use super::memory::{DriverEvent, DriverMemory};
use super::pinned::Pinned;

/// Memory of the host and as much of the device, which a copy passes through on its way.
pub struct DriverUploadBuffer {
    pinned: Pinned,
    arrived: DriverMemory,
    /// Behind the work that last read what arrived.
    taken: DriverEvent,
    /// Of the copy that was started and not finished.
    started: Option<usize>,
}

const NO_FLAGS: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

impl DriverUploadBuffer {
    /// Buffers as large as `arrived`, memory of the device. The context is current.
    pub(super) fn new(inner: &Arc<Inner>, arrived: DriverMemory) -> Result<Self, DriverError> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        let taken = DriverEvent { inner: Arc::clone(inner), event };
        Ok(Self { pinned: Pinned::new(inner, arrived.bytes)?, arrived, taken, started: None })
    }

    pub(super) fn capacity(&self) -> usize {
        self.arrived.bytes
    }

    /// # Safety
    /// The context is current, and there is room for the bytes.
    pub(super) unsafe fn start(&mut self, bytes: &[u8], inner: &Inner) -> Result<(), DriverError> {
        // SAFETY: the pinned bytes are written when the copy before has read them; the copy's event is recorded behind it. An
        // event that was never recorded has passed.
        unsafe {
            self.pinned.wait()?;
            self.pinned.first_mut(bytes.len()).copy_from_slice(bytes);
            wait_event(inner.copy_stream, self.taken.event, NO_FLAGS)?;
            let source = self.pinned.first(bytes.len());
            result::memcpy_htod_async(self.arrived.address, source, inner.copy_stream)?;
            result::event::record(self.pinned.copied, inner.copy_stream)?;
        }
        self.started = Some(bytes.len());
        Ok(())
    }

    /// Bytes that were started; from now on they are finished.
    pub(super) fn take_started(&mut self) -> Option<usize> {
        self.started.take()
    }

    /// # Safety
    /// The context is current, a copy of `bytes` was started, and `target` has room for them.
    pub(super) unsafe fn finish(
        &self,
        bytes: usize,
        target: sys::CUdeviceptr,
        inner: &Inner,
    ) -> Result<(), DriverError> {
        // SAFETY: the stream reads what arrived behind the copy's event, and the next copy comes behind the stream's.
        unsafe {
            wait_event(inner.stream, self.pinned.copied, NO_FLAGS)?;
            result::memcpy_dtod_async(target, self.arrived.address, bytes, inner.stream)?;
            result::event::record(self.taken.event, inner.stream)
        }
    }
}
