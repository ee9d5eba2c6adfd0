//! Finds nvcc and compiles the kernels for the GPU.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compile::{self, Job};
use crate::toolkit;

/// Machine code for Hopper alone.
const HOPPER: &str = "-gencode=arch=compute_90a,code=sm_90a";
/// Machine code for Ampere and for Hopper, and PTX that the driver compiles at load for anything newer.
const TARGETS: &[&str] = &["-gencode=arch=compute_80,code=[sm_80,compute_80]", HOPPER];

/// Whether a kernel file uses what only Hopper has.
fn is_for_hopper(name: &str) -> bool {
    name.ends_with("_sm90a")
}

/// `FASTLORA_CUDA`.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    /// With CUDA where nvcc is found.
    Auto,
    /// A missing nvcc, a register spill or a serialised tensor-core pipeline fails the build.
    Require,
    /// Without CUDA.
    Off,
}

/// Writes `OUT_DIR/cuda_modules.rs`: `CUDA_VERSION`, `TARGETS` and `MODULES`; without nvcc 0 and no modules.
pub fn build(kernels: &[&str], out: &Path) {
    let wanted = match std::env::var("FASTLORA_CUDA").as_deref() {
        Err(_) | Ok("" | "auto") => Wanted::Auto,
        Ok("require") => Wanted::Require,
        Ok("off") => Wanted::Off,
        Ok(other) => panic!("FASTLORA_CUDA is `{other}`; it may be `auto`, `require` or `off`"),
    };
    let nvcc = match wanted {
        Wanted::Off => None,
        _ => toolkit::find_nvcc().unwrap_or_else(|problem| panic!("{problem}")),
    };
    match (&nvcc, wanted) {
        (None, Wanted::Require) => panic!(
            "FASTLORA_CUDA=require, and no nvcc in NVCC, CUDA_HOME, CUDA_PATH, PATH, the active Python's nvidia/cu13 or \
             /usr/local/cuda; scripts/get-nvcc installs one into the project"
        ),
        (None, Wanted::Auto) => {
            println!("cargo:warning=no nvcc found: building without CUDA (scripts/get-nvcc installs one)");
        }
        _ => {}
    }
    let mut generated = String::new();
    let (version, modules) = match &nvcc {
        Some(nvcc) => {
            let version = toolkit::cuda_version(nvcc)
                .unwrap_or_else(|| panic!("{} --version names no release", nvcc.display()));
            (version, compile_kernels(nvcc, kernels, out, wanted))
        }
        None => (0, Vec::new()),
    };
    writeln!(generated, "/// The toolkit's version as the driver counts: 13000 for 13.0; 0 without CUDA.")
        .unwrap();
    writeln!(generated, "pub const CUDA_VERSION: i32 = {version};").unwrap();
    writeln!(generated, "/// What the kernels are compiled for.").unwrap();
    let targets: Vec<&str> = TARGETS.iter().flat_map(|flag| codes(flag)).collect();
    writeln!(generated, "pub const TARGETS: &[&str] = &{targets:?};").unwrap();
    writeln!(generated, "/// Each kernel file's name, whether it is for Hopper alone, and its fatbin.")
        .unwrap();
    writeln!(generated, "pub const MODULES: &[(&str, bool, &[u8])] = &[").unwrap();
    for (name, path) in modules {
        let is_for_hopper = is_for_hopper(&name);
        writeln!(generated, "    ({name:?}, {is_for_hopper}, include_bytes!({path:?})),").unwrap();
    }
    writeln!(generated, "];").unwrap();
    std::fs::write(out.join("cuda_modules.rs"), generated).expect("OUT_DIR is writable");
}

fn compile_kernels(nvcc: &Path, kernels: &[&str], out: &Path, wanted: Wanted) -> Vec<(String, PathBuf)> {
    let jobs = kernels
        .iter()
        .map(|name| {
            let source = PathBuf::from(format!("kernels/{name}.cu"));
            let output = out.join(format!("{name}.fatbin"));
            let mut command = Command::new(nvcc);
            command.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo", "-Xptxas=-v,-warn-spills"]);
            command.args(["-diag-suppress=177"]); // a header's primitive that this file does not use
            command.args(if is_for_hopper(name) { &[HOPPER] } else { TARGETS });
            command.arg(&source).arg("-o").arg(&output);
            Job { name: format!("{name}.cu"), command, output, inputs: compile::kernel_inputs(&source) }
        })
        .collect();
    let logs = compile::run(jobs);
    for (name, log) in kernels.iter().zip(&logs) {
        let complaints: Vec<_> = log.lines().filter(|line| is_slow_code(line)).collect();
        let message = format!("kernels/{name}.cu: {}", complaints.join("; "));
        assert!(complaints.is_empty() || wanted != Wanted::Require, "{message}");
        if !complaints.is_empty() {
            println!("cargo:warning={message}");
        }
    }
    kernels.iter().map(|name| (name.to_string(), out.join(format!("{name}.fatbin")))).collect()
}

/// The code that a `-gencode` flag asks for: `sm_80`, and `compute_80` for PTX.
fn codes(flag: &'static str) -> impl Iterator<Item = &'static str> {
    // With the comma: `-gencode=` holds `code=` too.
    let (_, codes) = flag.split_once(",code=").expect("a -gencode flag");
    codes.trim_matches(['[', ']']).split(',')
}

/// What ptxas says of code that runs but crawls: spilled registers, tensor-core instructions made to wait in turn.
fn is_slow_code(line: &str) -> bool {
    let spills =
        line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores, 0 bytes spill loads");
    spills || line.contains("wgmma") && line.contains("serializ")
}
