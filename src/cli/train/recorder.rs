//! Everything that a run leaves behind while it goes: metrics, progress, answers, the best adapter, checkpoints.

use super::checkpointer::Checkpointer;
use super::output::AdapterWriter;
use super::progress::Progress;
use super::sampler::Sampler;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::Transformer;
use crate::report::tensorboard::EventFile;
use crate::training::{Flow, MetricsFile, Observer, Pause, StepReport, ValidationReport};

/// The observer of `fastlora train`.
pub(super) struct Recorder<'a, B: Backend> {
    pub metrics: MetricsFile,
    /// TensorBoard's, where it is wanted.
    pub events: Option<EventFile>,
    pub progress: Progress,
    /// Where there are test cases.
    pub sampler: Option<Sampler<'a, B>>,
    pub writer: &'a AdapterWriter<'a>,
    pub checkpointer: Checkpointer<'a>,
}

impl<B: Backend> Observer<B> for Recorder<'_, B> {
    fn prepare(&mut self, model: &mut Transformer<B>) -> Result<()> {
        self.sampler.as_mut().map_or(Ok(()), |sampler| sampler.prepare(model))
    }

    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.metrics.step(report)?;
        if let Some(events) = &mut self.events {
            events.step(report)?;
        }
        self.progress.step(report);
        Ok(())
    }

    fn validation(&mut self, report: &ValidationReport, model: &Transformer<B>) -> Result<()> {
        self.metrics.validation(report)?;
        if let Some(events) = &mut self.events {
            events.validation(report)?;
        }
        self.progress.validation(report);
        if report.is_best {
            self.writer.write_best(report, &model.adapters()?)?;
        }
        Ok(())
    }

    fn ask(&mut self, step: u64, model: &mut Transformer<B>) -> Result<()> {
        let Some(sampler) = &mut self.sampler else { return Ok(()) };
        sampler.ask(step, model, &self.progress, || self.checkpointer.wants_to_stop())
    }

    fn between_steps(&mut self, pause: &Pause<'_, B>) -> Result<Flow> {
        self.checkpointer.between_steps(pause, || {
            self.metrics.sync()?;
            self.events.as_ref().map_or(Ok(()), EventFile::sync)
        })
    }

    fn wants_to_stop(&self) -> bool {
        self.checkpointer.wants_to_stop()
    }

    fn stop(&mut self) {
        self.checkpointer.stop();
    }
}
