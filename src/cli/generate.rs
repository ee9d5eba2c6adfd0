//! `fastlora generate`: prompts → model → text, streamed, as a table, or as JSON.

mod table;

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};
use tracing::info;

use super::Cli;
use super::answer::{Answer, Answerer, SamplingArgs};
use super::cases::{Case, read_cases};
use super::conditioning::{Conditioning, HashArgs};
use super::device::{DeviceArgs, on_backend};
use super::model::{ModelArgs, ModelFiles};
use super::output::print_line;
use super::tokenizer::{ChatArgs, chat_tokenizer};
use crate::backend::Backend;
use crate::checkpoint::base::BaseModel;
use crate::error::{Error, Result};
use crate::inference::StopConditions;
use crate::tokens::Tokenizer;

/// Arguments of `fastlora generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    prompts: PromptArgs,
    /// Runs everything with the adapter and without, and shows both.
    #[arg(long, requires = "adapter")]
    compare_base: bool,
    /// At most this many new tokens.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Where the prompts come from. Without `--prompt` and `--cases`, standard input is the prompt.
#[derive(Debug, Args)]
struct PromptArgs {
    /// What the user says; without it and --cases, standard input.
    #[arg(long, value_name = "TEXT", conflicts_with = "cases")]
    prompt: Option<String>,
    /// JSON list of objects with `instruction`, `hash` and, for comparison, `expected`.
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,
    /// The hash in front of the prompt, and of cases that have none; without it `unknown`, or none with --chat and
    /// for an adapter that learned with `hash_dropout` and no `unknown`.
    #[arg(long, value_name = "HASH")]
    hash: Option<String>,
    /// Continues the text as it is, without hash, `User:` and `Assistant:`.
    #[arg(long)]
    raw: bool,
    /// Renders the prompt with the model's chat template, as conversations are in training.
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// What the system says before the user.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    #[command(flatten)]
    template: ChatArgs,
    #[command(flatten)]
    hash_text: HashArgs,
}

impl PromptArgs {
    fn read(&self) -> Result<Vec<Case>> {
        if let Some(path) = &self.cases {
            return read_cases(path, self.hash.as_deref());
        }
        let instruction = match &self.prompt {
            Some(prompt) => prompt.clone(),
            None => read_standard_input()?,
        };
        Ok(vec![Case { instruction, hash: self.hash.clone(), expected: None }])
    }

    fn tokenizer(&self, base: &BaseModel, adapter: Option<&Path>) -> Result<Tokenizer> {
        if self.chat {
            return chat_tokenizer(base, adapter, &self.template.choice());
        }
        Tokenizer::from_folder(base.folder())
    }

    /// The hash in a prompt's text.
    fn hash<'c>(&self, case: &'c Case, conditioning: &Conditioning) -> Option<&'c str> {
        match (self.raw, self.chat) {
            (true, _) => None,
            (_, true) => case.hash.as_deref(),
            _ => conditioning.hash_of_prompt(case.hash.as_deref()),
        }
    }

    /// A prompt's text and its tokens.
    fn render(
        &self,
        case: &Case,
        tokenizer: &Tokenizer,
        conditioning: &Conditioning,
    ) -> Result<(String, Vec<u32>)> {
        if self.raw {
            let ids = tokenizer.encode_start(&case.instruction)?;
            return Ok((case.instruction.clone(), ids));
        }
        if self.chat {
            case.chat_prompt(tokenizer, self.system.as_deref(), conditioning)
        } else {
            case.prompt(tokenizer, conditioning)
        }
    }
}

fn read_standard_input() -> Result<String> {
    let mut stdin = io::stdin().lock();
    if stdin.is_terminal() {
        info!("reading the prompt from standard input; end it with Ctrl-D");
    }
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes).map_err(|source| Error::file("read", "standard input", source))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        Error::data(format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to())).at("standard input")
    })?;
    Ok(text.trim_end_matches(['\n', '\r']).to_string())
}

/// A case and its prompt's tokens.
struct Prepared {
    case: Case,
    /// The hash in the prompt's text.
    hash: Option<String>,
    prompt: String,
    prompt_ids: Vec<u32>,
}

