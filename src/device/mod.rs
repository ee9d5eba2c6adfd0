//! A compute device as bytes, kernel names and grids: [`driver`] speaks to an NVIDIA GPU, `emulator` runs the same
//! kernels on the CPU, for tests. Shapes live a level higher, in the backend.
//!
//! All work of a device is ordered: copies and launches run one after the other, as on one CUDA stream. That is why memory is
//! written through shared references: who may write which part is the backend's to know. Beside it runs one kind of copy alone,
//! from the host into an upload buffer, which the work then waits for.

mod boxes;
pub mod driver;
#[cfg(feature = "emulator")]
pub mod emulator;

use std::fmt;
use std::ops::Range;

use crate::error::{Error, Result};

pub use boxes::{BOX_COLUMNS, Boxes};

/// What the hardware allows, for choosing grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Compute capability, such as (8, 0).
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessor_count: u32,
    /// Shared memory that one block may have, in bytes.
    pub shared_bytes_per_block: u32,
    /// Memory of the device, in bytes.
    pub total_memory_bytes: u64,
}

impl Limits {
    /// Whether the kernels for sm_90a run: on compute capability 9.0 and on no other.
    pub fn is_hopper(&self) -> bool {
        self.compute_capability == (9, 0)
    }
}

/// Device memory, freed when dropped.
pub trait Memory: fmt::Debug + Send + Sync {
    /// Its first byte's address on the device, a multiple of 16 at least.
    fn address(&self) -> u64;
    /// Its length.
    fn bytes(&self) -> usize;
}

/// One argument of a kernel; the variant must match the parameter's type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Argument {
    /// A pointer.
    Address(u64),
    /// `float`.
    F32(f32),
    /// `int`.
    I32(i32),
    /// `unsigned`.
    U32(u32),
    /// `long long`.
    I64(i64),
    /// `TensorMap`.
    Boxes(Boxes),
}

impl Argument {
    /// The start of `memory`.
    pub fn of(memory: &impl Memory) -> Self {
        Argument::Address(memory.address())
    }
}

impl fmt::Display for Argument {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Argument::Address(0) => formatter.write_str("null"),
            Argument::Address(_) => formatter.write_str("memory"),
            Argument::F32(value) => write!(formatter, "{value:?}"),
            Argument::I32(value) => write!(formatter, "{value}"),
            Argument::U32(value) => write!(formatter, "{value}"),
            Argument::I64(value) => write!(formatter, "{value}"),
            Argument::Boxes(boxes) => boxes.fmt(formatter),
        }
    }
}

/// A kernel with its grid and arguments. Displays as CUDA writes it, so that an error tells name and shape.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// The exported name.
    pub kernel: &'a str,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Blocks of a cluster, neighbours in x, which divide the grid; 1 for a launch without clusters.
    pub cluster_blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub dynamic_shared_bytes: u32,
    /// In the order of the kernel's parameters.
    pub arguments: &'a [Argument],
}

impl fmt::Display for Launch<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.grid;
        let arguments: Vec<String> = self.arguments.iter().map(Argument::to_string).collect();
        write!(formatter, "{}<<<({x},{y},{z})", self.kernel)?;
        if self.cluster_blocks > 1 {
            write!(formatter, " by {}", self.cluster_blocks)?;
        }
        write!(formatter, ", {}", self.threads)?;
        write!(formatter, ", {}>>>({})", self.dynamic_shared_bytes, arguments.join(", "))
    }
}

