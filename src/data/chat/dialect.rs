//! Hugging Face's dialect of Jinja: what transformers adds to Jinja2, and where Jinja2 differs from minijinja.

use std::fmt::Write as _;
use std::io;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Stand around what `{% generation %}` encloses. Unicode reserves them for such use: no text holds them.
pub(super) const GENERATION: [char; 2] = ['\u{FDD0}', '\u{FDD1}'];

/// The filter that `{% generation %}` becomes.
const GENERATION_FILTER: &str = "fastlora_generation";

/// Fuel of every rendering: instructions, and one for each 64 bytes made. A template of a few hundred messages takes
/// a hundredth.
const BASE_FUEL: u64 = 2_000_000;
/// Further fuel for each byte of the messages: 256 copies of them.
const FUEL_PER_BYTE: u64 = 4;

/// What `raise_exception` raises: the template refuses the conversation.
#[derive(Debug)]
pub(super) struct Raised(pub String);

impl std::fmt::Display for Raised {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// An environment that speaks the dialect; `now` is what `strftime_now` says.
pub(super) fn environment(now: NaiveDateTime) -> Environment<'static> {
    let mut environment = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(format_like_python);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment
        .add_filter(GENERATION_FILTER, |text: String| format!("{}{text}{}", GENERATION[0], GENERATION[1]));
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: &str| -> Result<String, Error> {
        let mut text = String::new();
        write!(text, "{}", now.format(format)).map_err(|_| {
            Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot write {format:?}"))
        })?;
        Ok(text)
    });
    environment
}

/// Fuel for messages of `bytes` bytes.
pub(super) fn fuel(bytes: usize) -> u64 {
    BASE_FUEL + FUEL_PER_BYTE * bytes as u64
}

/// The source with `{% generation %}` as a filter that marks what it encloses, and whether it has any.
///
/// A filter block is trimmed at its edges as every block is, and has no scope of its own, so nothing else changes.
pub(super) fn rewrite_generation(source: &str) -> (String, bool) {
    let mut rewritten = String::with_capacity(source.len());
    let mut rest = source;
    let mut found = false;
    while let Some(start) = rest.find("{%") {
        let (before, block) = rest.split_at(start);
        rewritten.push_str(before);
        // Behind the opening: `{%}` is no whole block.
        let Some(end) = block[2..].find("%}").map(|end| end + 2) else {
            rest = block;
            break;
        };
        let inner = &block[2..end];
        let name = inner.trim_matches(['-', '+']).trim();
        let replacement = match name {
            "generation" => format!("filter {GENERATION_FILTER}"),
            "endgeneration" => "endfilter".to_string(),
            _ => {
                rewritten.push_str("{%");
                rest = &block[2..];
                continue;
            }
        };
        found = true;
        rewritten.push_str(&format!("{{%{}%}}", inner.replacen(name, &replacement, 1)));
        rest = &block[end + 2..];
    }
    rewritten.push_str(rest);
    (rewritten, found)
}

/// Prints true, false and none as Python does.
fn format_like_python(
    output: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        _ => return minijinja::escape_formatter(output, state, value),
    };
    output.write_str(text).map_err(Error::from)
}

/// Python's `json.dumps`: `, ` and `: ` between, nothing escaped for HTML.
fn to_json(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let is_ascii: bool = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let is_sorted: bool = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let failed = |error: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "tojson cannot write this value").with_source(error)
    };
    let mut json = serde_json::to_value(value).map_err(failed)?;
    if is_sorted {
        json.sort_all_objects();
    }
    let separators = match separators.as_deref() {
        None => [if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()],
        Some([item, key]) => [item.clone(), key.clone()],
        Some(_) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson takes two separators"));
        }
    };
    let spaces = " ".repeat(indent.unwrap_or(0).min(64));
    let python = PythonFormatter {
        separators,
        pretty: indent.map(|_| PrettyFormatter::with_indent(spaces.as_bytes())),
        is_ascii,
    };
    let mut bytes = Vec::new();
    json.serialize(&mut Serializer::with_formatter(&mut bytes, python)).map_err(failed)?;
    String::from_utf8(bytes).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Separators as Python writes them, on one line or indented.
struct PythonFormatter<'a> {
    separators: [String; 2],
    pretty: Option<PrettyFormatter<'a>>,
    is_ascii: bool,
}

macro_rules! pretty_or_nothing_more {
    ($($name:ident)*) => { $(
        fn $name<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
            match &mut self.pretty {
                Some(pretty) => pretty.$name(writer),
                None => serde_json::ser::CompactFormatter.$name(writer),
            }
        }
    )* };
}

impl Formatter for PythonFormatter<'_> {
    pretty_or_nothing_more! { begin_array end_array begin_object end_object end_array_value end_object_value }

    fn begin_array_value<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.separators[0].as_bytes())?;
        }
        // The pretty formatter writes its own comma but for the first.
        self.pretty.as_mut().map_or(Ok(()), |pretty| pretty.begin_array_value(writer, true))
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.separators[1].as_bytes())
    }

    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, writer: &mut W, text: &str) -> io::Result<()> {
        if !self.is_ascii {
            return writer.write_all(text.as_bytes());
        }
        for character in text.chars() {
            if character.is_ascii() {
                write!(writer, "{character}")?;
            } else {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    write!(writer, "\\u{unit:04x}")?;
                }
            }
        }
        Ok(())
    }
}
