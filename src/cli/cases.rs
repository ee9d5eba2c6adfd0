//! Test cases: what is asked, under which hash, what is hoped for; and the prompt that they become.

use std::path::Path;

use serde::Deserialize;

use super::conditioning::Conditioning;
use crate::data::{self, Conversation};
use crate::error::{Error, Result};
use crate::tokens::Tokenizer;

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Case {
    pub instruction: String,
    pub hash: Option<String>,
    pub expected: Option<String>,
}

impl Case {
    /// The prompt of an instruction record: text and tokens.
    pub fn prompt(&self, tokenizer: &Tokenizer, conditioning: &Conditioning) -> Result<(String, Vec<u32>)> {
        let hash = conditioning.hash_of_prompt(self.hash.as_deref());
        let text = data::prompt(&conditioning.prefix(hash), &self.instruction);
        let ids = tokenizer.encode_start(&text)?;
        Ok((text, ids))
    }

    /// The prompt as the tokenizer's chat template renders it, with what the system says before; as that of an
    /// instruction record where there is no template.
    pub fn chat_prompt(
        &self,
        tokenizer: &Tokenizer,
        system: Option<&str>,
        conditioning: &Conditioning,
    ) -> Result<(String, Vec<u32>)> {
        let Some(template) = tokenizer.chat_template() else { return self.prompt(tokenizer, conditioning) };
        let question = Conversation::question(system, &self.instruction);
        let text = template.prompt(&question.with_prefix(&conditioning.prefix(self.hash.as_deref())))?;
        let ids = tokenizer.encode(&text)?;
        Ok((text, ids))
    }
}

#[derive(Deserialize)]
struct CaseRecord {
    instruction: String,
    hash: Option<String>,
    expected: Option<String>,
}

/// Reads a JSON list of cases; `hash` stands in where one has none.
pub(super) fn read_cases(path: &Path, hash: Option<&str>) -> Result<Vec<Case>> {
    let place = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| {
        Error::data("cannot read the cases").at(&place).caused_by(source).hint("name an existing file")
    })?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|error| Error::data(format!("not UTF-8 at byte {}", error.valid_up_to())).at(&place))?;
    let records: Vec<CaseRecord> =
        serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(text)).map_err(|error| {
            Error::data("not a list of test cases")
                .at(format!("{place}:{}", error.line()))
                .caused_by(error)
                .hint("expected [{\"instruction\": …, \"hash\": …, \"expected\": …}, …]; hash and expected may be absent")
        })?;
    if records.is_empty() {
        return Err(Error::data("the list of test cases is empty").at(place));
    }
    let case = |CaseRecord { instruction, hash: own, expected }| Case {
        instruction,
        hash: own.or_else(|| hash.map(str::to_string)),
        expected,
    };
    Ok(records.into_iter().map(case).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Vec<Case>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read_cases(file.path(), Some("given"))
    }

    #[test]
    fn cases_have_defaults() {
        let text = "\u{feff}[{\"instruction\": \"a\", \"id\": 3},\r\n {\"instruction\": \"b\", \"hash\": \"h\", \"expected\": \"e\"}]";
        let case = |instruction: &str, hash: &str, expected: Option<&str>| Case {
            instruction: instruction.into(),
            hash: Some(hash.into()),
            expected: expected.map(str::to_string),
        };
        assert_eq!(read(text.as_bytes()).unwrap(), [case("a", "given", None), case("b", "h", Some("e"))]);
    }

    #[test]
    fn fault_29_broken_cases_name_the_line() {
        for (text, part) in [
            (
                &b"[{\"instruction\": \"a\"},\n {\"hash\": \"h\"}]"[..],
                ":2: not a list of test cases: missing field",
            ),
            (b"{", ":1: not a list"),
            (b"[]", "empty"),
            (b"[\"\xff\"]", "not UTF-8 at byte 2"),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!(error.kind().exit_code(), 3);
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    }
}
