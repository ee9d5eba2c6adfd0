//! How long samples are, told in few words.

use std::collections::BTreeMap;
use std::fmt;

/// Counts of lengths by powers of two: each bound with the number of lengths up to it and above the one before.
pub fn length_buckets(lengths: impl IntoIterator<Item = usize>) -> BTreeMap<usize, usize> {
    let mut counts = Lengths::default();
    lengths.into_iter().for_each(|length| counts.note(length));
    counts.buckets
}

/// Lengths in tokens, counted one by one.
#[derive(Clone, Debug, Default)]
pub(super) struct Lengths {
    buckets: BTreeMap<usize, usize>,
    longest: usize,
    /// How many there are.
    pub count: usize,
}

impl Lengths {
    pub fn note(&mut self, length: usize) {
        *self.buckets.entry(length.next_power_of_two().max(16)).or_insert(0) += 1;
        self.longest = self.longest.max(length);
        self.count += 1;
    }
}

impl fmt::Display for Lengths {
    /// [`length_buckets`] on one line.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let buckets: Vec<String> =
            self.buckets.iter().map(|(bound, count)| format!("≤{bound}: {count}")).collect();
        write!(formatter, "lengths in tokens: {}; longest {}", buckets.join(", "), self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_by_powers_of_two() {
        let mut lengths = Lengths::default();
        [1, 16, 17, 32, 33, 600].into_iter().for_each(|length| lengths.note(length));
        assert_eq!(lengths.to_string(), "lengths in tokens: ≤16: 2, ≤32: 2, ≤64: 1, ≤1024: 1; longest 600");
    }
}
