//! Cuts an overlong sample so that it still teaches: the hash prefix and `Assistant:` stay, a target is left.

use super::tokenizer::Tokenizer;
use crate::data::{PROMPT_END, prompt, prompt_start};
use crate::error::Result;

/// Prompt and completion tokens that fit together.
pub(super) struct Cut {
    pub prompt: Vec<u32>,
    pub completion: Vec<u32>,
}

/// Cuts an instruction record to `max_length` tokens; `prefix` carries its hash, `completion` ends with EOS.
///
/// The instruction loses its end, as much as is needed for the whole completion, but the prompt keeps half of
/// `max_length`; where that is not enough the completion loses its end, EOS included, for the text does not end there.
/// The prompt is the rendered prompt of the shorter instruction, token for token.
/// The error is the number of tokens that the prompt has without any instruction, when not even that fits.
pub(super) fn cut(
    tokenizer: &Tokenizer,
    prefix: &str,
    instruction: &str,
    mut completion: Vec<u32>,
    max_length: usize,
) -> Result<Result<Cut, usize>> {
    let frame_length = tokenizer.encode_start(&prompt(prefix, ""))?.len();
    if frame_length >= max_length {
        return Ok(Err(frame_length));
    }
    let budget = max_length.saturating_sub(completion.len()).max(max_length / 2).max(frame_length);
    let prompt = cut_prompt(tokenizer, prefix, instruction, budget)?;
    completion.truncate(max_length - prompt.len());
    Ok(Ok(Cut { prompt, completion }))
}

/// The prompt of the longest start of `instruction` found to fit into `budget` tokens.
fn cut_prompt(tokenizer: &Tokenizer, prefix: &str, instruction: &str, budget: usize) -> Result<Vec<u32>> {
    let start = prompt_start(prefix).len();
    let mut kept = instruction;
    loop {
        let text = prompt(prefix, kept);
        let tokens = tokenizer.encode_start_placed(&text)?;
        if tokens.ids.len() <= budget || kept.is_empty() {
            return Ok(tokens.ids);
        }
        // Leave out as many of the instruction's last tokens as are too many. Tokens may change at the new end, so
        // look again; the instruction is shorter each time.
        let excess = tokens.ids.len() - budget;
        let instruction_end = text.len() - PROMPT_END.len();
        let inside = tokens.ends.partition_point(|&end| end <= instruction_end);
        let end = inside.checked_sub(excess + 1).map_or(0, |last| tokens.ends[last].saturating_sub(start));
        kept = &kept[..kept.floor_char_boundary(end.min(kept.len() - 1))];
    }
}
