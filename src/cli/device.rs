//! What computes: device, compute type and threads, shared by the verbs.

use std::sync::Arc;

use clap::Args;

use super::tiles;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::{ComputeType, CudaBackend};
use crate::checkpoint::base::BaseModel;
use crate::config::{DeviceName, TileSource, TrainingConfig, check_compute_choices};
use crate::device::driver::Driver;
#[cfg(feature = "emulator")]
use crate::device::emulator::Emulator;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Arguments that choose what computes.
#[derive(Clone, Debug, Args)]
pub struct DeviceArgs {
    /// `auto`, `cpu` or `cuda[:N][:portable]`.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Compute type: `auto`, `f32` (CPU), `f16` or `bf16` (GPU).
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    pub dtype: String,
    /// CPU threads; without it, all cores.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Tiles of Hopper's products: `auto` (as `fastlora tune` measured), `rule`, or a file of its.
    #[arg(long, value_name = "auto|rule|FILE", default_value = "auto")]
    pub tiles: TileSource,
}

impl From<&TrainingConfig> for DeviceArgs {
    fn from(config: &TrainingConfig) -> Self {
        let TrainingConfig { device, dtype, threads, tiles, .. } = config.clone();
        Self { device, dtype, threads, tiles }
    }
}

impl DeviceArgs {
    /// Refuses what is misspelt, before anything is read.
    pub fn validate(&self) -> Result<()> {
        check_compute_choices(&self.device, &self.dtype, self.threads)?;
        tiles::resolve(&self.tiles).map(drop)
    }
}

/// The backend that was chosen. [`on_backend!`] goes on with it.
pub enum Chosen {
    /// The CPU, in f32.
    Cpu(Arc<CpuBackend>),
    /// An NVIDIA GPU.
    Cuda(Arc<CudaBackend<Driver>>),
    /// The GPU's kernels on the CPU.
    #[cfg(feature = "emulator")]
    Emulator(Arc<CudaBackend<Emulator>>),
}

/// Runs generic code with the backend that was [`Chosen`]: the one place where the type is matched on.
macro_rules! on_backend {
    ($chosen:expr, |$backend:ident| $work:expr) => {
        match $chosen {
            $crate::cli::device::Chosen::Cpu($backend) => $work,
            $crate::cli::device::Chosen::Cuda($backend) => $work,
            #[cfg(feature = "emulator")]
            $crate::cli::device::Chosen::Emulator($backend) => $work,
        }
    };
}
pub(super) use on_backend;

impl Chosen {
    fn description(&self) -> String {
        on_backend!(self, |backend| backend.description())
    }
}

impl DeviceArgs {
    /// The backend for the weights of `base`. `auto` takes the first GPU where there is one, and computes in the weights' own
    /// half type (bf16 where they are f32).
    ///
    /// # Errors
    /// A name that does not exist (config); a device that this build or machine lacks, or a type that it does not compute
    /// in (device).
    pub fn backend(&self, base: &BaseModel) -> Result<Chosen> {
        self.validate()?;
        let dtype = &*self.dtype;
        let chosen = match DeviceName::parse(&self.device)? {
            DeviceName::Cpu => cpu(dtype, self.threads)?,
            DeviceName::Cuda { index, is_portable } => self.cuda(index, is_portable, base)?,
            DeviceName::Auto if dtype == "f32" => cpu(dtype, self.threads)?,
            DeviceName::Auto => match self.cuda(0, false, base) {
                Ok(chosen) => chosen,
                Err(error) => {
                    tracing::debug!("no GPU: {error}");
                    // A half type was asked for by name, and only a GPU computes in it.
                    cpu(if dtype == "auto" { "f32" } else { dtype }, self.threads)?
                }
            },
            #[cfg(feature = "emulator")]
            DeviceName::Emulator { is_hopper, is_checked } => {
                let compute = compute_type(dtype, base)?;
                let backend = CudaBackend::new(Emulator::of(is_hopper, is_checked)?, compute);
                Chosen::Emulator(Arc::new(tiles::with_tiles(backend, &self.tiles)?))
            }
            #[cfg(not(feature = "emulator"))]
            DeviceName::Emulator { .. } => return Err(Error::internal("this build has no emulator")),
        };
        tracing::info!("device: {}", chosen.description());
        Ok(chosen)
    }

    fn cuda(&self, index: u32, is_portable: bool, base: &BaseModel) -> Result<Chosen> {
        let compute = compute_type(&self.dtype, base)?;
        let backend = gpu_backend(open_gpu(index)?, compute, is_portable);
        Ok(Chosen::Cuda(Arc::new(tiles::with_tiles(backend, &self.tiles)?)))
    }
}

fn cpu(dtype: &str, threads: Option<usize>) -> Result<Chosen> {
    if !matches!(dtype, "auto" | "f32") {
        return Err(Error::device(format!("`{dtype}`: the CPU backend computes in f32"))
            .at("dtype")
            .hint("choose auto or f32; weights keep their stored precision"));
    }
    Ok(Chosen::Cpu(Arc::new(CpuBackend::new(threads)?)))
}

/// GPU `index` among those that are visible.
pub(super) fn open_gpu(index: u32) -> Result<Driver> {
    Driver::new(index).map_err(|error| error.at(format!("device cuda:{index}")))
}

/// The backend on a GPU, with the kernels of its generation or with portable ones.
pub(super) fn gpu_backend(device: Driver, compute: ComputeType, is_portable: bool) -> CudaBackend<Driver> {
    let backend = CudaBackend::new(device, compute);
    if is_portable { backend.with_portable_kernels() } else { backend }
}

/// The half type that `dtype` names, or that of the weights.
pub(super) fn compute_type(dtype: &str, base: &BaseModel) -> Result<ComputeType> {
    match dtype {
        "f16" => Ok(ComputeType::F16),
        "bf16" => Ok(ComputeType::Bf16),
        "f32" => Err(Error::device("`f32`: the CUDA kernels compute in f16 and bf16, with f32 sums")
            .at("dtype")
            .hint("choose auto, bf16 or f16, or `--device cpu`")),
        _ => Ok(match base.embedding()?.dtype() {
            DType::F16 => ComputeType::F16,
            DType::Bf16 | DType::F32 => ComputeType::Bf16,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_exist_is_refused_by_name() {
        let base = BaseModel::open("tests/fixtures/tiny_qwen2").unwrap();
        let has_gpu = Driver::new(0).is_ok();
        let choose = |device: &str, dtype: &str, threads| {
            let (device, dtype, tiles) = (device.to_owned(), dtype.to_owned(), TileSource::Rule);
            DeviceArgs { device, dtype, threads, tiles }.backend(&base)
        };
        for (device, dtype, threads, exit_code, part) in [
            ("gpu", "auto", None, 2, "`gpu` is no device"),
            ("cuda:x", "auto", None, 2, "`cuda:x` is no device"),
            ("cpu", "f64", None, 2, "`f64` is no compute type"),
            ("cpu", "auto", Some(0), 2, "0 threads"),
            ("cuda", "f32", None, 5, "compute in f16 and bf16"),
            ("cpu", "bf16", None, 5, "computes in f32"),
        ] {
            let error = choose(device, dtype, threads).err().expect(part);
            assert_eq!(error.kind().exit_code(), exit_code, "{error}");
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(matches!(choose("auto", "f32", Some(1)), Ok(Chosen::Cpu(_))));
        if !has_gpu {
            assert_eq!(choose("cuda", "auto", None).err().unwrap().kind().exit_code(), 5);
            assert!(matches!(choose("auto", "auto", Some(1)), Ok(Chosen::Cpu(_))));
        }
    }
}
