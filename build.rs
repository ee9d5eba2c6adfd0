//! Compiles the one list of kernel files: by nvcc into fatbins that the binary embeds, and, with the feature `emulator`,
//! by the C++ compiler into the libraries that run them on the CPU.

#[path = "build/compile.rs"]
mod compile;
#[path = "build/emulator.rs"]
mod emulator;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/toolkit.rs"]
mod toolkit;

use std::path::{Path, PathBuf};

/// Every kernel file, `kernels/NAME.cu`.
const KERNELS: &[&str] = &[
    "adamw",
    "attention",
    "attention_backward",
    "attention_backward_sm90a",
    "attention_cached",
    "attention_sm90a",
    "column_sums",
    "conformance",
    "conformance_sm90a",
    "convert",
    "cross_entropy",
    "embedding_noise",
    "gated_activation",
    "gated_down",
    "layer_norm",
    "linear",
    "linear_sm90a",
    "lora",
    "lora_back",
    "magnitude",
    "mlp_back",
    "rms_norm",
    "rms_norm_down",
    "rope",
    "rows",
];

fn main() {
    for path in ["build.rs", "build", "kernels"] {
        println!("cargo:rerun-if-changed={path}");
    }
    let variables =
        ["FASTLORA_CUDA", "NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV", "CXX", "NVCC_CCBIN"];
    for variable in variables {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // Measurements of the products' tiles hold for these sources alone.
    let products = compile::kernel_inputs(Path::new("kernels/linear_sm90a.cu"));
    println!("cargo:rustc-env=FASTLORA_PRODUCT_KERNELS={}", compile::fingerprint("", &products));
    nvcc::build(KERNELS, &out);
    if std::env::var_os("CARGO_FEATURE_EMULATOR").is_some() {
        emulator::build(KERNELS, &out);
    }
}