/// Allocation, copies, launches and time. Handles are cheap to clone and name the same device.
pub trait Device: Clone + Send + Sync + 'static {
    /// Its memory.
    type Memory: Memory;
    /// A point in its work.
    type Event: Send + 'static;
    /// Recorded work.
    type Graph: Send + Sync;
    /// Where a copy to the host arrives.
    type Landing: Default + Send + Sync;
    /// Where a copy from the host arrives that runs beside the work.
    type UploadBuffer: Send;

    /// Whether it is hardware, and not only played.
    const IS_REAL: bool;

    /// As its maker calls it: devices of one kind have one name.
    fn name(&self) -> String;
    /// The device's name with what sets it apart, for the log.
    fn description(&self) -> String;
    /// What the hardware allows.
    fn limits(&self) -> Limits;
    /// Device memory that is still free; none where nobody counts it.
    fn free_memory_bytes(&self) -> Result<Option<u64>>;
    /// Whether the device notices an access outside an allocation: many buffers cut from one would hide it.
    fn guards_allocations(&self) -> bool;
    /// Allocations so far: recorded work names addresses, so it is void once anything was allocated anew.
    fn allocation_count(&self) -> u64;
    /// New memory with undefined contents. Zero bytes are allowed.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;
    /// Copies `bytes` to `memory` from byte `offset` on, in the order of the work; `bytes` may be reused when it returns,
    /// which is before the copy is done.
    fn upload(&self, bytes: &[u8], memory: &Self::Memory, offset: usize) -> Result<()>;
    /// Room for `bytes`, which count as allocated.
    fn allocate_upload_buffer(&self, bytes: usize) -> Result<Self::UploadBuffer>;
    /// Starts to copy `bytes` to `buffer`, at once and beside the work so far; `bytes` may be reused when it returns. It waits
    /// until the bytes before them have left the host.
    ///
    /// # Errors
    /// More bytes than there is room for: a bug of the caller.
    fn start_upload(&self, bytes: &[u8], buffer: &mut Self::UploadBuffer) -> Result<()>;
    /// Makes the work wait for that copy, and then move what arrived to byte `offset` of `memory`. Returns before it has.
    ///
    /// # Errors
    /// Nothing was started since the last time: a bug of the caller.
    fn finish_upload(
        &self,
        buffer: &mut Self::UploadBuffer,
        memory: &Self::Memory,
        offset: usize,
    ) -> Result<()>;
    /// Waits for the work so far and copies from byte `offset` of `memory`.
    fn download(&self, memory: &Self::Memory, offset: usize, into: &mut [u8]) -> Result<()>;
    /// Starts to copy `bytes` from byte `offset` of `memory` to `landing`, in the order of the work, and returns.
    fn start_download(
        &self,
        memory: &Self::Memory,
        offset: usize,
        bytes: usize,
        landing: &mut Self::Landing,
    ) -> Result<()>;
    /// Waits for that copy alone, while work behind it goes on.
    fn finish_download<'a>(&self, landing: &'a Self::Landing) -> Result<&'a [u8]>;
    /// Sets every byte of a range.
    fn fill(&self, memory: &Self::Memory, range: Range<usize>, byte: u8) -> Result<()>;
    /// Copies `range` of `from` to byte `offset` of `to`.
    fn copy(&self, from: &Self::Memory, range: Range<usize>, to: &Self::Memory, offset: usize) -> Result<()>;
    /// Starts a kernel. On a GPU a fault inside it is reported by a later call.
    ///
    /// # Safety
    /// The arguments' addresses must be of live memory of this device that covers what the kernel reads and writes, and
    /// stay so until the work is done.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()>;
    /// Records the launches, fills and copies inside the device that `work` asks for, instead of running them.
    ///
    /// # Errors
    /// Those of `work`, which may neither allocate nor exchange bytes with the host.
    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Self::Graph>;
    /// Runs recorded work, started as one.
    ///
    /// # Safety
    /// As [`launch`](Self::launch), for every address that the recording names.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<()>;
    /// Marks the end of the work so far.
    fn record_event(&self) -> Result<Self::Event>;
    /// Waits for `end` and tells the device's time since `start`.
    fn milliseconds_between(&self, start: &Self::Event, end: &Self::Event) -> Result<f32>;
    /// Opens or closes the window of a profiler that was told to wait for it, between the work so far and what follows.
    fn profile(&self, is_open: bool) -> Result<()>;
    /// Waits for all work.
    fn synchronize(&self) -> Result<()>;
}

/// Refuses what recorded work cannot hold.
fn not_while_recording(is_recording: bool, action: &str) -> Result<()> {
    if is_recording {
        Err(Error::internal(format!("work is being recorded, and cannot {action}")))
    } else {
        Ok(())
    }
}

/// Refuses what does not fit an upload buffer.
fn check_room(bytes: usize, capacity: usize) -> Result<()> {
    if bytes <= capacity {
        return Ok(());
    }
    Err(Error::internal(format!("{bytes} bytes for an upload buffer of {capacity}")))
}

fn nothing_started() -> Error {
    Error::internal("an upload is finished that was not started")
}

/// Refuses a copy that leaves its memory, before it reaches the device.
fn check_range(memory: &impl Memory, offset: usize, bytes: usize) -> Result<()> {
    match offset.checked_add(bytes) {
        Some(end) if end <= memory.bytes() => Ok(()),
        _ => Err(Error::internal(format!(
            "copy of {bytes} bytes at byte {offset} leaves device memory of {} bytes",
            memory.bytes()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_reads_as_in_cuda() {
        let arguments =
            [Argument::Address(4096), Argument::I32(64), Argument::F32(1e-5), Argument::Address(0)];
        let launch = Launch {
            kernel: "rms_norm_f16",
            grid: [4, 1, 1],
            cluster_blocks: 1,
            threads: 256,
            dynamic_shared_bytes: 0,
            arguments: &arguments,
        };
        assert_eq!(launch.to_string(), "rms_norm_f16<<<(4,1,1), 256, 0>>>(memory, 64, 1e-5, null)");
        let pairs = Launch { cluster_blocks: 2, ..launch };
        assert_eq!(pairs.to_string(), "rms_norm_f16<<<(4,1,1) by 2, 256, 0>>>(memory, 64, 1e-5, null)");
    }
}
