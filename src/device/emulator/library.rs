//! The libraries that the build script made of kernels and emulator.

use std::ffi::{c_char, c_int, c_void};

use libloading::Library;

/// A kernel of the library.
pub(super) type KernelHandle = *const c_void;

/// The interface of `kernels/emulator/interface.cpp`.
pub(super) struct Functions {
    pub allocate: unsafe extern "C" fn(usize) -> *mut c_void,
    pub release: unsafe extern "C" fn(*mut c_void) -> bool,
    pub upload: unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> bool,
    pub download: unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> bool,
    pub fill: unsafe extern "C" fn(*mut c_void, c_int, usize) -> bool,
    pub copy: unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> bool,
    pub kernel: unsafe extern "C" fn(*const c_char) -> KernelHandle,
    pub kernel_signature: unsafe extern "C" fn(KernelHandle) -> *const c_char,
    pub kernel_name: unsafe extern "C" fn(usize) -> *const c_char,
    pub encode_boxes: unsafe extern "C" fn(*mut u64, u64, u64, u64, u64, u32) -> bool,
    #[allow(clippy::type_complexity)]
    pub launch: unsafe extern "C" fn(
        KernelHandle,
        *const u32,
        *const u32,
        u32,
        u32,
        u64,
        *mut *mut c_void,
        *mut c_char,
        usize,
    ) -> bool,
    // Dropped last: the pointers above lead into it.
    _library: Library,
}

impl Functions {
    pub fn load(path: &str) -> Result<Self, libloading::Error> {
        // SAFETY: our own library; its initialisers only link the kernels into a list. The signatures are those of
        // interface.cpp, which is compiled by the same build.
        unsafe {
            let library = Library::new(path)?;
            Ok(Self {
                allocate: *library.get(b"emulator_allocate")?,
                release: *library.get(b"emulator_release")?,
                upload: *library.get(b"emulator_upload")?,
                download: *library.get(b"emulator_download")?,
                fill: *library.get(b"emulator_fill")?,
                copy: *library.get(b"emulator_copy")?,
                kernel: *library.get(b"emulator_kernel")?,
                kernel_signature: *library.get(b"emulator_kernel_signature")?,
                kernel_name: *library.get(b"emulator_kernel_name")?,
                encode_boxes: *library.get(b"emulator_encode_boxes")?,
                launch: *library.get(b"emulator_launch")?,
                _library: library,
            })
        }
    }
}
