//! What a data file holds: records, each with its place.

use std::fmt;
use std::sync::Arc;

use super::chat::Conversation;

/// The hash of a record that names none.
pub const UNKNOWN_HASH: &str = "unknown";

/// Where a record begins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// The file's path, as given.
    pub file: Arc<str>,
    /// Line, from 1; of the decompressed text.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.file, self.line)
    }
}

/// One record and its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// What it says.
    pub content: RecordContent,
    /// The domain that conditions the text; `unknown` where the record names none.
    pub hash: String,
    /// How often it is seen in an epoch, in the mean: its file's `weight`.
    pub weight: f64,
    /// Where it begins.
    pub origin: Origin,
}

impl Record {
    /// The hash that stands in the text, where one does.
    pub fn text_hash(&self) -> Option<&str> {
        let stands_in_text = match &self.content {
            RecordContent::Instruction { .. } => true,
            RecordContent::Chat { has_hash, .. } => *has_hash,
            RecordContent::PreTokenised { .. } => false,
        };
        stands_in_text.then_some(self.hash.as_str())
    }
}

/// Which kinds of record there are in some data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kinds {
    /// The first record with text, which needs a tokenizer.
    pub first_text: Option<Origin>,
    /// Whether there are conversations, which need a chat template.
    pub has_chat: bool,
}

impl Kinds {
    /// Notes one record.
    pub(super) fn note(&mut self, record: &Record) {
        if self.first_text.is_none() && record.content.is_text() {
            self.first_text = Some(record.origin.clone());
        }
        self.has_chat |= matches!(record.content, RecordContent::Chat { .. });
    }
}

/// The kinds of record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordContent {
    /// Text to be rendered and tokenised.
    Instruction {
        /// What the user says.
        instruction: String,
        /// What the assistant answers.
        output: String,
    },
    /// A conversation to be rendered with the model's chat template and tokenised.
    Chat {
        /// Its turns, without the hash.
        conversation: Conversation,
        /// Whether the record names a hash, which then stands in front of the first user turn.
        has_hash: bool,
    },
    /// Tokens to be taken as they are.
    PreTokenised {
        /// Token ids.
        token_ids: Vec<u32>,
        /// One label a token, -100 where there is no loss.
        labels: Vec<i32>,
    },
}

impl RecordContent {
    /// The kind's name.
    pub fn kind(&self) -> &'static str {
        match self {
            RecordContent::Instruction { .. } => "instruction",
            RecordContent::Chat { .. } => "chat",
            RecordContent::PreTokenised { .. } => "pre-tokenised",
        }
    }

    /// Whether it needs a tokenizer.
    pub fn is_text(&self) -> bool {
        !matches!(self, RecordContent::PreTokenised { .. })
    }
}
