//! The learning rate of each step.

use crate::config::LrScheduler;

/// Warm-up from 0 on a straight line, then constant, or down to 0 at the last step (as transformers'
/// `get_scheduler`).
///
/// ```
/// use fastlora::config::LrScheduler;
/// use fastlora::optim::Schedule;
///
/// let schedule = Schedule { scheduler: LrScheduler::Linear, peak_learning_rate: 1e-3, warmup_steps: 2, total_steps: 10 };
/// assert_eq!(schedule.learning_rate(0), 0.0);
/// assert_eq!(schedule.learning_rate(2), 1e-3);
/// assert_eq!(schedule.learning_rate(6), 5e-4);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub scheduler: LrScheduler,
    /// The rate at the end of the warm-up.
    pub peak_learning_rate: f64,
    /// Steps of warm-up; the rate of step 0 is 0 when there are any.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The rate of optimizer step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak_learning_rate * step as f64 / self.warmup_steps as f64;
        }
        let falling_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / falling_steps as f64).min(1.0);
        self.peak_learning_rate
            * match self.scheduler {
                LrScheduler::Constant => 1.0,
                LrScheduler::Linear => 1.0 - progress,
                LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(scheduler: LrScheduler, warmup_steps: u64) -> Schedule {
        Schedule { scheduler, peak_learning_rate: 2.0, warmup_steps, total_steps: 8 }
    }

    #[test]
    fn constant_stays_and_ignores_the_length() {
        let rates: Vec<f64> =
            (0..8).map(|step| schedule(LrScheduler::Constant, 0).learning_rate(step)).collect();
        assert_eq!(rates, [2.0; 8]);
    }

    #[test]
    fn linear_and_cosine_end_at_zero() {
        for scheduler in [LrScheduler::Linear, LrScheduler::Cosine] {
            assert_eq!(schedule(scheduler, 0).learning_rate(0), 2.0);
            assert!((schedule(scheduler, 0).learning_rate(4) - 1.0).abs() < 1e-12);
            assert!(schedule(scheduler, 4).learning_rate(8).abs() < 1e-12);
        }
    }

    #[test]
    fn warm_up_rises_from_zero() {
        let rates: Vec<f64> =
            (0..5).map(|step| schedule(LrScheduler::Constant, 4).learning_rate(step)).collect();
        assert_eq!(rates, [0.0, 0.5, 1.0, 1.5, 2.0]);
    }

    #[test]
    fn warm_up_longer_than_the_run_never_divides_by_zero() {
        assert!(schedule(LrScheduler::Linear, 20).learning_rate(19).is_finite());
        assert!(schedule(LrScheduler::Linear, 8).learning_rate(8).is_finite());
    }
}
