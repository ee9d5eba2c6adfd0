//! Which samples an epoch sees, how often and in which order: a function of the seed and the epoch alone.
//!
//! An order is the Fisher–Yates permutation (Durstenfeld 1964) whose draws come from SplitMix64 (Steele, Lea & Flood
//! 2014) started at `mix(mix(seed) + epoch)`, `mix` being SplitMix64's output function. It depends on nothing else: not
//! on the version of a random crate, not on threads. Other draws have the seed combined with a number of their own.
//!
//! A sample of weight w has ⌊w⌋ or ⌈w⌉ visits. Which samples have the greater number is systematic sampling (Madow &
//! Madow 1944) along a permutation of their group: where the running sum of the weights passes a whole number, there
//! is a visit. The sum goes on from epoch to epoch, so that E epochs give a group of total W its E·W visits, but for a
//! rounding at the end.

use std::collections::BTreeMap;

use super::sample_set::SampleSet;

/// Combined with the seed, for the permutations that share out fractions of visits.
const SHARES: u64 = 0x5348_4152_4553_0000;
/// Combined with the seed, for who loses its hash.
const HASH_DROPOUT: u64 = 0x4841_5348_4452_4f50;
/// Combined with the seed, for the order of batches of like length.
pub(super) const BATCHES: u64 = 0x4241_5443_4845_5300;

/// One look at a sample in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// Index of the sample.
    pub sample: u32,
    /// Earlier visits of the same epoch.
    pub copy: u32,
    /// Whether the hash is left out of its text.
    pub without_hash: bool,
}

/// How often each sample is seen in an epoch.
#[derive(Clone, Debug)]
pub(super) struct Shares {
    sample_count: usize,
    /// None: each once.
    groups: Option<Vec<Group>>,
}

/// Samples that share a number of visits.
#[derive(Clone, Debug)]
struct Group {
    members: Vec<u32>,
    /// `[members]` visits an epoch, in the mean.
    rates: Vec<f64>,
    /// Their sum.
    total: f64,
}

impl Group {
    /// The part of a visit that the epochs before left over, from 0 to 1; half of one at first.
    fn phase(&self, epoch: u64) -> f64 {
        (epoch as f64 * self.total + 0.5).fract()
    }

    fn count(&self, epoch: u64) -> u64 {
        (self.total + self.phase(epoch)).floor() as u64
    }

    fn is_whole(&self) -> bool {
        self.total.fract() == 0.0
    }
}

impl Shares {
    /// By the samples' weights; with `balance_by_hash` each hash gets as many visits as the one that has most.
    pub fn new(samples: &SampleSet, balance_by_hash: bool) -> Self {
        let mut groups: BTreeMap<u64, Group> = BTreeMap::new();
        for (index, entry) in samples.entries().enumerate() {
            let weight = samples.weight_of(entry);
            let key = if balance_by_hash { u64::from(entry.hash) } else { weight.to_bits() };
            let group = groups.entry(key).or_insert(Group { members: vec![], rates: vec![], total: 0.0 });
            group.members.push(index as u32);
            group.rates.push(weight);
        }
        let mut groups: Vec<Group> = groups.into_values().collect();
        for group in &mut groups {
            // Of equal weights the product, which rounds once.
            let first = group.rates[0];
            let is_even = group.rates.iter().all(|rate| *rate == first);
            group.total =
                if is_even { first * group.rates.len() as f64 } else { group.rates.iter().sum::<f64>() };
        }
        if balance_by_hash {
            let most = groups.iter().map(|group| group.total).fold(0.0, f64::max);
            for group in &mut groups {
                group.rates.iter_mut().for_each(|rate| *rate *= most / group.total);
                group.total = most;
            }
        }
        let is_once = groups.iter().all(|group| group.rates.iter().all(|rate| *rate == 1.0));
        Self { sample_count: samples.len(), groups: (!is_once).then_some(groups) }
    }

    /// Whether every sample is seen once an epoch.
    pub fn is_once(&self) -> bool {
        self.groups.is_none()
    }

    /// Whether every epoch has the same number of visits.
    pub fn is_constant(&self) -> bool {
        self.groups.iter().flatten().all(Group::is_whole)
    }

    /// Visits of an epoch.
    pub fn count(&self, epoch: u64) -> u64 {
        match &self.groups {
            None => self.sample_count as u64,
            Some(groups) => groups.iter().map(|group| group.count(epoch)).sum(),
        }
    }

    /// The fewest visits that an epoch can have.
    pub fn least(&self) -> u64 {
        match &self.groups {
            None => self.sample_count as u64,
            Some(groups) => {
                groups.iter().fold(0, |sum: u64, group| sum.saturating_add(group.total.floor() as u64))
            }
        }
    }

