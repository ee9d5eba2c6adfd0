//! `fastlora train`.

use clap::Args;

use super::Cli;
use crate::error::Result;

/// Arguments of `fastlora train`.
#[derive(Debug, Args)]
pub struct TrainArgs {}

pub(super) fn run(_args: &TrainArgs, _cli: &Cli) -> Result<()> {
    Ok(())
}
