//! The `s = x · Aᵀ` of an adapter where the kernel that makes `x` takes it: shares of stretches of the columns of `x`, which
//! are then added up in order (lora.cu).

use super::launch::{Shape, int};
use super::linear::{ELEMENT_THREADS, rank_leading};
use super::memory::{CudaBuffer, CudaFloats, FLOAT_BYTES};
use super::products::boxes;
use super::{CudaBackend, Scratch};
use crate::backend::{AdapterShape, LinearGroup};
use crate::device::{Argument, Device};
use crate::error::Result;

/// Ranks that Hopper's kernels have room for: `share_ranks` in shares_of_s.h.
const HOPPER_RANKS: usize = 64;

/// How the `s` of one adapter is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SharesOfS {
    pub stretches: usize,
    pub tokens: usize,
    pub rank: usize,
}

impl SharesOfS {
    /// By Hopper's kernels: none where there is no adapter, or one of more ranks than they have room for.
    pub fn on_hopper(adapters: &[AdapterShape], stretches: usize, tokens: usize) -> Option<Self> {
        match *adapters {
            [AdapterShape { rank, .. }] if rank <= HOPPER_RANKS => Some(Self { stretches, tokens, rank }),
            _ => None,
        }
    }

    /// Elements of `s [T, r̄]`, a multiple of 8.
    fn elements(self) -> usize {
        self.tokens * rank_leading(self.rank)
    }

    /// Bytes of all shares.
    pub fn bytes(self) -> usize {
        self.stretches * self.elements() * FLOAT_BYTES
    }
}

/// What a kernel takes shares with.
pub(super) struct ShareOperands {
    pub shares: SharesOfS,
    /// `[rank, I]`.
    pub a: Argument,
    /// `[stretches, T, r̄]`, f32.
    pub partials: Argument,
}

impl ShareOperands {
    /// `A` for Hopper's kernels.
    pub fn boxes_of_a(&self, inputs: usize) -> Result<Argument> {
        boxes(self.a, [self.shares.rank, inputs], inputs, HOPPER_RANKS)
    }
}

impl<D: Device> CudaBackend<D> {
    /// For the only adapter of `group`; the shares stand in scratch memory.
    pub(super) fn share_operands(
        &self,
        shares: SharesOfS,
        group: &LinearGroup<Self>,
        parameters: &CudaFloats<D>,
        scratch: &mut Scratch<D>,
    ) -> Result<ShareOperands> {
        let partials = scratch.partials.reserve(self.device(), shares.bytes())?.first(shares.bytes())?;
        Ok(ShareOperands { shares, a: self.adapter_a(group, parameters)?, partials })
    }

    /// Adds up the shares, which a kernel has written, into `s [T, r̄]`.
    pub(super) fn sum_shares(&self, operands: &ShareOperands, s: &CudaBuffer<D>) -> Result<()> {
        let &ShareOperands { shares, partials, .. } = operands;
        let elements = shares.elements();
        let arguments =
            [partials, s.first(elements)?, int(shares.stretches)?, Argument::I64(elements as i64)];
        let shape = Shape::blocks((elements / 4).div_ceil(ELEMENT_THREADS), ELEMENT_THREADS as u32);
        // SAFETY: partials [stretches, T, r̄], s [T, r̄].
        unsafe { self.kernels.launch_half("lora_sum_s", shape, &arguments) }
    }
}