    /// The most visits of each sample in an epoch.
    pub fn most_copies(&self) -> Vec<usize> {
        let mut copies = vec![1; self.sample_count];
        for group in self.groups.iter().flatten() {
            for (&member, rate) in group.members.iter().zip(&group.rates) {
                // A running sum may round over a whole number once more than the weight says.
                let is_exact = group.is_whole() && group.rates.iter().all(|rate| rate.fract() == 0.0);
                copies[member as usize] = (rate + 1e-6).floor() as usize + usize::from(!is_exact);
            }
        }
        copies
    }

    /// The visits of an epoch in the order of the data, second visits after all first ones.
    pub fn visits(&self, seed: u64, epoch: u64) -> Vec<Visit> {
        let first = |sample| Visit { sample, copy: 0, without_hash: false };
        let Some(groups) = &self.groups else {
            return (0..self.sample_count as u32).map(first).collect();
        };
        let mut copies = vec![0_u32; self.sample_count];
        for (number, group) in groups.iter().enumerate() {
            let mut places: Vec<u32> = (0..group.members.len() as u32).collect();
            shuffle(&mut places, mix(seed ^ SHARES).wrapping_add(number as u64), epoch);
            let (phase, count) = (group.phase(epoch), group.count(epoch) as f64);
            let (mut sum, mut seen) = (0.0, 0.0);
            for (rank, place) in places.iter().enumerate() {
                let place = *place as usize;
                sum += group.rates[place];
                let is_last = rank + 1 == places.len();
                let passed = if is_last { count } else { (sum + phase).floor().clamp(seen, count) };
                copies[group.members[place] as usize] = (passed - seen) as u32;
                seen = passed;
            }
        }
        let mut visits = Vec::new();
        let mut left: Vec<u32> = (0..self.sample_count as u32).collect();
        for copy in 0.. {
            left.retain(|&sample| copies[sample as usize] > copy);
            if left.is_empty() {
                break;
            }
            visits.extend(left.iter().map(|&sample| Visit { copy, ..first(sample) }));
        }
        visits
    }
}

/// Whether a visit loses its hash, of which a share of `probability` does.
pub(super) fn loses_hash(probability: f64, seed: u64, epoch: u64, visit: Visit) -> bool {
    let state = mix(mix(seed ^ HASH_DROPOUT).wrapping_add(epoch));
    let drawn = mix(mix(state.wrapping_add(u64::from(visit.sample))).wrapping_add(u64::from(visit.copy)));
    // 53 bits: every value is a float64, and 1 is never drawn.
    ((drawn >> 11) as f64) < probability * (1_u64 << 53) as f64
}

