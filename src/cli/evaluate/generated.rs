//! `evaluate --generate`: the model's own answers against the records' outputs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use comfy_table::{CellAlignment, Table, presets};
use fancy_regex::Regex;
use serde_json::{Value, json};

use super::super::answer::Answerer;
use super::super::model::ModelFiles;
use crate::backend::Backend;
use crate::config::HashTemplate;
use crate::data::{self, Dataset, Record, RecordContent};
use crate::error::{Error, Result, escape_control};
use crate::inference::{SamplingParameters, StopConditions};
use crate::model::Transformer;
use crate::tokens::Tokenizer;

/// The key of a regular expression that is for every hash.
const EVERY_HASH: &str = "*";

/// A regular expression that answers under a hash should match.
#[derive(Clone, Debug)]
pub(super) struct HashPattern {
    hash: String,
    regex: Regex,
}

impl std::str::FromStr for HashPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (hash, pattern) = text.split_once('=').ok_or("expected HASH=REGEX, or *=REGEX for every hash")?;
        let regex = Regex::new(pattern).map_err(|error| error.to_string())?;
        Ok(Self { hash: hash.to_string(), regex })
    }
}

/// What the model is asked, and what it should say.
struct Question<'d> {
    record: &'d Record,
    prompt: Vec<u32>,
    expected: &'d str,
}

/// Questions of all records, checked before the model answers any.
pub(super) struct Questions<'d> {
    questions: Vec<Question<'d>>,
    patterns: &'d [HashPattern],
}

/// Sums over answers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Scores {
    answers: u64,
    exact: u64,
    f1_sum: f64,
    /// Answers that a regular expression was there for, and those that it matched.
    tried: u64,
    matched: u64,
}

/// Scores by hash, and every answer.
pub(super) struct Generated {
    by_hash: BTreeMap<String, Scores>,
    answers: Vec<Value>,
}

impl<'d> Questions<'d> {
    /// # Errors
    /// Records of tokens, a template that refuses a conversation, a prompt that the model has no room for, a pattern
    /// for a hash that no record has.
    pub(super) fn new(
        dataset: &'d Dataset,
        tokenizer: Option<&Tokenizer>,
        template: &HashTemplate,
        patterns: &'d [HashPattern],
        positions: usize,
    ) -> Result<Self> {
        for HashPattern { hash, .. } in patterns.iter().filter(|pattern| pattern.hash != EVERY_HASH) {
            if !dataset.records.iter().any(|record| record.hash == *hash) {
                let message = format!("no record has the hash `{}`", escape_control(hash));
                return Err(Error::config(message)
                    .at("--regex")
                    .hint("write HASH=REGEX, or *=REGEX for all"));
            }
        }
        let question = |record: &'d Record| {
            let at_record = |error: Error| error.at(record.origin.to_string());
            question(record, tokenizer, template).map_err(at_record)
        };
        let questions: Vec<Question<'_>> = dataset.records.iter().map(question).collect::<Result<_>>()?;
        let prompts: Vec<&[u32]> = questions.iter().map(|question| &*question.prompt).collect();
        Answerer::check_room(&prompts, positions, |index| questions[index].record.origin.to_string())?;
        Ok(Self { questions, patterns })
    }

    /// Lets the model answer greedily.
    pub(super) fn ask<B: Backend>(
        &self,
        model: &mut Transformer<B>,
        backend: &Arc<B>,
        files: &ModelFiles,
        tokenizer: &Tokenizer,
        max_new_tokens: usize,
    ) -> Result<Generated> {
        let eos = files.base.config().eos_token_ids.iter().copied().chain(tokenizer.eos_id());
        let answerer = Answerer {
            tokenizer,
            sampling: SamplingParameters::default(),
            stop: StopConditions { max_new_tokens, eos_token_ids: eos.collect() },
            skips_space: true,
        };
        let prompts: Vec<&[u32]> = self.questions.iter().map(|question| &*question.prompt).collect();
        let answers = backend.run(|| answerer.answer_all(model, &prompts))?;
        let mut generated = Generated { by_hash: BTreeMap::new(), answers: Vec::new() };
        for (Question { record, expected, .. }, answer) in self.questions.iter().zip(answers) {
            let (exact, f1) = (answer.is_exact(expected), token_f1(&answer.text, expected));
            let matched = self.matched(&record.hash, &answer.text)?;
            let scores = generated.by_hash.entry(record.hash.clone()).or_default();
            scores.answers += 1;
            scores.exact += u64::from(exact);
            scores.f1_sum += f1;
            scores.tried += u64::from(matched.is_some());
            scores.matched += u64::from(matched == Some(true));
            generated.answers.push(json!({
                "origin": record.origin.to_string(),
                "hash": record.hash,
                "expected": expected,
                "answer": answer.text,
                "stop_reason": answer.generation.stop_reason.name(),
                "exact": exact,
                "token_f1": f1,
                "regex": matched,
            }));
        }
        Ok(generated)
    }

    /// Whether all expressions for the hash match; none where there is none.
    fn matched(&self, hash: &str, answer: &str) -> Result<Option<bool>> {
        let mut all = None;
        for pattern in self.patterns.iter().filter(|one| one.hash == hash || one.hash == EVERY_HASH) {
            let matches = pattern.regex.is_match(answer).map_err(|error| {
                Error::config("the expression is too costly").at("--regex").caused_by(error)
            })?;
            all = Some(all.unwrap_or(true) && matches);
        }
        Ok(all)
    }
}

