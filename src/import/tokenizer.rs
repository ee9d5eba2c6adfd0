//! A GGUF file's tokenizer as the files of a Hugging Face folder.
//!
//! Byte-level BPE only (`tokenizer.ggml.model` = `gpt2`), with the pre-tokenizers of the models that import reads; any
//! other is refused by name, because a wrong split gives wrong ids silently.

use std::collections::HashMap;
use std::io::{Read, Seek};

use serde_json::{Map, Value as Json, json};

use super::gguf::Gguf;
use crate::error::Result;

/// Token types of the format.
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;
const UNUSED: i128 = 5;

/// Splits as Qwen2 and Llama 3 publish them; they differ in how many digits stay together.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

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

/// What a pre-tokenizer's name stands for.
struct PreTokenizer {
    normalizer: Json,
    splits: Json,
    ignore_merges: bool,
    /// Whether the beginning-of-sequence token is added where the file does not say.
    adds_bos: bool,
}

fn byte_level(use_regex: bool) -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn split_then_bytes(pattern: &str) -> Json {
    json!({ "type": "Sequence", "pretokenizers": [
        { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
        byte_level(false),
    ]})
}

impl PreTokenizer {
    fn named(name: &str) -> Option<Self> {
        let plain = |splits| Self { normalizer: Json::Null, splits, ignore_merges: false, adds_bos: false };
        Some(match name {
            "gpt-2" => plain(byte_level(true)),
            "smollm" => plain(json!({ "type": "Sequence", "pretokenizers": [
                { "type": "Digits", "individual_digits": true },
                byte_level(true),
            ]})),
            "qwen2" | "deepseek-r1-qwen" => {
                Self { normalizer: json!({ "type": "NFC" }), ..plain(split_then_bytes(QWEN2_SPLIT)) }
            }
            "llama-bpe" | "llama3" | "llama-v3" => {
                Self { ignore_merges: true, adds_bos: true, ..plain(split_then_bytes(LLAMA3_SPLIT)) }
            }
            _ => return None,
        })
    }
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
    let pre_tokenizer = pre_tokenizer(gguf)?;
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
    let merges = merges(gguf, &ids)?;
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
        "normalizer": pre_tokenizer.normalizer,
        "pre_tokenizer": pre_tokenizer.splits,
        "post_processor": post_processor(gguf, &pre_tokenizer, &roles)?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre_tokenizer.ignore_merges, "vocab": vocab, "merges": merges,
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

fn pre_tokenizer<R: Read + Seek>(gguf: &Gguf<R>) -> Result<PreTokenizer> {
    let hint = "use the model's Hugging Face folder instead";
    let (model_key, key) = ("tokenizer.ggml.model", "tokenizer.ggml.pre");
    match gguf.string(model_key)? {
        Some("gpt2") => {}
        Some("llama") => {
            let message =
                "SentencePiece tokenizers (`llama`) are not supported, only byte-level BPE (`gpt2`)";
            return Err(gguf.error_at(model_key, message).hint(hint));
        }
        Some(other) => {
            let message = format!("tokenizer `{other}` is not supported, only byte-level BPE (`gpt2`)");
            return Err(gguf.error_at(model_key, message).hint(hint));
        }
        None => return Err(gguf.error_at(model_key, "the file has no tokenizer").hint(hint)),
    }
    let Some(name) = gguf.string(key)? else {
        return Err(gguf
            .error_at(key, "missing: an old file that does not say how text is split")
            .hint(hint));
    };
    PreTokenizer::named(name).ok_or_else(|| {
        let message =
            format!("pre-tokenizer `{name}` is not supported; gpt-2, smollm, qwen2 and llama-bpe are");
        gguf.error_at(key, message).hint(hint)
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

/// The merges, each of which joins two tokens into a third.
fn merges<'a, R: Read + Seek>(gguf: &'a Gguf<R>, ids: &HashMap<&str, usize>) -> Result<&'a [String]> {
    let key = "tokenizer.ggml.merges";
    let merges = gguf.strings(key)?;
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let valid = merge.split_once(' ').is_some_and(|(left, right)| {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            [left, right, joined.as_str()].into_iter().all(|part| ids.contains_key(part))
        });
        if !valid {
            let message = format!("merge {rank} (\"{merge}\") does not join two tokens into a third");
            return Err(gguf.error_at(key, message));
        }
    }
    Ok(merges)
}

/// Adds the beginning- and end-of-sequence tokens where the model wants them.
fn post_processor<R: Read + Seek>(
    gguf: &Gguf<R>,
    pre_tokenizer: &PreTokenizer,
    roles: &Roles<'_>,
) -> Result<Json> {
    let adds_bos = gguf.truth("tokenizer.ggml.add_bos_token")?.unwrap_or(pre_tokenizer.adds_bos);
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
