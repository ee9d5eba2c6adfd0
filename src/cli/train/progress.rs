//! What a person sees of a run: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tracing::{debug, info};

use crate::training::{StepReport, ValidationReport};

/// Time between two plain lines.
const PLAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Share of the newest step in the tokens/s shown.
const SMOOTHING: f64 = 0.1;

/// Progress of one run.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    done: u64,
    total_steps: u64,
    started: Instant,
    last_line: Option<Instant>,
    tokens_per_second: Option<f64>,
}

impl Progress {
    /// Shows nothing yet. `done` steps were done before; `quiet` shows nothing at all.
    pub(super) fn new(done: u64, total_steps: u64, quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let has_colour = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            let bar = if has_colour { "{bar:24.cyan/blue}" } else { "{bar:24}" };
            let style = ProgressStyle::with_template(&format!("{bar} {{pos}}/{{len}} {{msg}} ETA {{eta}}"))
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total_steps).with_style(style).with_position(done)
        });
        Self { bar, done, total_steps, started: Instant::now(), last_line: None, tokens_per_second: None }
    }

    pub(super) fn step(&mut self, report: &StepReport) {
        let rate = report.tokens as f64 / report.seconds.max(1e-9);
        let tokens_per_second =
            self.tokens_per_second.map_or(rate, |smooth| smooth + SMOOTHING * (rate - smooth));
        self.tokens_per_second = Some(tokens_per_second);
        let figures = format!(
            "loss {:.4} rate {:.2e} norm {:.3} {tokens_per_second:.0} tokens/s",
            report.loss, report.learning_rate, report.grad_norm
        );
        if let Some(bar) = &self.bar {
            bar.set_message(figures.clone());
            bar.set_position(report.step);
        }
        let is_due = self.last_line.is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL);
        if is_due || report.step == self.total_steps {
            let seconds_a_step = self.started.elapsed().as_secs_f64() / (report.step - self.done) as f64;
            let seconds_left = (self.total_steps - report.step) as f64 * seconds_a_step;
            let line = format!("step {}/{} {figures}", report.step, self.total_steps);
            match &self.bar {
                // For a log in a file: the terminal has the bar.
                Some(bar) => bar.suspend(|| debug!("{line}")),
                None => info!("{line} ETA {}", human_time(seconds_left)),
            }
            self.last_line = Some(Instant::now());
        }
    }

    pub(super) fn validation(&self, report: &ValidationReport) {
        let overall = report.evaluation.overall();
        let (Some(loss), Some(perplexity)) = (overall.loss(), overall.perplexity()) else { return };
        let best = if report.is_best { " (best so far)" } else { "" };
        self.print(format!(
            "validation at step {}: loss {loss:.4} perplexity {perplexity:.2}{best}",
            report.step
        ));
        for (hash, figures) in report.evaluation.by_hash() {
            if let (Some(loss), Some(perplexity)) = (figures.loss(), figures.perplexity()) {
                let hash = crate::error::escape_control(hash);
                self.print(format!("  {hash}: loss {loss:.4} perplexity {perplexity:.2}"));
            }
        }
    }

    /// A line above the bar, or a line of the log.
    pub(super) fn print(&self, line: String) {
        match &self.bar {
            Some(bar) => bar.suspend(|| info!("{line}")),
            None => info!("{line}"),
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}

/// `75` → `1m15s`.
pub(super) fn human_time(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::human_time;

    #[test]
    fn times_read_naturally() {
        assert_eq!(human_time(9.4), "9s");
        assert_eq!(human_time(75.0), "1m15s");
        assert_eq!(human_time(3720.0), "1h02m");
    }
}
