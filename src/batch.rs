//! What the tokens hand to the model: samples laid end to end, with the rows that carry loss.

/// Samples of one micro-batch, end to end without padding; attention stays inside each.
///
/// Row `t` of every activation is token `t` of `token_ids`. With `S` samples and `T` tokens,
/// `sample_starts` has `S + 1` entries from 0 to `T`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// `[T]` token ids.
    pub token_ids: Vec<u32>,
    /// `[S + 1]` first row of each sample, then `T`.
    pub sample_starts: Vec<usize>,
    /// `[S]` each sample's index in its data set: keys the dropout masks and the figures by hash.
    pub sample_ids: Vec<usize>,
    /// Rows whose next token carries loss, ascending.
    pub labelled_rows: Vec<u32>,
    /// The next token of each of `labelled_rows`.
    pub targets: Vec<u32>,
}

/// Rows of a batch, and of those that carry loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchRows {
    /// `T`.
    pub tokens: usize,
    /// `L`.
    pub labelled: usize,
}

/// A labelled row, and its target, that are none: see [`Batch::pad`].
pub const NO_ROW: u32 = u32::MAX;

impl Batch {
    /// Number of tokens, `T`.
    pub fn token_count(&self) -> usize {
        self.token_ids.len()
    }

    /// Tokens of each sample.
    pub fn sample_lengths(&self) -> impl Iterator<Item = usize> + '_ {
        self.sample_starts.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Number of samples, `S`.
    pub fn sample_count(&self) -> usize {
        self.sample_ids.len()
    }

    /// Number of rows that carry loss.
    pub fn labelled_count(&self) -> usize {
        self.labelled_rows.len()
    }

    /// Appends one sample. Label `t` says what token `t` should have been (`-100`: no loss), so the row that
    /// learns it is `t - 1`; the label of a sample's first token is never used.
    ///
    /// # Panics
    /// When `labels` and `token_ids` differ in length.
    pub fn push(&mut self, sample_id: usize, token_ids: &[u32], labels: &[i32]) {
        assert_eq!(token_ids.len(), labels.len(), "one label a token");
        if self.sample_starts.is_empty() {
            self.sample_starts.push(0);
        }
        let start = self.token_ids.len();
        for (offset, &label) in labels.iter().enumerate().skip(1) {
            if let Ok(target) = u32::try_from(label) {
                self.labelled_rows.push((start + offset - 1) as u32);
                self.targets.push(target);
            }
        }
        self.token_ids.extend_from_slice(token_ids);
        self.sample_starts.push(self.token_ids.len());
        self.sample_ids.push(sample_id);
    }

    /// `T` and `L`.
    pub fn rows(&self) -> BatchRows {
        BatchRows { tokens: self.token_count(), labelled: self.labelled_count() }
    }

    /// Fills a batch that has tokens up to `rows` with what changes no loss and no gradient: copies of its first sample,
    /// whose activations are as tame as those of the data, and [`NO_ROW`]s.
    pub fn pad(&mut self, rows: BatchRows) {
        let first = self.sample_starts[1];
        while self.token_count() < rows.tokens {
            let length = first.min(rows.tokens - self.token_count());
            self.token_ids.extend_from_within(..length);
            self.sample_starts.push(self.token_ids.len());
            self.sample_ids.push(NO_ROW as usize);
        }
        self.labelled_rows.resize(rows.labelled.max(self.labelled_count()), NO_ROW);
        self.targets.resize(self.labelled_count(), NO_ROW);
    }

    /// Becomes a copy of `other` and keeps its memory, which a derived `clone_from` would not.
    pub fn copy_from(&mut self, other: &Batch) {
        self.token_ids.clone_from(&other.token_ids);
        self.sample_starts.clone_from(&other.sample_starts);
        self.sample_ids.clone_from(&other.sample_ids);
        self.labelled_rows.clone_from(&other.labelled_rows);
        self.targets.clone_from(&other.targets);
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.sample_starts.clear();
        self.sample_ids.clear();
        self.labelled_rows.clear();
        self.targets.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_shift_by_one_inside_each_sample() {
        let mut batch = Batch::default();
        batch.push(7, &[10, 11, 12], &[-100, -100, 12]);
        batch.push(9, &[20, 21], &[20, 21]);
        assert_eq!(batch.sample_starts, [0, 3, 5]);
        assert_eq!(batch.labelled_rows, [1, 3]);
        assert_eq!(batch.targets, [12, 21]);
        assert_eq!(batch.sample_ids, [7, 9]);
    }

    #[test]
    fn padding_is_more_of_the_first_sample_without_labels() {
        let mut batch = Batch::default();
        batch.push(7, &[10, 11, 12], &[-100, -100, 12]);
        batch.push(9, &[20, 21], &[20, 21]);
        batch.pad(BatchRows { tokens: 9, labelled: 3 });
        assert_eq!(batch.token_ids, [10, 11, 12, 20, 21, 10, 11, 12, 10]);
        assert_eq!(batch.sample_starts, [0, 3, 5, 8, 9]);
        assert_eq!((batch.labelled_rows, batch.targets), (vec![1, 3, NO_ROW], vec![12, 21, NO_ROW]));
    }
}
