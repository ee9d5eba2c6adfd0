//! What the driver and this build offer, found without opening a GPU: for `fastlora doctor`.

use cudarc::driver::result::{self, device};

use super::library::{check_library, check_version, failed, supported_version, version_text};
use super::{Limits, check_capability, compiled, read_limits};
use crate::error::Result;

/// The GPU kernels of this build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelBuild {
    /// CUDA that compiled them, which the driver must support: "13.0".
    pub cuda_version: String,
    /// Release of the driver that first supported it, where known: "580".
    pub driver_release: Option<&'static str>,
    /// Machine code (`sm_80`) and PTX (`compute_80`) in the binary.
    pub targets: &'static [&'static str],
}

/// The GPU kernels of this build; none where nvcc was missing when it was compiled.
pub fn kernel_build() -> Option<KernelBuild> {
    super::is_compiled_in().then(|| KernelBuild {
        cuda_version: version_text(compiled::CUDA_VERSION),
        driver_release: driver_release(compiled::CUDA_VERSION),
        targets: compiled::TARGETS,
    })
}

/// The driver's release that first supports a version of CUDA (NVIDIA's CUDA Toolkit Release Notes, table 3).
fn driver_release(cuda_version: i32) -> Option<&'static str> {
    match cuda_version {
        13000 => Some("580"),
        12090 => Some("575"),
        12080 => Some("570"),
        12060 => Some("560"),
        12040 => Some("550"),
        _ => None,
    }
}

/// A GPU that the driver shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuSummary {
    /// As its maker calls it.
    pub name: String,
    /// What it allows.
    pub limits: Limits,
}

/// The driver and its GPUs.
#[derive(Debug, Default)]
pub struct Survey {
    /// Whether the driver's library loads, be it of use or not.
    pub has_library: bool,
    /// The newest CUDA that the driver supports: "13.0".
    pub cuda_version: Option<String>,
    /// In the order of their numbers, as `CUDA_VISIBLE_DEVICES` shows them.
    pub gpus: Vec<GpuSummary>,
    /// What stands between this build and every GPU.
    pub obstacle: Option<crate::error::Error>,
}

/// Asks the driver, if there is one.
pub fn survey() -> Survey {
    let mut found = Survey::default();
    found.obstacle = look(&mut found).err();
    found
}

fn look(found: &mut Survey) -> Result<()> {
    // SAFETY: as in `check_library`.
    found.has_library = unsafe { cudarc::driver::sys::is_culib_present() };
    check_library()?;
    found.cuda_version = Some(version_text(supported_version()?));
    result::init().map_err(|error| failed("start CUDA", error))?;
    let count = device::get_count().map_err(|error| failed("count the GPUs", error))?;
    for ordinal in 0..count {
        let gpu = device::get(ordinal).map_err(|error| failed("open the GPU", error))?;
        let name = device::get_name(gpu).map_err(|error| failed("read the GPU's name", error))?;
        let limits = read_limits(gpu).map_err(|error| failed("read the GPU's properties", error))?;
        found.gpus.push(GpuSummary { name, limits });
    }
    check_version()
}

impl GpuSummary {
    /// Refuses one that is older than the kernels.
    ///
    /// # Errors
    /// A device error with its compute capability.
    pub fn check(&self) -> Result<()> {
        check_capability(&self.name, self.limits)
    }
}
