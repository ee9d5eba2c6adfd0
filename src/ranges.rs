//! Ranges for profilers: `nsys` shows every step, layer and operation by name, as NVTX ranges.
//!
//! In code a range is a `tracing` span ([`range!`](crate::range)), which costs one load where nobody listens. Under a
//! profiler [`NvtxLayer`] hands the spans on. NVTX is a protocol without a library of its own (NVIDIA, "NVTX 3", nvtxInit.h
//! and nvtxTypes.h): the profiler names a library in `NVTX_INJECTION64_PATH`, which is loaded and fills a table of functions.
//! The `nvtx` crate does the same but needs libclang to build. [`timing`] takes the times of the same ranges itself.

pub mod timing;

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::fmt::{self, Write};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, Filter};
use tracing_subscriber::registry::LookupSpan;

/// Target of the spans that become ranges.
pub const TARGET: &str = "fastlora::ranges";

/// A named range until the end of the block: `let _range = range!("layer", number = 3);`, or with the
/// [`Work`](crate::backend::Work) in it: `range!("adamw"; Work::of_adamw(count, 0))`, which is counted where somebody listens.
#[macro_export]
macro_rules! range {
    ($name:literal $(, $field:ident = $value:expr)*) => {
        ::tracing::trace_span!(target: $crate::ranges::TARGET, $name $(, $field = $value)*).entered()
    };
    ($name:literal; $work:expr) => {{
        let work = || -> $crate::backend::Work { $work };
        $crate::range!($name, flops = work().flops, bytes = work().bytes)
    }};
}

/// Places in the table of core functions (`NvtxCallbackIdCore`).
const RANGE_PUSH: usize = 9;
const RANGE_POP: usize = 11;
const CORE_FUNCTIONS: usize = 16;
/// `NVTX_CB_MODULE_CORE` and `NVTX_ETID_CALLBACKS`, `NVTX_ETID_VERSIONINFO`.
const CORE_MODULE: c_uint = 1;
const CALLBACKS: c_uint = 1;
const VERSION_INFO: c_uint = 3;

/// What the injected library writes its functions into.
static FUNCTIONS: [AtomicPtr<c_void>; CORE_FUNCTIONS] =
    [const { AtomicPtr::new(ptr::null_mut()) }; CORE_FUNCTIONS];

/// Pointers to the places above, ending with null: `NvtxFunctionTable`.
struct Table([*const AtomicPtr<c_void>; CORE_FUNCTIONS + 1]);
// SAFETY: the pointers lead to statics.
unsafe impl Sync for Table {}

static TABLE: Table = {
    let mut places = [ptr::null(); CORE_FUNCTIONS + 1];
    let mut place = 0;
    while place < CORE_FUNCTIONS {
        places[place] = &FUNCTIONS[place] as *const AtomicPtr<c_void>;
        place += 1;
    }
    Table(places)
};

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct ExportedCallbacks {
    struct_size: usize,
    module_function_table: extern "C" fn(c_uint, *mut *const c_void, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct ExportedVersion {
    struct_size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

static EXPORTED_CALLBACKS: ExportedCallbacks =
    ExportedCallbacks { struct_size: size_of::<ExportedCallbacks>(), module_function_table };

static EXPORTED_VERSION: ExportedVersion = ExportedVersion {
    struct_size: size_of::<ExportedVersion>(),
    version: 3,
    reserved: 0,
    set_injection_version,
};

extern "C" fn set_injection_version(_: u32) {}

extern "C" fn module_function_table(module: c_uint, table: *mut *const c_void, size: *mut c_uint) -> c_int {
    if module != CORE_MODULE {
        return 0;
    }
    // SAFETY: the injected library passes places for the answers, or null where it wants none.
    unsafe {
        if !table.is_null() {
            *table = TABLE.0.as_ptr().cast();
        }
        if !size.is_null() {
            *size = CORE_FUNCTIONS as c_uint;
        }
    }
    1
}

extern "C" fn export_table(table: c_uint) -> *const c_void {
    match table {
        CALLBACKS => (&raw const EXPORTED_CALLBACKS).cast(),
        VERSION_INFO => (&raw const EXPORTED_VERSION).cast(),
        _ => ptr::null(),
    }
}

/// Spans as NVTX ranges, where a profiler listens.
pub struct NvtxLayer {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
    // Dropped last: the functions lie in it.
    _library: Library,
}

impl NvtxLayer {
    /// Loads the profiler's library; none where no profiler runs the program, or it does not want ranges.
    pub fn from_env() -> Option<Self> {
        type Initialise = unsafe extern "C" fn(extern "C" fn(c_uint) -> *const c_void) -> c_int;
        let path = std::env::var_os("NVTX_INJECTION64_PATH")?;
        // SAFETY: the profiler's own library, loaded as every NVTX program loads it; the function's type is
        // `NvtxInitializeInjectionNvtxFunc_t`, and the functions that it leaves have the types of nvtxTypes.h.
        unsafe {
            let library = Library::new(path).ok()?;
            let initialise = library.get::<Initialise>(b"InitializeInjectionNvtx2").ok()?;
            if initialise(export_table) == 0 {
                return None;
            }
            let [push, pop] = [RANGE_PUSH, RANGE_POP].map(|place| FUNCTIONS[place].load(Ordering::Acquire));
            if push.is_null() || pop.is_null() {
                return None;
            }
            Some(Self {
                push: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> c_int>(push),
                pop: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(pop),
                _library: library,
            })
        }
    }
}

/// A span's name as the profiler shows it.
struct RangeName(CString);

/// "layer 3" from the name `layer` and its fields.
struct Named(String);

impl Visit for Named {
    /// How much work it is belongs to [`timing`].
    fn record_f64(&mut self, _: &Field, _: f64) {}

    fn record_debug(&mut self, _: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = write!(self.0, " {value:?}");
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for NvtxLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut name = Named(attributes.metadata().name().to_string());
        attributes.record(&mut name);
        if let (Some(span), Ok(name)) = (context.span(id), CString::new(name.0)) {
            span.extensions_mut().insert(RangeName(name));
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(name) = span.extensions().get::<RangeName>() {
            // SAFETY: a C string, which the function copies.
            unsafe { (self.push)(name.0.as_ptr()) };
        }
    }

    fn on_exit(&self, _: &Id, _: Context<'_, S>) {
        // SAFETY: takes nothing; ranges are pushed and popped on the same thread, since spans are entered by guards.
        unsafe { (self.pop)() };
    }
}

/// Lets through the spans that become ranges.
pub struct OnlyRanges;

impl<S> Filter<S> for OnlyRanges {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        metadata.is_span() && metadata.target() == TARGET
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(Level::TRACE.into())
    }
}
