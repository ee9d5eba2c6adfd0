//! `fastlora import`.

use clap::Args;

use super::Cli;
use crate::error::Result;

/// Arguments of `fastlora import`.
#[derive(Debug, Args)]
pub struct ImportArgs {}

pub(super) fn run(_args: &ImportArgs, _cli: &Cli) -> Result<()> {
    Ok(())
}