pub(super) fn run(args: &GenerateArgs, cli: &Cli) -> Result<()> {
    let sampling = args.sampling.resolve()?;
    args.device.validate()?;
    if args.prompts.template.is_given() && !args.prompts.chat {
        return Err(Error::config("a chat template is of no use without --chat")
            .at("--chat-template")
            .hint("add --chat"));
    }
    if args.prompts.raw && args.prompts.hash_text.hash_template.is_some() {
        return Err(Error::config("--raw writes no hash into the text")
            .at("--hash-template")
            .hint("leave one of the two out"));
    }
    let cases = args.prompts.read()?;
    let files = args.model.open(cli)?;
    let tokenizer = args.prompts.tokenizer(&files.base, args.model.adapter.as_deref())?;
    let conditioning = Conditioning::of(args.model.adapter.as_deref())?.with(&args.prompts.hash_text);
    conditioning.warn_about(cases.iter().filter_map(|case| args.prompts.hash(case, &conditioning)));
    let prepared: Vec<Prepared> = cases
        .into_iter()
        .map(|case| {
            let (prompt, prompt_ids) = args.prompts.render(&case, &tokenizer, &conditioning)?;
            let hash = args.prompts.hash(&case, &conditioning).map(str::to_string);
            Ok(Prepared { case, hash, prompt, prompt_ids })
        })
        .collect::<Result<_>>()?;
    let prompts: Vec<&[u32]> = prepared.iter().map(|prepared| &*prepared.prompt_ids).collect();
    let positions = files.base.config().max_positions;
    Answerer::check_room(&prompts, positions, |index| format!("prompt {}", index + 1))?;
    let mut stop_ids = files.base.config().eos_token_ids.clone();
    stop_ids.extend(tokenizer.eos_id());
    let stop = StopConditions { max_new_tokens: args.max_new_tokens, eos_token_ids: stop_ids };
    let answerer = Answerer { tokenizer: &tokenizer, sampling, stop, skips_space: !args.prompts.raw };
    let work = Work { args, cli, files: &files, prepared: &prepared, prompts: &prompts, answerer };
    on_backend!(args.device.backend(&files.base)?, |backend| work.run_on(backend))
}

/// Everything but the backend.
struct Work<'a> {
    args: &'a GenerateArgs,
    cli: &'a Cli,
    files: &'a ModelFiles,
    prepared: &'a [Prepared],
    prompts: &'a [&'a [u32]],
    answerer: Answerer<'a>,
}

impl Work<'_> {
    fn run_on<B: Backend>(&self, backend: Arc<B>) -> Result<()> {
        let Work { args, cli, files, prepared, prompts, answerer } = self;
        let mut model = files.load(Arc::clone(&backend))?;
        let is_streamed = args.prompts.cases.is_none() && !args.compare_base && !cli.json;
        if is_streamed {
            return backend.run(|| answerer.stream(&mut model, prompts[0]));
        }
        let answers = backend.run(|| answerer.answer_all(&mut model, prompts))?;
        let base_answers = if args.compare_base {
            // An adapter of zeros adds nothing: this is the base, without loading it twice.
            let zeros = vec![0.0; model.layout().parameter_count()];
            model.set_parameters(&zeros)?;
            Some(backend.run(|| answerer.answer_all(&mut model, prompts))?)
        } else {
            None
        };
        if cli.json {
            let mut object = args.model.to_json(files);
            object["cases"] = cases_to_json(prepared, &answers, base_answers.as_deref());
            print_line(&format!("{object:#}"))
        } else {
            print_line(&table::render(prepared, &answers, base_answers.as_deref(), files.adapter.is_some()))
        }
    }
}

fn cases_to_json(prepared: &[Prepared], answers: &[Answer], base_answers: Option<&[Answer]>) -> Value {
    let objects = prepared.iter().zip(answers).enumerate().map(
        |(place, (Prepared { case, prompt, prompt_ids, .. }, answer))| {
            let expected = case.expected.as_deref();
            let mut object = json!({
                "hash": case.hash,
                "instruction": case.instruction,
                "expected": expected,
                "prompt": prompt,
                "prompt_token_count": prompt_ids.len(),
                "answer": answer.to_json(expected),
            });
            if let Some(base_answers) = base_answers {
                object["base_answer"] = base_answers[place].to_json(expected);
            }
            object
        },
    );
    Value::Array(objects.collect())
}
