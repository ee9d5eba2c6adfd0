//! What things take on a GPU, and one arena for the activations.

use super::adapter_gradients::partial_bytes;
use super::batch::most_bytes;
use super::column_sums::column_bytes;
use super::head::logits_bytes;
use super::linear::rank_leading;
use super::magnitudes::magnitude_bytes;
use super::memory::{FLOAT_BYTES, HALF_BYTES, Region};
use super::mlp::{GatePass, MiddlePass, gated_shares};
use super::recordings::bucket_of;
use super::shares_of_s::SharesOfS;
use super::{CudaBackend, Scratch, lock};
use crate::backend::{Footprint, GroupShape, OperationShapes};
use crate::batch::BatchRows;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Every buffer starts at a multiple of this: whole lines of the L2, as the driver's own allocations do.
const ALIGNMENT: usize = 256;

fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// One allocation from which buffers are cut, while the workspace is made.
pub(super) struct Arena<D: Device> {
    region: Region<D>,
    used: usize,
}

/// Nothing is fused where adapters have magnitudes.
fn middle_pass(gate_up: &GroupShape, down: &GroupShape, tokens: usize) -> Option<MiddlePass> {
    if gate_up.has_magnitudes || down.has_magnitudes {
        return None;
    }
    MiddlePass::new(&gate_up.adapters, &down.adapters, down.in_features, tokens)
}

/// Sizes of the scratch buffers, in bytes.
struct ScratchSizes {
    dropped: usize,
    gained: usize,
    ds: usize,
    partials: usize,
    rotated: usize,
    delta: usize,
    logits: usize,
    upload: usize,
}

impl ScratchSizes {
    fn new<D: Device>(shapes: &OperationShapes, backend: &CudaBackend<D>) -> Self {
        let uses_hopper = backend.kernels.uses_hopper;
        let head_rows = backend.head_rows(shapes.vocabulary, shapes.hidden);
        let only = |wanted: bool, size: usize| if wanted { size } else { 0 };
        let OperationShapes {
            tokens,
            labelled_rows,
            vocabulary,
            hidden,
            query_heads,
            key_value_heads,
            head_dim,
            ..
        } = *shapes;
        let largest = |size: &dyn Fn(&GroupShape) -> usize| shapes.groups.iter().map(size).max().unwrap_or(0);
        let dropped = largest(&|group| {
            if group.adapters.is_empty() { 0 } else { tokens * group.in_features * HALF_BYTES }
        });
        let gained = largest(&|group| {
            if group.has_magnitudes { tokens * group.out_features * HALF_BYTES } else { 0 }
        });
        let magnitudes =
            largest(&|group| magnitude_bytes(group, if shapes.is_training { tokens } else { 0 }));
        let of_middle = |[gate_up, down]: &[GroupShape; 2]| {
            middle_pass(gate_up, down, tokens).map_or(0, |pass| pass.bytes())
        };
        let gradients = largest(&|group| partial_bytes(&group.adapters, group.in_features, tokens))
            .max(shapes.mlps.iter().map(of_middle).max().unwrap_or(0))
            .max(only(shapes.trains_norms, column_bytes(tokens.max(labelled_rows), hidden)));
        let of_down = |[gate_up, down]: &[GroupShape; 2]| match uses_hopper {
            _ if gate_up.has_magnitudes || down.has_magnitudes => None,
            true => gated_shares(&down.adapters, down.in_features, tokens),
            false => GatePass::new(&down.adapters, down.in_features, tokens).map(|pass| pass.shares()),
        };
        let of_output =
            |output: &GroupShape| backend.shares_of_output(&output.adapters, [query_heads, head_dim], tokens);
        let of_outputs =
            shapes.attention_outputs.iter().filter(|output| !output.has_magnitudes).filter_map(of_output);
        let shares = shapes.mlps.iter().filter_map(of_down).chain(of_outputs);
        let shares = shares.map(SharesOfS::bytes).max().unwrap_or(0);
        Self {
            dropped: only(shapes.has_dropout && shapes.is_training, dropped),
            gained: only(shapes.is_training, gained),
            ds: only(shapes.is_training, largest(&|group| tokens * rank_leading(group.rank()) * HALF_BYTES)),
            partials: only(shapes.is_training, gradients).max(shares).max(magnitudes),
            rotated: tokens * (query_heads + key_value_heads) * head_dim * HALF_BYTES,
            delta: only(shapes.is_training, tokens * query_heads * FLOAT_BYTES),
            logits: logits_bytes(vocabulary, labelled_rows.clamp(1, head_rows)),
            upload: most_bytes(tokens, labelled_rows),
        }
    }

    fn total(&self) -> usize {
        [
            self.dropped,
            self.gained,
            self.ds,
            self.partials,
            self.rotated,
            self.delta,
            self.logits,
            self.upload,
        ]
        .map(aligned)
        .iter()
        .sum()
    }
}

impl<D: Device> Footprint for CudaBackend<D> {
    fn padded(&self, rows: BatchRows) -> BatchRows {
        bucket_of(rows)
    }

    /// The pass over the MLP's middle computes it again.
    fn reads_activation(&self, gate_up: &GroupShape, down: &GroupShape) -> bool {
        down.rank() > 0 && middle_pass(gate_up, down, 1).is_none()
    }

    fn buffer_bytes(&self, elements: usize) -> u64 {
        aligned(elements * HALF_BYTES) as u64
    }

