//! How long samples are, told in few words.

use std::collections::BTreeMap;

/// Counts of lengths by powers of two: each bound with the number of lengths up to it and above the one before.
pub fn length_buckets(lengths: impl IntoIterator<Item = usize>) -> BTreeMap<usize, usize> {
    let mut counts = BTreeMap::new();
    for length in lengths {
        *counts.entry(length.next_power_of_two().max(16)).or_insert(0) += 1;
    }
    counts
}

/// [`length_buckets`] on one line.
pub(super) fn length_histogram(lengths: &[usize]) -> String {
    let counts = length_buckets(lengths.iter().copied());
    let buckets: Vec<String> = counts.iter().map(|(bound, count)| format!("≤{bound}: {count}")).collect();
    let longest = lengths.iter().max().copied().unwrap_or(0);
    format!("lengths in tokens: {}; longest {longest}", buckets.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_by_powers_of_two() {
        assert_eq!(
            length_histogram(&[1, 16, 17, 32, 33, 600]),
            "lengths in tokens: ≤16: 2, ≤32: 2, ≤64: 1, ≤1024: 1; longest 600"
        );
    }
}
