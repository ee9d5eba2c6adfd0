//! Dropout masks from the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as
//! easy as 1, 2, 3"): the mask of an element depends on (seed, epoch, sample, position, input, feature) alone, so it
//! is the same on every backend, on any number of threads and however the batch is cut.
//!
//! One call yields four 32-bit words, for four neighbouring features:
//!
//! | word | content |
//! |---|---|
//! | key 0, key 1 | low and high half of the seed |
//! | counter 0 | `feature / 4`; the element takes output word `feature % 4` |
//! | counter 1 | position inside the sample |
//! | counter 2 | the sample's index in its data set, its low 32 bits |
//! | counter 3 | input index in the low 16 bits, epoch in the high 16 (both modulo 2¹⁶); input 0xFFFF: [noise](super::noise) |
//!
//! An element is kept where its word is at least `⌊probability · 2³²⌋` ([`threshold`]).

use super::Dropout;

/// Output words of one call, and the features that share it.
pub const FEATURES_PER_CALL: usize = 4;

/// Philox4x32 with ten rounds, of `N` counters under one key: word `w` of counter `n` is `[w][n]`.
#[inline(always)]
pub fn philox4x32_10<const N: usize>(mut counters: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    for _ in 0..10 {
        let before = counters;
        // One plain loop over the counters, which compilers turn into vector instructions.
        for n in 0..N {
            let first = u64::from(before[0][n]) * 0xD251_1F53;
            let second = u64::from(before[2][n]) * 0xCD9E_8D57;
            counters[0][n] = (second >> 32) as u32 ^ before[1][n] ^ key[0];
            counters[1][n] = second as u32;
            counters[2][n] = (first >> 32) as u32 ^ before[3][n] ^ key[1];
            counters[3][n] = first as u32;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counters
}

/// The least word that keeps an element: `⌊probability · 2³²⌋`.
pub fn threshold(probability: f32) -> u64 {
    (f64::from(probability) * 4_294_967_296.0) as u64
}

/// The words of `4·N` features from `4 · first_group` on: that of feature `4 · (first_group + n) + w` is `[w][n]`.
#[inline(always)]
pub fn words<const N: usize>(
    dropout: Dropout,
    sample: usize,
    position: usize,
    input_index: u32,
    first_group: usize,
) -> [[u32; N]; 4] {
    words_at(dropout.seed, dropout.epoch, sample, position, input_index, first_group)
}

/// The same of a seed and an epoch, whatever the words are for.
#[inline(always)]
pub fn words_at<const N: usize>(
    seed: u64,
    epoch: u32,
    sample: usize,
    position: usize,
    input_index: u32,
    first_group: usize,
) -> [[u32; N]; 4] {
    let counters = [
        std::array::from_fn(|n| (first_group + n) as u32),
        [position as u32; N],
        [sample as u32; N],
        [(input_index & 0xFFFF) | (epoch << 16); N],
    ];
    philox4x32_10(counters, [seed as u32, (seed >> 32) as u32])
}

/// Whether the element survives.
pub fn keep(dropout: Dropout, sample: usize, position: usize, input_index: u32, feature: usize) -> bool {
    let words = words::<1>(dropout, sample, position, input_index, feature / FEATURES_PER_CALL);
    u64::from(words[feature % FEATURES_PER_CALL][0]) >= threshold(dropout.probability)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors that Random123 publishes (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        let answers = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in answers {
            assert_eq!(philox4x32_10(counter.map(|word| [word]), key), expected.map(|word: u32| [word]));
            let among_others = philox4x32_10(counter.map(|word| [5, word, 9]), key);
            assert_eq!(among_others.map(|words| words[1]), expected);
        }
    }

    #[test]
    fn the_mask_depends_on_each_of_its_keys() {
        let dropout = Dropout { probability: 0.5, seed: 42, epoch: 0 };
        let mask = |dropout: Dropout, sample, position, input| -> Vec<bool> {
            (0..128).map(|feature| keep(dropout, sample, position, input, feature)).collect()
        };
        let base = mask(dropout, 1, 2, 3);
        assert_eq!(base, mask(dropout, 1, 2, 3));
        assert_ne!(base, mask(dropout, 2, 2, 3));
        assert_ne!(base, mask(dropout, 1, 3, 3));
        assert_ne!(base, mask(dropout, 1, 2, 4));
        assert_ne!(base, mask(Dropout { epoch: 1, ..dropout }, 1, 2, 3));
        assert_ne!(base, mask(Dropout { seed: 43, ..dropout }, 1, 2, 3));
        assert_ne!(base, mask(Dropout { seed: 42 | 1 << 32, ..dropout }, 1, 2, 3));
    }

    #[test]
    fn the_share_of_zeros_is_the_probability() {
        for probability in [0.0, 0.05, 0.5, 0.9, 1.0] {
            let dropout = Dropout { probability, seed: 7, epoch: 3 };
            let count = 40_000;
            let zeros = (0..count).filter(|&feature| !keep(dropout, 11, 5, 2, feature)).count();
            let (expected, p) = (count as f64 * f64::from(probability), f64::from(probability));
            // Five standard deviations of a binomial.
            let bound = 5.0 * (count as f64 * p * (1.0 - p)).sqrt();
            assert!((zeros as f64 - expected).abs() <= bound, "{zeros} of {count} at {probability}");
        }
    }
}
