//! Memory of the emulated device, freed when dropped, and what copies from the host pass through.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Limited;
use super::library::Functions;
use crate::device::Memory;

/// Memory of the emulated device: ends at a guard page, starts as NaN.
pub struct EmulatorMemory {
    pub(super) functions: Arc<Functions>,
    pub(super) address: *mut c_void,
    pub(super) bytes: usize,
    pub(super) counted_by: Option<Arc<Limited>>,
}

// SAFETY: the address is only used through the library's functions, which lock.
unsafe impl Send for EmulatorMemory {}
// SAFETY: as above; shared references only read the address.
unsafe impl Sync for EmulatorMemory {}

impl std::fmt::Debug for EmulatorMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} bytes at {:?}", self.bytes, self.address)
    }
}

impl EmulatorMemory {
    pub(super) fn at(&self, offset: usize) -> u64 {
        self.address() + offset as u64
    }
}

impl Memory for EmulatorMemory {
    fn address(&self) -> u64 {
        self.address as u64
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for EmulatorMemory {
    fn drop(&mut self) {
        // SAFETY: the address came from the library's allocate and is released once.
        let released = unsafe { (self.functions.release)(self.address) };
        if let Some(limited) = &self.counted_by {
            limited.used.fetch_sub(self.bytes as u64, Ordering::Relaxed);
        }
        debug_assert!(released, "memory was released twice");
    }
}

/// A copy from the host stays under way until the work waits for it: before, what it will overwrite is NaN.
pub struct EmulatorUploadBuffer {
    pub(super) arrived: EmulatorMemory,
    /// The bytes of the copy that was started and not finished.
    pub(super) under_way: Option<Vec<u8>>,
}
