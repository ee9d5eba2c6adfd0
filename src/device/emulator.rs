//! The kernels on the CPU, for tests: `kernels/emulator/README.md` says what it finds and what it cannot see.
//!
//! The build script makes two libraries of the same kernels: fast, and with the race checker compiled in.

mod library;
mod memory;

use std::ffi::{CStr, CString, c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use library::{Functions, KernelHandle};
pub use memory::{EmulatorMemory, EmulatorUploadBuffer};

use super::boxes::{Boxes, Values};
use super::{
    Argument, Device, Launch, Limits, Memory, check_range, check_room, not_while_recording, nothing_started,
};
use crate::error::{Error, Result};

/// Which of the two libraries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// 2–4 GFLOP/s a core; finds what shows as NaN, a wrong value, a fault or a deadlock.
    Fast,
    /// About five times slower; also finds races, uninitialised reads and exact bounds.
    Checked,
}

impl Flavour {
    fn library(self) -> &'static str {
        match self {
            Flavour::Fast => env!("FASTLORA_EMULATOR_FAST"),
            Flavour::Checked => env!("FASTLORA_EMULATOR_CHECKED"),
        }
    }
}

/// The emulator as a [`Device`].
#[derive(Clone)]
pub struct Emulator {
    functions: Arc<Functions>,
    flavour: Flavour,
    seed: u64,
    is_hopper: bool,
    memory: Option<Arc<Limited>>,
    state: Arc<State>,
}

/// What the clones of a device share.
#[derive(Default)]
struct State {
    allocations: AtomicU64,
    replays: AtomicU64,
    /// Set while work is recorded.
    recording: Mutex<Option<Vec<Work>>>,
}

/// One piece of work.
enum Work {
    Launch {
        kernel: String,
        grid: [u32; 3],
        cluster_blocks: u32,
        threads: u32,
        dynamic_shared_bytes: u32,
        arguments: Vec<Argument>,
    },
    Fill {
        at: u64,
        bytes: usize,
        byte: u8,
    },
    Copy {
        from: u64,
        to: u64,
        bytes: usize,
    },
}

/// Work to be run again and again.
pub struct Recording(Vec<Work>);

/// Memory of a made-up size.
#[derive(Debug)]
struct Limited {
    total: u64,
    used: AtomicU64,
}

