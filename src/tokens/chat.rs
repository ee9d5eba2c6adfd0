//! Conversations → tokens: the loss is on every assistant turn and what ends it, and on nothing else.

use super::sample_set::NO_LOSS;
use super::samples::{Fate, SampleOptions, Tokens, cut_end};
use super::tokenizer::Tokenizer;
use crate::config::LossOn;
use crate::data::{Conversation, RenderFault, RenderedChat};
use crate::error::{Error, Result};

/// Tokenises one conversation, its hash in place. Too long, it loses its end.
pub(super) fn tokenise(
    conversation: &Conversation,
    tokenizer: &Tokenizer,
    options: &SampleOptions,
) -> Result<Fate> {
    let chat = tokenizer.chat().ok_or_else(|| {
        Error::model("the data hold conversations, and there is no chat template")
            .hint("give the tokenizer one, or give instruction and output fields")
    })?;
    let rendered = match chat.template.conversation(conversation, &chat.turn_ends) {
        Ok(rendered) => rendered,
        Err(RenderFault::Refused(reason)) => return Ok(Fate::Bad { reason }),
        Err(RenderFault::Template(error)) => return Err(error),
    };
    let tokens = label(tokenizer, &rendered, options.loss_on)?;
    let mut fate = cut_end(&tokens.token_ids, &tokens.labels, options);
    if let Fate::Used { tokens, .. } = &mut fate {
        tokens.is_incomplete = rendered.leaves_out_messages;
    }
    Ok(fate)
}

/// Ids of the whole text, no special tokens added, with the assistant's turns as labels.
///
/// The text is encoded at once, as transformers does and as a prompt is. Where a token would lie across the edge of a
/// turn, which no generation can give, the text is encoded in two pieces at that edge.
fn label(tokenizer: &Tokenizer, chat: &RenderedChat, loss_on: LossOn) -> Result<Tokens> {
    let RenderedChat { text, assistant_turns, .. } = chat;
    let mut placed = tokenizer.encode_placed(text)?;
    let edges = assistant_turns.iter().flat_map(|turn| [turn.start, turn.end]);
    let crossed: Vec<usize> = edges.filter(|&edge| is_crossed(&placed, edge)).collect();
    if !crossed.is_empty() {
        placed.clear();
        let mut start = 0;
        for end in crossed.into_iter().chain([text.len()]) {
            let piece = tokenizer.encode_placed(&text[start..end])?;
            placed.extend(piece.into_iter().map(|(id, (from, to))| (id, (start + from, start + to))));
            start = end;
        }
    }
    let is_learned = |(from, to): (usize, usize)| {
        let turn = assistant_turns.partition_point(|turn| turn.end < to);
        from < to && assistant_turns.get(turn).is_some_and(|turn| turn.start <= from)
    };
    let labels = placed.iter().map(|&(id, bytes)| match loss_on {
        LossOn::Completion if !is_learned(bytes) => NO_LOSS,
        // Ids are below the embedding's rows, checked next, and those below 2³¹.
        _ => id as i32,
    });
    let labels = labels.collect();
    Ok(Tokens { token_ids: placed.into_iter().map(|(id, _)| id).collect(), labels, is_incomplete: false })
}

fn is_crossed(placed: &[(u32, (usize, usize))], edge: usize) -> bool {
    placed.iter().any(|&(_, (from, to))| from < edge && edge < to)
}
