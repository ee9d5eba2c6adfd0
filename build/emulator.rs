//! Compiles the kernels and the emulator's runtime into two shared libraries: fast, and with the race checker.
//!
//! Two libraries and not two archives: the same templates are compiled twice with different flags, and a linker would
//! silently merge them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::compile::{self, Job};

const FLAGS: &[&str] = &[
    "-std=c++17",
    "-march=x86-64-v3",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    // Else statics of templates are one for the whole process, across both libraries.
    "-fno-gnu-unique",
    // Kernels read halves through wider vectors, as CUDA allows.
    "-fno-strict-aliasing",
    // The two libraries optimise differently; contracted differently, their bits would differ.
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-variable",
    "-Wno-psabi",
];

/// Builds both libraries and hands their paths to the crate as FASTLORA_EMULATOR_{FAST,CHECKED}.
pub fn build(kernels: &[&str], out: &Path) {
    let kernel_sources = kernels.iter().map(|name| format!("kernels/{name}.cu"));
    let mut sources: Vec<PathBuf> = kernel_sources.map(PathBuf::from).collect();
    sources.extend(compile::files_in("kernels/emulator", &["cu", "cpp"]));
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());

    for checked in [false, true] {
        let name = if checked { "checked" } else { "fast" };
        let folder = out.join(format!("emulator_{name}"));
        std::fs::create_dir_all(&folder).expect("OUT_DIR is writable");
        let mut jobs = Vec::new();
        let mut objects = Vec::new();
        for source in &sources {
            let is_kernel = source.extension().is_some_and(|extension| extension == "cu");
            let stem = source.file_stem().expect("a file").to_string_lossy().into_owned();
            if stem == "checker" && !checked {
                continue;
            }
            let output = folder.join(format!("{stem}.o"));
            let mut command = Command::new(&compiler);
            command.args(FLAGS).arg(format!("-DEMULATOR_CHECKED={}", i32::from(checked)));
            match (checked, is_kernel) {
                (true, true) => command.args(["-O1", "-fsanitize=thread"]),
                _ => command.arg("-O2"),
            };
            command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(&output);
            let mut inputs = compile::kernel_inputs(source);
            inputs.extend(compile::files_in("kernels/emulator", &["h"]));
            objects.push(output.clone());
            jobs.push(Job { name: format!("{} ({name})", source.display()), command, output, inputs });
        }
        compile::run(jobs);
        let library = folder.join("libkernels.so");
        let mut command = Command::new(&compiler);
        // -z defs: a hook of the sanitizer that checker.cpp does not define fails here and not at load. -z nodelete: signal
        // handlers stay installed when the last emulator is dropped.
        command.args(["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-Wl,-z,nodelete"]).args(&objects).args([
            "-ldl",
            "-lpthread",
            "-lrt",
        ]);
        command.arg("-o").arg(&library);
        let link =
            Job { name: format!("emulator ({name})"), command, output: library.clone(), inputs: objects };
        compile::run(vec![link]);
        println!("cargo:rustc-env=FASTLORA_EMULATOR_{}={}", name.to_uppercase(), library.display());
    }
}
