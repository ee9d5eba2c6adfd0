//! Cuts JSON text into values without building them, and knows where each stands.
//!
//! Fields that nobody asks for cost no memory, numbers keep the digits that the file has, and nesting is walked
//! without recursion.

use std::borrow::Cow;
use std::path::Path;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

use crate::error::{Error, Result};

/// The JSON of a small file of a model folder; none where there is no file.
///
/// # Errors
/// A file that cannot be read (I/O), or is not JSON (model).
pub(crate) fn read_optional(path: &Path) -> Result<Option<Value>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("read", path, error)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::model("broken JSON").at(path.display().to_string()).caused_by(error))
}

/// A syntax error at a byte of the text.
#[derive(Debug, PartialEq)]
pub(super) struct Broken {
    pub offset: usize,
    pub message: String,
}

/// One JSON value as the text has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawValue<'a> {
    pub text: &'a str,
    pub offset: usize,
}

impl<'a> RawValue<'a> {
    /// What it is, as an error names it.
    pub fn kind(&self) -> &'static str {
        match self.text.as_bytes().first() {
            Some(b'{') => "an object",
            Some(b'[') => "a list",
            Some(b'"') => "a string",
            Some(b't' | b'f') => "a bool",
            Some(b'n') => "null",
            _ => "a number",
        }
    }

    pub fn is_null(&self) -> bool {
        self.text.starts_with('n')
    }

    /// A string's content, or the digits of a number, `true`, `false`; nothing for null, lists and objects.
    pub fn scalar(&self) -> Result<Option<Cow<'a, str>>, Broken> {
        Ok(match self.text.as_bytes().first() {
            Some(b'"') => Some(Cow::Owned(self.parse()?)),
            Some(b'{' | b'[' | b'n') => None,
            _ => Some(Cow::Borrowed(self.text)),
        })
    }

    /// The value as a `T`.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, Broken> {
        serde_json::from_str(self.text).map_err(|error| broken(&error, self.text, self.offset))
    }

    /// The fields of an object in their order.
    pub fn fields(&self) -> Result<Vec<(String, RawValue<'a>)>, Broken> {
        let mut scanner = Scanner { text: self.text, base: self.offset, position: 0 };
        let mut fields = Vec::new();
        scanner.expect(b'{')?;
        if scanner.peek() == Some(b'}') {
            return Ok(fields);
        }
        loop {
            let key = scanner.value()?;
            scanner.expect(b':')?;
            fields.push((key.parse()?, scanner.value()?));
            if scanner.peek() == Some(b'}') {
                return Ok(fields);
            }
            scanner.expect(b',')?;
        }
    }
}

/// Walks text value by value.
pub(super) struct Scanner<'a> {
    text: &'a str,
    /// Where `text` begins in the file.
    base: usize,
    position: usize,
}

impl<'a> Scanner<'a> {
    pub fn new(text: &'a str, base: usize) -> Self {
        Self { text, base, position: 0 }
    }

    /// Where the walk stands in the file.
    pub fn offset(&self) -> usize {
        self.base + self.position
    }

    /// The next byte that is not white space, which stays.
    pub fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.position..];
        let blank = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
        self.position += blank;
        rest.get(blank).copied()
    }

    /// Takes `byte`, or says what stands there instead.
    pub fn expect(&mut self, byte: u8) -> Result<(), Broken> {
        let found = self.peek();
        if found == Some(byte) {
            self.position += 1;
            return Ok(());
        }
        let message = format!("expected `{}`, found {}", byte as char, self.describe(found));
        Err(Broken { offset: self.offset(), message })
    }

    /// Takes the next value, whole and checked.
    pub fn value(&mut self) -> Result<RawValue<'a>, Broken> {
        let found = self.peek();
        let (rest, offset) = (&self.text[self.position..], self.offset());
        if !matches!(found, Some(b'{' | b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n')) {
            return Err(Broken {
                offset,
                message: format!("expected a value, found {}", self.describe(found)),
            });
        }
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<IgnoredAny>();
        match stream.next() {
            Some(Ok(_)) => {
                let text = &rest[..stream.byte_offset()];
                self.position += text.len();
                Ok(RawValue { text, offset })
            }
            Some(Err(error)) => Err(broken(&error, rest, offset)),
            None => Err(Broken { offset, message: "expected a value, found the end".into() }),
        }
    }

    fn describe(&self, byte: Option<u8>) -> String {
        match byte {
            None => "the end of the text".into(),
            Some(_) => {
                let character = self.text[self.position..].chars().next().unwrap_or_default();
                format!("`{character}`")
            }
        }
    }
}

/// serde_json's error with its line and column turned into the file's byte.
fn broken(error: &serde_json::Error, text: &str, base: usize) -> Broken {
    let line_start = match error.line() {
        0 | 1 => 0,
        line => text
            .bytes()
            .enumerate()
            .filter(|(_, byte)| *byte == b'\n')
            .nth(line - 2)
            .map_or(0, |(at, _)| at + 1),
    };
    let offset = match error.is_eof() {
        true => text.len(),
        false => (line_start + error.column().saturating_sub(1)).min(text.len()),
    };
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or_default().to_owned();
    Broken { offset: base + offset, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_digits_and_their_place() {
        let text = "  {\"a\": 1e5, \"b\\u0041\": \"x\\n\",\n \"c\": [1, {}], \"d\": 12345678901234567890123}";
        let mut scanner = Scanner::new(text, 100);
        let object = scanner.value().unwrap();
        assert_eq!((object.offset, scanner.peek()), (102, None));
        let fields = object.fields().unwrap();
        let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "bA", "c", "d"]);
        assert_eq!(fields[0].1.scalar().unwrap().unwrap(), "1e5");
        assert_eq!(fields[1].1.scalar().unwrap().unwrap(), "x\n");
        assert_eq!((fields[2].1.kind(), fields[2].1.scalar().unwrap()), ("a list", None));
        assert_eq!(fields[3].1.scalar().unwrap().unwrap(), "12345678901234567890123");
        assert_eq!(&text[fields[3].1.offset - 100..][..5], "12345");
    }

    #[test]
    fn broken_text_is_placed_at_its_byte() {
        for (text, offset) in [
            ("{\"a\": 1,}", 8),
            ("{\"a\" 1}", 5),
            ("{\"a\": tru}", 9),
            ("{\"a\":\n\n \"x\ny\"}", 9),
            ("{\"a\": [1 2]}", 9),
            ("", 0),
            ("nul", 3),
        ] {
            let result = Scanner::new(text, 7).value().and_then(|value| value.fields());
            assert_eq!(result.unwrap_err().offset, 7 + offset, "{text:?}");
        }
    }

    #[test]
    fn fault_29_deep_nesting_does_not_exhaust_the_stack() {
        let depth = 5_000_000;
        let closed = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(Scanner::new(&closed, 0).value().unwrap().text.len(), 2 * depth);
        assert!(Scanner::new(&closed[..depth], 0).value().is_err());
    }
}
