//! Everything that a run leaves behind while it goes: metrics, progress, the best adapter.

use std::path::Path;

use super::output::AdapterWriter;
use super::progress::Progress;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::Transformer;
use crate::training::{MetricsFile, Observer, StepReport, ValidationReport};

/// The observer of `fastlora train`.
pub(super) struct Recorder<'a> {
    metrics: MetricsFile,
    progress: Progress,
    writer: &'a AdapterWriter<'a>,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(
        metrics_path: &Path,
        progress: Progress,
        writer: &'a AdapterWriter<'a>,
    ) -> Result<Self> {
        Ok(Self { metrics: MetricsFile::create(metrics_path)?, progress, writer })
    }

    pub(super) fn finish(&self) {
        self.progress.finish();
    }
}

impl<B: Backend> Observer<B> for Recorder<'_> {
    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.metrics.step(report)?;
        self.progress.step(report);
        Ok(())
    }

    fn validation(&mut self, report: &ValidationReport, model: &Transformer<B>) -> Result<()> {
        self.metrics.validation(report)?;
        self.progress.validation(report);
        if report.is_best {
            self.writer.write_best(report, &model.adapters()?)?;
        }
        Ok(())
    }
}
