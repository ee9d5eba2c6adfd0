//! Where the assistant speaks in a rendered conversation.
//!
//! A template with `{% generation %}` says so. For any other the turn of message `i` begins where the prompt for it
//! ends, since that is where generation begins, and ends where the text of the conversation up to `i` ends. Both are
//! found by rendering prefixes. A template that writes a turn differently once others follow (Qwen 3 drops earlier
//! reasoning, some Mistral templates move the system's words to the last user turn) has prefixes that are not the
//! text's; there the message's content is replaced by a mark, and the text around the mark tells the place.
//!
//! A turn ends with the token that ends it (`<|im_end|>`, `<|eot_id|>`, `</s>`), which is learned; what a template
//! writes after that before the next turn, a line break mostly, is not.

use std::ops::Range;

use super::conversation::{ASSISTANT, Conversation, Message};
use super::dialect::GENERATION;
use super::template::{ChatTemplate, RenderFault};

/// Stands for a message's content where its place is looked for.
const CONTENT: char = '\u{FDD2}';

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The whole text, special tokens written out.
    pub text: String,
    /// Bytes of each assistant turn with what ends it, ascending and apart.
    pub assistant_turns: Vec<Range<usize>>,
    /// Whether some message of another role than the assistant's is not in the text.
    pub leaves_out_messages: bool,
}

impl ChatTemplate {
    /// Renders a whole conversation and finds the assistant's turns; `turn_ends` are the tokens that end one.
    ///
    /// # Errors
    /// The template refuses the conversation, fails, or writes a text in which the turns cannot be told.
    pub fn conversation(
        &self,
        conversation: &Conversation,
        turn_ends: &[String],
    ) -> Result<RenderedChat, RenderFault> {
        let messages = &conversation.messages;
        let contents = || messages.iter().filter_map(|message| message.content.as_deref());
        if contents().any(|content| content.contains([GENERATION[0], GENERATION[1], CONTENT])) {
            let reason = "a message holds U+FDD0, U+FDD1 or U+FDD2, which are no characters of any text";
            return Err(RenderFault::Refused(reason.into()));
        }
        let marked = self.render_marked(conversation, messages, false)?;
        let (text, assistant_turns) = if self.marks_generation {
            unmark(&marked).ok_or_else(|| self.cannot_mark())?
        } else {
            let turns = Finder { template: self, conversation, text: &marked, turn_ends }.turns()?;
            (marked, turns)
        };
        let is_left_out = |message: &Message| {
            let content = message.content.as_deref().unwrap_or_default().trim();
            message.role != ASSISTANT && !text.contains(content)
        };
        let leaves_out_messages = messages.iter().any(is_left_out);
        Ok(RenderedChat { text, assistant_turns, leaves_out_messages })
    }
}

/// The text without marks, and what stood between them; none where they do not pair.
fn unmark(marked: &str) -> Option<(String, Vec<Range<usize>>)> {
    let mut text = String::with_capacity(marked.len());
    let mut turns = Vec::new();
    let mut start = None;
    for character in marked.chars() {
        if character == GENERATION[0] {
            if start.replace(text.len()).is_some() {
                return None;
            }
        } else if character == GENERATION[1] {
            turns.push(start.take()?..text.len());
        } else {
            text.push(character);
        }
    }
    turns.retain(|turn| !turn.is_empty());
    start.is_none().then_some((text, turns))
}

struct Finder<'a> {
    template: &'a ChatTemplate,
    conversation: &'a Conversation,
    /// The whole conversation.
    text: &'a str,
    turn_ends: &'a [String],
}

