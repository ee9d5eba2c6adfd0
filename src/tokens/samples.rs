//! Records → samples: token ids with one label each, every record accounted for.

use std::collections::{BTreeSet, HashMap};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::chat;
use super::lengths::length_histogram;
use super::tokenizer::{Tokenizer, hex};
use super::truncation::{self, Cut};
use crate::config::{HashTemplate, LossOn, OnBadRecord, Overlong};
use crate::data::{Accounting, Dataset, Origin, Outcome, Record, RecordContent, render};
use crate::error::{Error, Result};

/// The label of a token without loss.
pub const NO_LOSS: i32 = -100;

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

    /// Tokens that carry loss.
    pub fn labelled_count(&self) -> usize {
        carry_loss(&self.labels)
    }

    /// Ids and labels, with the hash in the text or, where there is that, without.
    pub(super) fn tokens(&self, without_hash: bool) -> (&[u32], &[i32]) {
        match &self.without_hash {
            Some(sample) if without_hash => (&sample.token_ids, &sample.labels),
            _ => (&self.token_ids, &self.labels),
        }
    }
}

/// Number of labels that carry loss.
pub(super) fn carry_loss(labels: &[i32]) -> usize {
    labels.iter().skip(1).filter(|&&label| label != NO_LOSS).count()
}

/// What holds for every sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleOptions {
    /// Longest sample in tokens.
    pub max_length: usize,
    /// What happens to a longer one.
    pub overlong: Overlong,
    /// Which tokens carry loss.
    pub loss_on: LossOn,
    /// What happens to a record without anything to learn.
    pub on_bad_record: OnBadRecord,
    /// Rows of the model's embedding: every id is below.
    pub embedding_rows: usize,
    /// What carries the hash in a text.
    pub hash_template: HashTemplate,
    /// Whether each sample is made without its hash too, for `hash_dropout`.
    pub also_without_hash: bool,
}

impl SampleOptions {
    /// For counting what a data set holds: nothing is refused, and nothing is cut or left out for its length.
    pub fn counting(embedding_rows: usize) -> Self {
        Self {
            max_length: usize::MAX,
            overlong: Overlong::Drop,
            loss_on: LossOn::Completion,
            on_bad_record: OnBadRecord::Skip,
            embedding_rows,
            hash_template: HashTemplate::default(),
            also_without_hash: false,
        }
    }
}

/// Samples in the order of their records.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SampleSet {
    /// The samples.
    pub samples: Vec<Sample>,
    /// The hashes in the order in which they first appear.
    pub hash_names: Vec<String>,
    /// What became of every record, those that the loader skipped included.
    pub accounting: Accounting,
}

impl SampleSet {
    /// SHA-256 over the samples in order (each: its number of tokens as u64, the ids as u32, the labels as i32, all
    /// little-endian), in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hasher = Sha256::new();
        let mut bytes = Vec::new();
        for sample in &self.samples {
            bytes.clear();
            bytes.extend((sample.token_ids.len() as u64).to_le_bytes());
            bytes.extend(sample.token_ids.iter().flat_map(|id| id.to_le_bytes()));
            bytes.extend(sample.labels.iter().flat_map(|label| label.to_le_bytes()));
            hasher.update(&bytes);
        }
        hex(&hasher.finalize())
    }

    /// Tokens of all samples.
    pub fn token_count(&self) -> usize {
        self.samples.iter().map(|sample| sample.token_ids.len()).sum()
    }

    /// Tokens that carry loss in all samples.
    pub fn labelled_count(&self) -> usize {
        self.samples.iter().map(Sample::labelled_count).sum()
    }

    /// The hashes that stand in the text of a sample.
    pub fn hashes_in_text(&self) -> BTreeSet<&str> {
        let conditioned = self.samples.iter().filter(|sample| sample.is_conditioned);
        conditioned.map(|sample| self.hash_names[sample.hash].as_str()).collect()
    }
}