impl Emulator {
    /// Loads a library. The seed picks the schedule of the threads; 0 runs them in order.
    pub fn new(flavour: Flavour, seed: u64) -> Result<Self> {
        if !(is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        {
            return Err(Error::device("the emulator needs a processor with AVX2, FMA and F16C"));
        }
        let path = flavour.library();
        let functions = Functions::load(path).map_err(|error| {
            Error::device("cannot load the emulator").at(path).hint("build again").caused_by(error)
        })?;
        Ok(Self {
            functions: Arc::new(functions),
            flavour,
            seed,
            is_hopper: false,
            memory: None,
            state: Arc::default(),
        })
    }

    /// A small Hopper or Ampere, with the race checker or fast.
    pub fn of(is_hopper: bool, is_checked: bool) -> Result<Self> {
        let flavour = if is_checked { Flavour::Checked } else { Flavour::Fast };
        let emulator = Self::new(flavour, 0)?;
        Ok(if is_hopper { emulator.as_hopper() } else { emulator })
    }

    /// The same device as a small Hopper, for the kernels of sm_90a; else it is a small Ampere.
    pub fn as_hopper(&self) -> Self {
        Self { is_hopper: true, ..self.clone() }
    }

    /// A device with `total` bytes of memory, which is cut from large allocations as on a GPU: for tests of what fits.
    pub fn with_memory(&self, total: u64) -> Self {
        Self { memory: Some(Arc::new(Limited { total, used: AtomicU64::new(0) })), ..self.clone() }
    }

    /// The same device with another schedule.
    pub fn with_seed(&self, seed: u64) -> Self {
        Self { seed, ..self.clone() }
    }

    /// How often recorded work was run.
    pub fn replay_count(&self) -> u64 {
        self.state.replays.load(Ordering::Relaxed)
    }

    fn recording(&self) -> MutexGuard<'_, Option<Vec<Work>>> {
        self.state.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn not_while_recording(&self, action: &str) -> Result<()> {
        not_while_recording(self.recording().is_some(), action)
    }

    /// Runs `work` now, or keeps it for later while work is recorded.
    fn enqueue(&self, work: Work) -> Result<()> {
        if let Some(recorded) = &mut *self.recording() {
            recorded.push(work);
            return Ok(());
        }
        self.run(&work)
    }

    fn run(&self, work: &Work) -> Result<()> {
        // SAFETY: of ranges, whoever enqueued the work checked that they are inside their allocations; of launches, see `start`.
        match *work {
            Work::Launch {
                ref kernel,
                grid,
                cluster_blocks,
                threads,
                dynamic_shared_bytes,
                ref arguments,
            } => {
                self.start(&Launch { kernel, grid, cluster_blocks, threads, dynamic_shared_bytes, arguments })
            }
            Work::Fill { at, bytes, byte } => {
                copied(unsafe { (self.functions.fill)(pointer(at), c_int::from(byte), bytes) })
            }
            Work::Copy { from, to, bytes } => {
                copied(unsafe { (self.functions.copy)(pointer(to), pointer(from), bytes) })
            }
        }
    }

    fn start(&self, launch: &Launch<'_>) -> Result<()> {
        let kernel = self.find(launch)?;
        let values = Values::new(launch.arguments, |boxes| self.encode(boxes))?;
        let mut message = vec![0u8; 16 << 10];
        let block = [launch.threads, 1, 1];
        // SAFETY: the arguments' kinds were compared with the kernel's parameters; a kernel that leaves its memory is
        // stopped by guard pages and reported; message is writable for its whole length.
        let done = unsafe {
            (self.functions.launch)(
                kernel,
                launch.grid.as_ptr(),
                block.as_ptr(),
                launch.cluster_blocks,
                launch.dynamic_shared_bytes,
                self.seed,
                values.pointers().as_mut_ptr(),
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if done {
            return Ok(());
        }
        let text =
            CStr::from_bytes_until_nul(&message).unwrap_or_default().to_string_lossy().trim_end().to_owned();
        Err(Error::device(text).at(format!("{launch} on {}", self.description())))
    }

    fn encode(&self, boxes: &Boxes) -> Result<TensorMap> {
        let &Boxes { address, rows, columns, box_rows, .. } = boxes;
        let mut map = TensorMap([0; 16]);
        // SAFETY: the map is writable; the function checks the range that the numbers name.
        let encoded = unsafe {
            let words = map.0.as_mut_ptr();
            (self.functions.encode_boxes)(
                words,
                address,
                rows as u64,
                columns as u64,
                boxes.row_bytes(),
                box_rows,
            )
        };
        if encoded { Ok(map) } else { Err(Error::internal(format!("the TMA cannot take {boxes:?}"))) }
    }

    /// The names of all kernels.
    pub fn kernel_names(&self) -> Vec<String> {
        // SAFETY: the function accepts any index, and returns null or a string that lives as long as the library.
        let name = |index| unsafe {
            let name = (self.functions.kernel_name)(index);
            (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
        };
        (0..).map_while(name).collect()
    }

    /// The kernel's handle, after checking the arguments against its parameters.
    fn find(&self, launch: &Launch<'_>) -> Result<KernelHandle> {
        let name = CString::new(launch.kernel).map_err(|_| Error::internal("a kernel's name holds NUL"))?;
        // SAFETY: the name is a C string; the handle is null or lives as long as the library.
        let handle = unsafe { (self.functions.kernel)(name.as_ptr()) };
        if handle.is_null() {
            return Err(Error::internal(format!("there is no kernel `{}`", launch.kernel)));
        }
        // SAFETY: the handle is valid and signatures are static C strings.
        let signature = unsafe { CStr::from_ptr((self.functions.kernel_signature)(handle)) };
        let given: String = launch.arguments.iter().map(kind_of).collect();
        if given.as_bytes() != signature.to_bytes() {
            let expected = signature.to_string_lossy();
            return Err(Error::internal(format!(
                "arguments of kinds `{given}`, the kernel has `{expected}`"
            ))
            .at(launch.to_string()));
        }
        Ok(handle)
    }
}

/// The letters of `parameter_kind` in `kernels/emulator/runtime.h`.
fn kind_of(argument: &Argument) -> char {
    match argument {
        Argument::Address(_) => 'p',
        Argument::F32(_) => 'f',
        Argument::I32(_) => 'i',
        Argument::U32(_) => 'u',
        Argument::I64(_) => 'l',
        Argument::Boxes(_) => 'b',
    }
}

/// `TensorMap` of kernels/ptx/tma.h.
#[repr(C, align(64))]
struct TensorMap([u64; 16]);

fn pointer(address: u64) -> *mut c_void {
    address as *mut c_void
}

fn copied(done: bool) -> Result<()> {
    if done { Ok(()) } else { Err(Error::internal("the emulator refused a copy outside its memory")) }
}

impl Device for Emulator {
    type Memory = EmulatorMemory;
    type Event = Instant;
    type Graph = Recording;
    type Landing = Vec<u8>;
    type UploadBuffer = EmulatorUploadBuffer;
    const IS_REAL: bool = false;

    fn name(&self) -> String {
        "emulator".to_owned()
    }

    fn description(&self) -> String {
        let chip = if self.is_hopper { "Hopper, " } else { "" };
        format!("emulator ({chip}{:?}, seed {})", self.flavour, self.seed)
    }

    fn limits(&self) -> Limits {
        // More multiprocessors would only make tests slower.
        Limits {
            compute_capability: if self.is_hopper { (9, 0) } else { (8, 0) },
            multiprocessor_count: 4,
            shared_bytes_per_block: if self.is_hopper { 227 << 10 } else { 163 << 10 },
            total_memory_bytes: 64 << 30,
        }
    }

    fn free_memory_bytes(&self) -> Result<Option<u64>> {
        let free =
            |limited: &Arc<Limited>| limited.total.saturating_sub(limited.used.load(Ordering::Relaxed));
        Ok(self.memory.as_ref().map(free))
    }

    fn guards_allocations(&self) -> bool {
        self.memory.is_none()
    }

    fn allocation_count(&self) -> u64 {
        self.state.allocations.load(Ordering::Relaxed)
    }

    fn allocate(&self, bytes: usize) -> Result<EmulatorMemory> {
        if let Some(limited) = &self.memory {
            let used = limited.used.fetch_add(bytes as u64, Ordering::Relaxed);
            if used + bytes as u64 > limited.total {
                limited.used.fetch_sub(bytes as u64, Ordering::Relaxed);
                return Err(Error::device(format!("cannot allocate {bytes} bytes: out of memory")));
            }
        }
        self.not_while_recording("allocate")?;
        self.state.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: any size is allowed.
        let address = unsafe { (self.functions.allocate)(bytes) };
        if address.is_null() {
            return Err(Error::device(format!("the emulator has no {bytes} bytes left")));
        }
        Ok(EmulatorMemory {
            functions: self.functions.clone(),
            address,
            bytes,
            counted_by: self.memory.clone(),
        })
    }

    fn upload(&self, bytes: &[u8], memory: &EmulatorMemory, offset: usize) -> Result<()> {
        check_range(memory, offset, bytes.len())?;
        self.not_while_recording("take bytes from the host")?;
        // SAFETY: the range is inside the allocation, and the slice is readable.
        copied(unsafe {
            (self.functions.upload)(pointer(memory.at(offset)), bytes.as_ptr().cast(), bytes.len())
        })
    }

    fn allocate_upload_buffer(&self, bytes: usize) -> Result<EmulatorUploadBuffer> {
        Ok(EmulatorUploadBuffer { arrived: self.allocate(bytes)?, under_way: None })
    }

    fn start_upload(&self, bytes: &[u8], buffer: &mut EmulatorUploadBuffer) -> Result<()> {
        check_room(bytes.len(), buffer.arrived.bytes())?;
        self.not_while_recording("take bytes from the host")?;
        buffer.under_way = Some(bytes.to_vec());
        self.fill(&buffer.arrived, 0..bytes.len(), 0xFF)
    }

    fn finish_upload(
        &self,
        buffer: &mut EmulatorUploadBuffer,
        memory: &EmulatorMemory,
        offset: usize,
    ) -> Result<()> {
        let bytes = buffer.under_way.take().ok_or_else(nothing_started)?;
        self.upload(&bytes, &buffer.arrived, 0)?;
        self.copy(&buffer.arrived, 0..bytes.len(), memory, offset)
    }

    fn download(&self, memory: &EmulatorMemory, offset: usize, into: &mut [u8]) -> Result<()> {
        check_range(memory, offset, into.len())?;
        self.not_while_recording("be read")?;
        // SAFETY: the range is inside the allocation, and the slice is writable.
        copied(unsafe {
            (self.functions.download)(into.as_mut_ptr().cast(), pointer(memory.at(offset)), into.len())
        })
    }

    fn start_download(
        &self,
        memory: &EmulatorMemory,
        offset: usize,
        bytes: usize,
        landing: &mut Vec<u8>,
    ) -> Result<()> {
        landing.resize(bytes, 0);
        self.download(memory, offset, landing)
    }

    fn finish_download<'a>(&self, landing: &'a Vec<u8>) -> Result<&'a [u8]> {
        Ok(landing)
    }

    fn fill(&self, memory: &EmulatorMemory, range: Range<usize>, byte: u8) -> Result<()> {
        check_range(memory, range.start, range.len())?;
        self.enqueue(Work::Fill { at: memory.at(range.start), bytes: range.len(), byte })
    }

    fn copy(
        &self,
        from: &EmulatorMemory,
        range: Range<usize>,
        to: &EmulatorMemory,
        offset: usize,
    ) -> Result<()> {
        check_range(from, range.start, range.len())?;
        check_range(to, offset, range.len())?;
        self.enqueue(Work::Copy { from: from.at(range.start), to: to.at(offset), bytes: range.len() })
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        self.find(launch)?;
        let &Launch { kernel, grid, cluster_blocks, threads, dynamic_shared_bytes, arguments } = launch;
        let (kernel, arguments) = (kernel.to_owned(), arguments.to_vec());
        self.enqueue(Work::Launch { kernel, grid, cluster_blocks, threads, dynamic_shared_bytes, arguments })
    }

    fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Recording> {
        self.not_while_recording("be recorded itself")?;
        *self.recording() = Some(Vec::new());
        let done = work();
        let recorded = self.recording().take().unwrap_or_default();
        done.map(|()| Recording(recorded))
    }

    unsafe fn replay(&self, recording: &Recording) -> Result<()> {
        self.not_while_recording("replay")?;
        self.state.replays.fetch_add(1, Ordering::Relaxed);
        recording.0.iter().try_for_each(|work| self.run(work))
    }

    fn record_event(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn milliseconds_between(&self, start: &Instant, end: &Instant) -> Result<f32> {
        Ok(end.saturating_duration_since(*start).as_secs_f32() * 1e3)
    }

    /// Nothing profiles it.
    fn profile(&self, _: bool) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
