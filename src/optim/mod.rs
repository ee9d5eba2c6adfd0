//! The optimizer: AdamW over flat parameters, clipping by global norm, loss scaling, and the learning-rate schedule.
//!
//! It sees flat f32 buffers and knows nothing of the model.

mod adamw;
mod loss_scale;
mod schedule;

pub use adamw::{AdamW, AdamWSettings, AdamWState};
pub use loss_scale::LossScale;
pub use schedule::Schedule;
