//! Answers to the test cases while a model is trained.

use std::ops::ControlFlow;
use std::path::Path;

use serde_json::{Value, json};

use super::super::answer::Answerer;
use super::super::cases::Case;
use super::super::conditioning::Conditioning;
use super::super::output::{for_terminal, on_one_line};
use super::progress::Progress;
use crate::backend::Backend;
use crate::checkpoint::base::BaseModel;
use crate::error::{Result, shorten};
use crate::inference::{SamplingParameters, Session, StopConditions};
use crate::model::{Cache, Transformer};
use crate::report::SAMPLES;
use crate::tokens::{BatchPlan, Tokenizer};
use crate::training::JsonLines;

/// Tokens of an answer at most.
const MAX_NEW_TOKENS: usize = 128;
/// Characters of an answer in the log.
const LOGGED_CHARACTERS: usize = 200;

/// What the model is asked.
pub(super) struct Questions<'a> {
    cases: Vec<Case>,
    prompts: Vec<Vec<u32>>,
    answerer: Answerer<'a>,
}

impl<'a> Questions<'a> {
    /// The prompts of the cases, rendered as the training data are: with the tokenizer's chat template where it has one.
    ///
    /// # Errors
    /// A template that refuses a case, or a prompt that the model has no room for.
    pub(super) fn new(
        cases: Vec<Case>,
        tokenizer: &'a Tokenizer,
        base: &BaseModel,
        conditioning: &Conditioning,
    ) -> Result<Self> {
        let prompt = |case: &Case| Ok(case.chat_prompt(tokenizer, None, conditioning)?.1);
        let prompts: Vec<Vec<u32>> = cases.iter().map(prompt).collect::<Result<_>>()?;
        let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let place = |index: usize| format!("test_cases, case {}", index + 1);
        Answerer::check_room(&slices, base.config().max_positions, place)?;
        let eos = base.config().eos_token_ids.iter().copied().chain(tokenizer.eos_id());
        let answerer = Answerer {
            tokenizer,
            // Greedy: the answers are the model's alone.
            sampling: SamplingParameters::default(),
            stop: StopConditions { max_new_tokens: MAX_NEW_TOKENS, eos_token_ids: eos.collect() },
            skips_space: true,
        };
        Ok(Self { cases, prompts, answerer })
    }

    /// Tokens of the longest prompt with its answer.
    pub(super) fn capacity(&self, max_positions: usize) -> usize {
        let longest = self.prompts.iter().map(Vec::len).max().unwrap_or(0);
        (longest + MAX_NEW_TOKENS).min(max_positions)
    }
}

/// Asks them at some steps, and writes `samples.jsonl`.
pub(super) struct Sampler<'a, B: Backend> {
    questions: &'a Questions<'a>,
    file: JsonLines,
    /// Made once, before the run takes the memory that is left.
    cache: Option<Cache<B>>,
    times: Times<'a>,
    last_step: u64,
}

/// When they are asked: at the last step as well.
#[derive(Clone, Copy)]
pub(super) struct Times<'a> {
    /// Steps in between; none: at the end of each epoch.
    pub every: Option<u64>,
    pub plan: &'a BatchPlan<'a>,
    pub total_steps: u64,
}

impl Times<'_> {
    fn is_due(self, step: u64) -> bool {
        let is_time = match self.every {
            Some(every) => step.is_multiple_of(every),
            // The next step begins an epoch.
            None => self.plan.position(step).1 == 0,
        };
        step == self.total_steps || is_time
    }
}

impl<'a, B: Backend> Sampler<'a, B> {
    /// For a run that begins after `done` steps; answers after later ones are cut off.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(super) fn new(
        questions: &'a Questions<'a>,
        output: &Path,
        times: Times<'a>,
        done: u64,
    ) -> Result<Self> {
        let mut last_step = 0;
        let file = JsonLines::resume(&output.join(SAMPLES), |line| {
            let step = line["step"].as_u64().filter(|step| *step <= done);
            last_step = step.unwrap_or(last_step);
            step.is_some()
        })?;
        Ok(Self { questions, file, cache: None, times, last_step })
    }

    /// Takes the memory that an answer needs.
    pub(super) fn prepare(&mut self, model: &mut Transformer<B>) -> Result<()> {
        let capacity = self.questions.capacity(model.config().max_positions);
        self.cache = Some(model.new_cache(capacity)?);
        Ok(())
    }

    /// Asks, where it is time to. Broken off where `is_unwanted` says so, it is made up for when the run resumes.
    pub(super) fn ask(
        &mut self,
        step: u64,
        model: &mut Transformer<B>,
        progress: &Progress,
        is_unwanted: impl Fn() -> bool,
    ) -> Result<()> {
        if !self.times.is_due(step) || step <= self.last_step {
            return Ok(());
        }
        if self.cache.is_none() {
            self.prepare(model)?;
        }
        let Some(cache) = self.cache.take() else { return Ok(()) };
        let Questions { cases, prompts, answerer } = self.questions;
        let mut session = Session::with_cache(model, cache);
        let mut samples = Vec::with_capacity(cases.len());
        for (case, prompt_ids) in cases.iter().zip(prompts) {
            if is_unwanted() {
                break;
            }
            session.clear();
            let answer = answerer.answer(&mut session, prompt_ids, |_| ControlFlow::Continue(()))?;
            samples.push(json!({
                "hash": case.hash,
                "instruction": case.instruction,
                "expected": case.expected,
                "answer": answer.text,
                "stop_reason": answer.generation.stop_reason.name(),
                "exact": case.expected.as_deref().map(|expected| answer.is_exact(expected)),
            }));
        }
        self.cache = Some(session.into_cache());
        if samples.len() < cases.len() {
            return Ok(());
        }
        progress.print(format!("answers after step {step}:"));
        for sample in &samples {
            progress.print(line_of(sample));
        }
        // One line, so that a run that dies has all of a step's answers or none.
        self.file.write(&json!({ "step": step, "samples": samples }))?;
        self.last_step = step;
        Ok(())
    }
}

/// An answer in the log.
fn line_of(sample: &Value) -> String {
    let text = |key: &str| {
        let text = on_one_line(sample[key].as_str().unwrap_or_default());
        for_terminal(&shorten(&text, LOGGED_CHARACTERS))
    };
    match sample["hash"].is_null() {
        true => format!("  {} → {}", text("instruction"), text("answer")),
        false => format!("  [{}] {} → {}", text("hash"), text("instruction"), text("answer")),
    }
}
