//! Launches by kernel name and compute type.

use std::fmt;

use super::tiles::Tiles;
use crate::device::{Argument, Device, Launch};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// What activations and weights are on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComputeType {
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl ComputeType {
    /// As an element type.
    pub fn dtype(self) -> DType {
        match self {
            ComputeType::F16 => DType::F16,
            ComputeType::Bf16 => DType::Bf16,
        }
    }

    /// Rounds `values` to nearest even and appends their bytes.
    pub(super) fn encode(self, values: &[f32], bytes: &mut Vec<u8>) {
        match self {
            ComputeType::F16 => {
                bytes.extend(values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()))
            }
            ComputeType::Bf16 => {
                bytes.extend(values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()));
            }
        }
    }

    /// What `value` becomes when it is stored.
    pub(super) fn rounded(self, value: f32) -> f32 {
        match self {
            ComputeType::F16 => half::f16::from_f32(value).to_f32(),
            ComputeType::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// One element.
    pub(super) fn decode(self, bytes: [u8; 2]) -> f32 {
        match self {
            ComputeType::F16 => half::f16::from_le_bytes(bytes).to_f32(),
            ComputeType::Bf16 => half::bf16::from_le_bytes(bytes).to_f32(),
        }
    }
}

impl fmt::Display for ComputeType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dtype().fmt(formatter)
    }
}

/// Blocks, threads and dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub grid: [usize; 3],
    pub threads: u32,
    pub shared_bytes: usize,
}

impl Shape {
    /// A row of blocks without dynamic shared memory.
    pub fn blocks(blocks: usize, threads: u32) -> Self {
        Self { grid: [blocks, 1, 1], threads, shared_bytes: 0 }
    }
}

/// A number as `int`.
///
/// # Errors
/// It does not fit: a shape beyond what the kernels index.
pub(super) fn int(value: usize) -> Result<Argument> {
    i32::try_from(value).map(Argument::I32).map_err(|_| {
        Error::device(format!("a size of {value} is beyond what the kernels index (2³¹ − 1)"))
            .hint("use a smaller batch")
    })
}

/// A null pointer.
pub(super) const NULL: Argument = Argument::Address(0);

/// The kernels of one device in one compute type.
pub(super) struct Kernels<D: Device> {
    pub device: D,
    pub compute: ComputeType,
    /// Whether the products run on the kernels for sm_90a.
    pub uses_hopper: bool,
    /// Chooses their tiles there.
    pub tiles: Tiles,
}

impl<D: Device> Kernels<D> {
    /// Launches `name` as it is.
    ///
    /// # Safety
    /// The arguments' addresses cover what the kernel reads and writes; regions check that when they hand them out, so
    /// what is left to the caller is to ask them for the right sizes. Memory is freed by the device only behind the work.
    pub unsafe fn launch(&self, kernel: &str, shape: Shape, arguments: &[Argument]) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.launch_clusters(kernel, shape, 1, arguments) }
    }

    /// The same in clusters of so many blocks, which divide the grid.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_clusters(
        &self,
        kernel: &str,
        shape: Shape,
        cluster_blocks: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        let Shape { grid, threads, shared_bytes } = shape;
        if grid.contains(&0) {
            return Ok(()); // nothing to do: CUDA refuses an empty grid
        }
        let mut blocks = [0; 3];
        for (blocks, &wanted) in blocks.iter_mut().zip(&grid) {
            *blocks = u32::try_from(wanted)
                .map_err(|_| Error::device(format!("a grid of {grid:?} blocks")).at(kernel))?;
        }
        let dynamic_shared_bytes = shared_bytes as u32;
        let launch =
            Launch { kernel, grid: blocks, cluster_blocks, threads, dynamic_shared_bytes, arguments };
        // SAFETY: the caller's.
        unsafe { self.device.launch(&launch) }
    }

    /// Launches the kernel of the compute type.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_half(&self, kernel: &str, shape: Shape, arguments: &[Argument]) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.launch(&format!("{kernel}_{}", self.compute), shape, arguments) }
    }
}
