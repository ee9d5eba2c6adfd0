//! `fastlora doctor`: what training would find on this machine, what is wrong, and what to do.

mod findings;
mod machine;
#[path = "../../build/toolkit.rs"]
mod toolkit;

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Cli;
use super::output::{for_terminal, print_line};
use super::tiles;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::tiles::{DeviceKind, TileTable, Unusable};
use crate::checkpoint::hub::{CacheUsage, HubSettings, cache_usage};
use crate::config::TileSource;
use crate::device::driver::{Driver, GpuSummary, KernelBuild, Survey, kernel_build, survey};
use crate::error::{Error, Result};
use findings::{Finding, Weight, findings};
use machine::Machine;
pub(super) use machine::Memory;

/// Arguments of `fastlora doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {}

/// Everything that was found.
struct Report {
    machine: Machine,
    /// The GPU kernels of this build.
    kernels: Option<KernelBuild>,
    survey: Survey,
    gpus: Vec<Gpu>,
    /// Whether the CPU backend starts.
    cpu: Result<()>,
    /// Path and release of the nvcc that a build would use now.
    nvcc: Result<Option<(PathBuf, Option<String>)>, String>,
    hub: HubSettings,
    cache: CacheUsage,
}

/// A GPU, and its free memory or why it cannot be used.
struct Gpu {
    summary: GpuSummary,
    free_bytes: Result<u64>,
    /// Where its products have a choice of tiles.
    tiles: Option<TilesFound>,
}

/// What training would find of measured tiles.
struct TilesFound {
    path: Option<PathBuf>,
    table: Result<Option<TileTable>, Unusable>,
}

impl TilesFound {
    fn look(summary: &GpuSummary) -> Option<Self> {
        let limits = summary.limits;
        if !limits.is_hopper() {
            return None;
        }
        let device = DeviceKind::new(summary.name.clone(), limits);
        let path = tiles::resolve(&TileSource::Auto).ok().and_then(|source| tiles::path_of(source, &device));
        let table = path.as_ref().map_or(Ok(None), |path| tiles::read(path, &device));
        Some(Self { path, table })
    }

    fn to_json(&self) -> Value {
        let table = self.table.as_ref().ok().and_then(Option::as_ref);
        json!({
            "file": self.path,
            "tuned_at": table.map(|table| table.tuned_at),
            "products": table.map(|table| table.products.len()),
        })
    }

    fn to_text(&self) -> String {
        match &self.table {
            Ok(Some(table)) => tiles::summary(table),
            Ok(None) => "by rule; `fastlora tune` measures them".to_owned(),
            Err(unusable) => format!("by rule; the measured ones are of no use: {unusable}"),
        }
    }
}

impl Gpu {
    fn obstacle(&self) -> Option<&Error> {
        self.free_bytes.as_ref().err()
    }
}

pub(super) fn run(_: &DoctorArgs, cli: &Cli) -> Result<()> {
    let report = Report::collect();
    let findings = findings(&report);
    if cli.json {
        print_line(&format!("{:#}", report.to_json(&findings)))?;
    } else {
        print_line(for_terminal(&report.to_text(&findings)).trim_end())?;
    }
    report.verdict()
}

