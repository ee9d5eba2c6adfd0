//! The one error type: what went wrong, where, what to do, and the exit code of its kind.

use std::fmt;

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error concerns; each kind has a documented process exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A bug of ours (exit 1).
    Internal,
    /// Command line or configuration (exit 2).
    Config,
    /// Training, validation or test data (exit 3).
    Data,
    /// Model folder, weights, tokenizer or adapter (exit 4).
    Model,
    /// Compute device or memory (exit 5).
    Device,
    /// Reading or writing files, network (exit 6).
    Io,
    /// A loss, gradient or adapter is not finite (exit 7).
    Numerical,
    /// Corruption found and no valid copy left (exit 8).
    Corrupt,
    /// Stopped on request, with a checkpoint to go on from (exit 75).
    Stopped,
}

impl ErrorKind {
    /// The process exit code documented for this kind.
    pub const fn exit_code(self) -> u8 {
        match self {
            ErrorKind::Internal => 1,
            ErrorKind::Config => 2,
            ErrorKind::Data => 3,
            ErrorKind::Model => 4,
            ErrorKind::Device => 5,
            ErrorKind::Io => 6,
            ErrorKind::Numerical => 7,
            ErrorKind::Corrupt => 8,
            ErrorKind::Stopped => 75,
        }
    }

    /// The kind's name in `--json` errors.
    pub const fn name(self) -> &'static str {
        match self {
            ErrorKind::Internal => "internal",
            ErrorKind::Config => "config",
            ErrorKind::Data => "data",
            ErrorKind::Model => "model",
            ErrorKind::Device => "device",
            ErrorKind::Io => "io",
            ErrorKind::Numerical => "numerical",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::Stopped => "stopped",
        }
    }
}

/// One clear error: where it is, what was found and expected, what to do.
///
/// ```
/// use fastlora::error::{Error, ErrorKind};
///
/// let error = Error::data("field `output` is missing").at("train.json:12").hint("add it, or set on_bad_record = skip");
/// assert_eq!(error.kind(), ErrorKind::Data);
/// assert_eq!(error.kind().exit_code(), 3);
/// assert_eq!(error.to_string(), "train.json:12: field `output` is missing (add it, or set on_bad_record = skip)");
/// ```
#[derive(Debug)]
pub struct Error {
    // Boxed so that `Result<T>` stays small on every path that succeeds.
    details: Box<Details>,
}

#[derive(Debug)]
struct Details {
    kind: ErrorKind,
    location: Option<String>,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident,)*) => {
        $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self {
            Self::new(ErrorKind::$kind, message)
        })*
    };
}

impl Error {
    /// An error of `kind`; `message` says what was found and what was expected.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let details = Details { kind, location: None, message: message.into(), hint: None, source: None };
        Self { details: Box::new(details) }
    }

    constructors! {
        /// A bug of ours.
        internal => Internal,
        /// A command line or configuration error.
        config => Config,
        /// A data error.
        data => Data,
        /// A model, weight, tokenizer or adapter error.
        model => Model,
        /// A device or memory error.
        device => Device,
        /// A file or network error.
        io => Io,
        /// A number that is not finite.
        numerical => Numerical,
        /// Corruption without a valid copy.
        corrupt => Corrupt,
        /// A run that stopped on request and can be resumed.
        stopped => Stopped,
    }

    /// An I/O error on `path` while doing `action` ("read", "create" …).
    pub fn file(action: &str, path: impl AsRef<std::path::Path>, source: std::io::Error) -> Self {
        Self::io(format!("cannot {action}")).at(path.as_ref().display().to_string()).caused_by(source)
    }

    /// Where: `file:line`, a tensor's name, a configuration key.
    pub fn at(mut self, location: impl Into<String>) -> Self {
        self.details.location = Some(location.into());
        self
    }

    /// What to do about it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.details.hint = Some(hint.into());
        self
    }

    /// The error underneath.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.details.source = Some(source.into());
        self
    }

    /// The same error under another kind, where the caller knows better whose fault it is.
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.details.kind = kind;
        self
    }

    /// What the error concerns.
    pub fn kind(&self) -> ErrorKind {
        self.details.kind
    }

    /// Where it was found, if known.
    pub fn location(&self) -> Option<&str> {
        self.details.location.as_deref()
    }

    /// What was found and expected, without place and hint.
    pub fn message(&self) -> &str {
        &self.details.message
    }

    /// What to do, if there is something to do.
    pub fn hint_text(&self) -> Option<&str> {
        self.details.hint.as_deref()
    }

    /// The error as the object that `--json` prints.
    pub fn to_json(&self) -> serde_json::Value {
        let cause = std::error::Error::source(self).map(|source| escape_control(&source.to_string()));
        serde_json::json!({ "error": {
            "kind": self.kind().name(),
            "exit_code": self.kind().exit_code(),
            "where": self.location(),
            "message": self.message(),
            "cause": cause,
            "hint": self.hint_text(),
        }})
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(location) = self.location() {
            write!(formatter, "{}: ", escape_control(location))?;
        }
        formatter.write_str(&escape_control(self.message()))?;
        if let Some(source) = &self.details.source {
            write!(formatter, ": {}", escape_control(&source.to_string()))?;
        }
        if let Some(hint) = self.hint_text() {
            write!(formatter, " ({})", escape_control(hint))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.details.source.as_deref().map(|source| source as _)
    }
}

/// Control characters made visible (`\u{1b}` …), so that text from a file cannot drive the terminal.
/// Line breaks and tabs become `\n` and `\t`.
pub fn escape_control(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

/// At most `characters` of the text, then `…`: for values from files, which may be of any length.
pub(crate) fn shorten(text: &str, characters: usize) -> std::borrow::Cow<'_, str> {
    match text.char_indices().nth(characters) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}
