//! Configuration: as typed → checked and resolved.

mod choices;
mod data_source;

pub use choices::{LossOn, LrScheduler, OnBadRecord, Overlong};
pub use data_source::DataSource;
