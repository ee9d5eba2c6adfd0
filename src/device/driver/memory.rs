//! Memory of a GPU and events, freed when dropped.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::Inner;
use crate::device::Memory;

/// Memory of a GPU.
pub struct DriverMemory {
    pub(super) inner: Arc<Inner>,
    pub(super) address: sys::CUdeviceptr,
    pub(super) bytes: usize,
}

impl std::fmt::Debug for DriverMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} bytes at {:#x}", self.bytes, self.address)
    }
}

impl Memory for DriverMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DriverMemory {
    fn drop(&mut self) {
        // SAFETY: the address came from cuMemAlloc and is freed once; the driver waits for work that uses it.
        unsafe {
            if self.inner.enter().is_ok() {
                let _ = result::free_sync(self.address);
            }
        }
    }
}

/// A CUDA event.
pub struct DriverEvent {
    pub(super) inner: Arc<Inner>,
    pub(super) event: sys::CUevent,
}

// SAFETY: a CUDA handle may be used from any thread once the context is current there, which every method sees to.
unsafe impl Send for DriverEvent {}

impl Drop for DriverEvent {
    fn drop(&mut self) {
        // SAFETY: the event is ours and used nowhere after this.
        unsafe {
            if self.inner.enter().is_ok() {
                let _ = result::event::destroy(self.event);
            }
        }
    }
}
