//! Samples: one as it is made, and all of a data set.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::store::{Entry, Store, digest};
use super::tokenizer::hex;
use crate::data::{Accounting, Origin};

/// The label of a token without loss.
pub const NO_LOSS: i32 = -100;

/// Tokens after which a walk through all gives their pages back.
const RELEASED_TOKENS: usize = 8 << 20;

/// One record as the model learns it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Token ids.
    pub token_ids: Vec<u32>,
    /// What each token should have been; [`NO_LOSS`] where nothing is learned. The first is never used.
    pub labels: Vec<i32>,
    /// Index into [`SampleSet::hash_names`].
    pub hash: usize,
    /// Whether the hash stands in the text.
    pub is_conditioned: bool,
    /// The sample without the hash in its text, where it may be learned so.
    pub without_hash: Option<Box<Unconditioned>>,
    /// How often it is seen in an epoch, in the mean.
    pub weight: f64,
    /// Where its record begins.
    pub origin: Origin,
}

/// A sample without the hash in its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unconditioned {
    /// Token ids.
    pub token_ids: Vec<u32>,
    /// As [`Sample::labels`].
    pub labels: Vec<i32>,
}

impl Sample {
    /// A sample of tokens alone: of hash 0, which is not in its text, and seen once an epoch.
    pub fn new(token_ids: Vec<u32>, labels: Vec<i32>, origin: Origin) -> Self {
        Self { token_ids, labels, hash: 0, is_conditioned: false, without_hash: None, weight: 1.0, origin }
    }
}

/// Number of labels that carry loss.
pub(super) fn carry_loss(labels: &[i32]) -> usize {
    labels.iter().skip(1).filter(|&&label| label != NO_LOSS).count()
}

/// A sample of a set.
#[derive(Clone, Copy)]
pub struct SampleView<'a> {
    /// Token ids.
    pub token_ids: &'a [u32],
    /// As [`Sample::labels`].
    pub labels: &'a [i32],
    set: &'a SampleSet,
    entry: &'a Entry,
}

impl<'a> SampleView<'a> {
    /// Tokens that carry loss.
    pub fn labelled_count(&self) -> usize {
        self.entry.labelled as usize
    }

    /// Index into [`SampleSet::hash_names`].
    pub fn hash(&self) -> usize {
        self.entry.hash as usize
    }

    /// Whether the hash stands in the text.
    pub fn is_conditioned(&self) -> bool {
        self.entry.is_conditioned != 0
    }

    /// Ids and labels without the hash in the text, where it may be learned so.
    pub fn without_hash(&self) -> Option<(&'a [u32], &'a [i32])> {
        self.set.store.tokens_without_hash(self.entry).filter(|_| !self.set.is_plain)
    }

    /// How often it is seen in an epoch, in the mean.
    pub fn weight(&self) -> f64 {
        self.set.weight_of(self.entry)
    }

    /// Where its record begins.
    pub fn origin(&self) -> Origin {
        self.set.origin_of(self.entry)
    }

    /// A copy that stands alone.
    pub fn to_sample(&self) -> Sample {
        let without_hash = self.without_hash().map(|(token_ids, labels)| {
            Box::new(Unconditioned { token_ids: token_ids.to_vec(), labels: labels.to_vec() })
        });
        Sample {
            token_ids: self.token_ids.to_vec(),
            labels: self.labels.to_vec(),
            hash: self.hash(),
            is_conditioned: self.is_conditioned(),
            without_hash,
            weight: self.weight(),
            origin: self.origin(),
        }
    }
}

/// A file that samples come from.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Source {
    pub file: Arc<str>,
    pub weight: f64,
}

/// Samples in the order of their records. A copy shares their tokens.
#[derive(Clone)]
pub struct SampleSet {
    /// The hashes in the order in which they first appear.
    pub hash_names: Vec<String>,
    /// What became of every record, those that the loader skipped included.
    pub accounting: Accounting,
    pub(super) store: Arc<Store>,
    pub(super) sources: Arc<[Source]>,
    /// Those of the store's samples that are in the set; none: all.
    pub(super) picked: Option<Vec<u32>>,
    /// Whether each sample counts once, with its hash.
    pub(super) is_plain: bool,
}

