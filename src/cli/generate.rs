//! `fastlora generate`.

use clap::Args;

use super::Cli;
use crate::error::Result;

/// Arguments of `fastlora generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {}

pub(super) fn run(_args: &GenerateArgs, _cli: &Cli) -> Result<()> {
    Ok(())
}
