//! Where the tokens of samples lie: in memory, or in the pages of a file.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::visits::mix;

/// Bytes of a file that the system keeps in memory as long as it likes.
pub trait Pages: AsRef<[u8]> + Send + Sync {
    /// Takes the pages out of the process's memory; they are read again when they are touched.
    fn release(&self) {}
}

impl Pages for Vec<u8> {}

/// What is known of a sample without its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Entry {
    /// Its first word: the ids, the labels, then both without its hash, where there is that.
    pub start: u64,
    /// [`digest`] of the ids.
    pub digest: u64,
    /// Line of its record.
    pub line: u64,
    /// Index of its record's source.
    pub source: u32,
    /// Index of its hash.
    pub hash: u32,
    /// Tokens.
    pub length: u32,
    /// Tokens that carry loss.
    pub labelled: u32,
    /// Tokens without the hash; 0: it is not without.
    pub length_without: u32,
    /// Of these, the ones that carry loss.
    pub labelled_without: u32,
    /// Whether the hash stands in the text: 1, or 0.
    pub is_conditioned: u32,
    /// Whether the first two ids are one: 1, or 0.
    pub begins_twice: u32,
}

// SAFETY: all fields are integers, for which zero is a value.
unsafe impl Zeroable for Entry {}
// SAFETY: integers in C layout, three of eight bytes and then eight of four: no padding, and any bits are a value.
unsafe impl Pod for Entry {}

impl Entry {
    /// The words that the sample takes.
    pub fn word_count(&self) -> u64 {
        2 * (u64::from(self.length) + u64::from(self.length_without))
    }
}

/// Tells most lists of ids apart.
pub(super) fn digest(token_ids: &[u32]) -> u64 {
    token_ids.iter().fold(token_ids.len() as u64, |state, &id| mix(state ^ u64::from(id)))
}

/// Entries, and the words that they point to.
pub(super) enum Store {
    Memory {
        entries: Vec<Entry>,
        words: Vec<u32>,
    },
    File {
        pages: Arc<dyn Pages>,
        /// Where both lie in it, aligned.
        entries: Range<usize>,
        words: Range<usize>,
    },
}

impl Store {
    pub fn entries(&self) -> &[Entry] {
        match self {
            Store::Memory { entries, .. } => entries,
            Store::File { pages, entries, .. } => bytemuck::cast_slice(&(**pages).as_ref()[entries.clone()]),
        }
    }

    pub fn words(&self) -> &[u32] {
        match self {
            Store::Memory { words, .. } => words,
            Store::File { pages, words, .. } => bytemuck::cast_slice(&(**pages).as_ref()[words.clone()]),
        }
    }

    /// Ids and labels of a sample.
    pub fn tokens(&self, entry: &Entry) -> (&[u32], &[i32]) {
        self.part(entry.start as usize, entry.length as usize)
    }

    /// The same without its hash, where it may be without.
    pub fn tokens_without_hash(&self, entry: &Entry) -> Option<(&[u32], &[i32])> {
        let start = entry.start as usize + 2 * entry.length as usize;
        (entry.length_without > 0).then(|| self.part(start, entry.length_without as usize))
    }

    fn part(&self, start: usize, length: usize) -> (&[u32], &[i32]) {
        let (ids, labels) = self.words()[start..start + 2 * length].split_at(length);
        (ids, bytemuck::cast_slice(labels))
    }

    /// Gives pages back after a walk through them.
    pub fn release(&self) {
        if let Store::File { pages, .. } = self {
            pages.release();
        }
    }
}
