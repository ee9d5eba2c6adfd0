//! Text → token ids → samples → batches.
//!
//! [`Tokenizer`] wraps a model's `tokenizer.json`; [`tokenise`] turns records into a [`SampleSet`] with its labels,
//! [`SampleBuilder`] does so block by block, into a [`SampleFile`] where wanted; [`BatchPlan`] says which samples make
//! which optimizer step, as a pure function of seed and epoch.

mod batches;
mod builder;
mod chat;
mod holdout;
mod lengths;
mod packing;
mod sample_file;
mod sample_set;
mod samples;
mod store;
mod template;
mod tokenizer;
mod truncation;
mod visits;
mod vocabulary;
mod warnings;

pub use batches::{BatchOptions, BatchPlan, EpochOrder, Step};
pub use builder::{Built, SampleBuilder};
pub use lengths::length_buckets;
pub use sample_file::{SampleFile, SampleKey};
pub use sample_set::{NO_LOSS, Sample, SampleSet, SampleView, Unconditioned};
pub use samples::{SampleOptions, tokenise};
pub use store::Pages;
pub use tokenizer::Tokenizer;
pub use visits::Visit;
pub use warnings::{warn_about_ends, warn_about_overlap};
