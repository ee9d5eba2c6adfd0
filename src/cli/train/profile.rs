//! `--profile-steps A:B`: the GPU profiler's window opens for these steps alone. `--profile`: their time by operation.

use std::str::FromStr;
use std::sync::Arc;

use super::time_by_operation::{OpenWindow, TimeByOperation};
use crate::error::Result;
use crate::model::Transformer;
use crate::selftest::Measurable;
use crate::training::{Flow, Observer, Pause, StepReport, ValidationReport};

/// Steps `first` to `last`, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProfileSteps {
    first: u64,
    last: u64,
}

/// Past the warm-up: caches are filled, and shapes have been seen.
const TIMED_STEPS: ProfileSteps = ProfileSteps { first: 3, last: 7 };

/// What is profiled.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Profile {
    /// `--profile-steps`.
    pub steps: Option<ProfileSteps>,
    /// `--profile`.
    pub is_timed: bool,
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
pub(super) struct Profiled<B: Measurable, O> {
    backend: Arc<B>,
    profile: Profile,
    window: Option<OpenWindow<B>>,
    times: Option<TimeByOperation>,
    observer: O,
}

impl<B: Measurable, O: Observer<B>> Profiled<B, O> {
    /// # Errors
    /// A backend that has no such profiler, where steps are given for one.
    pub(super) fn new(backend: Arc<B>, profile: Profile, steps_done: u64, observer: O) -> Result<Self> {
        let mut profiled = Self { backend, profile, window: None, times: None, observer };
        profiled.step_ended(steps_done)?;
        Ok(profiled)
    }

    /// The observer within, and what the window showed, where one was closed.
    pub(super) fn into_parts(self) -> (O, Option<TimeByOperation>) {
        (self.observer, self.times)
    }

    fn step_ended(&mut self, step: u64) -> Result<()> {
        let Profile { steps, is_timed } = self.profile;
        let ProfileSteps { first, last } = match (steps, is_timed) {
            (Some(steps), _) => steps,
            (None, true) => TIMED_STEPS,
            (None, false) => return Ok(()),
        };
        if step + 1 == first {
            if is_timed {
                self.window = Some(OpenWindow::open(&self.backend)?);
            } else {
                self.backend.profile(true)?;
            }
        } else if step == last {
            match self.window.take() {
                Some(window) => self.times = Some(window.close(last + 1 - first)?),
                None if !is_timed => self.backend.profile(false)?,
                None => {} // a resumed run that began inside the window
            }
        }
        Ok(())
    }
}

impl<B: Measurable, O: Observer<B>> Observer<B> for Profiled<B, O> {
    fn prepare(&mut self, model: &mut Transformer<B>) -> Result<()> {
        self.observer.prepare(model)
    }

    fn step(&mut self, report: &StepReport) -> Result<()> {
        self.step_ended(report.step)?;
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

    fn stop(&mut self) {
        self.observer.stop();
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
