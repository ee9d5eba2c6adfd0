//! Losses far above what the steps before had.

/// Share of the newest loss in the running mean and variance.
const SMOOTHING: f64 = 0.02;
/// Steps before anything is said: the mean must have left its start.
const WARM_UP: u64 = 20;
/// Standard deviations above the mean.
const DEVIATIONS: f64 = 6.0;

/// Watches a run's losses by their exponentially weighted mean and variance (West 1979).
///
/// ```
/// use fastlora::training::LossWatch;
///
/// let mut watch = LossWatch::default();
/// for step in 0..50 {
///     assert_eq!(watch.spike(2.0 + 0.1 * f64::from(step % 3)), None);
/// }
/// let mean = watch.spike(9.0).ok_or("no spike")?;
/// assert!((2.0..2.2).contains(&mean));
/// # Ok::<(), &str>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct LossWatch {
    steps: u64,
    mean: f64,
    variance: f64,
}

impl LossWatch {
    /// Takes a step's loss; the mean of those before where this one is far above it.
    pub fn spike(&mut self, loss: f64) -> Option<f64> {
        let (mean, deviation) = (self.mean, self.variance.sqrt());
        // A tenth of the mean as well, so that a run of nearly equal losses is not alarmed by the next.
        let is_spike = self.steps >= WARM_UP && loss > mean + (DEVIATIONS * deviation).max(0.1 * mean);
        // The first losses count as in a plain mean.
        let share = SMOOTHING.max(1.0 / (self.steps + 1) as f64);
        let difference = loss - mean;
        self.mean += share * difference;
        self.variance = (1.0 - share) * (self.variance + share * difference * difference);
        self.steps += 1;
        is_spike.then_some(mean)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_variance_are_those_of_the_first_losses() {
        let mut watch = LossWatch::default();
        let losses = [2.0, 4.0, 3.0, 7.0];
        for loss in losses {
            watch.spike(loss);
        }
        let mean = losses.iter().sum::<f64>() / 4.0;
        let variance = losses.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / 4.0;
        assert!((watch.mean - mean).abs() < 1e-12 && (watch.variance - variance).abs() < 1e-12, "{watch:?}");
    }

    #[test]
    fn falling_and_noisy_losses_are_no_spikes() {
        let mut watch = LossWatch::default();
        let mut state = 1_u64;
        for step in 0..2_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let noise = (state >> 40) as f64 / (1 << 24) as f64 - 0.5;
            let loss = 1.0 + 4.0 * (-f64::from(step) / 300.0).exp() + noise;
            assert_eq!(watch.spike(loss), None, "step {step}");
        }
        assert!(watch.spike(4.0).is_some());
    }
}
