//! `fastlora evaluate`.

use clap::Args;

use super::Cli;
use crate::error::Result;

/// Arguments of `fastlora evaluate`.
#[derive(Debug, Args)]
pub struct EvaluateArgs {}

pub(super) fn run(_args: &EvaluateArgs, _cli: &Cli) -> Result<()> {
    Ok(())
}
