//! A process of a run that is not its first: it computes, and leaves nothing behind.

use std::sync::Arc;

use super::Run;
use super::ending::stopped;
use crate::backend::Backend;
use crate::cli::signals::Interrupts;
use crate::distributed::Group;
use crate::error::Result;
use crate::model::Transformer;
use crate::selftest::Measurable;
use crate::training::{
    Observer, StepReport, TrainingSettings, TrainingSummary, ValidationReport, train, train_in_group,
};

impl Run<'_> {
    /// Trains the model that is loaded, and writes nothing.
    pub(super) fn follow<B: Measurable>(
        &self,
        model: &mut Transformer<B>,
        settings: &TrainingSettings,
        group: Option<&mut Group>,
    ) -> Result<()> {
        let mut observer = Follower::new(&self.interrupts);
        let summary = self.steps(model, settings, group, &mut observer)?;
        match observer.is_stopped() {
            true => Err(stopped(self.writer.config, summary.steps, settings.schedule.total_steps)),
            false => Ok(()),
        }
    }

    /// Trains, with the other processes where there are any.
    pub(super) fn steps<B: Measurable>(
        &self,
        model: &mut Transformer<B>,
        settings: &TrainingSettings,
        group: Option<&mut Group>,
        observer: &mut (impl Observer<B> + Send),
    ) -> Result<TrainingSummary> {
        let (training, validation, start) = (&self.training, self.validation.as_ref(), self.start.state());
        let backend = Arc::clone(model.backend());
        backend.run(|| match group {
            None => train(model, training, validation, settings, start, observer),
            Some(group) => train_in_group(group, model, training, validation, settings, start, observer),
        })
    }
}

/// Its observer: a signal that it gets ends the whole run.
struct Follower<'a> {
    interrupts: &'a Interrupts,
    is_stopped: bool,
}

impl<'a> Follower<'a> {
    fn new(interrupts: &'a Interrupts) -> Self {
        Self { interrupts, is_stopped: false }
    }

    /// Whether the run was ended before its last step.
    fn is_stopped(&self) -> bool {
        self.is_stopped
    }
}

impl<B: Backend> Observer<B> for Follower<'_> {
    fn step(&mut self, _: &StepReport) -> Result<()> {
        Ok(())
    }

    fn validation(&mut self, _: &ValidationReport, _: &Transformer<B>) -> Result<()> {
        Ok(())
    }

    fn wants_to_stop(&self) -> bool {
        self.interrupts.is_requested()
    }

    fn stop(&mut self) {
        self.is_stopped = true;
    }
}
