//! Records → a set of samples, block by block, every record accounted for.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::lengths::Lengths;
use super::sample_file::SampleFile;
use super::sample_set::{SampleSet, Source, entry, place_of};
use super::samples::{Fate, SampleOptions, TextTokenizer, Tokens, tokenise_record};
use super::store::{Entry, Store};
use super::tokenizer::Tokenizer;
use crate::config::{DataSource, OnBadRecord, Overlong};
use crate::data::{Accounting, Dataset, Kinds, Origin, Outcome, Record};
use crate::error::{Error, Result, escape_control};

/// What became of a record that is not used whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    pub source: u32,
    pub line: u64,
    pub outcome: Outcome,
    pub reason: String,
}

/// Conversations of which the chat template writes only a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Incomplete {
    pub count: u64,
    /// Source and line of the first.
    pub first: (u32, u64),
}

/// What is known of samples besides their tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    pub hash_names: Vec<String>,
    pub notes: Vec<Note>,
    pub incomplete: Option<Incomplete>,
}

/// Where tokens go while they are made.
enum Words {
    Memory(Vec<u32>),
    File { file: SampleFile, error: Option<io::Error> },
}

/// Turns records into samples, block by block in their order, each block on all cores.
///
/// With [`into_file`](Self::into_file) the tokens go to a file at once, and what stays in memory is 56 bytes a sample.
pub struct SampleBuilder<'a> {
    text: Option<TextTokenizer<'a>>,
    options: &'a SampleOptions,
    sources: Vec<Source>,
    entries: Vec<Entry>,
    words: Words,
    word_count: u64,
    hashes: HashMap<String, u32>,
    description: Description,
    lengths: Lengths,
    overlong: usize,
    first_overlong: Option<Origin>,
}

impl<'a> SampleBuilder<'a> {
    /// A builder for records of these kinds.
    ///
    /// # Errors
    /// A model error when text meets no tokenizer, or one without EOS.
    pub fn new(kinds: &Kinds, tokenizer: Option<&'a Tokenizer>, options: &'a SampleOptions) -> Result<Self> {
        Ok(Self {
            text: TextTokenizer::for_kinds(kinds, tokenizer)?,
            options,
            sources: Vec::new(),
            entries: Vec::new(),
            words: Words::Memory(Vec::new()),
            word_count: 0,
            hashes: HashMap::new(),
            description: Description::default(),
            lengths: Lengths::default(),
            overlong: 0,
            first_overlong: None,
        })
    }

    /// The same for the records of `sources`, whose indices [`add`](Self::add) is told.
    pub fn of_sources(mut self, sources: &[DataSource]) -> Self {
        self.sources = sources_of(sources);
        self
    }

    /// The same with the tokens in a file, whatever there are of them.
    pub fn into_file(self, file: SampleFile) -> Self {
        Self { words: Words::File { file, error: None }, ..self }
    }

    /// Why the file of the tokens could not be written, where that is so.
    pub fn write_error(&self) -> Option<&io::Error> {
        match &self.words {
            Words::File { error, .. } => error.as_ref(),
            Words::Memory(_) => None,
        }
    }

    /// Adds records of one source.
    ///
    /// # Errors
    /// An id without an embedding row, a chat template that fails, a file that cannot be written.
    pub fn add(&mut self, source: usize, records: &[Record]) -> Result<()> {
        let (text, options) = (self.text, self.options);
        let fates: Vec<(Fate, Option<Tokens>)> = records
            .par_iter()
            .map(|record| tokenise_record(record, text, options))
            .collect::<Vec<Result<_>>>()
            .into_iter()
            .collect::<Result<_>>()?;
        for (record, (fate, without_hash)) in records.iter().zip(fates) {
            self.add_fate(source as u32, record, fate, without_hash)?;
        }
        Ok(())
    }

    fn add_fate(
        &mut self,
        source: u32,
        record: &Record,
        fate: Fate,
        without_hash: Option<Tokens>,
    ) -> Result<()> {
        let line = record.origin.line as u64;
        let mut note = |outcome, reason| self.description.notes.push(Note { source, line, outcome, reason });
        match fate {
            Fate::Used { tokens, cut_from } => {
                self.lengths.note(cut_from.unwrap_or(tokens.token_ids.len()));
                if let Some(length) = cut_from {
                    self.overlong += 1;
                    note(Outcome::Truncated, format!("{length} tokens cut to {}", tokens.token_ids.len()));
                }
                if tokens.is_incomplete {
                    let first = Incomplete { count: 0, first: (source, line) };
                    self.description.incomplete.get_or_insert(first).count += 1;
                }
                let hash = self.hash(&record.hash);
                self.entries.push(Entry {
                    line,
                    source,
                    hash,
                    is_conditioned: record.text_hash().is_some().into(),
                    ..entry(self.word_count, tokens.parts(), without_hash.as_ref().map(Tokens::parts))
                });
                for (ids, labels) in
                    [Some(&tokens), without_hash.as_ref()].into_iter().flatten().map(Tokens::parts)
                {
                    self.word_count += 2 * ids.len() as u64;
                    self.write(ids)?;
                    self.write(bytemuck::cast_slice(labels))?;
                }
            }
            Fate::Overlong { length } => {
                self.lengths.note(length);
                self.overlong += 1;
                note(
                    Outcome::Dropped,
                    format!("{length} tokens, more than max_length = {}", self.options.max_length),
                );
                if self.options.overlong == Overlong::Error && self.first_overlong.is_none() {
                    self.first_overlong = Some(record.origin.clone());
                }
            }
            Fate::Bad { reason } => note(
                match self.options.on_bad_record {
                    OnBadRecord::Error => Outcome::Refused,
                    OnBadRecord::Skip => Outcome::Skipped,
                },
                reason,
            ),
        }
        Ok(())
    }

