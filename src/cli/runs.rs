//! `fastlora runs`: the runs in the output folders here, one in detail, two side by side.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Map, Value, json};

use super::Cli;
use super::output::{for_terminal, print_line};
use crate::error::{Error, Result, escape_control, shorten};
use crate::report::{RunFolder, find_runs, loss_curve};

/// Folders here that are looked into where none is named.
const DEFAULT_ROOTS: &str = "outputs";
/// Characters of a value in a table.
const SHOWN_CHARACTERS: usize = 60;

/// Arguments of `fastlora runs`.
#[derive(Debug, Args)]
pub struct RunsArgs {
    #[command(subcommand)]
    command: RunsCommand,
}

#[derive(Debug, Subcommand)]
enum RunsCommand {
    /// List the runs in folders, in the order in which they were last written.
    List {
        /// Folders that hold output folders, or are some; without any, all here whose names begin with `outputs`.
        folders: Vec<PathBuf>,
    },
    /// Show a run: figures, curve, losses by hash, configuration.
    Show {
        /// The output folder.
        folder: PathBuf,
    },
    /// Compare two runs: what differs in their configurations, and their figures.
    Compare {
        /// One output folder.
        one: PathBuf,
        /// The other.
        other: PathBuf,
    },
}

pub(super) fn run(args: &RunsArgs, cli: &Cli) -> Result<()> {
    match &args.command {
        RunsCommand::List { folders } => list(folders, cli),
        RunsCommand::Show { folder } => show(&RunFolder::open(folder)?, cli),
        RunsCommand::Compare { one, other } => compare(&RunFolder::open(one)?, &RunFolder::open(other)?, cli),
    }
}

fn list(folders: &[PathBuf], cli: &Cli) -> Result<()> {
    let roots = match folders {
        [] => default_roots()?,
        named => named.to_vec(),
    };
    let mut paths = BTreeSet::new();
    for root in &roots {
        paths.extend(find_runs(root)?);
    }
    let mut runs = Vec::new();
    for path in paths {
        match RunFolder::open(&path) {
            Ok(run) => runs.push(run),
            // One damaged run does not hide the others.
            Err(error) => tracing::warn!("left out: {error}"),
        }
    }
    runs.sort_by_key(|run| run.last_written);
    if cli.json {
        return print_line(&format!("{:#}", runs.iter().map(object).collect::<Value>()));
    }
    if runs.is_empty() {
        let looked: Vec<String> = roots.iter().map(|root| root.display().to_string()).collect();
        let place = if looked.is_empty() { format!("{DEFAULT_ROOTS}*") } else { looked.join(", ") };
        return print_line(&format!("no runs in {}", escape_control(&place)));
    }
    let mut table =
        table(["run", "last written", "model", "steps", "loss", "best validation", "tokens/s", "state"]);
    for column in table.column_iter_mut().skip(3).take(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for run in &runs {
        let figures = run.figures();
        table.add_row([
            cell(&run.path.display().to_string()),
            run.last_written.map_or_else(|| "–".into(), |time| time.format("%Y-%m-%d %H:%M").to_string()),
            cell(run.model()),
            number(&figures["steps"], 0),
            number(&figures["last_loss"], 4),
            number(&figures["best_validation_loss"], 4),
            number(&figures["tokens_per_second"], 0),
            run.state.name().to_string(),
        ]);
    }
    print_line(&table.to_string())
}

/// The folders here whose names begin with `outputs`.
fn default_roots() -> Result<Vec<PathBuf>> {
    let failed = |source| Error::file("read", "the current folder", source);
    let mut roots = Vec::new();
    for entry in std::fs::read_dir(".").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if name.to_string_lossy().starts_with(DEFAULT_ROOTS) && Path::new(&name).is_dir() {
            roots.push(PathBuf::from(name));
        }
    }
    Ok(roots)
}

