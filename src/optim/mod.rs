//! The optimizer: AdamW over flat parameters, clipping by global norm, and the learning-rate schedule.
//!
//! It sees flat f32 buffers and knows nothing of the model.

mod adamw;
mod schedule;

pub use adamw::{AdamW, AdamWSettings};
pub use schedule::Schedule;
