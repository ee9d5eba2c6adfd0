//! Checks a `tokenizer.json` before the tokenizer library sees it.
//!
//! The library numbers added tokens itself and only warns where the file says otherwise, computes `largest id + 1`
//! without a check, and cuts merges at a prefix that need not be there: ids are checked here first.

use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result};

/// A token that `tokenizer.json` adds to its model's vocabulary.
#[derive(Debug, Deserialize)]
pub(super) struct AddedToken {
    pub id: serde_json::Number,
    pub content: String,
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    #[serde(default)]
    post_processor: serde_json::Value,
    /// Read because the library panics over one that is no JSON, such as a number out of range.
    #[serde(default, rename = "decoder")]
    _decoder: serde_json::Value,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    vocab: Vocabulary,
    #[serde(default)]
    dropout: Option<f64>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default, rename = "merges")]
    merges: Option<IgnoredAny>,
}

/// Tokens and their ids; a list (Unigram) numbers them by position.
struct Vocabulary(Vec<(String, serde_json::Number)>);

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tokens;
        impl<'de> Visitor<'de> for Tokens {
            type Value = Vocabulary;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter
                    .write_str("a vocabulary: tokens with their ids, or a list of tokens with their scores")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
                let mut tokens = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    tokens.push(entry);
                }
                Ok(Vocabulary(tokens))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vocabulary, A::Error> {
                let mut tokens: Vec<(String, serde_json::Number)> = Vec::new();
                while let Some((token, _score)) = list.next_element::<(String, f64)>()? {
                    tokens.push((token, tokens.len().into()));
                }
                Ok(Vocabulary(tokens))
            }
        }
        deserializer.deserialize_any(Tokens)
    }
}

/// What a checked file says beside its model.
pub(super) struct Checked {
    pub added_tokens: Vec<AddedToken>,
    /// Null where there is none.
    pub post_processor: serde_json::Value,
}

/// The added tokens and the template of a file whose ids are `0 .. n` without gap or repetition.
///
/// # Errors
/// Model errors at `place` for JSON that is no tokenizer, ids out of range, gaps, repetitions, and what would make
/// tokens depend on chance or on parts of the format that this program does not read.
pub(super) fn check(bytes: &[u8], place: &str) -> Result<Checked> {
    let refuse = |message: String| Error::model(message).at(place);
    let hint = "is the file the model's own, and whole?";
    let file: TokenizerFile = serde_json::from_slice(bytes)
        .map_err(|error| refuse("not a tokenizer file".into()).caused_by(error).hint(hint))?;
    if let Some(dropout) = file.model.dropout.filter(|dropout| *dropout != 0.0) {
        return Err(refuse(format!(
            "BPE dropout {dropout} would make the tokens random: it is not supported"
        )));
    }
    if let (Some(prefix), Some(_)) = (&file.model.continuing_subword_prefix, &file.model.merges)
        && !prefix.is_empty()
    {
        return Err(refuse(format!("`continuing_subword_prefix` \"{prefix}\" is not supported")));
    }

    let mut ids: HashMap<&str, &serde_json::Number> = HashMap::with_capacity(file.model.vocab.0.len());
    for (token, id) in &file.model.vocab.0 {
        if ids.insert(token, id).is_some() {
            return Err(refuse(format!("token {token:?} stands twice in the vocabulary")));
        }
    }
    for added in &file.added_tokens {
        match ids.insert(&added.content, &added.id) {
            Some(id) if *id != added.id => {
                return Err(refuse(format!("token {:?} has two ids, {id} and {}", added.content, added.id)));
            }
            _ => {}
        }
    }
    let mut owners: Vec<Option<&str>> = vec![None; ids.len()];
    for (token, id) in &ids {
        let slot = id.as_u64().and_then(|id| owners.get_mut(usize::try_from(id).ok()?)).ok_or_else(|| {
            refuse(format!(
                "id {id} of token {token:?} is out of range: {} tokens have the ids 0 to {} without a gap",
                ids.len(),
                ids.len().saturating_sub(1)
            ))
        })?;
        if let Some(other) = slot.replace(token) {
            return Err(refuse(format!("tokens {token:?} and {other:?} share the id {id}")));
        }
    }
    if ids.is_empty() {
        return Err(refuse("the vocabulary is empty".into()).hint(hint));
    }
    Ok(Checked { added_tokens: file.added_tokens, post_processor: file.post_processor })
}
