//! Every kernel against float64 on the emulator: ragged shapes, f16 and bf16, several schedules whose bits must agree, the
//! race checker, outputs that start as NaN. With `FASTLORA_TEST_DEVICE=cuda:0` the same on a GPU.
//!
//! The references are written here from the formulas, in f64 over the rounded inputs. A tolerance is what the format and
//! the length of the sums allow: roundings to the half type, and f32 additions against the sum of the terms' magnitudes.
#![cfg(feature = "emulator")]

mod activation;
mod adamw;
mod attention;
mod attention_cached;
mod attention_fused;
mod attention_launches;
mod conformance;
mod cross_entropy;
mod element_wise;
mod gated_down;
mod harness;
mod layer_norm;
mod linear;
mod linear_fused;
mod lora;
mod lora_back;
mod lora_group;
mod magnitude;
mod mlp_back;
mod norms;
mod random_angles;
mod rms_norm_down;
mod rope;
mod shares_of_s;
