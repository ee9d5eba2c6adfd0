//! What a tokenizer puts in front of a text: BOS for Llama 3 and Mistral, nothing for Qwen and SmolLM2.
//!
//! Read from the `post_processor` of `tokenizer.json`. The library never runs it: it panics on a template that names a
//! token or a sequence that is not there.

use serde_json::Value;

/// Ids in front of every text that begins, all below `id_count`.
///
/// # Errors
/// What is wrong with the template.
pub(super) fn text_start(post_processor: &Value, id_count: usize) -> Result<Vec<u32>, String> {
    match post_processor["type"].as_str() {
        Some("Sequence") => {
            let mut start = Vec::new();
            for processor in list(&post_processor["processors"]) {
                // A later one puts its tokens around what the earlier ones made.
                start.splice(0..0, text_start(processor, id_count)?);
            }
            Ok(start)
        }
        Some("TemplateProcessing") => {
            let special_tokens =
                list(&post_processor["single"]).iter().map_while(|piece| piece.get("SpecialToken"));
            let ids = special_tokens.map(|token| {
                let name = token["id"].as_str().unwrap_or_default();
                let ids = post_processor["special_tokens"][name]["ids"].as_array();
                ids.ok_or_else(|| {
                    format!("`post_processor` names {name:?}, which is not among its special tokens")
                })
            });
            let ids = ids.collect::<Result<Vec<_>, _>>()?;
            ids.into_iter().flatten().map(|id| checked(id, id_count)).collect()
        }
        Some("BertProcessing" | "RobertaProcessing") => {
            Ok(vec![checked(&post_processor["cls"][1], id_count)?])
        }
        // The others change offsets alone.
        _ => Ok(Vec::new()),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn checked(id: &Value, id_count: usize) -> Result<u32, String> {
    let known = id.as_u64().filter(|&id| id < id_count as u64).and_then(|id| u32::try_from(id).ok());
    known.ok_or_else(|| {
        format!("`post_processor` adds the id {id}, expected one of 0 to {}", id_count.saturating_sub(1))
    })
}
