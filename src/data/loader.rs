//! Data files → records, merged in the order given, every record with its place.

use std::sync::Arc;

use super::accounting::{Accounting, Outcome};
use super::blocks::each_block;
use super::fields::Keys;
use super::files::TextFile;
use super::records::{Kinds, Origin, Record, RecordContent, UNKNOWN_HASH};
use crate::config::{DataSource, OnBadRecord};
use crate::error::{Error, Result, escape_control};

/// What holds for every file that does not say otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadOptions {
    /// Field that holds the instruction, instead of the search.
    pub instruction_key: Option<String>,
    /// Field that holds the output, instead of the search.
    pub output_key: Option<String>,
    /// Field that holds the hash, instead of the search.
    pub hash_key: Option<String>,
    /// What happens to a record that cannot be used.
    pub on_bad_record: OnBadRecord,
}

/// Records of all files in their order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dataset {
    /// The usable records.
    pub records: Vec<Record>,
    /// What each file gave.
    pub files: Vec<FileReport>,
    /// The records that were skipped; `used` counts `records`.
    pub accounting: Accounting,
}

impl Dataset {
    /// Which kinds of record there are.
    pub fn kinds(&self) -> Kinds {
        let mut kinds = Kinds::default();
        self.records.iter().for_each(|record| kinds.note(record));
        kinds
    }
}

/// What one file gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// Its path, as given.
    pub file: Arc<str>,
    /// Usable records.
    pub used: usize,
    /// Bad records left out.
    pub skipped: usize,
    /// SHA-256, in hexadecimal, of its bytes and of how they are read.
    pub fingerprint: String,
    /// The hash field that was named, where no record has it.
    missing_hash_key: Option<String>,
}

/// What reading files gave besides the records.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// What each file gave.
    pub files: Vec<FileReport>,
    /// The records that were skipped, and the number of the others.
    pub accounting: Accounting,
    /// Which kinds of record there are.
    pub kinds: Kinds,
}

impl Survey {
    /// Logs what each file gave.
    pub fn log(&self) {
        for FileReport { file, used, skipped, missing_hash_key, .. } in &self.files {
            let file = escape_control(file);
            if let Some(key) = missing_hash_key {
                tracing::warn!("{file}: no record has the hash field `{key}`: all get `{UNKNOWN_HASH}`");
            }
            tracing::info!("{file}: {used} records, {skipped} bad");
        }
    }
}

/// Loads and merges data files.
///
/// `.json` holds a list of objects or one object, `.jsonl` / `.ndjson` one object a line; either may be compressed as
/// `.gz` or `.zst`. The instruction, output and hash are the first field present of [`INSTRUCTION_NAMES`],
/// [`OUTPUT_NAMES`] and [`HASH_NAMES`], unless the options or the source name one; a non-empty `input` beside
/// `instruction` is joined to it by a line break. Records with `messages` (`role`, `content`) or `conversations` (ShareGPT's
/// `from`, `value`) are conversations, records with `input_ids` are taken as tokens.
///
/// [`INSTRUCTION_NAMES`]: super::INSTRUCTION_NAMES
/// [`OUTPUT_NAMES`]: super::OUTPUT_NAMES
/// [`HASH_NAMES`]: super::HASH_NAMES
///
/// # Errors
/// Of kind data, with file, line and where it helps column: a file that is missing, empty, not UTF-8, not JSON, of
/// mixed kinds of record; a record with a missing, empty or unusable field, unless
/// `on_bad_record` skips it. Of kind config: a `weight` that is not above 0.
///
/// ```
/// use fastlora::config::DataSource;
/// use fastlora::data::{load, LoadOptions, RecordContent};
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("faq.jsonl");
/// std::fs::write(&path, r#"{"question": "Who are you?", "answer": "A model.", "domain": "faq"}"#)?;
///
/// let dataset = load(&[DataSource::new(&path)], &LoadOptions::default())?;
/// assert_eq!(dataset.records[0].hash, "faq");
/// assert_eq!(dataset.records[0].origin.line, 1);
/// assert!(matches!(&dataset.records[0].content, RecordContent::Instruction { output, .. } if output == "A model."));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn load(sources: &[DataSource], options: &LoadOptions) -> Result<Dataset> {
    let mut records = Vec::new();
    let survey = read(sources, options, |_, block| {
        records.extend(block);
        Ok(())
    })?;
    survey.log();
    let Survey { files, accounting, .. } = survey;
    Ok(Dataset { records, files, accounting })
}

