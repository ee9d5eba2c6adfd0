//! The transformer: configuration, adapters, blocks, forward and backward, on any [`Backend`](crate::backend::Backend).

mod adapted;
mod block;
pub mod config;
mod fields;
mod lora;
mod memory;
pub mod rope;
mod transformer;
mod work;
mod workspace;

pub use lora::{AdaptedLinear, AdapterLayout, AdapterTensor, LoraConfig, ModuleLora, ModuleScales};
pub use memory::{CHOICES, MemoryPlan, ModelShape, Needs, Recompute, choose_plan};
pub use transformer::{Cache, TokenScores, Transformer};
pub use work::StepWork;
pub use workspace::{Limits, Purpose};
