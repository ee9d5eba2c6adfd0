//! `hash_template`: the text that carries a sample's hash.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// Stands for the hash.
const PLACE: &str = "{hash}";

/// What stands in front of an instruction, or of the first user turn, to carry the hash.
///
/// A value is written so that it can be read back from the text: `\`, `]` and the character that ends it in the
/// template stand behind a `\`, line breaks as `\n`, `\r` or `\u{2028}`. Values without any of these stand as they are.
///
/// ```
/// use fastlora::config::HashTemplate;
///
/// assert_eq!(HashTemplate::default().prefix("faq"), "[hash: faq] ");
/// assert_eq!(HashTemplate::default().prefix("a]\nb"), r"[hash: a\]\nb] ");
/// let short: HashTemplate = "<{hash}>\n".parse()?;
/// assert_eq!(short.prefix("a>b"), "<a\\>b>\n");
/// assert!("[hash] ".parse::<HashTemplate>().is_err());
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashTemplate {
    before: String,
    after: String,
    /// The first character of `after`.
    end: char,
}

impl HashTemplate {
    /// The text of `hash`.
    pub fn prefix(&self, hash: &str) -> String {
        let mut text = self.before.clone();
        for character in hash.chars() {
            match character {
                '\n' => text.push_str("\\n"),
                '\r' => text.push_str("\\r"),
                // Vertical tab, form feed, next line, line and paragraph separator break lines too.
                '\u{b}' | '\u{c}' | '\u{85}' | '\u{2028}' | '\u{2029}' => {
                    text.extend(character.escape_unicode())
                }
                // Behind a `\` a letter could be read as a line break.
                _ if character == self.end && character.is_alphanumeric() => {
                    text.extend(character.escape_unicode());
                }
                _ if character == self.end || matches!(character, '\\' | ']') => {
                    text.extend(['\\', character])
                }
                _ => text.push(character),
            }
        }
        text + &self.after
    }
}

impl Default for HashTemplate {
    fn default() -> Self {
        Self { before: "[hash: ".into(), after: "] ".into(), end: ']' }
    }
}

impl FromStr for HashTemplate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |what: String| {
            Err(Error::config(what).at("hash_template").hint(
                "the default is \"[hash: {hash}] \"; what stands in front of and behind {hash} is free",
            ))
        };
        let parts: Vec<&str> = text.split(PLACE).collect();
        let [before, after] = parts[..] else {
            let count = parts.len() - 1;
            return refuse(format!("`{text}` holds {{hash}} {count} times, expected once"));
        };
        let Some(end) = after.chars().next() else {
            return refuse(format!("`{text}` ends with {{hash}}, so that nothing tells where a hash ends"));
        };
        if end == '\\' {
            return refuse(format!("`{text}` has a backslash behind {{hash}}, which begins an escape there"));
        }
        Ok(Self { before: before.into(), after: after.into(), end })
    }
}

impl fmt::Display for HashTemplate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}{PLACE}{}", self.before, self.after)
    }
}

impl<'de> Deserialize<'de> for HashTemplate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

impl Serialize for HashTemplate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the hash back from a text that begins with `before`: up to the first `end` that is not escaped.
    fn read_back(text: &str, before: &str, end: char) -> (String, String) {
        let mut rest = text.strip_prefix(before).unwrap().chars();
        let mut hash = String::new();
        loop {
            match rest.next().expect("the hash has an end") {
                '\\' => match rest.next().unwrap() {
                    'n' => hash.push('\n'),
                    'r' => hash.push('\r'),
                    'u' => {
                        let digits: String =
                            rest.by_ref().skip(1).take_while(|&digit| digit != '}').collect();
                        hash.push(char::from_u32(u32::from_str_radix(&digits, 16).unwrap()).unwrap());
                    }
                    other => hash.push(other),
                },
                character if character == end => return (hash, rest.collect()),
                character => hash.push(character),
            }
        }
    }

    #[test]
    fn every_hash_can_be_read_back_from_the_text() {
        let pieces =
            ["a", "n", "u", "]", "\\", "\n", "\r", "\u{2028}", "\u{85}", " ", ">", "é", "{hash}", "[hash: "];
        for (before, end, after) in [
            ("[hash: ", ']', "] "),
            ("<", '>', ">\n"),
            ("", ' ', " | "),
            ("say ", 'n', "n"),
            ("hash ", 'u', "u{"),
        ] {
            let template: HashTemplate = format!("{before}{{hash}}{after}").parse().unwrap();
            assert_eq!(template.to_string(), format!("{before}{{hash}}{after}"));
            // Every value of up to three pieces.
            for number in 0..pieces.len().pow(3) {
                let places = [number, number / pieces.len(), number / pieces.len().pow(2)];
                let hash: String = places.iter().map(|place| pieces[place % pieces.len()]).collect();
                let text = template.prefix(&hash) + "User: ]\\n > u";
                let (found, rest) = read_back(&text, before, end);
                assert_eq!(found, hash, "{text:?}");
                assert_eq!(format!("{end}{rest}"), format!("{after}User: ]\\n > u"));
                let value = &text[before.len()..text.len() - after.len() - "User: ]\\n > u".len()];
                assert!(!value.contains(['\n', '\r', '\u{2028}', '\u{85}']), "{text:?}");
            }
        }
    }

    #[test]
    fn plain_values_stand_as_they_are() {
        let template = HashTemplate::default();
        assert_eq!(template.to_string(), "[hash: {hash}] ");
        assert_eq!(template.to_string().parse::<HashTemplate>().unwrap(), template);
        for hash in ["faq", "sub/domain [x", "ünïcode  \t", "n", "{hash}"] {
            assert_eq!(template.prefix(hash), format!("[hash: {hash}] "));
        }
    }

    #[test]
    fn fault_44_a_template_without_one_place_for_the_hash_is_refused() {
        for (text, part) in [
            ("", "0 times"),
            ("[hash: faq] ", "0 times"),
            ("{hash}{hash} ", "2 times"),
            ("hash {hash}", "where a hash ends"),
            ("{hash}\\)", "a backslash behind {hash}"),
        ] {
            let error = text.parse::<HashTemplate>().unwrap_err();
            assert_eq!(error.kind().exit_code(), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
