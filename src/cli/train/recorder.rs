//! Everything that a run leaves behind while it goes: metrics, progress, the best adapter, checkpoints.

use super::checkpointer::Checkpointer;
use super::output::AdapterWriter;
use super::progress::Progress;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::Transformer;
use crate::training::{Flow, MetricsFile, Observer, Pause, StepReport, ValidationReport};

/// The observer of `fastlora train`.
pub(super) struct Recorder<'a> {
    pub metrics: MetricsFile,
    pub progress: Progress,
    pub writer: &'a AdapterWriter<'a>,
    pub checkpointer: Checkpointer<'a>,
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

    fn between_steps(&mut self, pause: &Pause<'_, B>) -> Result<Flow> {
        self.checkpointer.between_steps(pause, &self.metrics)
    }

    fn wants_to_stop(&self) -> bool {
        self.checkpointer.wants_to_stop()
    }
}
