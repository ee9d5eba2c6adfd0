//! A share of the samples set aside for validation.

use super::sample_set::SampleSet;
use super::visits::shuffle;
use crate::data::Accounting;
use crate::error::{Error, Result};

/// Takes the place of an epoch's number in the draw: no run has as many.
const STREAM: u64 = u64::MAX;

impl SampleSet {
    /// Cuts the samples into those for training and `share` of them (rounded, at least one) for validation: drawn by
    /// `seed`, each part in the order of the data. The account of the records stays with the first.
    ///
    /// # Errors
    /// A data error when a part would be empty.
    pub fn hold_out(mut self, share: f64, seed: u64) -> Result<(Self, Self)> {
        let count = self.len();
        let held_out = ((share * count as f64).round() as usize).max(1);
        if held_out >= count {
            return Err(Error::data(format!(
                "{held_out} of {count} samples for validation leave none to learn"
            ))
            .at("val_fraction")
            .hint("lower it, or name val_data"));
        }
        let mut order: Vec<u32> = (0..count as u32).collect();
        shuffle(&mut order, seed, STREAM);
        let mut is_held_out = vec![false; count];
        order[..held_out].iter().for_each(|&index| is_held_out[index as usize] = true);
        let all = self.picked.take().unwrap_or_else(|| (0..count as u32).collect());
        let (mut kept, mut taken) = (Vec::with_capacity(count - held_out), Vec::with_capacity(held_out));
        for (index, is_held_out) in all.into_iter().zip(is_held_out) {
            if is_held_out { taken.push(index) } else { kept.push(index) }
        }
        let validation = Self {
            accounting: Accounting { used: held_out, ..Accounting::default() },
            picked: Some(taken),
            // Each validation sample counts once, as it is.
            is_plain: true,
            ..self.clone()
        };
        self.picked = Some(kept);
        Ok((self, validation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;
    use crate::tokens::Sample;

    fn set(count: u32) -> SampleSet {
        let origin = || Origin { file: "a.json".into(), line: 1 };
        let sample = |number| Sample::new(vec![number, 1], vec![1; 2], origin());
        SampleSet::new((0..count).map(sample), vec!["faq".into()])
    }

    fn numbers(set: &SampleSet) -> Vec<u32> {
        set.iter().map(|sample| sample.token_ids[0]).collect()
    }

    #[test]
    fn each_sample_is_in_one_part_and_the_seed_decides() {
        let (training, validation) = set(50).hold_out(0.1, 7).unwrap();
        let [kept, held_out] = [&training, &validation].map(numbers);
        assert_eq!((kept.len(), held_out.len()), (45, 5));
        assert!(kept.is_sorted() && held_out.is_sorted());
        let mut all = [kept, held_out.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..50).collect::<Vec<_>>());
        assert_eq!(numbers(&set(50).hold_out(0.1, 7).unwrap().1), held_out);
        assert_ne!(numbers(&set(50).hold_out(0.1, 8).unwrap().1), held_out);
        assert_eq!(validation.hash_names, ["faq"]);
    }

    #[test]
    fn neither_part_is_empty() {
        assert_eq!(numbers(&set(3).hold_out(0.01, 1).unwrap().1).len(), 1);
        for (count, share) in [(1, 0.5), (3, 0.9)] {
            let error = set(count).hold_out(share, 1).unwrap_err();
            assert_eq!(error.kind().exit_code(), 3, "{error}");
        }
    }
}
