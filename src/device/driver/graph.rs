//! Work recorded from the stream as a CUDA graph.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::{Driver, Inner};
use crate::device::not_while_recording;
use crate::error::Result;

/// A graph, ready to be started.
pub struct DriverGraph {
    inner: Arc<Inner>,
    pub(super) executable: sys::CUgraphExec,
}

// SAFETY: graphs may be used from any thread with the context current; the driver locks its own state.
unsafe impl Send for DriverGraph {}
// SAFETY: as above; starting one does not change it.
unsafe impl Sync for DriverGraph {}

impl Drop for DriverGraph {
    fn drop(&mut self) {
        // SAFETY: the graph is ours; the driver keeps what is still running.
        unsafe {
            if self.inner.enter().is_ok() {
                let _ = result::graph::exec_destroy(self.executable);
            }
        }
    }
}

impl Driver {
    /// Refuses calls that a graph would not repeat.
    pub(super) fn not_while_recording(&self, action: &str) -> Result<()> {
        not_while_recording(self.inner.is_recording.load(Ordering::Relaxed), action)
    }

    /// What `work` enqueues, as a graph.
    pub(super) fn record_graph(&self, work: impl FnOnce() -> Result<()>) -> Result<DriverGraph> {
        self.not_while_recording("be recorded itself")?;
        self.enter()?;
        // Of this thread's calls those that a recording would not hold are refused.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive.
        unsafe { result::stream::begin_capture(self.inner.stream, mode) }
            .map_err(|error| self.failed_after_launch("begin to record work", error))?;
        self.inner.is_recording.store(true, Ordering::Relaxed);
        let done = work();
        self.inner.is_recording.store(false, Ordering::Relaxed);
        // SAFETY: the stream is recording; it must be ended whether or not the work succeeded.
        let graph = unsafe { result::stream::end_capture(self.inner.stream) };
        done?;
        let made = graph.and_then(|graph| {
            let no_flags = sys::CUgraphInstantiate_flags(0);
            // SAFETY: the graph was just made, and is not needed once it is ready to start.
            unsafe {
                let executable = result::graph::instantiate(graph, no_flags);
                let destroyed: Result<(), DriverError> = result::graph::destroy(graph);
                executable.and_then(|executable| destroyed.map(|()| executable))
            }
        });
        let executable = made.map_err(|error| self.failed_after_launch("record work", error))?;
        Ok(DriverGraph { inner: Arc::clone(&self.inner), executable })
    }
}
