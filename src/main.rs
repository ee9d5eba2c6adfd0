//! The `fastlora` binary: parse, dispatch, print the error and leave with its exit code.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use fastlora::cli::Cli;
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(
            std::io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        )
        .without_time()
        .with_target(false)
        .init();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whether anyone still reads does not change the exit code.
            if cli.json {
                let _ = writeln!(std::io::stdout(), "{}", error.to_json());
            }
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}
