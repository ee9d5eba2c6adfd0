//! A GGUF file's tokenizer as the files of a Hugging Face folder.
//!
//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`) with the pre-tokenizers of the models that import reads, and
//! SentencePiece BPE (`llama`). Any other is refused by name, because a wrong split gives wrong ids silently.

mod byte_level;
mod sentence_piece;

use std::collections::HashMap;
use std::io::{Read, Seek};

use serde_json::{Map, Value as Json, json};

use super::gguf::Gguf;
use crate::error::Result;

/// Token types of the format.
const UNKNOWN: i128 = 2;
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;
const UNUSED: i128 = 5;

/// The tokenizer's files and the ids that the model's configuration repeats.
#[derive(Debug)]
pub(super) struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer: Json,
    /// `tokenizer_config.json`.
    pub config: Json,
    /// `special_tokens_map.json`.
    pub special_tokens: Json,
    /// `bos_token_id`, `eos_token_id`, `pad_token_id` for `config.json`, where known.
    pub ids: Map<String, Json>,
    /// As [`Self::ids`], with every id that ends a generation, for `generation_config.json`.
    pub generation_ids: Map<String, Json>,
}

/// How one kind of tokenizer turns text into tokens, in the terms of `tokenizer.json`.
struct Scheme {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    /// What the BPE model needs besides vocabulary and merges.
    unk_token: Option<String>,
    /// Characters without a token become byte tokens, or else one unknown token for each run of them.
    byte_fallback: bool,
    ignore_merges: bool,
    merges: Json,
    /// Whether the beginning-of-sequence token is added where the file does not say.
    adds_bos: bool,
}

impl Scheme {
    fn of<R: Read + Seek>(gguf: &Gguf<R>, vocabulary: &Vocabulary<'_>) -> Result<Self> {
        let hint = "use the model's Hugging Face folder instead";
        let key = "tokenizer.ggml.model";
        match gguf.string(key)? {
            Some("gpt2") => byte_level::scheme(gguf, vocabulary),
            Some("llama") => sentence_piece::scheme(gguf, vocabulary),
            Some(other) => {
                let message = format!(
                    "tokenizer `{other}` is not supported; byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`) are"
                );
                Err(gguf.error_at(key, message).hint(hint))
            }
            None => Err(gguf.error_at(key, "the file has no tokenizer").hint(hint)),
        }
    }
}

/// The tokens in order of their ids.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: &'a [i128],
    ids: HashMap<&'a str, usize>,
}

/// The tokens that have a role.
struct Roles<'a> {
    bos: Option<usize>,
    eos: Option<usize>,
    padding: Option<usize>,
    unknown: Option<usize>,
    tokens: &'a [String],
}

impl<'a> Roles<'a> {
    fn read<R: Read + Seek>(gguf: &'a Gguf<R>, tokens: &'a [String]) -> Result<Self> {
        let id = |name: &str| token_id(gguf, name, tokens.len());
        let eos = id("eos_token_id")?;
        Ok(Self {
            bos: id("bos_token_id")?,
            eos,
            padding: id("padding_token_id")?.or(eos),
            unknown: id("unknown_token_id")?,
            tokens,
        })
    }

    fn text(&self, id: Option<usize>) -> Option<&'a str> {
        id.map(|id| self.tokens[id].as_str())
    }

    /// The four named tokens; those a model lacks are null.
    fn named(&self) -> [(&'static str, Option<&'a str>); 4] {
        [
            ("bos_token", self.text(self.bos)),
            ("eos_token", self.text(self.eos)),
            ("pad_token", self.text(self.padding)),
            ("unk_token", self.text(self.unknown)),
        ]
    }
}

fn token_id<R: Read + Seek>(gguf: &Gguf<R>, name: &str, token_count: usize) -> Result<Option<usize>> {
    let key = format!("tokenizer.ggml.{name}");
    match gguf.count(&key)? {
        Some(id) if id >= token_count => {
            Err(gguf.error_at(key, format!("id {id} is not one of the {token_count} tokens")))
        }
        id => Ok(id),
    }
}