/// SplitMix64's output function.
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// The permutation of `(seed, epoch)` that the module describes.
pub(super) fn shuffle<T>(order: &mut [T], seed: u64, epoch: u64) {
    let mut state = mix(mix(seed).wrapping_add(epoch));
    for last in (1..order.len()).rev() {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        // 0 ..= last without division (Lemire 2019); the bias of at most 2³²/2⁶⁴ is below notice.
        let drawn = (u128::from(mix(state)) * (last as u128 + 1)) >> 64;
        order.swap(last, drawn as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;
    use crate::tokens::Sample;

    /// One sample for each weight and hash.
    fn samples(of: &[(f64, usize)]) -> SampleSet {
        let origin = Origin { file: "a.json".into(), line: 1 };
        let sample = |&(weight, hash): &(f64, usize)| Sample {
            weight,
            hash,
            ..Sample::new(vec![5, 6], vec![5, 6], origin.clone())
        };
        SampleSet::new(of.iter().map(sample), vec![String::new(); 3])
    }

    /// Visits of each sample in one epoch.
    fn copies(shares: &Shares, count: usize, seed: u64, epoch: u64) -> Vec<u32> {
        let visits = shares.visits(seed, epoch);
        assert_eq!(visits.len() as u64, shares.count(epoch));
        let mut copies = vec![0; count];
        for visit in visits {
            assert_eq!(visit.copy, copies[visit.sample as usize], "visits are numbered");
            copies[visit.sample as usize] += 1;
        }
        copies
    }

    #[test]
    fn a_weight_is_the_mean_number_of_visits() {
        // 7 of weight 2.5, 5 of weight 1, 10 of weight 0.3: 17.5, 5 and 3 visits an epoch.
        let of = [&[(2.5, 0); 7][..], &[(1.0, 0); 5], &[(0.3, 0); 10]].concat();
        let shares = Shares::new(&samples(&of), false);
        let most = shares.most_copies();
        const EPOCHS: u64 = 4000;
        let mut sums = vec![0_u64; of.len()];
        for epoch in 0..EPOCHS {
            let copies = copies(&shares, of.len(), 3, epoch);
            let parts = [&copies[..7], &copies[7..12], &copies[12..]].map(|part| part.iter().sum::<u32>());
            assert_eq!(parts, [if epoch % 2 == 0 { 18 } else { 17 }, 5, 3], "epoch {epoch}");
            for (sample, &count) in copies.iter().enumerate() {
                let (weight, count) = (of[sample].0, f64::from(count));
                assert!(
                    count == weight.floor() || count == weight.ceil(),
                    "epoch {epoch}: {count} of {weight}"
                );
                assert!(count <= most[sample] as f64);
                sums[sample] += count as u64;
            }
        }
        for (sample, &sum) in sums.iter().enumerate() {
            let (weight, mean) = (of[sample].0, sum as f64 / EPOCHS as f64);
            // A visit more or less with probability ≤ 1/2 each epoch: five standard deviations of the mean.
            assert!(
                (mean - weight).abs() < 5.0 * 0.5 / (EPOCHS as f64).sqrt(),
                "{sample}: {mean} of {weight}"
            );
        }
        assert!(!shares.is_constant() && shares.least() == 17 + 5 + 3);
    }

    #[test]
    fn every_hash_has_the_visits_of_the_largest() {
        // 9 of hash 0, 4 of hash 1, 1 of hash 2; those of hash 1 in two weights.
        let of = [&[(1.0, 0); 9][..], &[(1.0, 1); 2], &[(3.0, 1); 2], &[(0.5, 2)]].concat();
        let shares = Shares::new(&samples(&of), true);
        assert!(shares.is_constant());
        let (mut light, mut heavy) = (0, 0);
        for epoch in 0..1000 {
            let copies = copies(&shares, of.len(), 3, epoch);
            let hashes = [&copies[..9], &copies[9..13], &copies[13..]].map(|part| part.iter().sum::<u32>());
            assert_eq!(hashes, [9, 9, 9], "epoch {epoch}");
            light += copies[9..11].iter().sum::<u32>();
            heavy += copies[11..13].iter().sum::<u32>();
        }
        // Inside a hash the weights hold: 1 to 3.
        let share = f64::from(light) / f64::from(light + heavy);
        assert!((share - 0.25).abs() < 0.01, "{share}");
        // Hashes of one size need nothing.
        assert!(Shares::new(&samples(&[(1.0, 0), (1.0, 1)]), true).is_once());
        assert!(!Shares::new(&samples(&[(1.0, 0), (1.0, 1), (1.0, 1)]), true).is_once());
    }

    #[test]
    fn whole_weights_are_whole_copies() {
        let shares = Shares::new(&samples(&[(2.0, 0), (1.0, 0), (3.0, 0)]), false);
        assert!(shares.is_constant());
        for epoch in 0..5 {
            let visits: Vec<u32> = shares.visits(9, epoch).iter().map(|visit| visit.sample).collect();
            assert_eq!(visits, [0, 1, 2, 0, 2, 2]);
        }
        assert_eq!(shares.most_copies(), [2, 1, 3]);
    }

    #[test]
    fn fractions_change_with_epoch_and_seed() {
        let shares = Shares::new(&samples(&[(0.5, 0); 40]), false);
        let visits = |seed, epoch| shares.visits(seed, epoch);
        assert_eq!(visits(1, 0), visits(1, 0));
        for (seed, epoch) in [(1, 1), (2, 0)] {
            assert_ne!(visits(1, 0), visits(seed, epoch));
        }
    }

    #[test]
    fn hashes_are_lost_by_chance_of_seed_epoch_and_sample() {
        let visit = |sample, copy| Visit { sample, copy, without_hash: false };
        let lost = |probability, seed, epoch, copy| -> Vec<bool> {
            (0..10_000).map(|sample| loses_hash(probability, seed, epoch, visit(sample, copy))).collect()
        };
        let count = |lost: &[bool]| lost.iter().filter(|&&lost| lost).count() as f64;
        let base = lost(0.3, 1, 0, 0);
        // Binomial: 10 000 · 0.3 with a standard deviation of 46.
        assert!((count(&base) - 3000.0).abs() < 5.0 * 46.0, "{}", count(&base));
        for other in [lost(0.3, 2, 0, 0), lost(0.3, 1, 1, 0), lost(0.3, 1, 0, 1)] {
            let both = base.iter().zip(&other).filter(|&(&one, &other)| one && other).count() as f64;
            // Independent: 10 000 · 0.09 with a standard deviation of 29.
            assert!((both - 900.0).abs() < 5.0 * 29.0, "{both}");
        }
        assert_eq!((count(&lost(0.0, 1, 0, 0)), count(&lost(1.0, 1, 0, 0))), (0.0, 10_000.0));
    }
}
