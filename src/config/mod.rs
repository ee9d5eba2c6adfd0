//! Configuration: as typed → checked and resolved.

mod choices;

pub use choices::{LossOn, LrScheduler, OnBadRecord, Overlong};