/// The same for data of any size: calls `visit` with the index of a source and some of its records, in order.
///
/// What is in memory is a few MiB of text and what was made of it, however large the files are; a record is at hand
/// whole.
///
/// # Errors
/// As [`load`], and what `visit` returns. Records that are refused, or missing, are found at the end.
pub fn read(
    sources: &[DataSource],
    options: &LoadOptions,
    mut visit: impl FnMut(usize, Vec<Record>) -> Result<()>,
) -> Result<Survey> {
    for source in sources {
        source.validate()?;
    }
    let mut survey = Survey::default();
    for (index, source) in sources.iter().enumerate() {
        read_file(source, options, &mut survey, |block| visit(index, block))?;
    }
    let accounting = &mut survey.accounting;
    accounting.used = survey.files.iter().map(|file| file.used).sum();
    if let Some(refusal) =
        accounting.refusal("mend it, or leave bad records out with on_bad_record = \"skip\"")
    {
        return Err(refusal);
    }
    if accounting.used == 0 {
        survey.log();
        survey.accounting.log();
        return Err(Error::data(format!("no usable record: {}", survey.accounting))
            .hint("the warnings name each file, line and reason"));
    }
    Ok(survey)
}

/// Visits one file's records, and notes its exceptions.
fn read_file(
    source: &DataSource,
    options: &LoadOptions,
    survey: &mut Survey,
    mut visit: impl FnMut(Vec<Record>) -> Result<()>,
) -> Result<()> {
    let file = TextFile::open(&source.path)?;
    let name = file.name.clone();
    let or = |own: &Option<String>, general: &Option<String>| own.clone().or_else(|| general.clone());
    let keys = Keys {
        instruction: or(&source.instruction_key, &options.instruction_key),
        output: or(&source.output_key, &options.output_key),
        hash: or(&source.hash_key, &options.hash_key),
        fixed_hash: source.hash.clone(),
    };
    let outcome = match options.on_bad_record {
        OnBadRecord::Error => Outcome::Refused,
        OnBadRecord::Skip => Outcome::Skipped,
    };
    let (mut used, mut skipped, mut any_hash) = (0, 0, false);
    let mut first: Option<(&'static str, Origin)> = None;
    let file = each_block(file, &keys, |block| {
        let mut records = Vec::with_capacity(block.len());
        for (line, result) in block {
            let origin = Origin { file: name.clone(), line };
            match result {
                Ok(interpreted) => {
                    any_hash |= interpreted.hash.is_some();
                    let (content, hash) = interpreted.hash_or_unknown();
                    let (kind, earlier) = &*first.get_or_insert_with(|| (content.kind(), origin.clone()));
                    refuse_mixture(kind, earlier, &content, &origin)?;
                    let record = Record { content, hash, weight: source.weight.unwrap_or(1.0), origin };
                    survey.kinds.note(&record);
                    records.push(record);
                }
                Err(reason) => {
                    skipped += 1;
                    survey.accounting.note(&origin, outcome, reason);
                }
            }
        }
        used += records.len();
        visit(records)
    })?;
    if used + skipped == 0 {
        return Err(Error::data("the file holds no record").at(&*name));
    }
    let missing_hash_key = keys.hash.filter(|_| keys.fixed_hash.is_none() && used > 0 && !any_hash);
    let fingerprint = file.fingerprint();
    survey.files.push(FileReport { file: name, used, skipped, fingerprint, missing_hash_key });
    Ok(())
}

/// One file holds one kind of record.
fn refuse_mixture(expected: &str, earlier: &Origin, content: &RecordContent, origin: &Origin) -> Result<()> {
    let found = content.kind();
    if expected == found {
        return Ok(());
    }
    Err(Error::data(format!(
        "mixed kinds of record: this one is {found}, the first ({earlier}) is {expected}"
    ))
    .at(origin.to_string())
    .hint("keep each kind in a file of its own"))
}
