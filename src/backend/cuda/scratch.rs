//! Memory between the kernels of one operation.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::memory::Growing;
use crate::device::Device;
use crate::error::Result;

/// Memory that one operation uses and the next may overwrite: the stream runs them in turn.
pub(super) struct Scratch<D: Device> {
    /// `dropout(x) [T, I]`; with magnitudes also what that leaves of `x`, and its gradient.
    pub dropped: Growing<D>,
    /// `g∘dy [T, O]` of groups with magnitudes.
    pub gained: Growing<D>,
    /// `ds [T, R̄]`.
    pub ds: Growing<D>,
    /// Partial sums, f32: of s and ds, of the gradients of A, B and of vectors, of norms.
    pub partials: Growing<D>,
    /// Rotated queries and keys, `[T, (Q + K)·D]`.
    pub rotated: Growing<D>,
    /// `dout · out [T, Q]`, f32.
    pub delta: Growing<D>,
    /// Logits of a chunk of rows.
    pub logits: Growing<D>,
    /// Scalars, flag and partial sums of the optimizer.
    pub norm: Growing<D>,
    /// Where the gradients' norm arrives.
    pub norm_landing: D::Landing,
    /// 0, 1, …
    pub counting: Growing<D>,
    /// Where batches arrive, with its capacity.
    upload_buffer: Option<(usize, D::UploadBuffer)>,
}

impl<D: Device> Scratch<D> {
    /// One for at least `bytes`.
    pub fn upload_buffer(&mut self, device: &D, bytes: usize) -> Result<&mut D::UploadBuffer> {
        if self.upload_buffer.as_ref().is_none_or(|(capacity, _)| *capacity < bytes) {
            // The old one first: both may not fit.
            self.upload_buffer = None;
            self.upload_buffer = Some((bytes, device.allocate_upload_buffer(bytes)?));
        }
        let (_, buffer) = self.upload_buffer.as_mut().expect("just made");
        Ok(buffer)
    }
}

impl<D: Device> Default for Scratch<D> {
    fn default() -> Self {
        Self {
            dropped: Growing::default(),
            gained: Growing::default(),
            ds: Growing::default(),
            partials: Growing::default(),
            rotated: Growing::default(),
            delta: Growing::default(),
            logits: Growing::default(),
            norm: Growing::default(),
            norm_landing: D::Landing::default(),
            counting: Growing::default(),
            upload_buffer: None,
        }
    }
}

/// Scratch has no invariant that a panic could break.
pub(super) fn lock<T>(scratch: &Mutex<T>) -> MutexGuard<'_, T> {
    scratch.lock().unwrap_or_else(PoisonError::into_inner)
}