    fn hash(&mut self, name: &str) -> u32 {
        if let Some(&known) = self.hashes.get(name) {
            return known;
        }
        let index = self.description.hash_names.len() as u32;
        self.hashes.insert(name.to_string(), index);
        self.description.hash_names.push(name.to_string());
        index
    }

    fn write(&mut self, words: &[u32]) -> Result<()> {
        match &mut self.words {
            Words::Memory(all) => all.extend_from_slice(words),
            Words::File { file, error } => {
                if let Err(source) = file.write(words) {
                    *error = Some(source);
                    return Err(Error::io("cannot write the samples"));
                }
            }
        }
        Ok(())
    }

    /// What was made of the records; `read` accounts for those that the loader left out.
    ///
    /// # Errors
    /// Data errors with file and line: nothing to learn in a record (unless skipped), samples over `max_length` (with
    /// the histogram of lengths, unless truncated or dropped), no sample left.
    pub fn finish(self, read: &Accounting) -> Result<Built> {
        let Self { options, sources, entries, words, description, lengths, overlong, first_overlong, .. } =
            self;
        description.warn(&sources);
        let accounting = description.account(entries.len(), &sources, read);
        let refusal = accounting.refusal("mend it, or leave bad records out with on_bad_record = \"skip\"");
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        let histogram = || {
            format!(
                "{overlong} of {} samples are longer than max_length = {}; {lengths}",
                lengths.count, options.max_length,
            )
        };
        let advice = "raise max_length, or set overlong to \"truncate\" or \"drop\"";
        if let Some(origin) = first_overlong {
            return Err(Error::data(histogram()).at(origin.to_string()).hint(advice));
        }
        if entries.is_empty() {
            let message = if overlong > 0 { histogram() } else { accounting.to_string() };
            return Err(Error::data(format!("no sample is left: {message}")).hint(advice));
        }
        Ok(Built { entries, words, description, accounting, sources })
    }
}

/// Samples that are made.
pub struct Built {
    entries: Vec<Entry>,
    words: Words,
    description: Description,
    accounting: Accounting,
    sources: Vec<Source>,
}

impl Built {
    /// Writes what is missing of the file of the tokens, if they went there, and forces it to the disk.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(self, key: &super::SampleKey) -> io::Result<()> {
        match self.words {
            Words::Memory(_) => Ok(()),
            Words::File { file, .. } => file.finish(key, &self.entries, &self.description),
        }
    }

    /// The set of the samples, whose tokens are in memory.
    pub fn into_set(self) -> SampleSet {
        let words = match self.words {
            Words::Memory(words) => words,
            Words::File { .. } => Vec::new(),
        };
        SampleSet {
            hash_names: self.description.hash_names,
            accounting: self.accounting,
            store: Arc::new(Store::Memory { entries: self.entries, words }),
            sources: self.sources.into(),
            picked: None,
            is_plain: false,
        }
    }
}

impl Description {
    /// Warns about conversations of which the chat template writes only a part.
    pub fn warn(&self, sources: &[Source]) {
        if let Some(Incomplete { count, first: (source, line) }) = self.incomplete {
            let file = escape_control(&sources[source as usize].file);
            tracing::warn!(
                "the chat template leaves out messages, or rewrites them, in {count} conversations; the first is \
                 {file}:{line}"
            );
        }
    }

    /// The account of all records, of which `used` became samples and `read` did not get so far.
    pub fn account(&self, used: usize, sources: &[Source], read: &Accounting) -> Accounting {
        let mut accounting = Accounting { used, ..read.clone() };
        for Note { source, line, outcome, reason } in &self.notes {
            let origin = Origin { file: sources[*source as usize].file.clone(), line: *line as usize };
            accounting.note(&origin, *outcome, reason.as_str());
        }
        accounting
    }
}

/// What samples are told of the files of a configuration.
pub(super) fn sources_of(sources: &[DataSource]) -> Vec<Source> {
    let source = |source: &DataSource| Source {
        file: source.path.display().to_string().into(),
        weight: source.weight.unwrap_or(1.0),
    };
    sources.iter().map(source).collect()
}

/// [`SampleBuilder`] for records that are in memory.
///
/// # Errors
/// As [`tokenise`](super::tokenise).
pub(super) fn build(
    dataset: &Dataset,
    tokenizer: Option<&Tokenizer>,
    options: &SampleOptions,
) -> Result<SampleSet> {
    let mut builder = SampleBuilder::new(&dataset.kinds(), tokenizer, options)?;
    let is_of_one_source = |one: &Record, next: &Record| {
        one.origin.file == next.origin.file && one.weight.to_bits() == next.weight.to_bits()
    };
    for records in dataset.records.chunk_by(is_of_one_source) {
        let source = Source { file: records[0].origin.file.clone(), weight: records[0].weight };
        let place = place_of(&mut builder.sources, source);
        builder.add(place as usize, records)?;
    }
    Ok(builder.finish(&dataset.accounting)?.into_set())
}
