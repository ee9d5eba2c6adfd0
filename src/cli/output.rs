//! Results on standard output.

use std::io::{self, Write};

use crate::error::{Error, Result};

/// Prints `text` and a line break.
///
/// # Errors
/// A write that fails, but for a reader that left: what it does not want is no failure.
pub(super) fn print_line(text: &str) -> Result<()> {
    accept_closed(writeln!(io::stdout().lock(), "{text}"))
}

/// A closed pipe ends the output quietly.
pub(super) fn accept_closed(written: io::Result<()>) -> Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::io("cannot write").at("standard output").caused_by(error))
        }
        _ => Ok(()),
    }
}

/// Control characters made visible, but for line breaks and tabs: generated text must not drive the terminal.
pub(super) fn for_terminal(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            control if control.is_control() => shown.extend(control.escape_default()),
            other => shown.push(other),
        }
    }
    shown
}

/// Lines joined by `⏎`, blank ones left out: an answer that rambles on shall not stretch its row.
pub(super) fn on_one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ⏎ ")
}

/// A word for a POSIX shell: as it is where the shell leaves it so, else in single quotes.
pub(super) fn shell_word(text: &str) -> String {
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "/._-+=:@%,".contains(character);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_string(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_42_control_characters_are_visible() {
        assert_eq!(for_terminal("a\tb\nc\u{1b}[31m\r\u{9b}é"), "a\tb\nc\\u{1b}[31m\\r\\u{9b}é");
    }

    #[test]
    fn words_reach_a_shell_as_they_are() {
        for text in ["faq", "", "it's", "a b", "$HOME", "`x`", "-q", "é\\n", "a\nb", "~", "#", "*"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", shell_word(text))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
        }
        assert_eq!(shell_word("outputs/run-1"), "outputs/run-1");
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        assert!(accept_closed(Err(io::ErrorKind::BrokenPipe.into())).is_ok());
        assert_eq!(accept_closed(Err(io::ErrorKind::StorageFull.into())).unwrap_err().kind().exit_code(), 6);
    }
}
