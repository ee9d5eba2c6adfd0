//! What a run takes of a device's memory, told without a device: the workspace is planned by the code that allocates
//! it, on a meter instead of a backend.

use std::cell::Cell;

use super::block::{BlockShape, GROUP_COUNT};
use super::config::ModelConfig;
use super::lora::{AdapterLayout, LoraConfig};
use super::workspace::{Limits, Purpose, Workspace};
use crate::backend::Backend;
use crate::error::Result;

/// Where buffers come from: a backend, or a meter that only counts them.
pub(super) trait Allocator {
    /// Activations in the compute type.
    type Buffer;
    /// f32 values.
    type Floats;
    /// Activations of `elements`.
    fn buffer(&self, elements: usize) -> Result<Self::Buffer>;
    /// `elements` zeros.
    fn zeros(&self, elements: usize) -> Result<Self::Floats>;
    /// As [`Backend::low_rank_stride`].
    fn low_rank_stride(&self, rank: usize) -> usize;
}

impl<B: Backend> Allocator for B {
    type Buffer = <B as Backend>::Buffer;
    type Floats = <B as Backend>::Floats;

    fn buffer(&self, elements: usize) -> Result<Self::Buffer> {
        Backend::buffer(self, elements)
    }

    fn zeros(&self, elements: usize) -> Result<Self::Floats> {
        self.floats(&vec![0.0; elements])
    }

    fn low_rank_stride(&self, rank: usize) -> usize {
        Backend::low_rank_stride(self, rank)
    }
}

/// Counts elements.
struct Meter<'a> {
    buffers: Cell<u64>,
    floats: Cell<u64>,
    low_rank_stride: &'a dyn Fn(usize) -> usize,
}

impl Allocator for Meter<'_> {
    type Buffer = ();
    type Floats = ();

    fn buffer(&self, elements: usize) -> Result<()> {
        self.buffers.set(self.buffers.get().saturating_add(elements as u64));
        Ok(())
    }

    fn zeros(&self, elements: usize) -> Result<()> {
        self.floats.set(self.floats.get().saturating_add(elements as u64));
        Ok(())
    }

    fn low_rank_stride(&self, rank: usize) -> usize {
        (self.low_rank_stride)(rank)
    }
}

/// Bytes of a run by what they hold; scratch inside a backend's operations is not among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The frozen base. On a CPU these bytes are of the memory-mapped files, and shared with whoever else maps them.
    pub weights: u64,
    /// Adapter parameters and their gradients, f32, and a copy in the compute type where a device wants one.
    pub adapters: u64,
    /// AdamW's two moments, f32.
    pub optimizer: u64,
    /// The workspace of the longest batch, and the table of rotations.
    pub activations: u64,
}

impl MemoryPlan {
    /// All of it.
    pub fn total(&self) -> u64 {
        [self.weights, self.adapters, self.optimizer, self.activations]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// What a device holds things in.
pub struct MemoryFormat<'a> {
    /// Bytes of the base's weights on the device.
    pub weight_bytes: u64,
    /// Bytes of one activation.
    pub activation_bytes: u64,
    /// Bytes of each adapter parameter's copy in the compute type; 0 where there is none.
    pub adapter_copy_bytes: u64,
    /// As [`Backend::low_rank_stride`].
    pub low_rank_stride: &'a dyn Fn(usize) -> usize,
}

impl MemoryPlan {
    /// The memory of training `lora` on a model of this shape with batches within `limits`.
    ///
    /// # Errors
    /// Targets that match no module (fault 45).
    pub fn training(
        config: &ModelConfig,
        lora: &LoraConfig,
        limits: Limits,
        format: &MemoryFormat<'_>,
    ) -> Result<Self> {
        let linears = lora.linears(config)?;
        let ranks: Vec<[usize; GROUP_COUNT]> = linears
            .chunks_exact(linears.len() / config.layer_count)
            .map(|layer| {
                let targets = |range: std::ops::Range<usize>| {
                    layer[range].iter().filter(|(_, is_target)| *is_target).count() * lora.rank
                };
                [targets(0..3), targets(3..4), targets(4..6), targets(6..7)]
            })
            .collect();
        let meter =
            Meter { buffers: Cell::new(0), floats: Cell::new(0), low_rank_stride: format.low_rank_stride };
        Workspace::new(&meter, &BlockShape::new(config), &ranks, Purpose::Training, limits)?;
        let float_bytes = size_of::<f32>() as u64;
        let rotations = (limits.positions * config.head_dim) as u64;
        let mut layout = AdapterLayout::default();
        layout.push_group(lora, &linears);
        let parameters = layout.parameter_count() as u64;
        Ok(Self {
            weights: format.weight_bytes,
            adapters: (2 * float_bytes + format.adapter_copy_bytes) * parameters,
            optimizer: 2 * float_bytes * parameters,
            activations: meter.buffers.get() * format.activation_bytes
                + (meter.floats.get() + rotations) * float_bytes,
        })
    }
}
