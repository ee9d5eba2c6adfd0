//! `fastlora chat`: a conversation in the terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::Arc;

use clap::Args;
use tracing::info;

use super::Cli;
use super::answer::{Answerer, SamplingArgs};
use super::conditioning::{Conditioning, HashArgs};
use super::device::{DeviceArgs, on_backend};
use super::model::{ModelArgs, ModelFiles};
use super::output::{accept_closed, print_line};
use super::tokenizer::{ChatArgs, chat_tokenizer};
use crate::backend::Backend;
use crate::data::{self, Conversation, Message};
use crate::error::{Error, ErrorKind, Result};
use crate::inference::{Session, StopConditions};
use crate::tokens::Tokenizer;

const HELP: &str =
    "/hash X  the hash of what follows (/hash alone: none)    /system TEXT  what the system says
/reset   forgets the conversation                        /quit         ends (Ctrl-D too)";

/// Arguments of `fastlora chat`.
#[derive(Debug, Args)]
pub struct ConverseArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The hash to begin with.
    #[arg(long, value_name = "HASH")]
    hash: Option<String>,
    /// What the system says before the user.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Every line by itself as `[hash: X] User: …`, as instruction records are in training, without history.
    #[arg(long, conflicts_with_all = ["system", "chat_template", "chat_date"])]
    plain: bool,
    /// At most this many tokens an answer.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    #[command(flatten)]
    template: ChatArgs,
    #[command(flatten)]
    hash_text: HashArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub(super) fn run(args: &ConverseArgs, cli: &Cli) -> Result<()> {
    let sampling = args.sampling.resolve()?;
    args.device.validate()?;
    if cli.json {
        return Err(Error::config("a conversation has no JSON form")
            .at("--json")
            .hint("use fastlora generate"));
    }
    let files = args.model.open(cli)?;
    let tokenizer = match args.plain {
        true => Tokenizer::from_folder(files.base.folder())?,
        false => chat_tokenizer(&files.base, args.model.adapter.as_deref(), &args.template.choice())
            .map_err(|error| match error.kind() {
                ErrorKind::Model if error.message().contains("has none") => {
                    error.hint("--plain talks without one; --chat-template names one")
                }
                _ => error,
            })?,
    };
    let mut stop_ids = files.base.config().eos_token_ids.clone();
    stop_ids.extend(tokenizer.eos_id());
    let stop = StopConditions { max_new_tokens: args.max_new_tokens, eos_token_ids: stop_ids };
    let answerer = Answerer { tokenizer: &tokenizer, sampling, stop, skips_space: true };
    let conditioning = Conditioning::of(args.model.adapter.as_deref())?.with(&args.hash_text);
    conditioning.warn_about(args.hash.as_deref());
    let talk = Talk {
        conversation: Conversation::default(),
        system: args.system.clone(),
        hash: args.hash.clone(),
        is_plain: args.plain,
        conditioning,
    };
    on_backend!(args.device.backend(&files.base)?, |backend| converse(talk, &answerer, &files, backend))
}

/// What was said so far.
struct Talk {
    /// Without the system's words.
    conversation: Conversation,
    system: Option<String>,
    hash: Option<String>,
    is_plain: bool,
    conditioning: Conditioning,
}

/// What a line asks for.
enum Line<'a> {
    Say(&'a str),
    Hash(Option<&'a str>),
    System(Option<&'a str>),
    Reset,
    Help,
    Quit,
    Unknown(&'a str),
    Nothing,
}

impl<'a> Line<'a> {
    fn parse(text: &'a str) -> Self {
        let text = text.trim();
        if text.is_empty() {
            return Line::Nothing;
        }
        let Some(command) = text.strip_prefix('/') else { return Line::Say(text) };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = Some(rest.trim()).filter(|rest| !rest.is_empty());
        match name {
            "hash" => Line::Hash(rest),
            "system" => Line::System(rest),
            "reset" => Line::Reset,
            "help" => Line::Help,
            "quit" | "exit" => Line::Quit,
            other => Line::Unknown(other),
        }
    }
}

fn converse<B: Backend>(
    mut talk: Talk,
    answerer: &Answerer<'_>,
    files: &ModelFiles,
    backend: Arc<B>,
) -> Result<()> {
    let mut model = files.load(Arc::clone(&backend))?;
    let mut session = Session::new(&mut model, files.base.config().max_positions)?;
    // The tokens that the session has read.
    let mut read: Vec<u32> = Vec::new();
    let stdin = io::stdin();
    let is_terminal = stdin.is_terminal();
    info!("/help shows the commands");
    let mut line = String::new();
    loop {
        if is_terminal {
            let prompt = talk.hash.as_ref().map_or("> ".to_string(), |hash| format!("[{hash}] > "));
            accept_closed(write!(io::stdout(), "{prompt}").and_then(|()| io::stdout().flush()))?;
        }
        line.clear();
        let length = stdin.lock().read_line(&mut line);
        if length.map_err(|source| Error::file("read", "standard input", source))? == 0 {
            return Ok(());
        }
        match Line::parse(&line) {
            Line::Nothing => {}
            Line::Quit => return Ok(()),
            Line::Help => print_line(HELP)?,
            Line::Unknown(name) => print_line(&format!("no command `/{name}`\n{HELP}"))?,
            Line::Reset => talk.conversation.messages.clear(),
            Line::Hash(hash) => {
                // The hash stands in the first user turn: another one begins another conversation.
                talk.conditioning.warn_about(hash);
                talk.hash = hash.map(str::to_string);
                talk.conversation.messages.clear();
            }
            Line::System(system) => {
                talk.system = system.map(str::to_string);
                talk.conversation.messages.clear();
            }
            Line::Say(text) => {
                talk.conversation.messages.push(Message::new("user", text));
                let prompt = talk.prompt(answerer.tokenizer)?;
                let positions = files.base.config().max_positions;
                if prompt.len() >= positions {
                    talk.conversation.messages.pop();
                    let length = prompt.len();
                    print_line(&format!(
                        "that makes {length} tokens, the model has room for {positions}; /reset begins anew"
                    ))?;
                    continue;
                }
                // What both texts begin with need not be read again; the last token is, since its logits are asked for.
                let shared = read.iter().zip(&prompt).take_while(|(one, other)| one == other).count();
                let shared = shared.min(prompt.len() - 1);
                session.keep(shared);
                let (answer, written) = backend.run(|| answerer.print(&mut session, &prompt[shared..]))?;
                accept_closed(written)?;
                read = prompt;
                // The last token was chosen and not read.
                let ids = &answer.generation.token_ids;
                read.extend(&ids[..ids.len().saturating_sub(1)]);
                talk.conversation.messages.push(Message::new("assistant", answer.text));
                if talk.is_plain {
                    talk.conversation.messages.clear();
                }
            }
        }
    }
}

impl Talk {
    /// Tokens that ask for the next turn.
    fn prompt(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let messages = &self.conversation.messages;
        if let (false, Some(template)) = (self.is_plain, tokenizer.chat_template()) {
            let system = self.system.iter().map(|system| Message::new("system", system));
            let conversation =
                Conversation { messages: system.chain(messages.iter().cloned()).collect(), tools: None };
            let conversation = conversation.with_prefix(&self.conditioning.prefix(self.hash.as_deref()));
            return tokenizer.encode(&template.prompt(&conversation)?);
        }
        let said = messages.last().and_then(|message| message.content.as_deref()).unwrap_or_default();
        let hash = self.conditioning.hash_of_prompt(self.hash.as_deref());
        tokenizer.encode_start(&data::prompt(&self.conditioning.prefix(hash), said))
    }
}
