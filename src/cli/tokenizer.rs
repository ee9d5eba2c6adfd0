//! The tokenizer that data and prompts need, with the chat template where there are conversations.

use std::path::Path;

use chrono::NaiveDate;
use clap::Args;

use crate::checkpoint::base::BaseModel;
use crate::data::{Kinds, TemplateChoice};
use crate::error::Result;
use crate::tokens::Tokenizer;

/// Arguments that choose the chat template.
#[derive(Clone, Debug, Args)]
pub(super) struct ChatArgs {
    /// Chat template of conversations: one of the model's by name, a `.jinja` file, or `chatml`; without it, the
    /// adapter's or the model's own.
    #[arg(long, value_name = "TEMPLATE")]
    chat_template: Option<String>,
    /// Day that chat templates see (2026-01-31); without it, today.
    #[arg(long, value_name = "DATE")]
    chat_date: Option<NaiveDate>,
}

impl ChatArgs {
    pub(super) fn is_given(&self) -> bool {
        self.chat_template.is_some() || self.chat_date.is_some()
    }

    pub(super) fn choice(&self) -> TemplateChoice {
        TemplateChoice { name: self.chat_template.clone(), date: self.chat_date }
    }
}

/// The tokenizer for these data; none where they are tokens already.
///
/// # Errors
/// Model errors: no tokenizer, no chat template for conversations, or broken ones.
pub(super) fn tokenizer_for<'d>(
    kinds: impl IntoIterator<Item = &'d Kinds>,
    base: &BaseModel,
    adapter: Option<&Path>,
    choice: &TemplateChoice,
) -> Result<Option<Tokenizer>> {
    let (mut is_text, mut is_chat) = (false, false);
    for kinds in kinds {
        is_text |= kinds.first_text.is_some();
        is_chat |= kinds.has_chat;
    }
    Ok(match (is_text, is_chat) {
        (false, _) => None,
        (true, false) => Some(Tokenizer::from_folder(base.folder())?),
        (true, true) => Some(chat_tokenizer(base, adapter, choice)?),
    })
}

/// The tokenizer with its chat template: the chosen one, else the adapter's, else the base's.
pub(super) fn chat_tokenizer(
    base: &BaseModel,
    adapter: Option<&Path>,
    choice: &TemplateChoice,
) -> Result<Tokenizer> {
    let folders: Vec<&Path> = adapter.into_iter().chain([base.folder()]).collect();
    let template = choice.open(&folders)?;
    Ok(Tokenizer::from_folder(base.folder())?.with_chat_template(template, &base.config().eos_token_ids))
}