impl SampleSet {
    /// A set of these samples, for which nothing is accounted.
    ///
    /// ```
    /// use fastlora::data::Origin;
    /// use fastlora::tokens::{Sample, SampleSet};
    ///
    /// let origin = Origin { file: "train.json".into(), line: 1 };
    /// let set = SampleSet::new([Sample::new(vec![5, 6, 7], vec![-100, 6, 7], origin)], vec!["faq".into()]);
    /// assert_eq!((set.len(), set.token_count(), set.labelled_count()), (1, 3, 2));
    /// assert_eq!(set.get(0).token_ids, [5, 6, 7]);
    /// ```
    pub fn new(samples: impl IntoIterator<Item = Sample>, hash_names: Vec<String>) -> Self {
        let (mut entries, mut words, mut sources) = (Vec::new(), Vec::new(), Vec::new());
        for sample in samples {
            let source = Source { file: sample.origin.file.clone(), weight: sample.weight };
            let without = sample.without_hash.as_ref().map(|without| (&without.token_ids, &without.labels));
            entries.push(Entry {
                line: sample.origin.line as u64,
                source: place_of(&mut sources, source),
                hash: sample.hash as u32,
                is_conditioned: sample.is_conditioned.into(),
                ..entry(words.len() as u64, (&sample.token_ids, &sample.labels), without)
            });
            for (ids, labels) in [(&sample.token_ids, &sample.labels)].into_iter().chain(without) {
                words.extend_from_slice(ids);
                words.extend_from_slice(bytemuck::cast_slice(labels));
            }
        }
        Self {
            hash_names,
            accounting: Accounting { used: entries.len(), ..Accounting::default() },
            store: Arc::new(Store::Memory { entries, words }),
            sources: sources.into(),
            picked: None,
            is_plain: false,
        }
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.picked.as_ref().map_or_else(|| self.store.entries().len(), Vec::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sample of an index, from 0. Panics past the end.
    pub fn get(&self, index: usize) -> SampleView<'_> {
        self.view(self.entry(index))
    }

    /// The samples in their order.
    pub fn iter(&self) -> impl Iterator<Item = SampleView<'_>> {
        self.entries().map(|entry| self.view(entry))
    }

