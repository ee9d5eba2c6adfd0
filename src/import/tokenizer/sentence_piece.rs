//! SentencePiece BPE: pieces have scores instead of merges, spaces are `▁`, and characters without a piece become byte
//! tokens.
//!
//! SentencePiece joins, among all neighbours that form a piece, those whose piece has the highest score. The same order as
//! merges: every way to cut a piece into two pieces is a merge, ranked by the piece's score (the rule of transformers'
//! converter, ties included).

use std::io::{Read, Seek};

use serde_json::{Value as Json, json};

use super::{CONTROL, Scheme, UNKNOWN, USER_DEFINED, Vocabulary};
use crate::error::Result;
use crate::import::gguf::Gguf;

/// Longer pieces are refused: the merges of a piece take space that grows with the square of its length.
const LONGEST_PIECE: usize = 64;

/// The scheme of a SentencePiece vocabulary.
pub(super) fn scheme<R: Read + Seek>(gguf: &Gguf<R>, vocabulary: &Vocabulary<'_>) -> Result<Scheme> {
    for (key, what) in [
        ("tokenizer.ggml.precompiled_charsmap", "a table that normalises characters"),
        ("tokenizer.ggml.remove_extra_whitespaces", "removing extra spaces"),
    ] {
        if gguf.has(key) && gguf.truth(key).ok().flatten() != Some(false) {
            return Err(gguf.error_at(key, format!("{what} is not supported")));
        }
    }
    let unknown = vocabulary.types.iter().position(|&kind| kind == UNKNOWN).ok_or_else(|| {
        gguf.error_at(
            "tokenizer.ggml.token_type",
            "SentencePiece needs a token of the type unknown; there is none",
        )
    })?;
    let adds_space = gguf.truth("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" })];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if adds_space {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(Scheme {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Json::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        unk_token: Some(vocabulary.tokens[unknown].clone()),
        byte_fallback: true,
        ignore_merges: false,
        merges: json!(merges(gguf, vocabulary)?),
        adds_bos: true,
    })
}

/// One way to form a piece.
struct Merge<'a> {
    left: &'a str,
    right: &'a str,
    score: f64,
}

/// All merges, best first.
fn merges<'a, R: Read + Seek>(gguf: &Gguf<R>, vocabulary: &Vocabulary<'a>) -> Result<Vec<[&'a str; 2]>> {
    let scores = scores(gguf, vocabulary.tokens.len())?;
    let is_piece = |id: usize| !matches!(vocabulary.types[id], CONTROL | USER_DEFINED | UNKNOWN);
    let id_of = |text: &str| vocabulary.ids.get(text).copied().filter(|&id| is_piece(id));
    let mut merges = Vec::new();
    for (id, piece) in vocabulary.tokens.iter().enumerate().filter(|&(id, _)| is_piece(id)) {
        if piece.chars().count() > LONGEST_PIECE {
            let message = format!("piece {id} is longer than {LONGEST_PIECE} characters");
            return Err(gguf.error_at("tokenizer.ggml.tokens", message));
        }
        let mut ways: Vec<_> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(cut, _)| {
                let (left, right) = piece.split_at(cut);
                Some((id_of(left)?, id_of(right)?, left, right))
            })
            .collect();
        ways.sort_by_key(|&(left_id, right_id, ..)| (left_id, right_id));
        merges.extend(ways.into_iter().map(|(_, _, left, right)| Merge { left, right, score: scores[id] }));
    }
    let length = |text: &str| text.chars().count();
    merges.sort_by(|a, b| {
        let by_score = b.score.total_cmp(&a.score);
        by_score.then(length(b.left).cmp(&length(a.left))).then(length(b.right).cmp(&length(a.right)))
    });
    Ok(merges.into_iter().map(|merge| [merge.left, merge.right]).collect())
}

/// The pieces' scores; those of unused rows at the end are left out.
fn scores<R: Read + Seek>(gguf: &Gguf<R>, count: usize) -> Result<Vec<f64>> {
    let key = "tokenizer.ggml.scores";
    let scores = gguf.numbers(key)?.ok_or_else(|| gguf.error_at(key, "this metadata key is missing"))?;
    if scores.len() < count || scores.iter().any(|score| !score.is_finite()) {
        let message = format!("found {} scores, expected {count} finite numbers", scores.len());
        return Err(gguf.error_at(key, message));
    }
    Ok(scores)
}