fn show(run: &RunFolder, cli: &Cli) -> Result<()> {
    if cli.json {
        let mut object = object(run);
        let by_hash: Map<String, Value> = run
            .history
            .hashes()
            .into_iter()
            .map(|hash| (hash.to_string(), json!(run.history.losses_of(hash).last().map(|point| point.1))))
            .collect();
        object["validation_loss_by_hash"] = Value::Object(by_hash);
        object["config"] = Value::Object(run.config.clone());
        return print_line(&format!("{object:#}"));
    }
    let mut lines = vec![format!("{}: {}", run.path.display(), run.state.name())];
    if let Some(error) = &run.error {
        lines.push(format!("ended by an error: {}", error_text(error)));
    }
    if let Some(step) = run.checkpoint {
        lines.push(format!("newest checkpoint after step {step}"));
    }
    let figures = run.figures();
    for (name, value) in figures.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        lines.push(format!("{:<24}{}", name.replace('_', " "), figure(name, value)));
    }
    lines.extend(loss_curve(&run.history));
    if !run.history.validations.is_empty() {
        let mut table = table(["hash", "first loss", "last loss"]);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for hash in run.history.hashes() {
            let losses = run.history.losses_of(hash);
            let ends = [losses.first(), losses.last()].map(|end| number(&json!(end.map(|point| point.1)), 4));
            table.add_row([cell(hash), ends[0].clone(), ends[1].clone()]);
        }
        lines.push(table.to_string());
    }
    for (key, value) in &run.config {
        lines.push(format!("{key:<32}{}", setting(value)));
    }
    print_line(&for_terminal(&lines.join("\n")))
}

fn compare(one: &RunFolder, other: &RunFolder, cli: &Cli) -> Result<()> {
    let keys: BTreeSet<&String> = one.config.keys().chain(other.config.keys()).collect();
    let absent = Value::Null;
    let value = |run: &RunFolder, key: &str| run.config.get(key).unwrap_or(&absent).clone();
    let differences: Vec<(&str, Value, Value)> = keys
        .into_iter()
        .map(|key| (key.as_str(), value(one, key), value(other, key)))
        .filter(|(_, one, other)| one != other)
        .collect();
    if cli.json {
        let config: Map<String, Value> =
            differences.into_iter().map(|(key, one, other)| (key.to_string(), json!([one, other]))).collect();
        return print_line(&format!(
            "{:#}",
            json!({ "runs": [object(one), object(other)], "config": config })
        ));
    }
    let names = [one, other].map(|run| cell(&run.path.display().to_string()));
    let mut settings = table(["configuration", &names[0], &names[1]]);
    for (key, one, other) in &differences {
        settings.add_row([key.to_string(), cell(&setting(one)), cell(&setting(other))]);
    }
    let mut figures = table(["figures", &names[0], &names[1]]);
    for column in figures.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let values = [one, other].map(RunFolder::figures);
    for (name, first) in values[0].as_object().into_iter().flatten() {
        let row = [figure(name, first), figure(name, &values[1][name])];
        figures.add_row([name.replace('_', " "), row[0].clone(), row[1].clone()]);
    }
    figures.add_row(["state", one.state.name(), other.state.name()]);
    print_line(&format!("{settings}\n{figures}"))
}

/// A run in `--json`.
fn object(run: &RunFolder) -> Value {
    let mut object = json!({
        "run": run.path,
        "last_written": run.last_written.map(|time| time.to_rfc3339()),
        "model": run.model(),
        "state": run.state.name(),
        "checkpoint": run.checkpoint,
        "error": run.error,
    });
    if let (Some(object), Value::Object(figures)) = (object.as_object_mut(), run.figures()) {
        object.extend(figures);
    }
    object
}

/// Place and message of an error as `--json` has it.
fn error_text(error: &Value) -> String {
    let text = |key: &str| error[key].as_str().map(escape_control);
    match (text("where"), text("message")) {
        (Some(place), Some(message)) => format!("{place}: {message}"),
        (_, message) => message.unwrap_or_else(|| "not known".into()),
    }
}

fn table<'t>(header: impl IntoIterator<Item = &'t str>) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED).set_header(header);
    table
}

/// Text for a cell: on one line, of bounded width, without control characters.
fn cell(text: &str) -> String {
    escape_control(&shorten(text, SHOWN_CHARACTERS))
}

fn number(value: &Value, digits: usize) -> String {
    value.as_f64().map_or("–".to_string(), |value| format!("{value:.digits$}"))
}

/// A figure by its name: losses with four digits, counts as they are.
fn figure(name: &str, value: &Value) -> String {
    match value {
        Value::Number(count) if count.is_u64() => count.to_string(),
        value => number(value, if name.ends_with("loss") { 4 } else { 1 }),
    }
}

/// A value of the configuration; `–` for none.
fn setting(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
