//! The transformer: configuration, adapters, blocks, forward and backward, on any [`Backend`](crate::backend::Backend).

pub mod config;
mod fields;
mod lora;
pub mod rope;

pub use lora::{AdapterLayout, AdapterTensor, LoraConfig, TargetModules};
