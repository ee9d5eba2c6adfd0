//! How much memory a model takes on a backend, told before any of it is allocated.

use crate::batch::BatchRows;
use crate::dtype::DType;
use crate::error::Result;

/// Width and rank of one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterShape {
    /// Its projection's width.
    pub out_features: usize,
    /// Its rank.
    pub rank: usize,
}

/// Widths of a linear group and of its adapters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupShape {
    /// `I`.
    pub in_features: usize,
    /// `O`.
    pub out_features: usize,
    /// Its adapters, in order.
    pub adapters: Vec<AdapterShape>,
    /// Whether these have magnitudes.
    pub has_magnitudes: bool,
}

impl GroupShape {
    /// `R`; 0 without adapters.
    pub fn rank(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.rank).sum()
    }
}

/// The largest shapes of a model's operations: what their scratch memory depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperationShapes {
    /// Tokens of a batch.
    pub tokens: usize,
    /// Labelled rows of a batch.
    pub labelled_rows: usize,
    /// `V`.
    pub vocabulary: usize,
    /// `H`.
    pub hidden: usize,
    /// `Q`.
    pub query_heads: usize,
    /// `K`.
    pub key_value_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// Every linear group.
    pub groups: Vec<GroupShape>,
    /// Of them those that read what attention leaves.
    pub attention_outputs: Vec<GroupShape>,
    /// Of them those of the MLPs: gate and up, and down.
    pub mlps: Vec<[GroupShape; 2]>,
    /// Whether norms have weights that are trained.
    pub trains_norms: bool,
    /// Whether adapters' inputs pass through dropout.
    pub has_dropout: bool,
    /// Whether there is a backward.
    pub is_training: bool,
}

/// Rows and bytes that things take on a backend, rounded up as it rounds them.
pub trait Footprint {
    /// The rows to which a batch of `rows` is to be filled up, so that shapes come again:
    /// [`Backend::repeat`](super::Backend::repeat).
    fn padded(&self, rows: BatchRows) -> BatchRows {
        rows
    }
    /// Whether the backward of an MLP of these groups reads the activation that its forward left.
    fn reads_activation(&self, gate_up: &GroupShape, down: &GroupShape) -> bool {
        let _ = gate_up;
        down.rank() > 0
    }
    /// Activations of `elements`.
    fn buffer_bytes(&self, elements: usize) -> u64;
    /// f32 values.
    fn floats_bytes(&self, elements: usize) -> u64;
    /// Frozen weights, which are `stored` in their file. Those that are read where the file is mapped count too.
    fn weight_bytes(&self, elements: u64, stored: DType) -> u64;
    /// Adapters with their gradients and whatever copies the products read.
    fn adapter_bytes(&self, parameter_count: usize, groups: &[GroupShape]) -> u64;
    /// Memory that one operation uses and the next overwrites.
    fn scratch_bytes(&self, shapes: &OperationShapes) -> u64;
    /// Allocates that memory, so that no later operation need.
    fn reserve_scratch(&self, shapes: &OperationShapes) -> Result<()>;
    /// Memory that is still free; none where allocating asks for no permission.
    fn free_bytes(&self) -> Result<Option<u64>>;
}
