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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_42_control_characters_are_visible() {
        assert_eq!(for_terminal("a\tb\nc\u{1b}[31m\r\u{9b}é"), "a\tb\nc\\u{1b}[31m\\r\\u{9b}é");
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        assert!(accept_closed(Err(io::ErrorKind::BrokenPipe.into())).is_ok());
        assert_eq!(accept_closed(Err(io::ErrorKind::StorageFull.into())).unwrap_err().kind().exit_code(), 6);
    }
}
