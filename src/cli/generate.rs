//! `fastlora generate`: prompts → model → text, streamed, as a table, or as JSON.

mod cases;
mod table;

use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};
use tracing::info;

use self::cases::{Case, read_cases};
use super::Cli;
use super::device::{DeviceArgs, on_backend};
use super::model::{ModelArgs, ModelFiles};
use super::output::{accept_closed, for_terminal, print_line};
use super::tokenizer::{ChatArgs, chat_tokenizer};
use crate::backend::Backend;
use crate::checkpoint::base::BaseModel;
use crate::data::{self, Conversation};
use crate::error::{Error, Result};
use crate::inference::{
    Generation, NextTokenLogits, Sampler, SamplingParameters, Session, StopConditions, TextStream, generate,
};
use crate::model::Transformer;
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
    /// The hash in front of the prompt, and of cases that have none; without it `unknown`, or none with --chat.
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
}

/// How tokens are chosen.
#[derive(Debug, Args)]
struct SamplingArgs {
    /// Divides the logits; 0 always takes the most likely token.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Only the K most likely tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Only the most likely tokens whose probabilities sum to P.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Only tokens at least P times as likely as the most likely one.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Makes tokens of the prompt and the text so far less likely, above 1.
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,
    /// Same seed, same text.
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
}

impl SamplingArgs {
    /// The parameters, checked.
    fn resolve(&self) -> Result<SamplingParameters> {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, seed } = *self;
        let parameters = SamplingParameters { temperature, top_k, top_p, min_p, repetition_penalty, seed };
        parameters.validate()?;
        if temperature == 0.0 && (top_k.is_some() || top_p != 1.0 || min_p != 0.0) {
            return Err(Error::config("top-k, top-p and min-p have no effect at temperature 0")
                .at("--temperature")
                .hint("give --temperature 1, or leave them out"));
        }
        Ok(parameters)
    }
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

    /// A prompt's text and its tokens.
    fn render(&self, case: &Case, tokenizer: &Tokenizer) -> Result<(String, Vec<u32>)> {
        if let (true, Some(template)) = (self.chat, tokenizer.chat_template()) {
            let question = Conversation::question(self.system.as_deref(), &case.instruction);
            let question = match &case.hash {
                Some(hash) => question.with_hash(hash),
                None => question,
            };
            let text = template.prompt(&question)?;
            let ids = tokenizer.encode(&text)?;
            return Ok((text, ids));
        }
        let text = match self.raw {
            true => case.instruction.clone(),
            false => data::prompt(case.hash(), &case.instruction),
        };
        let ids = tokenizer.encode_start(&text)?;
        Ok((text, ids))
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
    prompt: String,
    prompt_ids: Vec<u32>,
}

/// What the model said.
struct Answer {
    text: String,
    generation: Generation,
}

impl Answer {
    fn to_json(&self, expected: Option<&str>) -> Value {
        json!({
            "text": self.text,
            "token_count": self.generation.token_ids.len(),
            "stop_reason": self.generation.stop_reason.name(),
            "exact": expected.map(|expected| self.is_exact(expected)),
        })
    }

    fn is_exact(&self, expected: &str) -> bool {
        self.text.trim() == expected.trim()
    }
}

pub(super) fn run(args: &GenerateArgs, cli: &Cli) -> Result<()> {
    let sampling = args.sampling.resolve()?;
    args.device.validate()?;
    if args.prompts.template.is_given() && !args.prompts.chat {
        return Err(Error::config("a chat template is of no use without --chat")
            .at("--chat-template")
            .hint("add --chat"));
    }
    let cases = args.prompts.read()?;
    let files = args.model.open(cli)?;
    let tokenizer = args.prompts.tokenizer(&files.base, args.model.adapter.as_deref())?;
    let prepared: Vec<Prepared> = cases
        .into_iter()
        .map(|case| {
            let (prompt, prompt_ids) = args.prompts.render(&case, &tokenizer)?;
            Ok(Prepared { case, prompt, prompt_ids })
        })
        .collect::<Result<_>>()?;
    // Before the first answer, which would be lost when a later prompt fails.
    let positions = files.base.config().max_positions;
    if let Some(place) = prepared.iter().position(|prepared| prepared.prompt_ids.len() > positions) {
        let length = prepared[place].prompt_ids.len();
        return Err(Error::data(format!(
            "the prompt has {length} tokens, the model has room for {positions}"
        ))
        .at(format!("prompt {}", place + 1))
        .hint("shorten it"));
    }
    let mut stop_ids = files.base.config().eos_token_ids.clone();
    stop_ids.extend(tokenizer.eos_id());
    let stop = StopConditions { max_new_tokens: args.max_new_tokens, eos_token_ids: stop_ids };
    let runner = Runner { tokenizer: &tokenizer, sampling, stop, is_raw: args.prompts.raw };
    let work = Work { args, cli, files: &files, prepared: &prepared, runner };
    on_backend!(args.device.backend(&files.base)?, |backend| work.run_on(backend))
}

/// Everything but the backend.
struct Work<'a> {
    args: &'a GenerateArgs,
    cli: &'a Cli,
    files: &'a ModelFiles,
    prepared: &'a [Prepared],
    runner: Runner<'a>,
}

