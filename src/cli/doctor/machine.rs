//! Processor, memory and operating system, as far as they can be told.

use std::fs;
use std::num::NonZero;

use serde_json::{Value, json};

use crate::backend::cpu::simd::Simd;

/// What the machine is.
pub(super) struct Machine {
    pub system: String,
    pub processor: Option<String>,
    /// Cores that this process may use.
    pub cores: usize,
    pub simd: Simd,
    pub memory: Option<Memory>,
    /// Release of the NVIDIA kernel module, such as "580.65.06".
    pub driver_release: Option<String>,
    /// An NVIDIA device on the PCI bus, with or without a driver.
    pub has_nvidia_device: bool,
}

/// Main memory in bytes.
#[derive(Clone, Copy)]
pub(in crate::cli) struct Memory {
    pub total: u64,
    /// What programs can still take.
    pub available: u64,
    /// What the process's control group may take, where that is less than `total`.
    pub limit: Option<u64>,
}

impl Machine {
    pub(super) fn look() -> Self {
        let release =
            read("/proc/sys/kernel/osrelease").map_or(String::new(), |release| format!(" {release}"));
        let processor = read("/proc/cpuinfo").and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        Self {
            system: format!("{}{release}, {}", std::env::consts::OS, std::env::consts::ARCH),
            processor,
            cores: std::thread::available_parallelism().map_or(1, NonZero::get),
            simd: Simd::detect(),
            memory: Memory::look(),
            driver_release: read("/sys/module/nvidia/version"),
            has_nvidia_device: nvidia_on_the_bus(),
        }
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "system": self.system,
            "processor": self.processor,
            "cores": self.cores,
            "simd": self.simd.name(),
            "memory_total_bytes": self.memory.map(|memory| memory.total),
            "memory_available_bytes": self.memory.map(|memory| memory.available),
            "memory_limit_bytes": self.memory.and_then(|memory| memory.limit),
        })
    }
}

/// A small file of the system, where there is one.
fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

impl Memory {
    /// This machine's, as far as it can be told.
    pub(in crate::cli) fn look() -> Option<Self> {
        Self::parse(&read("/proc/meminfo")?, read("/sys/fs/cgroup/memory.max"))
    }

    /// From the text of `/proc/meminfo` and of a control group's `memory.max`.
    fn parse(meminfo: &str, group_limit: Option<String>) -> Option<Self> {
        let kibibytes = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':').trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        };
        let (total, available) = (kibibytes("MemTotal")? << 10, kibibytes("MemAvailable")? << 10);
        let limit = group_limit.and_then(|text| text.parse().ok()).filter(|&limit| limit < total);
        Some(Self { total, available, limit })
    }
}

/// The vendor that every NVIDIA device announces.
const NVIDIA_PCI_VENDOR: &str = "0x10de";

fn nvidia_on_the_bus() -> bool {
    let devices = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten();
    let mut vendors = devices.filter_map(|device| fs::read_to_string(device.path().join("vendor")).ok());
    vendors.any(|vendor| vendor.trim() == NVIDIA_PCI_VENDOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_the_system_says_and_its_group_allows() {
        let text = "MemTotal:       16000 kB\nMemFree: 1 kB\nMemAvailable:    4000 kB\n";
        let memory = Memory::parse(text, Some("8192000".into())).unwrap();
        assert_eq!((memory.total, memory.available, memory.limit), (16_384_000, 4_096_000, Some(8_192_000)));
        assert_eq!(Memory::parse(text, Some("max".into())).unwrap().limit, None);
        assert_eq!(Memory::parse(text, Some("99999999999".into())).unwrap().limit, None);
        assert!(Memory::parse("MemTotal: 1 kB", None).is_none());
    }
}
