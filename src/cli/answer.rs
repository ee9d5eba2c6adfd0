//! Answers to prompts, for every verb that lets a model speak.

use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;

use clap::Args;
use serde_json::{Value, json};
use tracing::info;

use super::output::{accept_closed, for_terminal};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::inference::{
    Generation, NextTokenLogits, Sampler, SamplingParameters, Session, StopConditions, TextStream, generate,
};
use crate::model::Transformer;
use crate::tokens::Tokenizer;

/// How tokens are chosen.
#[derive(Debug, Args)]
pub(super) struct SamplingArgs {
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
    pub(super) fn resolve(&self) -> Result<SamplingParameters> {
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

/// What the model said.
pub(super) struct Answer {
    pub text: String,
    pub generation: Generation,
}

impl Answer {
    pub(super) fn to_json(&self, expected: Option<&str>) -> Value {
        json!({
            "text": self.text,
            "token_count": self.generation.token_ids.len(),
            "stop_reason": self.generation.stop_reason.name(),
            "exact": expected.map(|expected| self.is_exact(expected)),
        })
    }

    pub(super) fn is_exact(&self, expected: &str) -> bool {
        self.text.trim() == expected.trim()
    }
}

/// What all prompts share.
pub(super) struct Answerer<'a> {
    pub tokenizer: &'a Tokenizer,
    pub sampling: SamplingParameters,
    pub stop: StopConditions,
    /// Whether a space in front of an answer belongs to the template and not to the answer.
    pub skips_space: bool,
}

impl Answerer<'_> {
    /// Prints the answer as it comes, and a line break. The answer, and whether anyone still reads.
    pub(super) fn print(
        &self,
        model: &mut impl NextTokenLogits,
        prompt_ids: &[u32],
    ) -> Result<(Answer, io::Result<()>)> {
        let mut stdout = io::stdout().lock();
        let is_terminal = stdout.is_terminal();
        let mut written = Ok(());
        let answer = self.answer(model, prompt_ids, |piece| {
            let shown = if is_terminal { for_terminal(piece) } else { piece.to_string() };
            written = stdout.write_all(shown.as_bytes()).and_then(|()| stdout.flush());
            if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        let written = written.and_then(|()| writeln!(stdout));
        Ok((answer, written))
    }

    /// One prompt, answered as it comes.
    pub(super) fn stream<B: Backend>(&self, model: &mut Transformer<B>, prompt_ids: &[u32]) -> Result<()> {
        let mut session = self.session(model, prompt_ids.len())?;
        let (answer, written) = self.print(&mut session, prompt_ids)?;
        report_speed([&answer].into_iter(), prompt_ids.len());
        accept_closed(written)
    }

    /// Every prompt by itself.
    pub(super) fn answer_all<B: Backend>(
        &self,
        model: &mut Transformer<B>,
        prompts: &[&[u32]],
    ) -> Result<Vec<Answer>> {
        let longest = prompts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let mut session = self.session(model, longest)?;
        let mut answers = Vec::with_capacity(prompts.len());
        for prompt_ids in prompts {
            session.clear();
            answers.push(self.answer(&mut session, prompt_ids, |_| ControlFlow::Continue(()))?);
        }
        report_speed(answers.iter(), prompts.iter().map(|ids| ids.len()).sum());
        Ok(answers)
    }

    /// A session with room for a prompt of `longest` tokens and its answer.
    fn session<'m, B: Backend>(
        &self,
        model: &'m mut Transformer<B>,
        longest: usize,
    ) -> Result<Session<'m, B>> {
        Session::new(model, longest.saturating_add(self.stop.max_new_tokens))
    }

    /// Refuses prompts that the model has no room for, before the first answer, which would be lost when a later
    /// prompt fails; `place` names a prompt.
    pub(super) fn check_room(
        prompts: &[&[u32]],
        positions: usize,
        place: impl Fn(usize) -> String,
    ) -> Result<()> {
        match prompts.iter().position(|ids| ids.len() > positions) {
            None => Ok(()),
            Some(index) => {
                let length = prompts[index].len();
                let message = format!("the prompt has {length} tokens, the model has room for {positions}");
                Err(Error::data(message).at(place(index)).hint("shorten it"))
            }
        }
    }

    /// Runs one prompt; `on_text` gets the text in whole characters. Each starts from the seed, so that its answer
    /// does not depend on the ones before.
    pub(super) fn answer(
        &self,
        model: &mut impl NextTokenLogits,
        prompt_ids: &[u32],
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Answer> {
        let mut sampler = Sampler::new(self.sampling)?;
        let mut stream = TextStream::new(|ids: &[u32]| self.tokenizer.decode(ids));
        let mut text = String::new();
        let mut failure = None;
        let mut show = |piece: String, on_text: &mut dyn FnMut(&str) -> ControlFlow<()>| {
            let piece = match piece.strip_prefix(' ') {
                Some(rest) if self.skips_space && text.is_empty() => rest,
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
