//! The `fastlora` binary: parse, dispatch, print the error and leave with its exit code.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Mutex;

use clap::Parser;
use clap::error::ErrorKind;
use fastlora::cli::Cli;
use fastlora::error::{self, Error, Result};
use fastlora::ranges::timing::TimingLayer;
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
    let mut log_file = None;
    let result = open_log(&cli).and_then(|file| {
        start_log(&cli, file.as_ref())?;
        log_file = file;
        cli.run()
    });
    let Err(error) = result else { return ExitCode::SUCCESS };
    // Whether anyone still reads does not change the exit code.
    if cli.json {
        let _ = writeln!(std::io::stdout(), "{}", error.to_json());
    }
    let what = if error.kind() == error::ErrorKind::Stopped { "stopped" } else { "error" };
    let line = format!("{}{what}: {error}", prefix(&cli));
    if cli.json {
        // As all lines of the log.
        let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
        let line = serde_json::json!({ "timestamp": time, "level": "ERROR", "fields": { "message": line } });
        let _ = writeln!(std::io::stderr(), "{line}");
    } else {
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    if let Some(file) = &mut log_file {
        let _ = writeln!(file, "{line}");
    }
    ExitCode::from(error.kind().exit_code())
}

fn open_log(cli: &Cli) -> Result<Option<File>> {
    let open = |path| OpenOptions::new().create(true).append(true).open(path);
    let file =
        cli.log_file.as_ref().map(|path| open(path).map_err(|source| Error::file("open", path, source)));
    file.transpose()
}

/// The log goes to standard error, and to the file with more detail.
fn start_log(cli: &Cli, file: Option<&File>) -> Result<()> {
    let level = match (cli.quiet, cli.verbose) {
        (true, _) => LevelFilter::ERROR,
        // The first process says it for all.
        (false, 0) if cli.follower_rank().is_some() => LevelFilter::ERROR,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    // A log that nobody reads any more must not end the run: the default reports that on the closed stream, and panics.
    let layer = || tracing_subscriber::fmt::layer().with_target(false).log_internal_errors(false);
    let without_ranges =
        |level| Targets::new().with_default(level).with_target(ranges::TARGET, LevelFilter::OFF);
    let has_colour =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let terminal = layer().with_writer(Mutex::new(Prefixed::new(cli, io::stderr())));
    let mut layers = vec![match cli.json {
        true => terminal.json().with_filter(without_ranges(level)).boxed(),
        false => terminal.with_ansi(has_colour).without_time().with_filter(without_ranges(level)).boxed(),
    }];
    if let Some(file) = file {
        let file =
            file.try_clone().map_err(|source| Error::io("cannot open the log twice").caused_by(source))?;
        let file = layer()
            .with_writer(Mutex::new(Prefixed { json: false, ..Prefixed::new(cli, file) }))
            .with_ansi(false);
        layers.push(file.with_filter(without_ranges(level.max(LevelFilter::DEBUG))).boxed());
    }
    // Under a profiler: without one nobody listens, and ranges cost nothing.
    if let Some(nvtx) = NvtxLayer::from_env() {
        layers.push(nvtx.with_filter(OnlyRanges).boxed());
    }
    if cli.times_operations() {
        layers.push(TimingLayer.with_filter(OnlyRanges).boxed());
    }
    tracing_subscriber::registry().with(layers).init();
    Ok(())
}

/// What begins the lines of a process that is not the first of its run.
fn prefix(cli: &Cli) -> String {
    cli.follower_rank().map_or_else(String::new, |rank| format!("rank {rank} "))
}

/// A log whose lines say which process they are of, where there are several.
struct Prefixed<W> {
    inner: W,
    rank: Option<usize>,
    json: bool,
}

impl<W: Write> Prefixed<W> {
    fn new(cli: &Cli, inner: W) -> Self {
        Self { inner, rank: cli.follower_rank(), json: cli.json }
    }
}

impl<W: Write> Write for Prefixed<W> {
    /// A line of the log comes whole.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let Some(rank) = self.rank else { return self.inner.write(line) };
        let text = match line.strip_prefix(b"{") {
            Some(rest) if self.json => [format!("{{\"rank\":{rank},").as_bytes(), rest].concat(),
            _ => [format!("rank {rank} ").as_bytes(), line].concat(),
        };
        self.inner.write_all(&text).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
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
