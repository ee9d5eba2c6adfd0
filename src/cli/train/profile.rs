//! `--profile-steps A:B`: the GPU profiler's window opens for these steps alone.

use std::str::FromStr;
use std::sync::Arc;

use crate::backend::Backend;
use crate::error::Result;
use crate::model::Transformer;
use crate::training::{Flow, Observer, Pause, StepReport, ValidationReport};

/// Steps `first` to `last`, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProfileSteps {
    first: u64,
    last: u64,
}

impl FromStr for ProfileSteps {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parse = |number: &str| number.parse::<u64>().ok();
        match text.split_once(':').map(|(first, last)| (parse(first), parse(last))) {
            Some((Some(first), Some(last))) if 1 <= first && first <= last => Ok(Self { first, last }),
            _ => Err("expected FIRST:LAST, two step numbers from 1, such as 10:12".into()),
        }
    }
}

/// Opens and closes the window around an observer's steps.
pub(super) struct Profiled<B, O> {
    backend: Arc<B>,
    steps: Option<ProfileSteps>,
    observer: O,
}

impl<B: Backend, O: Observer<B>> Profiled<B, O> {
    /// # Errors
    /// A backend that has no such profiler, where steps are given.
    pub(super) fn new(backend: Arc<B>, steps: Option<ProfileSteps>, observer: O) -> Result<Self> {
        if let Some(ProfileSteps { first, .. }) = steps {
            backend.profile(first == 1)?;
        }
        Ok(Self { backend, steps, observer })
    }

    /// The observer within.
    pub(super) fn into_inner(self) -> O {
        self.observer
    }
}

impl<B: Backend, O: Observer<B>> Observer<B> for Profiled<B, O> {
    fn prepare(&mut self, model: &mut Transformer<B>) -> Result<()> {
        self.observer.prepare(model)
    }

    fn step(&mut self, report: &StepReport) -> Result<()> {
        if let Some(ProfileSteps { first, last }) = self.steps {
            if report.step == last {
                self.backend.profile(false)?;
            } else if report.step + 1 == first {
                self.backend.profile(true)?;
            }
        }
        self.observer.step(report)
    }

    fn validation(&mut self, report: &ValidationReport, model: &Transformer<B>) -> Result<()> {
        self.observer.validation(report, model)
    }

    fn ask(&mut self, step: u64, model: &mut Transformer<B>) -> Result<()> {
        self.observer.ask(step, model)
    }

    fn between_steps(&mut self, pause: &Pause<'_, B>) -> Result<Flow> {
        self.observer.between_steps(pause)
    }

    fn wants_to_stop(&self) -> bool {
        self.observer.wants_to_stop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_two_numbers_in_order() {
        assert_eq!("10:12".parse(), Ok(ProfileSteps { first: 10, last: 12 }));
        assert_eq!("1:1".parse(), Ok(ProfileSteps { first: 1, last: 1 }));
        for wrong in ["", "3", "0:2", "3:2", "a:b", "1:2:3", "-1:2"] {
            assert!(wrong.parse::<ProfileSteps>().is_err(), "{wrong}");
        }
    }
}