    fn floats_bytes(&self, elements: usize) -> u64 {
        aligned(elements * FLOAT_BYTES) as u64
    }

    fn weight_bytes(&self, elements: u64, _: DType) -> u64 {
        elements * HALF_BYTES as u64
    }

    fn adapter_bytes(&self, parameter_count: usize, groups: &[GroupShape]) -> u64 {
        let packed = |group: &GroupShape| {
            let norms = if group.has_magnitudes { 2 * self.floats_bytes(group.out_features) } else { 0 };
            self.buffer_bytes(group.out_features * rank_leading(group.rank())) + norms
        };
        2 * self.floats_bytes(parameter_count)
            + self.buffer_bytes(parameter_count)
            + groups.iter().map(packed).sum::<u64>()
    }

    fn scratch_bytes(&self, shapes: &OperationShapes) -> u64 {
        ScratchSizes::new(shapes, self).total() as u64
    }

    fn reserve_scratch(&self, shapes: &OperationShapes) -> Result<()> {
        let sizes = ScratchSizes::new(shapes, self);
        let mut scratch = lock(&self.scratch);
        scratch.upload_buffer(self.device(), sizes.upload)?;
        let Scratch { dropped, gained, ds, partials, rotated, delta, logits, .. } = &mut *scratch;
        for (growing, bytes) in [
            (dropped, sizes.dropped),
            (gained, sizes.gained),
            (ds, sizes.ds),
            (partials, sizes.partials),
            (rotated, sizes.rotated),
            (delta, sizes.delta),
            (logits, sizes.logits),
        ] {
            if bytes > 0 {
                growing.reserve(self.device(), bytes)?;
            }
        }
        Ok(())
    }

    fn free_bytes(&self) -> Result<Option<u64>> {
        self.device().free_memory_bytes()
    }
}

impl<D: Device> CudaBackend<D> {
    /// Runs `make`, whose buffers are cut from one allocation of `bytes`. Where the device watches the bounds of every
    /// allocation, each keeps its own.
    pub(super) fn cut_from_arena<R>(&self, bytes: u64, make: impl FnOnce() -> Result<R>) -> Result<R> {
        if self.device().guards_allocations() {
            return make();
        }
        let bytes =
            usize::try_from(bytes).map_err(|_| Error::device(format!("an arena of {bytes} bytes")))?;
        let region = Region::allocate(self.device(), bytes)?;
        *lock(&self.arena) = Some(Arena { region, used: 0 });
        let made = make();
        *lock(&self.arena) = None;
        made
    }

    /// `bytes` of the arena, or memory of their own.
    pub(super) fn cut(&self, bytes: usize) -> Result<Region<D>> {
        match &mut *lock(&self.arena) {
            None => Region::allocate(self.device(), bytes),
            Some(arena) => {
                let part = arena.region.part(arena.used, bytes)?;
                arena.used += aligned(bytes);
                Ok(part)
            }
        }
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use super::super::ComputeType;
    use super::*;
    use crate::backend::{Dropout, PassSettings};
    use crate::checkpoint::adapter::read_adapter;
    use crate::checkpoint::base::BaseModel;
    use crate::config::ActivationMemory;
    use crate::device::emulator::Emulator;
    use crate::model::{Limits, Transformer};
    use crate::selftest::inputs::batch_of;

    /// Bytes of the scratch buffers that a step uses.
    fn sizes<D: Device>(backend: &CudaBackend<D>) -> Vec<Option<usize>> {
        let scratch = lock(&backend.scratch);
        let Scratch { dropped, gained, ds, partials, rotated, delta, logits, .. } = &*scratch;
        [dropped, gained, ds, partials, rotated, delta, logits]
            .map(|growing| growing.region().map(Region::bytes))
            .to_vec()
    }

    #[test]
    fn a_step_fits_the_scratch_memory_that_was_planned() {
        for (base, name) in [
            ("tiny_qwen2", "trained/dora_whole/adapter_init"),
            ("tiny_qwen3", "trained/whole/adapter_init"),
            ("tiny_qwen2", "tiny_qwen2/adapter_init_brand"),
        ] {
            for is_hopper in [false, true] {
                let device = Emulator::of(is_hopper, false).unwrap();
                let backend = Arc::new(CudaBackend::new(device, ComputeType::Bf16));
                let fixtures = Path::new("tests/fixtures");
                let base = BaseModel::open(fixtures.join(base)).unwrap();
                let adapter = read_adapter(&fixtures.join(name)).unwrap();
                let mut model = Transformer::load_with_adapter(backend, &base, &adapter).unwrap();
                let batch = batch_of(&[90, 41], 200);
                let (tokens, labelled_rows) = (batch.token_count(), batch.labelled_count());
                let limits = Limits { tokens, labelled_rows, positions: 90 };
                model.reserve_training(limits, ActivationMemory::Fast, true).unwrap();
                let planned = sizes(model.backend());
                let dropout = Some(Dropout { probability: 0.2, seed: 3, epoch: 0 });
                let settings = PassSettings { gradient_scale: 0.01, dropout, ..PassSettings::default() };
                model.accumulate_gradients(&batch, settings).unwrap();
                assert_eq!(sizes(model.backend()), planned, "{name}, Hopper's kernels: {is_hopper}");
            }
        }
    }
}