/// Turns records into samples, on all cores, in order.
///
/// An instruction record becomes its prompt's tokens (after BOS, where the tokenizer puts one in front of a text), its
/// completion's tokens (encoded apart, so that the boundary is
/// the same when the model answers) and EOS, which is learned. With `loss_on: completion` the prompt is masked.
/// Pre-tokenised records are taken as they are; they need no tokenizer.
///
/// # Errors
/// Data errors with file and line: nothing to learn in a record (unless skipped), samples over `max_length` (with the
/// histogram of lengths, unless truncated or dropped), no sample left, an id without an embedding row.
/// A model error when text meets no tokenizer, or one without EOS.
///
/// ```
/// use fastlora::config::{DataSource, HashTemplate, LossOn, OnBadRecord, Overlong};
/// use fastlora::data::{load, LoadOptions};
/// use fastlora::tokens::{tokenise, SampleOptions, Tokenizer};
///
/// // A tokenizer whose tokens are single characters.
/// let characters = ('\n'..='~').map(String::from).chain(["<eos>".into()]);
/// let vocabulary: serde_json::Map<_, _> = characters.zip(0..).map(|(token, id): (_, u32)| (token, id.into())).collect();
/// let model = serde_json::json!({ "type": "BPE", "vocab": vocabulary, "merges": [] });
/// let file = serde_json::json!({ "version": "1.0", "model": model }).to_string();
/// let tokenizer = Tokenizer::from_bytes(file.as_bytes(), "tokenizer.json")?;
/// let eos_id = tokenizer.token_to_id("<eos>").ok_or("no EOS")?;
/// let tokenizer = tokenizer.with_eos_id(eos_id);
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("train.json");
/// std::fs::write(&path, r#"[{"instruction": "2+2?", "output": "4", "hash": "math"}]"#)?;
/// let dataset = load(&[DataSource::new(&path)], &LoadOptions::default())?;
/// let options = SampleOptions {
///     max_length: 512,
///     overlong: Overlong::Error,
///     loss_on: LossOn::Completion,
///     on_bad_record: OnBadRecord::Error,
///     embedding_rows: tokenizer.id_count(),
///     hash_template: HashTemplate::default(),
///     also_without_hash: false,
/// };
/// let set = tokenise(&dataset, Some(&tokenizer), &options)?;
/// let sample = &set.samples[0];
/// assert_eq!(sample.token_ids.len(), "[hash: math] User: 2+2?\nAssistant: 4".len() + 1);
/// assert_eq!(sample.labelled_count(), " 4".len() + 1);
/// assert_eq!(sample.labels.last(), Some(&(eos_id as i32)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn tokenise(
    dataset: &Dataset,
    tokenizer: Option<&Tokenizer>,
    options: &SampleOptions,
) -> Result<SampleSet> {
    let text = text_tokenizer(dataset, tokenizer)?;
    let fates: Vec<(Fate, Option<Tokens>)> = dataset
        .records
        .par_iter()
        .map(|record| tokenise_record(record, text, options))
        .collect::<Vec<Result<_>>>()
        .into_iter()
        .collect::<Result<_>>()?;

    let mut set = SampleSet { accounting: dataset.accounting.clone(), ..SampleSet::default() };
    set.accounting.used = 0;
    let lengths: Vec<usize> = fates.iter().filter_map(|(fate, _)| fate.length()).collect();
    let mut hashes: HashMap<&str, usize> = HashMap::new();
    let mut first_overlong = None;
    let mut incomplete = Vec::new();
    for (record, (fate, without_hash)) in dataset.records.iter().zip(fates) {
        let origin = &record.origin;
        match fate {
            Fate::Used { tokens, cut_from } => {
                if let Some(length) = cut_from {
                    let reason = format!("{length} tokens cut to {}", tokens.token_ids.len());
                    set.accounting.note(origin, Outcome::Truncated, reason);
                }
                let hash = *hashes.entry(&record.hash).or_insert_with(|| {
                    set.hash_names.push(record.hash.clone());
                    set.hash_names.len() - 1
                });
                let Tokens { token_ids, labels, is_incomplete } = tokens;
                if is_incomplete {
                    incomplete.push(origin);
                }
                let unconditioned =
                    |Tokens { token_ids, labels, .. }| Box::new(Unconditioned { token_ids, labels });
                set.samples.push(Sample {
                    token_ids,
                    labels,
                    hash,
                    is_conditioned: record.text_hash().is_some(),
                    without_hash: without_hash.map(unconditioned),
                    weight: record.weight,
                    origin: origin.clone(),
                });
            }
            Fate::Overlong { length } => {
                let reason = format!("{length} tokens, more than max_length = {}", options.max_length);
                if options.overlong == Overlong::Error {
                    first_overlong = first_overlong.or(Some(origin));
                }
                set.accounting.note(origin, Outcome::Dropped, reason);
            }
            Fate::Bad { reason } => {
                let outcome = match options.on_bad_record {
                    OnBadRecord::Error => Outcome::Refused,
                    OnBadRecord::Skip => Outcome::Skipped,
                };
                set.accounting.note(origin, outcome, reason);
            }
        }
    }
    set.accounting.used = set.samples.len();
    warn_about_incomplete(&incomplete);
    let refusal = set.accounting.refusal("mend it, or leave bad records out with on_bad_record = \"skip\"");
    if let Some(refusal) = refusal {
        return Err(refusal);
    }
    let over = lengths.iter().filter(|&&length| length > options.max_length).count();
    let histogram = || {
        format!(
            "{over} of {} samples are longer than max_length = {}; {}",
            lengths.len(),
            options.max_length,
            length_histogram(&lengths)
        )
    };
    let advice = "raise max_length, or set overlong to \"truncate\" or \"drop\"";
    if let Some(origin) = first_overlong {
        return Err(Error::data(histogram()).at(origin.to_string()).hint(advice));
    }
    if set.samples.is_empty() {
        let message = if over > 0 { histogram() } else { set.accounting.to_string() };
        return Err(Error::data(format!("no sample is left: {message}")).hint(advice));
    }
    Ok(set)
}