impl Work<'_> {
    fn run_on<B: Backend>(&self, backend: Arc<B>) -> Result<()> {
        let Work { args, cli, files, prepared, runner } = self;
        let mut model = files.load(Arc::clone(&backend))?;
        let is_streamed = args.prompts.cases.is_none() && !args.compare_base && !cli.json;
        if is_streamed {
            return backend.run(|| runner.stream(&mut model, &prepared[0]));
        }
        let answers = backend.run(|| runner.answer_all(&mut model, prepared))?;
        let base_answers = if args.compare_base {
            // An adapter of zeros adds nothing: this is the base, without loading it twice.
            let zeros = vec![0.0; model.layout().parameter_count()];
            model.set_parameters(&zeros)?;
            Some(backend.run(|| runner.answer_all(&mut model, prepared))?)
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
        |(place, (Prepared { case, prompt, prompt_ids }, answer))| {
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

/// What all prompts share.
struct Runner<'a> {
    tokenizer: &'a Tokenizer,
    sampling: SamplingParameters,
    stop: StopConditions,
    is_raw: bool,
}

impl Runner<'_> {
    /// Prints the answer as it comes.
    fn stream<B: Backend>(&self, model: &mut Transformer<B>, prepared: &Prepared) -> Result<()> {
        let mut session = self.session(model, std::slice::from_ref(prepared))?;
        let mut stdout = io::stdout().lock();
        let is_terminal = stdout.is_terminal();
        let mut written = Ok(());
        let answer = self.answer(&mut session, &prepared.prompt_ids, |piece| {
            let shown = if is_terminal { for_terminal(piece) } else { piece.to_string() };
            written = stdout.write_all(shown.as_bytes()).and_then(|()| stdout.flush());
            if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        report_speed([&answer].into_iter(), prepared.prompt_ids.len());
        accept_closed(written.and_then(|()| writeln!(stdout)))
    }

    fn answer_all<B: Backend>(
        &self,
        model: &mut Transformer<B>,
        prepared: &[Prepared],
    ) -> Result<Vec<Answer>> {
        let mut session = self.session(model, prepared)?;
        let mut answers = Vec::with_capacity(prepared.len());
        for Prepared { prompt_ids, .. } in prepared {
            session.clear();
            answers.push(self.answer(&mut session, prompt_ids, |_| ControlFlow::Continue(()))?);
        }
        report_speed(answers.iter(), prepared.iter().map(|prepared| prepared.prompt_ids.len()).sum());
        Ok(answers)
    }

    /// A session with room for the longest of the prompts and its answer.
    fn session<'m, B: Backend>(
        &self,
        model: &'m mut Transformer<B>,
        prepared: &[Prepared],
    ) -> Result<Session<'m, B>> {
        let longest = prepared.iter().map(|prepared| prepared.prompt_ids.len()).max().unwrap_or(0);
        Session::new(model, longest.saturating_add(self.stop.max_new_tokens))
    }

    /// Runs one prompt; `on_text` gets the text in whole characters. Each starts from the seed, so that its answer
    /// does not depend on the ones before.
    fn answer(
        &self,
        model: &mut impl NextTokenLogits,
        prompt_ids: &[u32],
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let mut sampler = Sampler::new(self.sampling)?;
        let mut stream = TextStream::new(|ids: &[u32]| self.tokenizer.decode(ids));
        let mut text = String::new();
        let mut failure = None;
        // The template puts a space between prompt and answer; it is none of the answer.
        let skips_space = !self.is_raw;
        let mut show = |piece: String, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>| {
            let piece = match piece.strip_prefix(' ') {
                Some(rest) if skips_space && text.is_empty() => rest,
                _ => &piece,
            };
            text.push_str(piece);
            if piece.is_empty() { ControlFlow::Continue(()) } else { on_text(piece) }
        };
        let generation =
            generate(model, prompt_ids, &mut sampler, &self.stop, |token_id| match stream.push(token_id) {
                Ok(piece) => show(piece, &mut on_text),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            })?;
        if let Some(error) = failure {
            return Err(error);
        }
        // A last, unfinished character; whether anyone still reads does not matter any more.
        let _ = show(stream.finish()?, &mut on_text);
        Ok(Answer { text, generation })
    }
}

/// Says how fast it went, on the log.
fn report_speed<'a>(answers: impl Iterator<Item = &'a Answer> + Clone, prompt_tokens: usize) {
    let generations = answers.map(|answer| &answer.generation);
    let prompt_seconds: f64 =
        generations.clone().map(|generation| generation.prompt_time.as_secs_f64()).sum();
    let seconds: f64 = generations.clone().map(|generation| generation.decoding_time.as_secs_f64()).sum();
    // The first token of each comes with its prompt.
    let decoded: usize = generations.map(|generation| generation.token_ids.len().saturating_sub(1)).sum();
    info!(
        "prompts: {prompt_tokens} tokens at {:.1} tokens/s; answers: {:.1} tokens/s",
        prompt_tokens as f64 / prompt_seconds.max(1e-9),
        decoded as f64 / seconds.max(1e-9)
    );
}
