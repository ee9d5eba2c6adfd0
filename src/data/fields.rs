//! A record's fields → what it says: which field is the instruction, the output, the hash.

use std::borrow::Cow;

use super::chat::{Conversation, Message};
use super::json::{Broken, RawValue};
use super::records::{RecordContent, UNKNOWN_HASH};

/// Names tried for the instruction, in this order.
pub const INSTRUCTION_NAMES: [&str; 5] = ["instruction", "question", "prompt", "input", "text"];
/// Names tried for the output, in this order.
pub const OUTPUT_NAMES: [&str; 5] = ["output", "answer", "response", "label", "completion"];
/// Names tried for the hash, in this order.
pub const HASH_NAMES: [&str; 4] = ["hash", "domain", "category", "type"];

/// Names of the list of a conversation's turns.
const CHAT_NAMES: [&str; 2] = ["messages", "conversations"];

/// Fields that a configuration names instead of the search.
#[derive(Clone, Debug, Default)]
pub(super) struct Keys {
    pub instruction: Option<String>,
    pub output: Option<String>,
    pub hash: Option<String>,
    /// The hash of every record, whatever its fields say.
    pub fixed_hash: Option<String>,
}

/// What a record says.
#[derive(Debug)]
pub(super) struct Interpreted {
    pub content: RecordContent,
    /// None where the record names none.
    pub hash: Option<String>,
}

impl Interpreted {
    pub fn hash_or_unknown(self) -> (RecordContent, String) {
        (self.content, self.hash.unwrap_or_else(|| UNKNOWN_HASH.into()))
    }
}

/// Why a value is no usable record.
#[derive(Debug)]
pub(super) enum Problem {
    /// The file is not JSON from here on.
    Broken(Broken),
    /// This record cannot be used: `on_bad_record` decides.
    Bad(String),
}

impl From<Broken> for Problem {
    fn from(broken: Broken) -> Self {
        Problem::Broken(broken)
    }
}

/// Reads one value as a record. `null` counts as absent in every search.
pub(super) fn interpret(value: RawValue<'_>, keys: &Keys) -> Result<Interpreted, Problem> {
    if value.kind() != "an object" {
        return Err(Problem::Bad(format!("a record is an object, found {}", value.kind())));
    }
    let fields = Fields(value.fields()?);
    let hash = match &keys.fixed_hash {
        Some(hash) => Some(hash.clone()),
        None => fields.hash(&keys.hash)?,
    };
    let turns = CHAT_NAMES.into_iter().find(|name| fields.is_list(name));
    let content = if keys.instruction.is_none() && fields.present("input_ids").is_some() {
        pre_tokenised(&fields)?
    } else if let (None, Some(name)) = (&keys.instruction, turns) {
        chat(&fields, name, hash.is_some())?
    } else {
        let (name, mut instruction) = fields.text("instruction", &keys.instruction, &INSTRUCTION_NAMES)?;
        if name == "instruction"
            && let Some(input) = fields.present("input")
        {
            let input = scalar("input", input)?;
            if !is_blank(&input) {
                instruction = instruction + "\n" + &input;
            }
        }
        let (_, output) = fields.text("output", &keys.output, &OUTPUT_NAMES)?;
        RecordContent::Instruction { instruction, output }
    };
    Ok(Interpreted { content, hash })
}

fn is_blank(text: &str) -> bool {
    text.trim().is_empty()
}

fn scalar<'a>(name: &str, value: RawValue<'a>) -> Result<Cow<'a, str>, Problem> {
    let found = value.kind();
    value
        .scalar()?
        .ok_or_else(|| Problem::Bad(format!("`{name}` is {found}, expected a string, number or bool")))
}

struct Fields<'a>(Vec<(String, RawValue<'a>)>);

