//! `fastlora schema`: the configuration's JSON Schema.

use clap::Args;

use super::output::print_line;
use crate::config::schema;
use crate::error::Result;

/// Arguments of `fastlora schema`.
#[derive(Debug, Args)]
pub struct SchemaArgs {}

pub(super) fn run(_: &SchemaArgs) -> Result<()> {
    print_line(&format!("{:#}", schema()?))
}
