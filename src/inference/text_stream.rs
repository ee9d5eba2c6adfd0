//! Token ids → text as they come, complete characters only.

use crate::error::Result;

/// Turns a stream of token ids into text. A token may be part of a character, and what one token adds may depend on
/// the one before (spaces); so the last tokens are decoded together, and what is new is handed out once it no longer
/// ends inside a character.
///
/// ```
/// use fastlora::inference::TextStream;
///
/// // Tokens that are single bytes.
/// let bytes = |ids: &[u32]| {
///     let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
///     Ok(String::from_utf8_lossy(&bytes).into_owned())
/// };
/// let mut stream = TextStream::new(bytes);
/// let pieces: Vec<String> = "a£".bytes().map(|byte| stream.push(byte.into())).collect::<Result<_, _>>()?;
/// assert_eq!(pieces, ["a", "", "£"]);
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Debug)]
pub struct TextStream<Decode> {
    decode: Decode,
    token_ids: Vec<u32>,
    /// First token of the window that is decoded together.
    window_start: usize,
    /// Bytes of the window's text that were handed out.
    shown: usize,
}

/// What decoders put in the place of an unfinished character.
const REPLACEMENT: char = '\u{fffd}';

impl<Decode: Fn(&[u32]) -> Result<String>> TextStream<Decode> {
    /// A stream over a tokenizer's `decode`.
    pub fn new(decode: Decode) -> Self {
        Self { decode, token_ids: Vec::new(), window_start: 0, shown: 0 }
    }

    /// The text that `token_id` completes; empty inside a character.
    pub fn push(&mut self, token_id: u32) -> Result<String> {
        self.token_ids.push(token_id);
        let text = (self.decode)(&self.token_ids[self.window_start..])?;
        if text.ends_with(REPLACEMENT) {
            return Ok(String::new());
        }
        let new = text.get(self.shown..).unwrap_or_default().to_string();
        // The last token stays in the window: a decoder may drop the space in front of the first one.
        self.window_start = self.token_ids.len() - 1;
        self.shown = (self.decode)(&self.token_ids[self.window_start..])?.len();
        Ok(new)
    }

    /// What is left at the end: an unfinished character, shown as the replacement character.
    pub fn finish(self) -> Result<String> {
        let text = (self.decode)(&self.token_ids[self.window_start..])?;
        Ok(text.get(self.shown..).unwrap_or_default().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_as_tokens(ids: &[u32]) -> Result<String> {
        let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    #[test]
    fn characters_come_whole_and_nothing_is_lost() {
        for text in ["plain", "naïve café", "日本語", "a👩‍🚀b", "", "e\u{301}"] {
            let mut stream = TextStream::new(bytes_as_tokens);
            let mut joined = String::new();
            for byte in text.bytes() {
                let piece = stream.push(byte.into()).unwrap();
                assert!(!piece.contains(REPLACEMENT), "{piece:?}");
                joined += &piece;
            }
            joined += &stream.finish().unwrap();
            assert_eq!(joined, text);
        }
    }

    #[test]
    fn an_unfinished_character_shows_at_the_end() {
        let mut stream = TextStream::new(bytes_as_tokens);
        let pieces: Vec<String> =
            [b'a', 0xf0, 0x9f].iter().map(|&byte| stream.push(byte.into()).unwrap()).collect();
        assert_eq!(pieces, ["a", "", ""]);
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    /// As SentencePiece decoders do: `▁` is a space, but not in front of the first token.
    fn words(ids: &[u32]) -> Result<String> {
        let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
        Ok(words.join(" "))
    }

    #[test]
    fn a_space_that_depends_on_the_token_before_is_kept() {
        let mut stream = TextStream::new(words);
        let pieces: Vec<String> = [1, 2, 3].iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces, ["w1", " w2", " w3"]);
    }
}
