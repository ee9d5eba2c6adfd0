//! What things take on the CPU. Allocating asks for no permission there, so nothing is refused for its size.

use super::CpuBackend;
use crate::backend::{Footprint, GroupShape, OperationShapes};
use crate::dtype::DType;
use crate::error::Result;

/// Bytes of `elements` f32 values.
fn bytes_of(elements: usize) -> u64 {
    (elements * size_of::<f32>()) as u64
}

impl Footprint for CpuBackend {
    fn buffer_bytes(&self, elements: usize) -> u64 {
        bytes_of(elements)
    }

    fn floats_bytes(&self, elements: usize) -> u64 {
        bytes_of(elements)
    }

    fn weight_bytes(&self, elements: u64, stored: DType) -> u64 {
        elements * stored.bytes() as u64
    }

    /// Parameters and gradients; with magnitudes the norms, their f64 parts and the products that they are made of.
    fn adapter_bytes(&self, parameter_count: usize, groups: &[GroupShape]) -> u64 {
        let norms = |group: &GroupShape| {
            let (outputs, rank) = (group.out_features, group.rank());
            if group.has_magnitudes { bytes_of(3 * outputs + rank * (outputs + rank)) } else { 0 }
        };
        2 * bytes_of(parameter_count) + groups.iter().map(norms).sum::<u64>()
    }

    /// The buffers of the linear groups and the logits of one chunk; the packed panels of products, a few hundred kilobytes a
    /// thread, are left out.
    fn scratch_bytes(&self, shapes: &OperationShapes) -> u64 {
        let OperationShapes { tokens, labelled_rows, vocabulary, .. } = *shapes;
        let of_group = |group: &GroupShape| {
            let width = if shapes.has_dropout { 2 * group.in_features } else { group.in_features };
            let rank = group.rank();
            let transposed = rank * group.in_features;
            let gained = if group.has_magnitudes { tokens * group.out_features } else { 0 };
            if rank > 0 && shapes.is_training { tokens * (width + rank) + transposed + gained } else { 0 }
        };
        let linears = shapes.groups.iter().map(of_group).max().unwrap_or(0);
        bytes_of(linears + super::head::chunk_rows(vocabulary, labelled_rows) * vocabulary)
    }

    /// Scratch grows with the first step.
    fn reserve_scratch(&self, _: &OperationShapes) -> Result<()> {
        Ok(())
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}
