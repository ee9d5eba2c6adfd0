//! `fastlora completions` and `fastlora man`: what shells and `man` want to know.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::output::{accept_closed, print_line};
use crate::error::{Error, Result};

/// Arguments of `fastlora completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell: `fastlora completions bash > ~/.local/share/bash-completion/completions/fastlora`.
    #[arg(value_enum)]
    shell: Shell,
}

/// Arguments of `fastlora man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Writes the pages of all verbs into this folder; without it, the first page goes to standard output.
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

pub(super) fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "fastlora", &mut script);
    accept_closed(std::io::stdout().lock().write_all(&script))
}

pub(super) fn man(args: &ManArgs) -> Result<()> {
    let Some(folder) = &args.folder else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command())
            .render(&mut page)
            .map_err(|error| Error::internal("cannot render the page").caused_by(error))?;
        return accept_closed(std::io::stdout().lock().write_all(&page));
    };
    std::fs::create_dir_all(folder)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
        .map_err(|error| Error::file("write the pages", folder, error))?;
    print_line(&format!("{}: man -l {0}/fastlora.1", folder.display()))
}
