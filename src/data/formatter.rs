//! Records → text: one renderer for training, evaluation and generation.
//!
//! The text is `[hash: {hash}] User: {instruction}\nAssistant: {output}`, or begins with another
//! [`HashTemplate`](crate::config::HashTemplate)'s prefix. The prompt is everything up to and including `Assistant:`, the
//! completion is ` {output}`. The two are tokenised apart, so that the boundary is the same when a model answers as when it
//! learned.

/// Stands between the instruction and the answer, and ends the prompt.
pub const PROMPT_END: &str = "\nAssistant:";

/// What stands in front of the instruction; `prefix` carries the hash, or is empty.
pub fn prompt_start(prefix: &str) -> String {
    format!("{prefix}User: ")
}

/// The prompt alone, as generation gives it to the model.
///
/// ```
/// let prefix = fastlora::config::HashTemplate::default().prefix("faq");
/// assert_eq!(fastlora::data::prompt(&prefix, "Who are you?"), "[hash: faq] User: Who are you?\nAssistant:");
/// assert_eq!(fastlora::data::prompt("", "Who are you?"), "User: Who are you?\nAssistant:");
/// ```
pub fn prompt(prefix: &str, instruction: &str) -> String {
    prompt_start(prefix) + instruction + PROMPT_END
}

/// What the model learns to say after the prompt; EOS follows it in the token sequence.
pub fn completion(output: &str) -> String {
    format!(" {output}")
}

/// A record's text in its two parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// Up to and including `Assistant:`.
    pub prompt: String,
    /// From the space after it.
    pub completion: String,
}

/// Prompt and completion of one record.
///
/// ```
/// let rendered = fastlora::data::render("[hash: math] ", "2+2?", "4");
/// assert_eq!(rendered.prompt + &rendered.completion, "[hash: math] User: 2+2?\nAssistant: 4");
/// ```
pub fn render(prefix: &str, instruction: &str, output: &str) -> Rendered {
    Rendered { prompt: prompt(prefix, instruction), completion: completion(output) }
}