fn question<'d>(
    record: &'d Record,
    tokenizer: Option<&Tokenizer>,
    template: &HashTemplate,
) -> Result<Question<'d>> {
    let no_text = || Error::data("tokens ask no question: --generate needs records with text");
    let tokenizer = tokenizer.ok_or_else(no_text)?;
    let prefix = record.text_hash().map(|hash| template.prefix(hash)).unwrap_or_default();
    match &record.content {
        RecordContent::Instruction { instruction, output } => {
            let prompt = tokenizer.encode_start(&data::prompt(&prefix, instruction))?;
            Ok(Question { record, prompt, expected: output })
        }
        RecordContent::Chat { conversation, .. } => {
            let messages = &conversation.messages;
            let last =
                messages.iter().rposition(|message| message.role == "assistant" && message.content.is_some());
            let (Some(last), Some(chat)) = (last, tokenizer.chat_template()) else {
                return Err(Error::data("no assistant turn with text: there is nothing to expect"));
            };
            let mut asked = conversation.clone();
            asked.messages.truncate(last);
            let prompt = tokenizer.encode(&chat.prompt(&asked.with_prefix(&prefix))?)?;
            let expected = messages[last].content.as_deref().unwrap_or_default();
            Ok(Question { record, prompt, expected })
        }
        RecordContent::PreTokenised { .. } => Err(no_text()),
    }
}

/// Harmonic mean of precision and recall of words, as SQuAD scores answers (Rajpurkar et al. 2016), articles kept: in
/// lower case, without punctuation, order and number of other words left aside.
fn token_f1(answer: &str, expected: &str) -> f64 {
    let words = |text: &str| -> Vec<String> {
        let kept = |character: &char| !character.is_ascii_punctuation();
        let bare = |word: &str| word.to_lowercase().chars().filter(kept).collect::<String>();
        text.split_whitespace().map(bare).filter(|word| !word.is_empty()).collect()
    };
    let (answer, expected) = (words(answer), words(expected));
    if answer.is_empty() || expected.is_empty() {
        return f64::from(u8::from(answer == expected));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in &expected {
        *left.entry(word).or_default() += 1;
    }
    let mut shared = 0;
    for word in &answer {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            shared += 1;
        }
    }
    // 2PR/(P + R) with P = shared/answer and R = shared/expected.
    2.0 * f64::from(shared) / (answer.len() + expected.len()) as f64
}

impl Scores {
    fn plus(self, other: &Self) -> Self {
        Self {
            answers: self.answers + other.answers,
            exact: self.exact + other.exact,
            f1_sum: self.f1_sum + other.f1_sum,
            tried: self.tried + other.tried,
            matched: self.matched + other.matched,
        }
    }

    fn exact_share(&self) -> f64 {
        self.exact as f64 / self.answers.max(1) as f64
    }

    fn f1(&self) -> f64 {
        self.f1_sum / self.answers.max(1) as f64
    }

    fn regex_share(&self) -> Option<f64> {
        (self.tried > 0).then(|| self.matched as f64 / self.tried as f64)
    }

    fn to_json(self) -> Value {
        json!({
            "answers": self.answers,
            "exact": self.exact_share(),
            "token_f1": self.f1(),
            "regex": self.regex_share(),
        })
    }
}

impl Generated {
    fn overall(&self) -> Scores {
        self.by_hash.values().fold(Scores::default(), Scores::plus)
    }

    pub(super) fn to_json(&self) -> Value {
        let by_hash: serde_json::Map<_, _> =
            self.by_hash.iter().map(|(hash, scores)| (hash.clone(), scores.to_json())).collect();
        json!({ "overall": self.overall().to_json(), "by_hash": by_hash, "answers": self.answers })
    }

    pub(super) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_FULL_CONDENSED);
        table.set_header(["hash", "answers", "exact", "token F1", "regex"]);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let row = |name: &str, scores: &Scores| {
            [
                name.to_string(),
                scores.answers.to_string(),
                percent(scores.exact_share()),
                percent(scores.f1()),
                scores.regex_share().map_or("–".to_string(), percent),
            ]
        };
        for (hash, scores) in &self.by_hash {
            table.add_row(row(&escape_control(hash), scores));
        }
        table.add_row(row("all", &self.overall()));
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_compared_as_bags() {
        for (answer, expected, f1) in [
            ("The cat.", "the cat", 1.0),
            ("a b c", "c b d", 2.0 / 3.0),
            ("a a", "a", 2.0 / 3.0),
            ("", "", 1.0),
            ("?", "!", 1.0),
            ("", "a", 0.0),
            ("x", "y", 0.0),
        ] {
            assert!((token_f1(answer, expected) - f1).abs() < 1e-12, "{answer:?} {expected:?}");
            assert_eq!(token_f1(answer, expected), token_f1(expected, answer));
        }
    }

    #[test]
    fn patterns_name_their_hash() {
        let pattern: HashPattern = "faq=^a=b$".parse().unwrap();
        assert_eq!((pattern.hash.as_str(), pattern.regex.as_str()), ("faq", "^a=b$"));
        assert!("faq".parse::<HashPattern>().is_err());
        assert!("faq=(".parse::<HashPattern>().is_err());
    }
}