/// Converts the tokenizer of `gguf`, a model with `vocabulary` rows of embeddings made for `context` positions.
pub(super) fn convert<R: Read + Seek>(
    gguf: &Gguf<R>,
    vocabulary: usize,
    context: usize,
) -> Result<TokenizerFiles> {
    let tokens = gguf.strings("tokenizer.ggml.tokens")?;
    let types = token_types(gguf, tokens.len())?;
    // Rows of the embedding that no token uses are named in the file; at the end they are no tokens.
    let token_count = types.iter().rposition(|&kind| kind != UNUSED).map_or(0, |last| last + 1);
    let tokens = &tokens[..token_count];
    if token_count == 0 || token_count > vocabulary {
        let message = format!("{token_count} tokens for {vocabulary} rows of embeddings");
        return Err(gguf.error_at("tokenizer.ggml.tokens", message));
    }
    let ids = ids_by_text(gguf, tokens)?;
    let scheme = Scheme::of(gguf, &Vocabulary { tokens, types: &types, ids })?;
    let roles = Roles::read(gguf, tokens)?;

    let added: Vec<Json> = tokens
        .iter()
        .zip(&types)
        .enumerate()
        .filter(|(_, (_, kind))| matches!(**kind, CONTROL | USER_DEFINED))
        .map(|(id, (text, kind))| {
            json!({ "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind == CONTROL })
        })
        .collect();
    let vocab: Map<String, Json> =
        tokens.iter().enumerate().map(|(id, text)| (text.clone(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": scheme.normalizer,
        "pre_tokenizer": scheme.pre_tokenizer,
        "post_processor": post_processor(gguf, scheme.adds_bos, &roles)?,
        "decoder": scheme.decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": scheme.unk_token, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": scheme.byte_fallback, "byte_fallback": scheme.byte_fallback,
            "ignore_merges": scheme.ignore_merges, "vocab": vocab, "merges": scheme.merges,
        },
    });
    check(gguf, &tokenizer)?;
    let (ids, generation_ids) = model_ids(gguf, &roles)?;
    Ok(TokenizerFiles {
        config: tokenizer_config(gguf, &roles, &added, context)?,
        special_tokens: roles
            .named()
            .into_iter()
            .filter_map(|(name, text)| Some((name.to_owned(), json!(text?))))
            .collect(),
        tokenizer,
        ids,
        generation_ids,
    })
}

fn token_types<R: Read + Seek>(gguf: &Gguf<R>, token_count: usize) -> Result<Vec<i128>> {
    let key = "tokenizer.ggml.token_type";
    let types = gguf.integers(key)?.ok_or_else(|| gguf.error_at(key, "this metadata key is missing"))?;
    if types.len() != token_count {
        return Err(gguf.error_at(key, format!("{} types for {token_count} tokens", types.len())));
    }
    Ok(types)
}

fn ids_by_text<'a, R: Read + Seek>(gguf: &Gguf<R>, tokens: &'a [String]) -> Result<HashMap<&'a str, usize>> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, text) in tokens.iter().enumerate() {
        if let Some(first) = ids.insert(text.as_str(), id) {
            let message = format!("tokens {first} and {id} are both \"{text}\"");
            return Err(gguf.error_at("tokenizer.ggml.tokens", message));
        }
    }
    Ok(ids)
}