    /// The same for a walk through all tokens: what lies behind it is not kept in memory.
    pub(super) fn walk(&self) -> impl Iterator<Item = SampleView<'_>> {
        let mut walked = 0;
        self.iter().inspect(move |sample| {
            walked += sample.token_ids.len();
            if walked > RELEASED_TOKENS {
                self.store.release();
                walked = 0;
            }
        })
    }

    fn view<'a>(&'a self, entry: &'a Entry) -> SampleView<'a> {
        let (token_ids, labels) = self.store.tokens(entry);
        SampleView { token_ids, labels, set: self, entry }
    }

    pub(super) fn entry(&self, index: usize) -> &Entry {
        let index = self.picked.as_ref().map_or(index, |picked| picked[index] as usize);
        &self.store.entries()[index]
    }

    pub(super) fn entries(&self) -> impl ExactSizeIterator<Item = &Entry> {
        let entries = self.store.entries();
        (0..self.len()).map(move |index| match &self.picked {
            Some(picked) => &entries[picked[index] as usize],
            None => &entries[index],
        })
    }

    /// Ids and labels, with the hash in the text or, where there is that, without.
    pub(super) fn tokens(&self, index: usize, without_hash: bool) -> (&[u32], &[i32]) {
        let entry = self.entry(index);
        let without = if without_hash { self.store.tokens_without_hash(entry) } else { None };
        without.unwrap_or_else(|| self.store.tokens(entry))
    }

    /// Numbers of tokens with the hash and without; the same where it is not without.
    pub(super) fn lengths(&self, entry: &Entry) -> [usize; 2] {
        let without = if self.has_without(entry) { entry.length_without } else { entry.length };
        [entry.length, without].map(|length| length as usize)
    }

    /// The same of tokens that carry loss.
    pub(super) fn labelled(&self, entry: &Entry) -> [usize; 2] {
        let without = if self.has_without(entry) { entry.labelled_without } else { entry.labelled };
        [entry.labelled, without].map(|count| count as usize)
    }

    /// Whether it may be learned without its hash.
    pub(super) fn has_without(&self, entry: &Entry) -> bool {
        entry.length_without > 0 && !self.is_plain
    }

    pub(super) fn weight_of(&self, entry: &Entry) -> f64 {
        if self.is_plain { 1.0 } else { self.sources[entry.source as usize].weight }
    }

    pub(super) fn origin_of(&self, entry: &Entry) -> Origin {
        Origin { file: self.sources[entry.source as usize].file.clone(), line: entry.line as usize }
    }

    /// Numbers of tokens of the samples.
    pub fn token_counts(&self) -> impl Iterator<Item = usize> {
        self.entries().map(|entry| entry.length as usize)
    }

    /// Tokens of all samples.
    pub fn token_count(&self) -> usize {
        self.token_counts().sum()
    }

    /// Tokens that carry loss in all samples.
    pub fn labelled_count(&self) -> usize {
        self.entries().map(|entry| entry.labelled as usize).sum()
    }

    /// Samples of each hash, in the order of `hash_names`.
    pub fn hash_counts(&self) -> Vec<(&str, usize)> {
        let mut counts = vec![0; self.hash_names.len()];
        self.entries().for_each(|entry| counts[entry.hash as usize] += 1);
        self.hash_names.iter().map(String::as_str).zip(counts).collect()
    }

    /// The hashes that stand in the text of a sample.
    pub fn hashes_in_text(&self) -> BTreeSet<&str> {
        let conditioned = self.entries().filter(|entry| entry.is_conditioned != 0);
        conditioned.map(|entry| self.hash_names[entry.hash as usize].as_str()).collect()
    }

    /// Whether any sample may be learned without its hash.
    pub fn can_lose_hash(&self) -> bool {
        self.entries().any(|entry| self.has_without(entry))
    }

    /// SHA-256 over the samples in order (each: its number of tokens as u64, the ids as u32, the labels as i32, all
    /// little-endian), in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        let mut bytes = Vec::new();
        for sample in self.walk() {
            bytes.clear();
            bytes.extend((sample.token_ids.len() as u64).to_le_bytes());
            bytes.extend(sample.token_ids.iter().flat_map(|id| id.to_le_bytes()));
            bytes.extend(sample.labels.iter().flat_map(|label| label.to_le_bytes()));
            hasher.update(&bytes);
        }
        hex(&hasher.finalize())
    }
}

/// What a sample's tokens say of it: the rest of the entry is zero.
pub(super) fn entry<I, L>(start: u64, tokens: (I, L), without_hash: Option<(I, L)>) -> Entry
where
    I: AsRef<[u32]>,
    L: AsRef<[i32]>,
{
    // A sample is far below 2³² tokens: its ids are in memory, and max_length ends at 2²⁴.
    let labelled = |labels: &[i32]| carry_loss(labels) as u32;
    let (length_without, labelled_without) =
        without_hash.map_or((0, 0), |(ids, labels)| (ids.as_ref().len() as u32, labelled(labels.as_ref())));
    let (ids, labels) = (tokens.0.as_ref(), tokens.1.as_ref());
    Entry {
        start,
        digest: digest(ids),
        line: 0,
        source: 0,
        hash: 0,
        length: ids.len() as u32,
        labelled: labelled(labels),
        length_without,
        labelled_without,
        is_conditioned: 0,
        begins_twice: ids.get(1).is_some_and(|second| *second == ids[0]).into(),
    }
}

/// The index of `source`, which is added where it is missing.
pub(super) fn place_of(sources: &mut Vec<Source>, source: Source) -> u32 {
    // Samples of one source follow one another.
    let place = sources.iter().rposition(|known| *known == source).unwrap_or_else(|| {
        sources.push(source);
        sources.len() - 1
    });
    place as u32
}

impl Default for SampleSet {
    fn default() -> Self {
        Self::new([], Vec::new())
    }
}

impl PartialEq for SampleSet {
    fn eq(&self, other: &Self) -> bool {
        self.hash_names == other.hash_names
            && self.accounting == other.accounting
            && self.len() == other.len()
            && self.iter().zip(other.iter()).all(|(one, other)| one.to_sample() == other.to_sample())
    }
}

impl fmt::Debug for SampleSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (samples, tokens) = (self.len(), self.token_count());
        write!(formatter, "SampleSet {{ samples: {samples}, tokens: {tokens}, {} }}", self.accounting)
    }
}
