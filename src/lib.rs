//! Fast, trustworthy LoRA fine-tuning of language models.
//!
//! The modules stand in the order in which data flows: [`config`] → [`data`] → [`tokens`] → [`batch`] → [`model`] →
//! [`optim`] → [`checkpoint`]; [`training`] joins them, in one process or, with [`distributed`], in several, and
//! [`inference`] uses what came out. Each is usable alone.
#![warn(missing_docs)]

pub mod dtype;
pub mod error;
pub mod ranges;
pub mod tensor;

pub mod config;
pub mod data;
pub mod tokens;

pub mod batch;

pub mod device;

pub mod backend;
pub mod checkpoint;
pub mod distributed;
pub mod model;
pub mod optim;
pub mod pissa;

pub mod cli;
pub mod evaluation;
pub mod export;
pub mod import;
pub mod inference;
pub mod report;
pub mod selftest;
pub mod training;
