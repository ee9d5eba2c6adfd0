//! The CPU backend: f32 on all cores.

pub mod matmul;
pub mod simd;
