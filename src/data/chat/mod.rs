//! Conversations: read from records, rendered with a model's chat template, with the place of every assistant turn.

mod choice;
mod conversation;
mod dialect;
mod template;
mod turns;

pub use choice::TemplateChoice;
pub use conversation::{Conversation, Message};
pub use template::{ChatTemplate, RenderFault};
pub use turns::RenderedChat;
