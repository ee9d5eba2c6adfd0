//! What computes: device, compute type and threads, shared by the verbs.

use std::sync::Arc;

use clap::Args;

use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::config::check_compute_choices;
use crate::error::{Error, Result};

/// Arguments that choose what computes.
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// `auto`, `cpu` or `cuda[:N]`.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Compute type: `auto`, `f32`, `f16` or `bf16`.
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub dtype: String,
    /// CPU threads; without it, all cores.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

impl DeviceArgs {
    /// Refuses what is misspelt, before anything is read.
    pub fn validate(&self) -> Result<()> {
        check_compute_choices(&self.device, &self.dtype, self.threads)
    }

    /// The backend that was asked for.
    ///
    /// # Errors
    /// As [`cpu_backend`].
    pub fn backend(&self) -> Result<Arc<CpuBackend>> {
        cpu_backend(&self.device, &self.dtype, self.threads)
    }
}

/// The CPU backend, where `device` and `dtype` allow it.
///
/// # Errors
/// A name that does not exist (config); a device that this build lacks, or a type that it does not compute in
/// (device).
pub fn cpu_backend(device: &str, dtype: &str, threads: Option<usize>) -> Result<Arc<CpuBackend>> {
    check_compute_choices(device, dtype, threads)?;
    if !matches!(device, "auto" | "cpu") {
        return Err(Error::device(format!("`{device}`: this build has no CUDA"))
            .at("device")
            .hint("choose auto or cpu"));
    }
    if !matches!(dtype, "auto" | "f32") {
        return Err(Error::device(format!("`{dtype}`: the CPU backend computes in f32"))
            .at("dtype")
            .hint("choose auto or f32; weights keep their stored precision"));
    }
    let backend = CpuBackend::new(threads)?;
    tracing::info!("device: {}", backend.description());
    Ok(Arc::new(backend))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_exist_is_refused_by_name() {
        for (device, dtype, threads, exit_code, part) in [
            ("gpu", "auto", None, 2, "`gpu` is no device"),
            ("cuda:x", "auto", None, 2, "`cuda:x` is no device"),
            ("cpu", "f64", None, 2, "`f64` is no compute type"),
            ("cpu", "auto", Some(0), 2, "0 threads"),
            ("cuda", "auto", None, 5, "this build has no CUDA"),
            ("cuda:1", "bf16", None, 5, "this build has no CUDA"),
            ("cpu", "bf16", None, 5, "computes in f32"),
        ] {
            let error = cpu_backend(device, dtype, threads).err().expect(part);
            assert_eq!(error.kind().exit_code(), exit_code, "{error}");
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(cpu_backend("auto", "f32", Some(1)).is_ok());
    }
}
