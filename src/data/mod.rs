//! Data files → records → text.
//!
//! [`load`] reads and merges JSON and JSONL files into [`Record`]s that know their place, [`read`] does so block by
//! block; [`render`] turns one into prompt and completion, a [`ChatTemplate`] turns a [`Conversation`] into text and says
//! where the assistant speaks; [`Accounting`] says what became of every record.

mod accounting;
mod blocks;
mod chat;
mod fields;
mod files;
mod formatter;
mod json;
mod loader;
mod records;

pub use accounting::{Accounting, Exception, Outcome};
pub use chat::{ChatTemplate, Conversation, Message, RenderFault, RenderedChat, TemplateChoice};
pub use fields::{HASH_NAMES, INSTRUCTION_NAMES, OUTPUT_NAMES};
pub use formatter::{PROMPT_END, Rendered, completion, prompt, prompt_start, render};
pub(crate) use json::read_optional as read_optional_json;
pub use loader::{Dataset, FileReport, LoadOptions, Survey, load, read};
pub use records::{Kinds, Origin, Record, RecordContent, UNKNOWN_HASH};
