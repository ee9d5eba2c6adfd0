//! Text → token ids → samples → batches.
//!
//! [`Tokenizer`] wraps a model's `tokenizer.json`; [`tokenise`] turns records into [`Sample`]s with their labels;
//! [`BatchPlan`] says which samples make which optimizer step, as a pure function of seed and epoch.

mod batches;
mod chat;
mod holdout;
mod samples;
mod template;
mod tokenizer;
mod truncation;
mod vocabulary;

pub use batches::{BatchOptions, BatchPlan, EpochOrder, Step};
pub use samples::{
    NO_LOSS, Sample, SampleOptions, SampleSet, length_buckets, tokenise, warn_about_ends, warn_about_overlap,
};
pub use tokenizer::Tokenizer;