/// Ids and labels of one sample.
#[derive(Default)]
pub(super) struct Tokens {
    pub token_ids: Vec<u32>,
    pub labels: Vec<i32>,
    /// Whether the chat template left out what some message says.
    pub is_incomplete: bool,
}

/// What becomes of one record.
pub(super) enum Fate {
    Used {
        tokens: Tokens,
        /// Its length before it was cut.
        cut_from: Option<usize>,
    },
    Overlong {
        length: usize,
    },
    Bad {
        reason: String,
    },
}

impl Fate {
    /// Tokens of the uncut sample.
    fn length(&self) -> Option<usize> {
        match self {
            Fate::Used { tokens, cut_from } => Some(cut_from.unwrap_or(tokens.token_ids.len())),
            Fate::Overlong { length } => Some(*length),
            Fate::Bad { .. } => None,
        }
    }
}

/// A tokenizer that can end a completion.
#[derive(Clone, Copy)]
struct TextTokenizer<'a> {
    tokenizer: &'a Tokenizer,
    eos_id: u32,
}

/// The tokenizer for the text of a data set; none where the data set has no text.
fn text_tokenizer<'a>(
    dataset: &Dataset,
    tokenizer: Option<&'a Tokenizer>,
) -> Result<Option<TextTokenizer<'a>>> {
    let is_text = |record: &&Record| record.content.is_text();
    let Some(record) = dataset.records.iter().find(is_text) else { return Ok(None) };
    let tokenizer = tokenizer.ok_or_else(|| {
        Error::model("the data hold text, and the model folder has no tokenizer files")
            .at(record.origin.to_string())
            .hint("add tokenizer.json to the model folder, or give records with `input_ids`")
    })?;
    let eos_id = tokenizer.eos_id().ok_or_else(|| {
        Error::model("the tokenizer has no EOS token, so the model would never learn to stop")
            .hint("name `eos_token` in tokenizer_config.json or `eos_token_id` in generation_config.json")
    })?;
    Ok(Some(TextTokenizer { tokenizer, eos_id }))
}

/// What becomes of a record, and its tokens without the hash where they are wanted and others.
fn tokenise_record(
    record: &Record,
    text: Option<TextTokenizer<'_>>,
    options: &SampleOptions,
) -> Result<(Fate, Option<Tokens>)> {
    let prefix = record.text_hash().map(|hash| options.hash_template.prefix(hash));
    let fate = tokenise_with(record, prefix.as_deref().unwrap_or_default(), text, options)?;
    let is_used = matches!(fate, Fate::Used { .. });
    if prefix.is_none() || !options.also_without_hash || !is_used {
        return Ok((fate, None));
    }
    Ok(match tokenise_with(record, "", text, options)? {
        Fate::Used { tokens, .. } => (fate, Some(tokens)),
        unusable => (unusable, None),
    })
}

