//! Data files → records, merged in the order given, every record with its place.

use std::sync::Arc;

use rayon::prelude::*;

use super::accounting::{Accounting, Outcome};
use super::fields::{Interpreted, Keys, Problem, interpret};
use super::files::{Layout, TextFile};
use super::json::{Broken, RawValue, Scanner};
use super::records::{Origin, Record};
use crate::config::{DataSource, OnBadRecord};
use crate::error::{Error, Result};

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

/// What one file gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// Its path, as given.
    pub file: Arc<str>,
    /// Usable records.
    pub used: usize,
    /// Bad records left out.
    pub skipped: usize,
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
    for source in sources {
        source.validate()?;
    }
    let mut dataset = Dataset::default();
    for source in sources {
        load_file(source, options, &mut dataset)?;
    }
    dataset.accounting.used = dataset.records.len();
    if let Some(refusal) =
        dataset.accounting.refusal("mend it, or leave bad records out with on_bad_record = \"skip\"")
    {
        return Err(refusal);
    }
    if dataset.records.is_empty() {
        dataset.accounting.log();
        return Err(Error::data(format!("no usable record: {}", dataset.accounting))
            .hint("the warnings name each file, line and reason"));
    }
    Ok(dataset)
}

/// Appends one file's records and exceptions.
fn load_file(source: &DataSource, options: &LoadOptions, dataset: &mut Dataset) -> Result<()> {
    let file = TextFile::read(&source.path)?;
    let or = |own: &Option<String>, general: &Option<String>| own.clone().or_else(|| general.clone());
    let keys = Keys {
        instruction: or(&source.instruction_key, &options.instruction_key),
        output: or(&source.output_key, &options.output_key),
        hash: or(&source.hash_key, &options.hash_key),
        fixed_hash: source.hash.clone(),
    };
    let results = match file.layout {
        Layout::Json => json_records(&file, &keys)?,
        Layout::Lines => line_records(&file, &keys),
    };
    if results.is_empty() {
        return Err(Error::data("the file holds no record").at(&*file.name));
    }

    let first = dataset.records.len();
    let (mut skipped, mut any_hash) = (0, false);
    for (line, result) in results {
        let origin = Origin { file: file.name.clone(), line };
        match result {
            Ok(interpreted) => {
                any_hash |= interpreted.hash.is_some();
                let (content, hash) = interpreted.hash_or_unknown();
                let record = Record { content, hash, weight: source.weight.unwrap_or(1.0), origin };
                if let Some(earlier) = dataset.records.get(first) {
                    refuse_mixture(earlier, &record)?;
                }
                dataset.records.push(record);
            }
            Err(Problem::Broken(broken)) => return Err(broken_json(&file, &broken)),
            Err(Problem::Bad(reason)) => {
                let outcome = match options.on_bad_record {
                    OnBadRecord::Error => Outcome::Refused,
                    OnBadRecord::Skip => Outcome::Skipped,
                };
                skipped += 1;
                dataset.accounting.note(&origin, outcome, reason);
            }
        }
    }
    let used = dataset.records.len() - first;
    if let Some(key) = keys.hash.filter(|_| keys.fixed_hash.is_none() && used > 0 && !any_hash) {
        tracing::warn!(
            "{}: no record has the hash field `{key}`: all get `{}`",
            file.name,
            super::UNKNOWN_HASH
        );
    }
    tracing::info!("{}: {used} records, {skipped} bad", crate::error::escape_control(&file.name));
    dataset.files.push(FileReport { file: file.name.clone(), used, skipped });
    Ok(())
}

/// Each record's line and what it says.
type Interpretations = Vec<(usize, Result<Interpreted, Problem>)>;

/// The records of a list of objects, or of one object.
fn json_records(file: &TextFile, keys: &Keys) -> Result<Interpretations> {
    let values = json_values(file.text()).map_err(|broken| broken_json(file, &broken))?;
    let (mut line, mut counted) = (1, 0);
    let placed: Vec<(usize, RawValue<'_>)> = values
        .into_iter()
        .map(|value| {
            line += line_breaks(&file.text()[counted..value.offset]);
            counted = value.offset;
            (line, value)
        })
        .collect();
    Ok(placed.into_par_iter().map(|(line, value)| (line, interpret(value, keys))).collect())
}

fn json_values(text: &str) -> Result<Vec<RawValue<'_>>, Broken> {
    let mut scanner = Scanner::new(text, 0);
    let mut values = Vec::new();
    match scanner.peek() {
        None => return Ok(values),
        Some(b'[') => {
            scanner.expect(b'[')?;
            if scanner.peek() == Some(b']') {
                scanner.expect(b']')?;
            } else {
                loop {
                    values.push(scanner.value()?);
                    if scanner.peek() == Some(b']') {
                        scanner.expect(b']')?;
                        break;
                    }
                    scanner.expect(b',')?;
                }
            }
        }
        Some(_) => values.push(scanner.value()?),
    }
    match scanner.peek() {
        None => Ok(values),
        Some(b'{') if text.trim_start().starts_with('{') => Err(Broken {
            offset: scanner.offset(),
            message: "a second object: a file with one object a line is named .jsonl".into(),
        }),
        Some(_) => Err(Broken { offset: scanner.offset(), message: "text after the end of the data".into() }),
    }
}

/// The records of a file with one object a line; blank lines are none.
fn line_records(file: &TextFile, keys: &Keys) -> Interpretations {
    let mut offset = 0;
    let lines: Vec<(usize, usize, &str)> = file
        .text()
        .split_inclusive('\n')
        .enumerate()
        .map(|(index, line)| {
            let start = offset;
            offset += line.len();
            // Without its end, so that an object which is not whole is placed on its own line.
            (index + 1, start, line.trim_end_matches(['\r', '\n']))
        })
        .filter(|(_, _, line)| !line.trim().is_empty())
        .collect();
    lines
        .into_par_iter()
        .map(|(number, offset, line)| {
            (number, line_value(line, offset).and_then(|value| interpret(value, keys)))
        })
        .collect()
}

fn line_value(line: &str, offset: usize) -> Result<RawValue<'_>, Problem> {
    let mut scanner = Scanner::new(line, offset);
    let value = scanner.value()?;
    match scanner.peek() {
        None => Ok(value),
        Some(_) => {
            let message = "text after the object: expected one object a line".into();
            Err(Problem::Broken(Broken { offset: scanner.offset(), message }))
        }
    }
}

fn line_breaks(text: &str) -> usize {
    text.bytes().filter(|&byte| byte == b'\n').count()
}

fn broken_json(file: &TextFile, broken: &Broken) -> Error {
    let hint = match file.layout {
        Layout::Json => "expected a JSON list of objects, or one object",
        Layout::Lines => "expected one whole JSON object on each line; a list of objects is named .json",
    };
    Error::data(format!("broken JSON: {}", broken.message)).at(file.place(broken.offset)).hint(hint)
}

/// One file holds one kind of record.
fn refuse_mixture(first: &Record, record: &Record) -> Result<()> {
    let (expected, found) = (first.content.kind(), record.content.kind());
    if expected == found {
        return Ok(());
    }
    Err(Error::data(format!(
        "mixed kinds of record: this one is {found}, the first ({}) is {expected}",
        first.origin
    ))
    .at(record.origin.to_string())
    .hint("keep each kind in a file of its own"))
}
