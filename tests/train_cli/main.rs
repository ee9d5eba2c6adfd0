//! The promises of `fastlora train`, through the binary, on tiny models.

#[path = "../support/mod.rs"]
mod support;

mod adapter_out;
mod chat;
mod checkpoint_faults;
mod conditioning;
mod configuration;
mod data_faults;
mod dry_run;
#[cfg(feature = "emulator")]
mod emulator;
mod families;
mod fault_table;
mod faulty_files;
mod golden;
mod interruptions;
mod invariance;
mod numerical;
mod order_of_checks;
mod outputs;
mod processes;
#[cfg(target_os = "linux")]
mod profile;
mod resume;
mod run_faults;
mod sampling;
mod seeing;
mod snapshots;
mod speaking;
mod storage_faults;
mod token_cache;
#[cfg(feature = "emulator")]
mod tuning;
mod variants;
mod workspace;
