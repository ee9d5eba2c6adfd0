//! A file of tokenised samples that is mapped into memory instead of being read.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `fastlora` |
//! | 4, 4 | format (in the byte order of all numbers), zeros |
//! | 32 | key: what the samples were made of and how |
//! | 32 | SHA-256 over the rest of the file and then the three sizes below |
//! | 8, 8, 8 | words, entries and bytes of the description |
//! | 24 | zeros |
//! | 4 a word | ids and labels of the samples, end to end; zeros up to a multiple of 8 bytes |
//! | 56 an entry | what is known of each sample without its tokens |
//! | | the description: names of the hashes, what became of records that are not used whole (JSON) |

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::sync::Arc;

use bytemuck::PodCastError;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::builder::{Description, sources_of};
use super::sample_set::SampleSet;
use super::store::{Entry, Pages, Store};
use super::tokenizer::hex;
use crate::config::DataSource;
use crate::data::Accounting;

const MAGIC: [u8; 8] = *b"fastlora";
/// Layout of the file.
const FORMAT: u32 = 1;
/// Raised whenever the same data, tokenizer and settings become other samples.
const SAMPLES: u32 = 1;
const HEADER_BYTES: usize = 128;
/// Where the header's parts are.
const KEY: Range<usize> = 16..48;
const CHECKSUM: Range<usize> = 48..80;
const SIZES: Range<usize> = 80..104;
/// Bytes that are hashed between two releases of the pages.
const RELEASED_BYTES: usize = 64 << 20;

/// SHA-256 of what samples are made of and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleKey([u8; 32]);

impl SampleKey {
    /// The key of samples whose making is told by `identity`.
    pub fn new(identity: &Value) -> Self {
        let version = env!("CARGO_PKG_VERSION");
        Self(Sha256::digest(format!("{SAMPLES} {version} {identity}")).into())
    }

    /// In hexadecimal.
    pub fn name(&self) -> String {
        hex(&self.0)
    }
}

/// A file of samples in the making.
pub struct SampleFile {
    file: BufWriter<File>,
    hasher: Sha256,
    word_count: u64,
}

impl SampleFile {
    /// Begins an empty file.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn new(file: File) -> io::Result<Self> {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&[0; HEADER_BYTES])?;
        Ok(Self { file, hasher: Sha256::new(), word_count: 0 })
    }

    pub(super) fn write(&mut self, words: &[u32]) -> io::Result<()> {
        self.word_count += words.len() as u64;
        self.append(bytemuck::cast_slice(words))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.file.write_all(bytes)
    }

    /// Writes the rest and forces the file to the disk.
    pub(super) fn finish(
        mut self,
        key: &SampleKey,
        entries: &[Entry],
        description: &Description,
    ) -> io::Result<()> {
        if !self.word_count.is_multiple_of(2) {
            self.append(&[0; 4])?;
        }
        self.append(bytemuck::cast_slice(entries))?;
        let description = serde_json::to_vec(description)?;
        self.append(&description)?;
        let sizes = [self.word_count, entries.len() as u64, description.len() as u64];
        self.hasher.update(bytemuck::bytes_of(&sizes));
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_ne_bytes());
        header[KEY].copy_from_slice(&key.0);
        header[CHECKSUM].copy_from_slice(&self.hasher.finalize());
        header[SIZES].copy_from_slice(bytemuck::bytes_of(&sizes));
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&header)?;
        file.sync_all()
    }
}

impl SampleSet {
    /// The samples of a file whose bytes are `pages`, made of `sources`; `read` accounts for the records that the
    /// loader left out. Every byte is checked against the file's SHA-256.
    ///
    /// # Errors
    /// Why the file cannot be used: it is of another kind, version or key, or damaged.
    pub fn from_file(
        pages: Arc<dyn Pages>,
        key: &SampleKey,
        sources: &[DataSource],
        read: &Accounting,
    ) -> Result<Self, String> {
        let bytes = (*pages).as_ref();
        let header = bytes.get(..HEADER_BYTES).ok_or("it is cut short")?;
        if header[..8] != MAGIC {
            return Err("it is no file of samples".into());
        }
        let format = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
        if format != FORMAT {
            return Err(format!("it has format {format}, not {FORMAT}"));
        }
        if header[KEY] != key.0 {
            return Err("it was made of other data, or otherwise".into());
        }
        let size = |place: usize| {
            let start = SIZES.start + 8 * place;
            header[start..start + 8].try_into().map_or(0, u64::from_ne_bytes)
        };
        let (words, entries, description) =
            parts([size(0), size(1), size(2)], bytes.len()).ok_or("its size is not what it says")?;
        if checksum(&*pages, &header[SIZES]) != header[CHECKSUM] {
            return Err("its SHA-256 is another than it says: it is damaged".into());
        }
        let description: Description = serde_json::from_slice(&bytes[description])
            .map_err(|error| format!("its description cannot be read: {error}"))?;
        let sources = sources_of(sources);
        let misaligned = |error: PodCastError| format!("it cannot be mapped: {error}");
        let word_count =
            bytemuck::try_cast_slice::<u8, u32>(&bytes[words.clone()]).map_err(misaligned)?.len() as u64;
        let all: &[Entry] = bytemuck::try_cast_slice(&bytes[entries.clone()]).map_err(misaligned)?;
        let is_inside = |entry: &Entry| {
            let end = entry.start.checked_add(entry.word_count());
            end.is_some_and(|end| end <= word_count)
                && (entry.source as usize) < sources.len()
                && (entry.hash as usize) < description.hash_names.len()
        };
        let notes = description.notes.iter().map(|note| note.source);
        let first_incomplete = description.incomplete.iter().map(|incomplete| incomplete.first.0);
        if all.is_empty()
            || !all.iter().all(is_inside)
            || notes.chain(first_incomplete).any(|source| source as usize >= sources.len())
        {
            return Err("its samples lie outside of it".into());
        }
        description.warn(&sources);
        let accounting = description.account(all.len(), &sources, read);
        Ok(Self {
            hash_names: description.hash_names,
            accounting,
            store: Arc::new(Store::File { pages, entries, words }),
            sources: sources.into(),
            picked: None,
            is_plain: false,
        })
    }
}

/// Where words, entries and description are in a file of `length` bytes, if they fill it.
fn parts(sizes: [u64; 3], length: usize) -> Option<(Range<usize>, Range<usize>, Range<usize>)> {
    let [words, entries, description] = sizes.map(|size| usize::try_from(size).ok());
    let words_end = HEADER_BYTES.checked_add(words?.checked_mul(size_of::<u32>())?)?;
    let entries_start = words_end.checked_next_multiple_of(8)?;
    let entries_end = entries_start.checked_add(entries?.checked_mul(size_of::<Entry>())?)?;
    let end = entries_end.checked_add(description?)?;
    (end == length).then_some((HEADER_BYTES..words_end, entries_start..entries_end, entries_end..end))
}

fn checksum(pages: &dyn Pages, sizes: &[u8]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for piece in pages.as_ref()[HEADER_BYTES..].chunks(RELEASED_BYTES) {
        hasher.update(piece);
        pages.release();
    }
    hasher.update(sizes);
    hasher.finalize().into()
}

#[cfg(test)]
mod tests;
