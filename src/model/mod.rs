//! The transformer: configuration, adapters, blocks, forward and backward, on any [`Backend`](crate::backend::Backend).

mod lora;

pub use lora::{AdapterLayout, AdapterTensor, LoraConfig, TargetModules};