impl<'a> Fields<'a> {
    /// The field's value; of two with one name the last, as elsewhere.
    fn get(&self, name: &str) -> Option<RawValue<'a>> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| *value)
    }

    fn present(&self, name: &str) -> Option<RawValue<'a>> {
        self.get(name).filter(|value| !value.is_null())
    }

    fn is_list(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| value.kind() == "a list")
    }

    /// The text of a field that must be there, and its name.
    fn text<'n>(
        &self,
        what: &str,
        chosen: &'n Option<String>,
        names: &[&'n str],
    ) -> Result<(&'n str, String), Problem> {
        let chosen = chosen.as_deref();
        let names =
            chosen.as_slice().iter().copied().chain(names.iter().copied().filter(|_| chosen.is_none()));
        let mut null = None;
        for name in names.clone() {
            match self.get(name) {
                Some(value) if value.is_null() => null = null.or(Some(name)),
                Some(value) => {
                    let text = scalar(name, value)?;
                    if is_blank(&text) {
                        return Err(Problem::Bad(format!("`{name}` is empty")));
                    }
                    return Ok((name, text.into_owned()));
                }
                None => {}
            }
        }
        Err(Problem::Bad(match null {
            Some(name) => format!("`{name}` is null"),
            None => {
                let tried: Vec<String> = names.map(|name| format!("`{name}`")).collect();
                format!("no {what}: tried {}; the record has {}", tried.join(", "), self.names())
            }
        }))
    }

    fn hash(&self, chosen: &Option<String>) -> Result<Option<String>, Problem> {
        let found = match chosen {
            Some(name) => self.present(name).map(|value| (name.as_str(), value)),
            None => HASH_NAMES.iter().find_map(|name| self.present(name).map(|value| (*name, value))),
        };
        let Some((name, value)) = found else { return Ok(None) };
        Ok(Some(scalar(name, value)?.into_owned()).filter(|hash| !is_blank(hash)))
    }

    /// The fields there are, for an error.
    fn names(&self) -> String {
        const NAMED: usize = 8;
        if self.0.is_empty() {
            return "no fields".into();
        }
        let mut names: Vec<String> = self.0.iter().take(NAMED).map(|(name, _)| format!("`{name}`")).collect();
        if self.0.len() > NAMED {
            names.push("…".into());
        }
        names.join(", ")
    }
}

fn chat(fields: &Fields<'_>, name: &str, has_hash: bool) -> Result<RecordContent, Problem> {
    let turns: Vec<serde_json::Value> = match fields.get(name) {
        Some(value) => value.parse()?,
        None => Vec::new(),
    };
    let message = |(place, turn)| {
        Message::from_json(turn).map_err(|problem| Problem::Bad(format!("`{name}`[{place}]: {problem}")))
    };
    let messages = turns.into_iter().enumerate().map(message).collect::<Result<_, _>>()?;
    let tools = fields.present("tools").map(|tools| tools.parse()).transpose()?;
    let conversation = Conversation { messages, tools };
    conversation.check(has_hash).map_err(Problem::Bad)?;
    Ok(RecordContent::Chat { conversation, has_hash })
}

fn pre_tokenised(fields: &Fields<'_>) -> Result<RecordContent, Problem> {
    let integers = |name: &str, value: RawValue<'_>| -> Result<Vec<i64>, Problem> {
        // The text is known to be JSON: what fails here is its type.
        value.parse().map_err(|_| Problem::Bad(format!("`{name}` is not a list of integers")))
    };
    let ids = fields.present("input_ids").map_or(Ok(Vec::new()), |value| integers("input_ids", value))?;
    if ids.is_empty() {
        return Err(Problem::Bad("`input_ids` is empty".into()));
    }
    let out_of_range = |name: &str, position: usize, value: i64, expected: &str| {
        Problem::Bad(format!("`{name}`[{position}] is {value}, expected {expected}"))
    };
    let token_ids = ids
        .iter()
        .enumerate()
        // Labels are i32, so ids end there too.
        .map(|(position, &id)| {
            i32::try_from(id)
                .ok()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| out_of_range("input_ids", position, id, "a token id from 0"))
        })
        .collect::<Result<Vec<u32>, _>>()?;
    let labels = match fields.present("labels") {
        None => ids,
        Some(value) => integers("labels", value)?,
    };
    if labels.len() != token_ids.len() {
        return Err(Problem::Bad(format!(
            "`labels` has {} entries, `input_ids` has {}",
            labels.len(),
            token_ids.len()
        )));
    }
    let labels = labels
        .iter()
        .enumerate()
        .map(|(position, &label)| {
            i32::try_from(label)
                .ok()
                .filter(|&label| label >= 0 || label == -100)
                .ok_or_else(|| out_of_range("labels", position, label, "a token id from 0, or -100"))
        })
        .collect::<Result<Vec<i32>, _>>()?;
    Ok(RecordContent::PreTokenised { token_ids, labels })
}
