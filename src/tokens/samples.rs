//! A record → its sample: token ids with one label each.

use serde::Serialize;

use super::builder::build;
use super::chat;
use super::sample_set::{NO_LOSS, SampleSet, carry_loss};
use super::tokenizer::Tokenizer;
use super::truncation::{self, Cut};
use crate::config::{HashTemplate, LossOn, OnBadRecord, Overlong};
use crate::data::{Dataset, Kinds, Origin, Record, RecordContent, render};
use crate::error::{Error, Result};

/// What holds for every sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
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
/// let sample = set.get(0);
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
    build(dataset, tokenizer, options)
}

/// Ids and labels of one sample.
#[derive(Default)]
pub(super) struct Tokens {
    pub token_ids: Vec<u32>,
    pub labels: Vec<i32>,
    /// Whether the chat template left out what some message says.
    pub is_incomplete: bool,
}

impl Tokens {
    pub fn parts(&self) -> (&[u32], &[i32]) {
        (&self.token_ids, &self.labels)
    }
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

/// A tokenizer that can end a completion.
#[derive(Clone, Copy)]
pub(super) struct TextTokenizer<'a> {
    tokenizer: &'a Tokenizer,
    eos_id: u32,
}

impl<'a> TextTokenizer<'a> {
    /// The tokenizer for the text of a data set; none where the data set has no text.
    pub fn for_kinds(kinds: &Kinds, tokenizer: Option<&'a Tokenizer>) -> Result<Option<Self>> {
        let Some(origin) = &kinds.first_text else { return Ok(None) };
        let tokenizer = tokenizer.ok_or_else(|| {
            Error::model("the data hold text, and the model folder has no tokenizer files")
                .at(origin.to_string())
                .hint("add tokenizer.json to the model folder, or give records with `input_ids`")
        })?;
        let eos_id = tokenizer.eos_id().ok_or_else(|| {
            Error::model("the tokenizer has no EOS token, so the model would never learn to stop")
                .hint("name `eos_token` in tokenizer_config.json or `eos_token_id` in generation_config.json")
        })?;
        Ok(Some(Self { tokenizer, eos_id }))
    }
}

/// What becomes of a record, and its tokens without the hash where they are wanted and others.
pub(super) fn tokenise_record(
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
