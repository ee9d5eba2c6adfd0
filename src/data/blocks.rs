//! A data file's text → its records' values, block by block, so that a file may be larger than the memory.

use rayon::prelude::*;

use super::fields::{Interpreted, Keys, Problem, interpret};
use super::files::{Layout, TextFile};
use super::json::{Broken, RawValue, Scanner};
use crate::error::{Error, Result};

/// Text that is worked on at once; a longer record makes its block as long as it is.
const BLOCK_BYTES: usize = 4 << 20;

/// A record's line, and what it says or why it cannot be used.
pub(super) type Interpretation = (usize, Result<Interpreted, String>);

/// Calls `visit` with the records of `file` in their order.
///
/// # Errors
/// A file that cannot be read or is not JSON, and what `visit` returns.
pub(super) fn each_block(
    file: TextFile,
    keys: &Keys,
    visit: impl FnMut(Vec<Interpretation>) -> Result<()>,
) -> Result<TextFile> {
    each_block_of(BLOCK_BYTES, file, keys, visit)
}

fn each_block_of(
    block_bytes: usize,
    mut file: TextFile,
    keys: &Keys,
    mut visit: impl FnMut(Vec<Interpretation>) -> Result<()>,
) -> Result<TextFile> {
    let mut state = Place::Start;
    let mut least = block_bytes;
    loop {
        file.fill(least)?;
        let (values, taken, broken) = match file.layout {
            Layout::Lines => lines(&file),
            Layout::Json => list(&file, &mut state),
        };
        let mut interpreted: Vec<(usize, Result<Interpreted, Problem>)> = values
            .into_par_iter()
            .map(|(line, value)| (line, value.and_then(|value| interpret(value, keys))))
            .collect();
        // What is not JSON ends the file, after the records in front of it.
        let is_broken = |(_, result): &(usize, Result<_, Problem>)| matches!(result, Err(Problem::Broken(_)));
        let whole = interpreted.iter().position(is_broken).unwrap_or(interpreted.len());
        let first_broken = interpreted.drain(whole..).next().and_then(|(_, result)| result.err());
        let block = interpreted.into_iter().map(|(line, result)| match result {
            Ok(record) => (line, Ok(record)),
            Err(Problem::Bad(reason)) => (line, Err(reason)),
            Err(Problem::Broken(broken)) => (line, Err(broken.message)),
        });
        visit(block.collect())?;
        if let Some(Problem::Broken(broken)) = first_broken.or(broken.map(Problem::Broken)) {
            return Err(broken_json(&file, &broken));
        }
        if file.is_at_end() {
            return Ok(file);
        }
        // Nothing that is whole: the record is longer than the window.
        least = if taken == 0 { file.text().len().saturating_mul(2).max(block_bytes) } else { block_bytes };
        file.take(taken);
    }
}

/// Values with their lines, the bytes that they take, and what ends them.
type Found<'a> = (Vec<(usize, Result<RawValue<'a>, Problem>)>, usize, Option<Broken>);

/// The records of the whole lines in the window; blank lines are none.
fn lines(file: &TextFile) -> Found<'_> {
    let text = file.text();
    let end = if file.is_at_end() { text.len() } else { text.rfind('\n').map_or(0, |last| last + 1) };
    let mut offset = 0;
    let values = text[..end]
        .split_inclusive('\n')
        .enumerate()
        .map(|(index, line)| {
            let start = offset;
            offset += line.len();
            // Without its end, so that an object which is not whole is placed on its own line.
            (file.line() + index, start, line.trim_end_matches(['\r', '\n']))
        })
        .filter(|(_, _, line)| !line.trim().is_empty())
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|(number, offset, line)| (number, line_value(line, offset)))
        .collect();
    (values, end, None)
}

fn line_value(line: &str, offset: usize) -> Result<RawValue<'_>, Problem> {
    let mut scanner = Scanner::new(line, offset);
    let value = scanner.value()?;
    match scanner.peek() {
        None => Ok(value),
        Some(_) => {
            let message = "text after the object: expected one object a line".into();
            Err(Problem::Broken(Broken { offset: scanner.offset(), message }))
        }
    }
}

/// Where in a list of objects, or in front of or behind it.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Start,
    /// Behind `[`.
    Open,
    /// Behind an object of the list.
    Object,
    /// Behind `,`.
    Comma,
    /// Behind the list.
    End,
    /// Behind the one object.
    OneObject,
}

/// The whole values in the window, of a list of objects or of one object.
fn list<'a>(file: &'a TextFile, place: &mut Place) -> Found<'a> {
    let text = file.text();
    let (mut values, mut taken, mut line, mut counted) = (Vec::new(), 0, file.line(), 0);
    let mut scanner = Scanner::new(text, 0);
    loop {
        let found = match next(&mut scanner, *place) {
            // At the window's end nothing is known to be whole, nor to be broken.
            _ if scanner.offset() == text.len() && !file.is_at_end() => break,
            Err(broken) if broken.offset == text.len() && !file.is_at_end() => break,
            Err(broken) => return (values, taken, Some(broken)),
            Ok(None) => break,
            Ok(Some(found)) => found,
        };
        *place = found.0;
        taken = scanner.offset();
        if let Some(value) = found.1 {
            line += text[counted..value.offset].bytes().filter(|&byte| byte == b'\n').count();
            counted = value.offset;
            values.push((line, Ok(value)));
        }
    }
    (values, taken, None)
}

