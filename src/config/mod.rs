//! Configuration: as typed ([`Options`]) → checked and resolved ([`TrainingConfig`]).

mod choices;
mod comments;
mod data_source;
mod device_name;
mod hash_template;
mod init_lora_weights;
mod options;
mod pattern_map;
mod save_every;
mod schema;
mod starting;
mod target_modules;
mod tile_source;
mod token_cache;
mod training;

pub use choices::{
    ActivationMemory, LossOn, LrScheduler, OnBadRecord, OnNan, Overlong, ReportFormat, check_compute_choices,
};
pub use data_source::DataSource;
pub use device_name::DeviceName;
pub use hash_template::HashTemplate;
pub use init_lora_weights::InitLoraWeights;
pub use options::Options;
pub use pattern_map::{CompiledPatterns, PatternMap};
pub use save_every::SaveEvery;
pub use schema::schema;
pub use starting::{Choice, starting_configuration};
pub use target_modules::TargetModules;
pub use tile_source::TileSource;
pub use token_cache::TokenCache;
pub use training::{DEFAULT_CONFIG_PATH, TrainingConfig};
