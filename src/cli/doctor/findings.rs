//! What is wrong, and what to do about it.

use serde_json::{Value, json};

use super::super::tiles;
use super::{Gpu, Report, TilesFound};
use crate::backend::cuda::tiles::Unusable;
use crate::error::Error;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// Something that was probably meant to work does not.
    Problem,
    /// It works, but could be better.
    Advice,
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub weight: Weight,
    pub what: String,
    pub remedy: String,
}

impl Finding {
    fn problem(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { weight: Weight::Problem, what: what.into(), remedy: remedy.into() }
    }

    fn advice(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { weight: Weight::Advice, what: what.into(), remedy: remedy.into() }
    }

    fn of(error: &Error) -> Self {
        let place = error.location().map_or(String::new(), |place| format!("{place}: "));
        let cause = std::error::Error::source(error).map_or(String::new(), |cause| format!(": {cause}"));
        Self::problem(format!("{place}{}{cause}", error.message()), error.hint_text().unwrap_or_default())
    }

    pub(super) fn to_json(&self) -> Value {
        let weight = match self.weight {
            Weight::Problem => "problem",
            Weight::Advice => "advice",
        };
        json!({ "weight": weight, "what": self.what, "remedy": self.remedy })
    }
}

/// Memory below which even the smallest models are tight.
const LITTLE_MEMORY_BYTES: u64 = 2 << 30;

/// Everything that the report shows to be wrong, what matters most first.
pub(super) fn findings(report: &Report) -> Vec<Finding> {
    let mut found: Vec<Finding> = report.cpu.as_ref().err().map(Finding::of).into_iter().collect();
    found.extend(gpu_findings(report));
    if let Err(problem) = &report.nvcc {
        found.push(Finding::problem(problem, "unset NVCC, or let it name an nvcc"));
    }
    if let Some(error) = &report.cache.obstacle {
        let what = format!("models cannot be downloaded: {error}");
        let remedy = "set HF_HOME or HF_HUB_CACHE to a folder of yours; models in a folder train as they are";
        found.push(Finding::problem(what, remedy));
    }
    if let Some(memory) = report.machine.memory {
        let usable = memory.limit.map_or(memory.available, |limit| limit.min(memory.available));
        if usable < LITTLE_MEMORY_BYTES {
            let what = format!("{:.1} GiB of memory are free", super::gibibytes(usable));
            found.push(Finding::advice(what, "end other programs, or use small batches and short samples"));
        }
    }
    if cfg!(target_arch = "x86_64") && report.machine.simd.name() == "portable" {
        let what = "this processor has no AVX2, FMA and F16C: training on it is slow";
        found.push(Finding::advice(what, "use a processor from 2013 or later, or a GPU"));
    }
    if cfg!(debug_assertions) {
        found.push(Finding::advice("this is a debug build: it computes slowly", "cargo build --release"));
    }
    found.sort_by_key(|finding| finding.weight == Weight::Advice);
    found
}

fn gpu_findings(report: &Report) -> Vec<Finding> {
    let survey = &report.survey;
    let Some(build) = &report.kernels else {
        if survey.gpus.is_empty() && !report.machine.has_nvidia_device {
            return Vec::new(); // neither wanted nor possible
        }
        let what = "there is an NVIDIA GPU, and this build has no kernels for it";
        return vec![Finding::problem(
            what,
            "build again with nvcc: NVCC=$(scripts/get-nvcc) cargo build --release",
        )];
    };
    match &survey.obstacle {
        None => {}
        Some(error) if !survey.has_library && !report.machine.has_nvidia_device => {
            let what = format!("no GPU: {}", error.message());
            return vec![Finding::advice(what, "training runs on the CPU")];
        }
        Some(error) => {
            let mut finding = Finding::of(error);
            if let Some(release) = build.driver_release {
                finding.remedy +=
                    &format!("; CUDA {} came with driver release {release}", build.cuda_version);
            }
            if !survey.has_library && report.machine.driver_release.is_some() {
                finding.remedy += "; the kernel module is there, so in a container: pass the driver through \
                                   (docker run --gpus all)";
            }
            return vec![finding];
        }
    }
    if survey.gpus.is_empty() {
        let remedy = "check nvidia-smi; CUDA_VISIBLE_DEVICES may hide them";
        return vec![Finding::problem("the driver shows no GPU", remedy)];
    }
    let obstacles = report.gpus.iter().filter_map(Gpu::obstacle).map(Finding::of);
    obstacles.chain(report.gpus.iter().filter_map(tile_finding)).collect()
}

/// A table of tiles that is damaged: training goes on without it.
fn tile_finding(gpu: &Gpu) -> Option<Finding> {
    let TilesFound { path, table } = gpu.tiles.as_ref()?;
    let (Some(path), Err(Unusable::Damaged(reason))) = (path, table) else { return None };
    let what = format!("{}: no table of tiles: {reason}", path.display());
    Some(Finding::advice(what, tiles::REMEDY))
}