/// Adds the beginning- and end-of-sequence tokens where the model wants them.
fn post_processor<R: Read + Seek>(gguf: &Gguf<R>, adds_bos: bool, roles: &Roles<'_>) -> Result<Json> {
    let adds_bos = gguf.truth("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let adds_eos = gguf.truth("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let wanted = |wanted: bool, id: Option<usize>, name: &str| match (wanted, id) {
        (false, _) => Ok(None),
        (true, Some(id)) => Ok(Some((id, roles.tokens[id].as_str()))),
        (true, None) => {
            let key = format!("tokenizer.ggml.{name}_token_id");
            Err(gguf.error_at(key, format!("missing, although the tokenizer adds the {name} token")))
        }
    };
    let (bos, eos) = (wanted(adds_bos, roles.bos, "bos")?, wanted(adds_eos, roles.eos, "eos")?);
    if bos.is_none() && eos.is_none() {
        return Ok(Json::Null);
    }
    let sequence = |name: &str, type_id: usize| {
        let special = |token: Option<(usize, &str)>| {
            token.map(|(_, text)| json!({ "SpecialToken": { "id": text, "type_id": type_id } }))
        };
        let text = json!({ "Sequence": { "id": name, "type_id": type_id } });
        [special(bos), Some(text), special(eos)].into_iter().flatten().collect::<Vec<_>>()
    };
    let pair = [sequence("A", 0), sequence("B", 1)].concat();
    let special_tokens: Map<String, Json> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(id, text)| (text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] })))
        .collect();
    Ok(json!({
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": pair,
        "special_tokens": special_tokens,
    }))
}

fn tokenizer_config<R: Read + Seek>(
    gguf: &Gguf<R>,
    roles: &Roles<'_>,
    added: &[Json],
    context: usize,
) -> Result<Json> {
    let added_by_id: Map<String, Json> = added
        .iter()
        .map(|token| {
            let mut token = token.as_object().cloned().unwrap_or_default();
            let id = token.shift_remove("id").unwrap_or_default().to_string();
            (id, Json::Object(token))
        })
        .collect();
    let mut additional: Vec<&str> =
        [roles.text(roles.bos), roles.text(roles.eos)].into_iter().flatten().collect();
    additional.dedup();
    let mut config = Map::new();
    config.insert("add_prefix_space".into(), json!(false));
    config.insert("added_tokens_decoder".into(), Json::Object(added_by_id));
    config.insert("additional_special_tokens".into(), json!(additional));
    config.extend(roles.named().map(|(name, text)| (name.to_owned(), json!(text))));
    if let Some(template) = gguf.string("tokenizer.chat_template")? {
        config.insert("chat_template".into(), json!(template));
    }
    config.insert("clean_up_tokenization_spaces".into(), json!(false));
    config.insert("model_max_length".into(), json!(context));
    // Under its own class transformers 5 rebuilds the pre-tokenizer and loses the digit splitting.
    config.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
    config.insert("vocab_size".into(), json!(roles.tokens.len()));
    Ok(Json::Object(config))
}

/// The ids for `config.json`, and those for `generation_config.json`, which end at any end-of-turn token as well.
fn model_ids<R: Read + Seek>(
    gguf: &Gguf<R>,
    roles: &Roles<'_>,
) -> Result<(Map<String, Json>, Map<String, Json>)> {
    let mut ends: Vec<usize> = roles.eos.into_iter().collect();
    for name in ["eot_token_id", "eom_token_id"] {
        let id = token_id(gguf, name, roles.tokens.len())?;
        ends.extend(id.filter(|id| !ends.contains(id)));
    }
    let map = |eos: Json| {
        [("bos_token_id", json!(roles.bos)), ("eos_token_id", eos), ("pad_token_id", json!(roles.padding))]
            .into_iter()
            .map(|(name, id)| (name.to_owned(), id))
            .collect::<Map<_, _>>()
    };
    let all_ends = if ends.len() > 1 { json!(ends) } else { json!(ends.first()) };
    Ok((map(json!(roles.eos)), map(all_ends)))
}

/// The tokenizer must load before anything is written.
fn check<R: Read + Seek>(gguf: &Gguf<R>, tokenizer: &Json) -> Result<()> {
    let bytes = serde_json::to_vec(tokenizer)
        .map_err(|error| gguf.error_at("tokenizer", "cannot be written as JSON").caused_by(error))?;
    tokenizers::Tokenizer::from_bytes(bytes)
        .map(drop)
        .map_err(|error| gguf.error_at("tokenizer", "the tokenizer does not load").caused_by(error))
}
