//! What a run says and writes when it ends.

use std::path::PathBuf;

use chrono::Local;
use serde_json::json;
use tracing::{info, warn};

use super::super::Cli;
use super::super::output::{for_terminal, print_line, shell_word};
use super::output::{best_folder, checkpoints_folder};
use super::progress::human_time;
use super::time_by_operation::TimeByOperation;
use crate::checkpoint::adapter::{ADAPTER_WEIGHTS, CHAT_TEMPLATE};
use crate::checkpoint::atomic::replace_file;
use crate::checkpoint::run::read_json;
use crate::config::{ReportFormat, TrainingConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::report::{FAILURE, History, PROVENANCE, loss_curve, write_page};
use crate::training::TrainingSummary;

/// The run ended on request before its end.
pub(super) fn stopped(config: &TrainingConfig, steps: u64, total_steps: u64) -> Error {
    let output = config.output_dir.display();
    Error::stopped(format!("after step {steps} of {total_steps}, as asked; there is a checkpoint"))
        .at(checkpoints_folder(config).join(format!("step-{steps}")).display().to_string())
        .hint(format!("fastlora train --resume {output} goes on"))
}

/// Notes in the output folder that an error ended the run, for those who look at its figures later, and writes the page.
/// What fails here is warned about: the run's error is the one to tell.
pub(super) fn note_failure(config: &TrainingConfig, error: &Error, device: String) {
    // A run that was stopped on request has not failed.
    if error.kind() == ErrorKind::Stopped {
        return;
    }
    let text = format!("{:#}\n", error.to_json());
    if let Err(error) = replace_file(&config.output_dir.join(FAILURE), text.as_bytes()) {
        warn!("{error}");
    }
    write_report(config, Some(device));
}

/// Writes `report.html` where it is wanted. A page that fails is no failure of the run, whose adapter is saved.
///
/// `device` says what computed; without it, what the finished run says of itself.
pub(super) fn write_report(config: &TrainingConfig, device: Option<String>) {
    if !config.report.contains(&ReportFormat::Html) {
        return;
    }
    let folder = &config.output_dir;
    let saved = || read_json(&folder.join(PROVENANCE)).ok()?["computed_by"].as_str().map(str::to_string);
    let environment = [
        ("written", Local::now().format("%Y-%m-%d %H:%M:%S %:z").to_string()),
        ("fastlora", env!("CARGO_PKG_VERSION").to_string()),
        ("device", device.or_else(saved).unwrap_or_else(|| "not known".into())),
        ("system", format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH)),
    ];
    if let Err(error) = write_page(folder, &environment) {
        warn!("no report: {error}");
    }
}

/// Says how the run went, on the log or as an object.
pub(super) fn report(
    cli: &Cli,
    config: &TrainingConfig,
    summary: &TrainingSummary,
    times: Option<&TimeByOperation>,
) -> Result<()> {
    let best_folder = existing_best_folder(config);
    let best = summary
        .best_validation
        .map(|(step, loss)| json!({ "step": step, "loss": loss, "folder": best_folder }));
    let tokens_per_second = summary.tokens as f64 / summary.training_seconds.max(1e-9);
    // The figures decorate the end: without them it is the same.
    let history = History::read(&config.output_dir).unwrap_or_default();
    if !cli.json
        && let Some(curve) = loss_curve(&history)
    {
        info!("loss:\n{curve}");
    }
    info!(
        "{} steps in {}, {tokens_per_second:.0} tokens/s; training loss {:.4} at the first step, {:.4} at the last",
        summary.steps,
        human_time(summary.training_seconds),
        summary.first_loss,
        summary.last_loss
    );
    if let Some((step, loss)) = summary.best_validation {
        match &best_folder {
            Some(folder) => info!("best validation loss {loss:.4} at step {step}: {}", folder.display()),
            None => info!("best validation loss {loss:.4} at step {step}, whose adapter is no longer there"),
        }
    }
    info!("adapter: {}", config.output_dir.display());
    for command in next_commands(config, summary, &history) {
        info!("next: {}", for_terminal(&command));
    }
    if cli.json {
        let result = json!({
            "output_dir": config.output_dir,
            "time_by_operation": times.map(TimeByOperation::to_json),
            "steps": summary.steps,
            "first_loss": summary.first_loss,
            "last_loss": summary.last_loss,
            "validation_loss": summary.last_validation_loss,
            "best": best,
            "tokens": summary.tokens,
            "training_seconds": summary.training_seconds,
        });
        return print_line(&result.to_string());
    }
    Ok(())
}

/// Where the best adapter is; none where someone took it away.
fn existing_best_folder(config: &TrainingConfig) -> Option<PathBuf> {
    Some(best_folder(config)).filter(|folder| folder.join(ADAPTER_WEIGHTS).exists())
}

/// Warns where the best adapter of a run that goes on is missing.
pub(super) fn warn_about_missing_best(config: &TrainingConfig, summary: &TrainingSummary) {
    if let (Some((step, loss)), None) = (summary.best_validation, existing_best_folder(config)) {
        warn!(
            "{} is missing: the adapter of step {step} with the lowest validation loss so far, {loss:.4}, is lost; a \
             later one is kept there if its loss is lower still",
            best_folder(config).display()
        );
    }
}

/// What a user does next, with the arguments of this run.
fn next_commands(config: &TrainingConfig, summary: &TrainingSummary, history: &History) -> Vec<String> {
    // The best adapter, where that is not the last one.
    let adapter = match summary.best_validation {
        Some((step, _)) if step < summary.steps => existing_best_folder(config),
        _ => None,
    };
    let adapter = adapter.unwrap_or_else(|| config.output_dir.clone());
    let adapter = shell_word(&adapter.display().to_string());
    let chat = if config.output_dir.join(CHAT_TEMPLATE).exists() { " --chat" } else { "" };
    let provenance = read_json(&config.output_dir.join(PROVENANCE)).unwrap_or_default();
    let learned = provenance["hashes"][0].as_str();
    let hash = history.hashes().first().copied().or(learned).map_or("HASH".to_string(), shell_word);
    let mut commands =
        vec![format!("fastlora generate{chat} --adapter {adapter} --hash {hash} --prompt TEXT")];
    if let Some(sources) = &config.val_data {
        let paths: Vec<String> =
            sources.iter().map(|source| shell_word(&source.path.display().to_string())).collect();
        commands.push(format!("fastlora evaluate --adapter {adapter} {}", paths.join(" ")));
    }
    commands
}