fn gibibytes(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

impl Report {
    fn collect() -> Self {
        let survey = survey();
        let gpus = survey.gpus.iter().enumerate().map(|(index, summary)| {
            let free_bytes = summary.check().and_then(|()| Driver::new(index as u32)?.memory_info());
            let place = |error: Error| match error.location() {
                Some(place) => {
                    let place = format!("cuda:{index}: {place}");
                    error.at(place)
                }
                None => error.at(format!("cuda:{index}")),
            };
            Gpu {
                tiles: TilesFound::look(summary),
                summary: summary.clone(),
                free_bytes: free_bytes.map(|(free, _)| free as u64).map_err(place),
            }
        });
        let gpus = gpus.collect();
        let hub = HubSettings::from_env();
        let release = |path: PathBuf| {
            let version = toolkit::cuda_version(&path);
            (path, version.map(|version| format!("{}.{}", version / 1000, version % 1000 / 10)))
        };
        Self {
            machine: Machine::look(),
            kernels: kernel_build(),
            survey,
            gpus,
            cpu: CpuBackend::new(None).map(drop),
            nvcc: toolkit::find_nvcc().map(|found| found.map(release)),
            cache: cache_usage(&hub.cache),
            hub,
        }
    }

    /// What `--device` may name here.
    fn trains_on(&self) -> Vec<String> {
        let usable = self.gpus.iter().enumerate().filter(|(_, gpu)| gpu.obstacle().is_none());
        let mut devices: Vec<String> = usable.map(|(index, _)| format!("cuda:{index}")).collect();
        if self.cpu.is_ok() {
            devices.push("cpu".to_owned());
        }
        devices
    }

    /// A device error where training can run nowhere.
    fn verdict(&self) -> Result<()> {
        match &self.cpu {
            Err(error) if self.trains_on().is_empty() => {
                Err(Error::device(format!("training can run nowhere on this machine: {error}"))
                    .hint("see what is wrong above"))
            }
            _ => Ok(()),
        }
    }

    fn to_json(&self, findings: &[Finding]) -> Value {
        let gpus = self.gpus.iter().enumerate().map(|(index, Gpu { summary, free_bytes, tiles })| {
            let (major, minor) = summary.limits.compute_capability;
            json!({
                "device": format!("cuda:{index}"),
                "name": summary.name,
                "compute_capability": format!("{major}.{minor}"),
                "multiprocessors": summary.limits.multiprocessor_count,
                "memory_total_bytes": summary.limits.total_memory_bytes,
                "memory_free_bytes": free_bytes.as_ref().ok(),
                "tiles": tiles.as_ref().map(TilesFound::to_json),
            })
        });
        let nvcc = self.nvcc.as_ref().ok().and_then(Option::as_ref);
        let models = self.cache.models.iter().map(|(name, bytes)| json!({ "name": name, "bytes": bytes }));
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "build": {
                "profile": profile(),
                "emulator": cfg!(feature = "emulator"),
                "kernels": self.kernels.as_ref().map(|build| json!({
                    "cuda_version": build.cuda_version,
                    "targets": build.targets,
                })),
            },
            "machine": self.machine.to_json(),
            "driver": {
                "release": self.machine.driver_release,
                "cuda_version": self.survey.cuda_version,
            },
            "gpus": gpus.collect::<Value>(),
            "nvcc": nvcc.map(|(path, version)| json!({ "path": path, "version": version })),
            "hub_cache": {
                "folder": self.hub.cache,
                "models": models.collect::<Value>(),
                "free_bytes": self.cache.free_bytes,
                "is_writable": self.cache.obstacle.is_none(),
                "endpoint": self.hub.endpoint,
                "offline": self.hub.offline,
                "has_token": self.hub.token.is_some(),
            },
            "trains_on": self.trains_on(),
            "findings": findings.iter().map(Finding::to_json).collect::<Value>(),
        })
    }

    fn to_text(&self, findings: &[Finding]) -> String {
        let mut lines: Vec<(String, String)> = Vec::new();
        let mut line = |name: &str, text: String| lines.push((name.to_owned(), text));
        let kernels = match &self.kernels {
            Some(build) => format!("{} by CUDA {}", build.targets.join(", "), build.cuda_version),
            None => "none: nvcc was not found when this was built".to_owned(),
        };
        let emulator = if cfg!(feature = "emulator") { ", with the emulator" } else { "" };
        line("fastlora", format!("{}, {} build{emulator}", env!("CARGO_PKG_VERSION"), profile()));
        line("kernels", kernels);
        line("system", self.machine.system.clone());
        let processor = self.machine.processor.as_deref().unwrap_or("unknown processor");
        line("cpu", format!("{processor}, {} threads, {}", self.machine.cores, self.machine.simd));
        if let Some(memory) = self.machine.memory {
            let limit = memory.limit.map(|limit| format!(", limited to {:.1} GiB", gibibytes(limit)));
            let (available, total) = (gibibytes(memory.available), gibibytes(memory.total));
            line("memory", format!("{available:.1} GiB free of {total:.1} GiB{}", limit.unwrap_or_default()));
        }
        line("driver", self.driver_text());
        for (index, gpu) in self.gpus.iter().enumerate() {
            line(&format!("cuda:{index}"), gpu.to_text());
            if let Some(tiles) = &gpu.tiles {
                line("", format!("tiles {}", tiles.to_text()));
            }
        }
        line(
            "nvcc",
            match &self.nvcc {
                Ok(Some((path, version))) => {
                    format!("{}, CUDA {}", path.display(), version.as_deref().unwrap_or("unknown"))
                }
                Ok(None) => "none".to_owned(),
                Err(problem) => problem.clone(),
            },
        );
        let bytes = self.cache.models.iter().map(|(_, bytes)| bytes).sum();
        let free = self.cache.free_bytes.map(|free| format!("; {:.0} GiB left there", gibibytes(free)));
        let count = self.cache.models.len();
        line(
            "hub cache",
            format!(
                "{}: {count} model{}, {:.1} GiB{}",
                self.hub.cache.display(),
                if count == 1 { "" } else { "s" },
                gibibytes(bytes),
                free.unwrap_or_default()
            ),
        );
        for (name, bytes) in &self.cache.models {
            line("", format!("{name}, {:.1} GiB", gibibytes(*bytes)));
        }
        let token = if self.hub.token.is_some() { "with a token" } else { "no token" };
        let offline = if self.hub.offline { ", offline" } else { "" };
        line("hub", format!("{}, {token}{offline}", self.hub.endpoint));
        let devices = self.trains_on();
        line("trains on", if devices.is_empty() { "nothing".to_owned() } else { devices.join(", ") });
        let mut text: String = lines.iter().map(|(name, text)| format!("{name:<11}{text}\n")).collect();
        text += "\n";
        if findings.is_empty() {
            text += "Nothing is wrong.\n";
        }
        for finding in findings {
            let weight = match finding.weight {
                Weight::Problem => "Problem",
                Weight::Advice => "Advice",
            };
            text += &format!("{weight}: {}\n  What to do: {}\n", finding.what, finding.remedy);
        }
        text
    }

    fn driver_text(&self) -> String {
        let release = self.machine.driver_release.as_ref().map(|release| format!("release {release}"));
        let cuda = self.survey.cuda_version.as_ref().map(|version| format!("supports CUDA {version}"));
        let known: Vec<String> = release.into_iter().chain(cuda).collect();
        if known.is_empty() { "none".to_owned() } else { known.join(", ") }
    }
}

impl Gpu {
    fn to_text(&self) -> String {
        let limits = self.summary.limits;
        let (major, minor) = limits.compute_capability;
        let total = gibibytes(limits.total_memory_bytes);
        let memory = match &self.free_bytes {
            Ok(free) => format!("{:.1} GiB free of {total:.1} GiB", gibibytes(*free)),
            Err(_) => format!("{total:.1} GiB, cannot be used"),
        };
        let multiprocessors = limits.multiprocessor_count;
        format!(
            "{}, compute capability {major}.{minor}, {multiprocessors} multiprocessors, {memory}",
            self.summary.name
        )
    }
}

fn profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_on_which_nothing_trains_ends_with_the_device_code() {
        let mut report = Report::collect();
        assert!(report.verdict().is_ok());
        report.gpus.clear();
        report.cpu = Err(Error::device("cannot start 8 threads"));
        assert_eq!(report.verdict().unwrap_err().kind().exit_code(), 5);
        let findings = findings(&report);
        assert_eq!((findings[0].weight, &*findings[0].what), (Weight::Problem, "cannot start 8 threads"));
        assert!(report.to_text(&findings).contains("trains on  nothing"));
    }
}
