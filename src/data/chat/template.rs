//! A chat template: compiled once, rendered for every conversation, within limits.

use chrono::{Local, NaiveDate, NaiveDateTime, NaiveTime};
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value, json};

use super::conversation::{Conversation, Message};
use super::dialect::{self, GENERATION, Raised};
use crate::error::{Error, shorten};

/// The template's name inside its environment.
const NAME: &str = "chat_template";
/// Characters of a template's own words in a message.
const LONGEST_QUOTE: usize = 300;

/// Why a conversation was not rendered.
#[derive(Debug)]
pub enum RenderFault {
    /// The template refuses this conversation (`raise_exception`), or it cannot be marked: the record's fault.
    Refused(String),
    /// The template itself is broken, endless or too large: the model's fault.
    Template(Error),
}

/// A model's chat template in Hugging Face's dialect of Jinja.
///
/// It reaches no file and no host object, and what it may do is limited by fuel, which pays for instructions and bytes.
///
/// ```
/// use fastlora::data::{ChatTemplate, Conversation};
///
/// let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}\
///               {% if add_generation_prompt %}<assistant>{% endif %}";
/// let template = ChatTemplate::new(source, "chat_template.jinja", serde_json::Map::new(), None)?;
/// let prompt = template.prompt(&Conversation::question(None, "Who are you?").with_prefix("[hash: faq] "))?;
/// assert_eq!(prompt, "<user>[hash: faq] Who are you?</s><assistant>");
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    /// Where it came from, for errors.
    place: String,
    /// `bos_token`, `eos_token` and the like.
    special_tokens: Map<String, Value>,
    /// What `strftime_now` tells; none: now.
    date: Option<NaiveDate>,
    pub(super) marks_generation: bool,
}

impl ChatTemplate {
    /// Compiles `source`; `place` names it in errors, `special_tokens` are further variables (`eos_token` …), and
    /// `date` is what `strftime_now` tells (at noon), today's where there is none.
    ///
    /// # Errors
    /// A model error for a template that does not compile, with its line.
    pub fn new(
        source: &str,
        place: &str,
        special_tokens: Map<String, Value>,
        date: Option<NaiveDate>,
    ) -> Result<Self, Error> {
        let noon = |date: NaiveDate| date.and_time(NaiveTime::from_hms_opt(12, 0, 0).unwrap_or_default());
        let now: NaiveDateTime = date.map_or_else(|| Local::now().naive_local(), noon);
        let (rewritten, marks_generation) = dialect::rewrite_generation(source);
        let mut environment = dialect::environment(now);
        environment.add_template_owned(NAME, rewritten).map_err(|error| {
            Error::model(format!("the chat template does not compile: {}", describe(&error)))
                .at(line_of(place, &error))
                .hint("correct it, or name another with chat_template")
        })?;
        Ok(Self {
            environment,
            source: source.to_string(),
            place: place.to_string(),
            special_tokens,
            date,
            marks_generation,
        })
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// What its texts depend on besides the conversation.
    pub(crate) fn identity(&self) -> Value {
        json!({ "source": self.source, "special_tokens": self.special_tokens, "date": self.date })
    }

    /// Whether it says by itself where the assistant speaks (`{% generation %}`).
    pub fn marks_turns(&self) -> bool {
        self.marks_generation
    }

    /// Whether what it writes depends on the day.
    pub fn uses_date(&self) -> bool {
        self.source.contains("strftime_now")
    }

    /// The prompt that asks for the assistant's next turn.
    ///
    /// # Errors
    /// A data error where the template refuses the conversation; a model error where the template fails.
    pub fn prompt(&self, conversation: &Conversation) -> Result<String, Error> {
        self.render(conversation, &conversation.messages, true).map_err(|fault| match fault {
            RenderFault::Refused(reason) => Error::data(reason).hint("change the conversation"),
            RenderFault::Template(error) => error,
        })
    }

    /// The text of some of a conversation's messages, without the marks of `{% generation %}`.
    pub(super) fn render(
        &self,
        conversation: &Conversation,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, RenderFault> {
        let mut text = self.render_marked(conversation, messages, add_generation_prompt)?;
        if self.marks_generation {
            text.retain(|character| !GENERATION.contains(&character));
        }
        Ok(text)
    }

    pub(super) fn render_marked(
        &self,
        conversation: &Conversation,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, RenderFault> {
        let messages: Vec<Value> = messages.iter().map(Message::to_json).collect();
        let mut variables = self.special_tokens.clone();
        variables.extend([
            ("messages".to_string(), Value::Array(messages)),
            ("tools".to_string(), json!(conversation.tools)),
            ("documents".to_string(), Value::Null),
            ("add_generation_prompt".to_string(), Value::Bool(add_generation_prompt)),
        ]);
        let variables = Value::Object(variables);
        let bytes = text_bytes(&variables);
        // Cheap: what an environment holds is shared.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(dialect::fuel(bytes)));
        environment
            .get_template(NAME)
            .and_then(|template| template.render(minijinja::value::Serde(&variables)))
            .map_err(|error| match raised(&error) {
                Some(reason) => RenderFault::Refused(format!(
                    "the chat template refuses the conversation: {}",
                    shorten(reason, LONGEST_QUOTE)
                )),
                None => RenderFault::Template(self.failure(&error)),
            })
    }

    fn failure(&self, error: &minijinja::Error) -> Error {
        let failure = match error.kind() {
            ErrorKind::OutOfFuel => {
                Error::model("the chat template does not end, or writes without measure: stopped")
            }
            _ => Error::model(format!("the chat template fails: {}", describe(error))),
        };
        failure.at(line_of(&self.place, error)).hint("correct it, or name another with chat_template")
    }

    pub(super) fn cannot_mark(&self) -> RenderFault {
        RenderFault::Template(
            Error::model("cannot tell the assistant's turns in the text that the chat template writes")
                .at(self.place.clone())
                .hint("put {% generation %} … {% endgeneration %} around them, or name another with chat_template"),
        )
    }
}

/// What a template said when it raised.
fn raised(error: &minijinja::Error) -> Option<&str> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message);
        }
        source = error.source();
    }
    None
}

fn describe(error: &minijinja::Error) -> String {
    let text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    shorten(&text, LONGEST_QUOTE).into_owned()
}

fn line_of(place: &str, error: &minijinja::Error) -> String {
    match error.line() {
        Some(line) => format!("{place}:{line}"),
        None => place.to_string(),
    }
}

/// Bytes of all strings in a value.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(entries) => entries.values().map(text_bytes).sum(),
        _ => 0,
    }
}
