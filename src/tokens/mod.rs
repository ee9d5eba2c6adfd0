//! Text → token ids → samples → batches.
//!
//! [`Tokenizer`] wraps a model's `tokenizer.json`; [`tokenise`] turns records into [`Sample`]s with their labels;
//! [`BatchPlan`] says which samples make which optimizer step, as a pure function of seed and epoch.

mod batches;
mod chat;
mod holdout;
mod lengths;
mod packing;
mod samples;
mod template;
mod tokenizer;
mod truncation;
mod visits;
mod vocabulary;
mod warnings;

pub use batches::{BatchOptions, BatchPlan, EpochOrder, Step};
pub use lengths::length_buckets;
pub use samples::{NO_LOSS, Sample, SampleOptions, SampleSet, Unconditioned, tokenise};
pub use tokenizer::Tokenizer;
pub use visits::Visit;
pub use warnings::{warn_about_ends, warn_about_overlap};
