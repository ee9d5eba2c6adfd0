//! Byte-level BPE: text is split by a pattern, its bytes become printable characters, and those merge by rank.

use std::io::{Read, Seek};

use serde_json::{Value as Json, json};

use super::{Scheme, Vocabulary};
use crate::error::Result;
use crate::import::gguf::Gguf;

/// Splits as Qwen2 and Llama 3 publish them; they differ in how many digits stay together.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The scheme that the file's pre-tokenizer names.
pub(super) fn scheme<R: Read + Seek>(gguf: &Gguf<R>, vocabulary: &Vocabulary<'_>) -> Result<Scheme> {
    let hint = "use the model's Hugging Face folder instead";
    let key = "tokenizer.ggml.pre";
    let Some(name) = gguf.string(key)? else {
        return Err(gguf
            .error_at(key, "missing: an old file that does not say how text is split")
            .hint(hint));
    };
    let merges = json!(merges(gguf, vocabulary)?);
    let plain = |pre_tokenizer| Scheme {
        normalizer: Json::Null,
        pre_tokenizer,
        decoder: json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        unk_token: None,
        byte_fallback: false,
        ignore_merges: false,
        merges,
        adds_bos: false,
    };
    Ok(match name {
        "gpt-2" => plain(byte_level(true)),
        "smollm" => plain(json!({ "type": "Sequence", "pretokenizers": [
            { "type": "Digits", "individual_digits": true },
            byte_level(true),
        ]})),
        "qwen2" | "deepseek-r1-qwen" => {
            Scheme { normalizer: json!({ "type": "NFC" }), ..plain(split_then_bytes(QWEN2_SPLIT)) }
        }
        "llama-bpe" | "llama3" | "llama-v3" => {
            Scheme { ignore_merges: true, adds_bos: true, ..plain(split_then_bytes(LLAMA3_SPLIT)) }
        }
        other => {
            let message =
                format!("pre-tokenizer `{other}` is not supported; gpt-2, smollm, qwen2 and llama-bpe are");
            return Err(gguf.error_at(key, message).hint(hint));
        }
    })
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

/// The merges, each of which joins two tokens into a third.
fn merges<'a, R: Read + Seek>(gguf: &'a Gguf<R>, vocabulary: &Vocabulary<'_>) -> Result<&'a [String]> {
    let key = "tokenizer.ggml.merges";
    let merges = gguf.strings(key)?;
    let mut joined = String::new();
    for (rank, merge) in merges.iter().enumerate() {
        let valid = merge.split_once(' ').is_some_and(|(left, right)| {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            [left, right, joined.as_str()].into_iter().all(|part| vocabulary.ids.contains_key(part))
        });
        if !valid {
            let message = format!("merge {rank} (\"{merge}\") does not join two tokens into a third");
            return Err(gguf.error_at(key, message));
        }
    }
    Ok(merges)
}
