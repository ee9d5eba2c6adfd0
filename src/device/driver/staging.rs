//! Host memory that the GPU copies from by itself: an upload returns when its bytes are there, and the copy runs in the
//! stream's order, without waiting for the work before it.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

/// Slots that take turns: while the GPU copies from one, the next is filled.
const SLOT_COUNT: usize = 4;
/// Bytes of a slot: a batch fits, and weights go through at the speed of the bus.
const SLOT_BYTES: usize = 8 << 20;

/// Pinned memory, and the event behind the copy that last read it.
struct Slot {
    host: *mut c_void,
    copied: sys::CUevent,
}

/// The slots, made with the first upload.
#[derive(Default)]
pub(super) struct Staging {
    slots: Vec<Slot>,
    next: usize,
}

// SAFETY: pinned memory and events may be used from any thread with the context current.
unsafe impl Send for Staging {}

impl Staging {
    /// Copies `bytes` to `target`, in the order of `stream`. `bytes` may be reused when it returns.
    ///
    /// # Safety
    /// The context is current, `target` has room, and the stream is alive.
    pub unsafe fn copy(
        &mut self,
        bytes: &[u8],
        target: sys::CUdeviceptr,
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        for (place, chunk) in bytes.chunks(SLOT_BYTES).enumerate() {
            if self.slots.len() < SLOT_COUNT {
                self.add_slot()?;
                self.next = self.slots.len() - 1;
            }
            let slot = &self.slots[self.next];
            self.next = (self.next + 1) % SLOT_COUNT;
            let at = target + (place * SLOT_BYTES) as u64;
            // SAFETY: nobody reads the slot once its event has passed, and it holds SLOT_BYTES; the copy's event is recorded
            // behind it, so the slot is not written before the copy is done.
            unsafe {
                result::event::synchronize(slot.copied)?;
                ptr::copy_nonoverlapping(chunk.as_ptr(), slot.host.cast(), chunk.len());
                let pinned = std::slice::from_raw_parts(slot.host.cast::<u8>(), chunk.len());
                result::memcpy_htod_async(at, pinned, stream)?;
                result::event::record(slot.copied, stream)?;
            }
        }
        Ok(())
    }

    fn add_slot(&mut self) -> Result<(), DriverError> {
        let copied = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // Flags 0: write-combined memory, cudarc's default, is slow to read back and gains nothing here.
        // SAFETY: the context is current.
        match unsafe { result::malloc_host(SLOT_BYTES, 0) } {
            Ok(host) => self.slots.push(Slot { host, copied }),
            Err(error) => {
                // SAFETY: the event was just made.
                let _ = unsafe { result::event::destroy(copied) };
                return Err(error);
            }
        }
        Ok(())
    }

    /// Frees the slots; errors have nobody to be told.
    pub fn free(&mut self) {
        for slot in self.slots.drain(..) {
            // SAFETY: the copies are done, and nobody uses the slot after this.
            unsafe {
                let _ = result::event::destroy(slot.copied);
                let _ = result::free_host(slot.host);
            }
        }
    }
}
