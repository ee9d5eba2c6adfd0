//! Files of models: base weights, adapters, and how they reach the disk whole.

pub mod adapter;
pub mod atomic;
pub mod base;
mod finite;
pub mod folder;
pub mod hub;
pub mod mapped;
pub mod model_folder;
pub mod run;
pub mod safetensors;
mod shard_index;
pub mod volume;