fn tokenise_with(
    record: &Record,
    prefix: &str,
    text: Option<TextTokenizer<'_>>,
    options: &SampleOptions,
) -> Result<Fate> {
    let fate = match (&record.content, text) {
        (RecordContent::Instruction { instruction, output }, Some(text)) => {
            tokenise_instruction(prefix, instruction, output, text, options)?
        }
        (RecordContent::Chat { conversation, .. }, Some(text)) => {
            let conversation = conversation.clone().with_prefix(prefix);
            chat::tokenise(&conversation, text.tokenizer, options)
                .map_err(|error| at_record(error, &record.origin))?
        }
        (RecordContent::Instruction { .. } | RecordContent::Chat { .. }, None) => {
            return Err(Error::internal("text without a tokenizer").at(record.origin.to_string()));
        }
        (RecordContent::PreTokenised { token_ids, labels }, _) => cut_end(token_ids, labels, options),
    };
    if let Fate::Used { tokens, cut_from } = &fate {
        let is_cut = cut_from.is_some();
        check_ids(tokens, options.embedding_rows, &record.origin)?;
        if carry_loss(&tokens.labels) == 0 {
            let reason = match tokens.token_ids.len() {
                1 => "one token alone has nothing to predict".into(),
                _ if is_cut => {
                    format!("no label is left within max_length = {}", options.max_length)
                }
                _ => "every label is masked (-100): nothing to learn".into(),
            };
            return Ok(Fate::Bad { reason });
        }
    }
    Ok(fate)
}

/// The record's place in front of the template's.
fn at_record(error: Error, origin: &Origin) -> Error {
    let place = match error.location() {
        Some(place) => format!("{origin} ({place})"),
        None => origin.to_string(),
    };
    error.at(place)
}

fn tokenise_instruction(
    prefix: &str,
    instruction: &str,
    output: &str,
    text: TextTokenizer<'_>,
    options: &SampleOptions,
) -> Result<Fate> {
    let rendered = render(prefix, instruction, output);
    let prompt = text.tokenizer.encode_start(&rendered.prompt)?;
    let mut completion = text.tokenizer.encode(&rendered.completion)?;
    completion.push(text.eos_id);
    let length = prompt.len() + completion.len();
    if length <= options.max_length {
        let tokens = label(prompt, completion, options.loss_on);
        return Ok(Fate::Used { tokens, cut_from: None });
    }
    if options.overlong != Overlong::Truncate {
        return Ok(Fate::Overlong { length });
    }
    Ok(match truncation::cut(text.tokenizer, prefix, instruction, completion, options.max_length)? {
        Ok(Cut { prompt, completion }) => {
            Fate::Used { tokens: label(prompt, completion, options.loss_on), cut_from: Some(length) }
        }
        Err(frame_length) => Fate::Bad {
            reason: format!(
                "the prompt has {frame_length} tokens without any instruction, max_length = {} leaves no target",
                options.max_length
            ),
        },
    })
}

fn label(prompt: Vec<u32>, completion: Vec<u32>, loss_on: LossOn) -> Tokens {
    let masked = if loss_on == LossOn::All { 0 } else { prompt.len() };
    let mut token_ids = prompt;
    token_ids.extend(completion);
    // Ids are below the embedding's rows, checked next, and those below 2³¹.
    let labels = token_ids
        .iter()
        .enumerate()
        .map(|(position, &id)| if position < masked { NO_LOSS } else { id as i32 })
        .collect();
    Tokens { token_ids, labels, is_incomplete: false }
}

/// Tokens without structure; too long, they lose their end.
pub(super) fn cut_end(token_ids: &[u32], labels: &[i32], options: &SampleOptions) -> Fate {
    let length = token_ids.len();
    let kept = length.min(options.max_length);
    if kept < length && options.overlong != Overlong::Truncate {
        return Fate::Overlong { length };
    }
    let (token_ids, labels) = (token_ids[..kept].to_vec(), labels[..kept].to_vec());
    let tokens = Tokens { token_ids, labels, is_incomplete: false };
    Fate::Used { tokens, cut_from: (kept < length).then_some(length) }
}

/// Refuses ids without an embedding row, before any device sees them.
fn check_ids(tokens: &Tokens, embedding_rows: usize, origin: &Origin) -> Result<()> {
    let labels = tokens.labels.iter().filter_map(|&label| u32::try_from(label).ok());
    match tokens.token_ids.iter().copied().chain(labels).find(|&id| id as usize >= embedding_rows) {
        None => Ok(()),
        Some(id) => {
            Err(Error::data(format!("token id {id}, but the model's embedding has {embedding_rows} rows"))
                .at(origin.to_string())
                .hint("were these tokens made with the model's own tokenizer?"))
        }
    }
}

/// Warns about conversations of which the chat template writes only a part.
fn warn_about_incomplete(origins: &[&Origin]) {
    if let Some(first) = origins.first() {
        tracing::warn!(
            "the chat template leaves out messages, or rewrites them, in {} conversations; the first is {}",
            origins.len(),
            crate::error::escape_control(&first.to_string())
        );
    }
}