/// Takes what stands next: the place behind it, and a value where it is one. Nothing at the end of the text, where the
/// text may end.
fn next<'a>(
    scanner: &mut Scanner<'a>,
    place: Place,
) -> Result<Option<(Place, Option<RawValue<'a>>)>, Broken> {
    let found = scanner.peek();
    let take = |scanner: &mut Scanner<'a>, byte, place| {
        scanner.expect(byte)?;
        Ok(Some((place, None)))
    };
    let value = |scanner: &mut Scanner<'a>, place| Ok(Some((place, Some(scanner.value()?))));
    let behind = |scanner: &Scanner<'_>, message: &str| {
        Err(Broken { offset: scanner.offset(), message: message.into() })
    };
    match (place, found) {
        (Place::Start | Place::End | Place::OneObject, None) => Ok(None),
        (Place::Start, Some(b'[')) => take(scanner, b'[', Place::Open),
        (Place::Start, Some(b'{')) => value(scanner, Place::OneObject),
        (Place::Start, Some(_)) => value(scanner, Place::End),
        (Place::Open | Place::Object, Some(b']')) => take(scanner, b']', Place::End),
        (Place::Open | Place::Comma, _) => value(scanner, Place::Object),
        (Place::Object, _) => take(scanner, b',', Place::Comma),
        (Place::OneObject, Some(b'{')) => {
            behind(scanner, "a second object: a file with one object a line is named .jsonl")
        }
        (Place::OneObject | Place::End, Some(_)) => behind(scanner, "text after the end of the data"),
    }
}

fn broken_json(file: &TextFile, broken: &Broken) -> Error {
    let hint = match file.layout {
        Layout::Json => "expected a JSON list of objects, or one object",
        Layout::Lines => "expected one whole JSON object on each line; a list of objects is named .json",
    };
    Error::data(format!("broken JSON: {}", broken.message)).at(file.place(broken.offset)).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::RecordContent;

    /// (line, instruction or reason) of every record, and the error if there is one, read in windows of so many bytes.
    fn read(name: &str, text: &[u8], block_bytes: usize) -> (Vec<(usize, String)>, Option<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let mut file = TextFile::open(&path).unwrap();
        file.piece_bytes = block_bytes.clamp(4, 1 << 20);
        let mut found = Vec::new();
        let result = each_block_of(block_bytes, file, &Keys::default(), |block| {
            found.extend(block.into_iter().map(|(line, result)| match result {
                Ok(Interpreted { content: RecordContent::Instruction { instruction, output }, .. }) => {
                    (line, instruction + "|" + &output)
                }
                Ok(other) => panic!("{other:?}"),
                Err(reason) => (line, reason),
            }));
            Ok(())
        });
        let error =
            result.err().map(|error| error.to_string().rsplit('/').next().unwrap_or_default().to_string());
        (found, error)
    }

    #[test]
    fn records_do_not_depend_on_how_a_file_is_cut() {
        let record = |number: usize| {
            format!(
                r#"{{"instruction": "ä\"]}}, {{{number}", "output": "{}\\", "n": {number}}}"#,
                "ö".repeat(number)
            )
        };
        let records: Vec<String> = (0..12).map(record).collect();
        let list = format!("\u{feff}\r\n [{}\n] \n", records.join(" \n,\n"));
        let lines = format!("\u{feff}{}\r\n\n  \n{}", records[..5].join("\r\n"), records[5..].join("\n"));
        let bad = format!("[{}, 12345, {},\n null]", records[0], records[1]);
        for (name, text) in [
            ("a.json", &list),
            ("a.jsonl", &lines),
            ("a.json", &records[3]),
            ("a.json", &bad),
            ("a.json", &"\n[ ] ".to_string()),
            ("a.jsonl", &"\n \n".to_string()),
            // Broken in every way, at every place.
            ("a.json", &format!("{list},")),
            ("a.json", &format!("{}\n{}", records[1], records[2])),
            ("a.json", &list[..list.len() - 5].to_string()),
            ("a.json", &format!("[{}\n{}]", records[1], records[2])),
            ("a.json", &format!("[{},]", records[1])),
            ("a.json", &format!("[{},\n tru]", records[1])),
            ("a.json", &format!("[{},\n {{\"a\" 1}}]", records[1])),
            ("a.jsonl", &format!("{lines}\n{{\"a\": [1 2]}}\n{lines}")),
            ("a.jsonl", &format!("{lines} x\n")),
            ("a.jsonl", &lines[..lines.len() - 3].to_string()),
        ] {
            let whole = read(name, text.as_bytes(), usize::MAX / 4);
            for block_bytes in [1, 2, 3, 5, 7, 11, 16, 40, 64, 100, 333, 1000] {
                let pieces = read(name, text.as_bytes(), block_bytes);
                assert_eq!(pieces, whole, "{name} in {block_bytes}: {text}");
            }
        }
        let (found, error) = read("a.json", list.as_bytes(), 7);
        assert_eq!((found.len(), error), (12, None));
        // A line break in front of the list, then two lines a record.
        assert_eq!(found[3], (8, format!("ä\"]}}, {{3|{}\\", "ö".repeat(3))));
    }
}
