//! What `device` names.

use crate::error::{Error, Result};

/// A device, as named in a configuration or a flag. Whether the machine has it is another question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// The first GPU, or the CPU where there is none.
    Auto,
    /// `cpu`.
    Cpu,
    /// `cuda[:N][:portable]`.
    Cuda {
        /// Among those that `CUDA_VISIBLE_DEVICES` shows.
        index: u32,
        /// With the kernels that every GPU from Ampere on runs, also where the GPU's generation has its own.
        is_portable: bool,
    },
    /// `emulator[:hopper][:checked]`: the GPU's kernels on the CPU, in builds that have them.
    Emulator {
        /// Those of Hopper.
        is_hopper: bool,
        /// With the race checker.
        is_checked: bool,
    },
}

impl DeviceName {
    /// Reads a name.
    ///
    /// # Errors
    /// A config error that names what there is.
    pub fn parse(name: &str) -> Result<Self> {
        let mut parts = name.split(':').peekable();
        let parsed = match parts.next() {
            Some("auto") => Some(DeviceName::Auto),
            Some("cpu") => Some(DeviceName::Cpu),
            Some("cuda") => {
                let index = parts.peek().and_then(|part| part.parse().ok());
                if index.is_some() {
                    parts.next();
                }
                let is_portable = parts.next_if_eq(&"portable").is_some();
                Some(DeviceName::Cuda { index: index.unwrap_or(0), is_portable })
            }
            Some("emulator") if cfg!(feature = "emulator") => {
                let is_hopper = parts.next_if_eq(&"hopper").is_some();
                let is_checked = parts.next_if_eq(&"checked").is_some();
                Some(DeviceName::Emulator { is_hopper, is_checked })
            }
            _ => None,
        };
        parsed.filter(|_| parts.next().is_none()).ok_or_else(|| {
            Error::config(format!("`{name}` is no device; there are auto, cpu and cuda[:N][:portable]"))
                .at("device")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_whole() {
        let cuda = |index, is_portable| DeviceName::Cuda { index, is_portable };
        for (name, expected) in [
            ("auto", DeviceName::Auto),
            ("cpu", DeviceName::Cpu),
            ("cuda", cuda(0, false)),
            ("cuda:3", cuda(3, false)),
            ("cuda:portable", cuda(0, true)),
            ("cuda:1:portable", cuda(1, true)),
        ] {
            assert_eq!(DeviceName::parse(name).unwrap(), expected, "{name}");
        }
        for wrong in
            ["", "gpu", "cuda:", "cuda:x", "cuda:1:2", "cuda:portable:1", "cpu:0", "auto:", "CPU", "cuda:-1"]
        {
            assert!(DeviceName::parse(wrong).is_err(), "{wrong}");
        }
    }
}
