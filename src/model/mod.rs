//! The transformer: configuration, adapters, blocks, forward and backward, on any [`Backend`](crate::backend::Backend).

mod adapted;
mod block;
pub mod config;
mod factors;
mod fields;
mod layout;
mod lora;
mod memory;
pub mod rope;
mod transformer;
mod weights;
mod whole;
mod work;
mod workspace;

pub use factors::Factors;
pub use layout::{AdapterLayout, AdapterTensor, TensorKind};
pub use lora::{AdaptedLinear, LoraConfig, ModuleLora, ModuleScales};
pub use memory::{CHOICES, MemoryPlan, ModelShape, Needs, Recompute, choose_plan};
pub use transformer::{Cache, TokenScores, Transformer, decoding_limits};
pub use whole::{BlockNorm, WholeModule, WholePlace, whole_modules};
pub use work::StepWork;
pub use workspace::{Limits, Purpose};
