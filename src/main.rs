//! The `fastlora` binary: parse, dispatch, print the error and leave with its exit code.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use fastlora::cli::Cli;
use fastlora::error::{self, Error};
use fastlora::ranges::{self, NvtxLayer, OnlyRanges};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let log = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(
            std::io::stderr().is_terminal()
                && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        )
        // A log that nobody reads any more must not end the run: the default reports that on the closed stream, and
        // panics.
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .with_filter(Targets::new().with_default(level).with_target(ranges::TARGET, LevelFilter::OFF));
    // Under a profiler: without one nobody listens, and ranges cost nothing.
    let nvtx = NvtxLayer::from_env().map(|layer| layer.with_filter(OnlyRanges));
    tracing_subscriber::registry().with(log).with(nvtx).init();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whether anyone still reads does not change the exit code.
            if cli.json {
                let _ = writeln!(std::io::stdout(), "{}", error.to_json());
            }
            let what = if error.kind() == error::ErrorKind::Stopped { "stopped" } else { "error" };
            let _ = writeln!(std::io::stderr(), "{what}: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// Help and version, or what is wrong with the command line.
fn usage(error: &clap::Error) -> ExitCode {
    // Nothing was parsed, so the flag is looked for by hand.
    let wants_json =
        std::env::args_os().skip(1).take_while(|argument| argument != "--").any(|flag| flag == "--json");
    if error.use_stderr() && wants_json {
        let text = error.render().to_string();
        let message = match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "no command was given",
            // The first paragraph; tip and usage follow.
            _ => text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: "),
        };
        let object =
            Error::config(message).at("command line").hint("fastlora help shows the usage").to_json();
        let _ = writeln!(std::io::stdout(), "{object}");
    }
    let _ = error.print();
    ExitCode::from(error.exit_code() as u8)
}
