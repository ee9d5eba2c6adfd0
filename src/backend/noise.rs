//! Noise on the embeddings while training (NEFTune, Jain et al. 2023): each element of a sample of `L` tokens gains a number
//! that is uniform in ±α/√(L·H).
//!
//! The numbers come from the generator of the [dropout masks](super::dropout), as those of the input [`INPUT_INDEX`], which
//! no linear has: they depend on (seed, epoch, sample, position, feature) alone. `L` is the sample's own length. The paper's
//! and TRL's is that of the padded batch, with which the noise would depend on how batches are cut.

use super::dropout::{FEATURES_PER_CALL, words_at};

/// The input whose words make the noise.
pub const INPUT_INDEX: u32 = 0xFFFF;

/// Noise on the embeddings of a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmbeddingNoise {
    /// α.
    pub alpha: f32,
    /// The run's seed.
    pub seed: u64,
    /// The pass over the data, from 0.
    pub epoch: u32,
}

impl EmbeddingNoise {
    /// Adds the noise of the token at `position` of a sample of `length` tokens to its embedding.
    pub fn add(self, sample: usize, position: usize, length: usize, x: &mut [f32]) {
        let bound = self.alpha / ((length * x.len()) as f32).sqrt();
        for (group, x) in x.chunks_mut(FEATURES_PER_CALL).enumerate() {
            let words = words_at::<1>(self.seed, self.epoch, sample, position, INPUT_INDEX, group);
            for (value, [word]) in x.iter_mut().zip(words) {
                *value += bound * uniform(word);
            }
        }
    }
}

/// A word as a number in (-1, 1): the middle of one of 2²⁴ equal steps, exact in f32.
pub fn uniform(word: u32) -> f32 {
    ((word.cast_signed() >> 8) as f32 + 0.5) / 8_388_608.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_become_steps_between_minus_one_and_one() {
        assert_eq!(uniform(0), 2f32.powi(-24));
        assert_eq!(uniform(u32::MAX), -(2f32.powi(-24)));
        assert_eq!(uniform(0x7FFF_FFFF), 1.0 - 2f32.powi(-24));
        assert_eq!(uniform(0x8000_0000), -1.0 + 2f32.powi(-24));
        assert_eq!(uniform(0x40_00_00_FF), 0.5 + 2f32.powi(-24));
    }

    #[test]
    fn the_noise_has_the_variance_of_its_bounds_and_depends_on_every_key() {
        let noise = EmbeddingNoise { alpha: 5.0, seed: 42, epoch: 0 };
        let (width, length) = (4096, 9);
        let of = |noise: EmbeddingNoise, sample, position| {
            let mut x = vec![0.0; width];
            noise.add(sample, position, length, &mut x);
            x
        };
        let x = of(noise, 1, 2);
        let bound = 5.0 / (f64::from(9 * 4096)).sqrt();
        assert!(x.iter().all(|value| f64::from(value.abs()) < bound));
        // Mean 0 and variance b²/3, that of a square 4b⁴/45: five standard deviations of the means.
        let count = width as f64;
        let mean = x.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
        assert!(mean.abs() < 5.0 * bound / (3.0 * count).sqrt(), "{mean}");
        let square = x.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>() / count;
        let allowed = 5.0 * bound * bound * (4.0 / 45.0 / count).sqrt();
        assert!((square - bound * bound / 3.0).abs() < allowed, "{square}");

        assert_eq!(x, of(noise, 1, 2));
        for other in [
            of(noise, 2, 2),
            of(noise, 1, 3),
            of(EmbeddingNoise { epoch: 1, ..noise }, 1, 2),
            of(EmbeddingNoise { seed: 43, ..noise }, 1, 2),
        ] {
            assert_ne!(x, other);
        }
    }
}