impl Finder<'_> {
    fn turns(&self) -> Result<Vec<Range<usize>>, RenderFault> {
        let messages = &self.conversation.messages;
        let mut turns: Vec<Range<usize>> = Vec::new();
        for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == ASSISTANT) {
            let start = self.start(index)?;
            let end = self.end(index, start)?;
            let earlier_end = turns.last().map_or(0, |turn| turn.end);
            if start < earlier_end || end <= start {
                return Err(self.template.cannot_mark());
            }
            turns.push(start..self.cut_after_turn_end(start, end));
        }
        Ok(turns)
    }

    /// Where generation of message `index` begins.
    fn start(&self, index: usize) -> Result<usize, RenderFault> {
        let before = &self.conversation.messages[..index];
        let prompt = self.try_render(before, true)?;
        if let Some(prompt) = prompt.as_ref().filter(|prompt| self.text.starts_with(prompt.as_str())) {
            return Ok(prompt.len());
        }
        let (front, _) = self.around_content(index, self.conversation.messages.len())?;
        if !self.text.starts_with(front.as_str()) {
            return Err(self.template.cannot_mark());
        }
        // Spaces between what asks for the turn and the content are generated.
        let header = match (&prompt, self.try_render(before, false)?) {
            (Some(prompt), Some(before)) => prompt.strip_prefix(before.as_str()).unwrap_or_default(),
            _ => "",
        };
        let trimmed = front.trim_end_matches(' ');
        Ok(if front.ends_with(header) && !header.is_empty() { front.len() } else { trimmed.len() })
    }

    /// Where message `index`, whose turn begins at `start`, ends, with all that the template writes after it for its own sake.
    fn end(&self, index: usize, start: usize) -> Result<usize, RenderFault> {
        let messages = &self.conversation.messages;
        if index + 1 == messages.len() {
            return Ok(self.last_end(start));
        }
        let so_far = self.try_render(&messages[..=index], false)?;
        if let Some(so_far) = so_far.filter(|so_far| self.text.starts_with(so_far.as_str())) {
            return Ok(so_far.len());
        }
        let (_, rest) = self.around_content(index, messages.len())?;
        let Some(content_end) =
            self.text.len().checked_sub(rest.len()).filter(|_| self.text.ends_with(&rest))
        else {
            return Err(self.template.cannot_mark());
        };
        let (_, own_rest) = self.around_content(index, index + 1)?;
        let shared = own_rest.chars().zip(rest.chars()).take_while(|(own, other)| own == other);
        Ok(content_end + shared.map(|(character, _)| character.len_utf8()).sum::<usize>())
    }

    /// Where the last turn ends. A template may write the text's end behind the turn's (Phi); that is not there where the text
    /// goes on to ask for another turn, but a turn that nothing else ends is ended by it.
    fn last_end(&self, start: usize) -> usize {
        let whole = self.text.len();
        // A template may refuse to ask for a turn after one of the assistant's.
        let Ok(prompt) = self.template.render(self.conversation, &self.conversation.messages, true) else {
            return whole;
        };
        let both = self.text.chars().zip(prompt.chars()).take_while(|(one, other)| one == other);
        let shared: usize = both.map(|(character, _)| character.len_utf8()).sum();
        if shared > start && self.last_turn_end(start, shared).is_some() { shared } else { whole }
    }

    /// The text before and after the content of message `index`, of the first `count` messages.
    fn around_content(&self, index: usize, count: usize) -> Result<(String, String), RenderFault> {
        let mut messages = self.conversation.messages[..count].to_vec();
        if messages[index].content.is_none() {
            return Err(self.template.cannot_mark());
        }
        messages[index].content = Some(CONTENT.to_string());
        let text = self.template.render(self.conversation, &messages, false)?;
        match text.split(CONTENT).collect::<Vec<_>>()[..] {
            [front, rest] => Ok((front.to_string(), rest.to_string())),
            _ => Err(self.template.cannot_mark()),
        }
    }

    /// A prefix that a template refuses, since conversations do not end there, is none; one that fails is an error.
    fn try_render(&self, messages: &[Message], prompt: bool) -> Result<Option<String>, RenderFault> {
        match self.template.render(self.conversation, messages, prompt) {
            Ok(text) => Ok(Some(text)),
            Err(RenderFault::Refused(_)) => Ok(None),
            // Templates read the first message without asking whether there is one.
            Err(RenderFault::Template(_)) if messages.is_empty() => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// The end of the last token in `start..end` that ends a turn; where there is none, of the last visible character.
    fn cut_after_turn_end(&self, start: usize, end: usize) -> usize {
        start + self.last_turn_end(start, end).unwrap_or_else(|| self.text[start..end].trim_end().len())
    }

    /// The end of the last token in `start..end` that ends a turn, counted from `start`.
    fn last_turn_end(&self, start: usize, end: usize) -> Option<usize> {
        let turn = &self.text[start..end];
        let ends = self.turn_ends.iter().filter(|token| !token.is_empty());
        ends.filter_map(|token| turn.rfind(token.as_str()).map(|at| at + token.len())).max()
    }
}
