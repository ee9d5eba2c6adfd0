//! Dynamic loss scaling (Micikevicius et al. 2018, "Mixed Precision Training"): f16 flushes small gradients to zero, so
//! they are computed from a loss that is many times too large, and divided before the update.

/// Start of the scale, as in PyTorch's `GradScaler`.
const START: f64 = 65_536.0;
/// Steps without overflow after which a larger scale is tried, as there.
const GROWTH_INTERVAL: u64 = 2_000;
/// Below this a step that overflows is not saved by scaling.
const LEAST: f64 = 1.0;

/// A factor on the loss: halved when gradients overflow, doubled after many steps that did not.
///
/// ```
/// use fastlora::optim::LossScale;
///
/// let mut scale = LossScale::dynamic();
/// assert!(scale.lower());
/// assert_eq!(scale.factor(), 32_768.0);
/// assert!(!LossScale::none().lower());
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    factor: f64,
    /// Updates since the factor last changed; none: the factor stays 1.
    good_steps: Option<u64>,
}

impl LossScale {
    /// Always 1: for compute types with the range of f32.
    pub fn none() -> Self {
        Self { factor: 1.0, good_steps: None }
    }

    /// Starts at 2¹⁶ and follows the gradients.
    pub fn dynamic() -> Self {
        Self { factor: START, good_steps: Some(0) }
    }

    /// What a checkpoint keeps: the factor and the updates since it last changed; none where it is always 1.
    pub fn state(&self) -> Option<(f64, u64)> {
        self.good_steps.map(|steps| (self.factor, steps))
    }

    /// As [`state`](Self::state) told it.
    pub fn from_state(state: Option<(f64, u64)>) -> Self {
        state.map_or(Self::none(), |(factor, steps)| Self { factor, good_steps: Some(steps) })
    }

    /// What the loss is multiplied by: a power of two, so that dividing by it rounds nothing.
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// After an update whose gradients were finite.
    pub(super) fn raise_in_time(&mut self) {
        let Some(steps) = &mut self.good_steps else { return };
        *steps += 1;
        if *steps == GROWTH_INTERVAL {
            self.factor *= 2.0;
            *steps = 0;
        }
    }

    /// After gradients that were not finite: halves the factor. False if that cannot help.
    pub fn lower(&mut self) -> bool {
        let Some(steps) = &mut self.good_steps else { return false };
        if self.factor <= LEAST {
            return false;
        }
        self.factor /= 2.0;
        *steps = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_doubles_after_two_thousand_updates_and_halves_down_to_one() {
        let mut scale = LossScale::dynamic();
        (0..1_999).for_each(|_| scale.raise_in_time());
        assert_eq!(scale.state(), Some((65_536.0, 1_999)));
        assert_eq!(LossScale::from_state(scale.state()), scale);
        scale.raise_in_time();
        assert_eq!(scale.state(), Some((131_072.0, 0)));
        assert_eq!((0..30).filter(|_| scale.lower()).count(), 17);
        assert_eq!(scale.factor(), 1.0);
    }

    #[test]
    fn none_stays_one() {
        let mut scale = LossScale::none();
        (0..5_000).for_each(|_| scale.raise_in_time());
        assert_eq!((scale.factor(), scale.lower(), scale.state()), (1.0, false, None));
    }
}
