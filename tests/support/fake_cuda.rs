//! The made-up CUDA driver of `tests/fixtures/fake_cuda.c`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Compiles the library into `folder`; `stub` leaves out a function that is needed.
pub fn build_library(folder: &Path, stub: bool) {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fake_cuda.c");
    let mut command = Command::new("cc");
    // The name that is tried first, also where a real driver is installed.
    command.args(["-shared", "-fPIC", "-w", "-o"]).arg(folder.join("libcuda.so")).arg(source);
    if stub {
        command.arg("-DcuStreamCreate=renamed");
    }
    assert!(command.status().unwrap().success());
}
