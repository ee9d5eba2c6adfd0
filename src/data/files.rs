//! Data files as text: decompressed, checked to be UTF-8, without byte-order mark.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};

use crate::error::{Error, Result};

/// How records stand in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// A list of objects, or one object.
    Json,
    /// One object a line.
    Lines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstandard,
}

/// A data file's text.
#[derive(Debug)]
pub(super) struct TextFile {
    pub name: Arc<str>,
    pub layout: Layout,
    text: String,
}

/// Decompressed bytes that any file may have, so that a small hostile file cannot fill the memory.
const ALWAYS_ALLOWED_BYTES: u64 = 256 << 20;
/// Decompressed bytes allowed for each compressed one beyond that; text seldom passes 20.
const ALLOWED_RATIO: u64 = 256;

impl TextFile {
    /// Reads the whole file.
    pub fn read(path: &Path) -> Result<Self> {
        let name: Arc<str> = path.display().to_string().into();
        let (layout, compression) = layout_of(path)?;
        let not_a_file =
            || Error::data("not a file").at(&*name).hint("a data path is a .json or .jsonl file");
        let metadata = std::fs::metadata(path).map_err(|error| cannot_read(&name, error))?;
        if !metadata.is_file() {
            return Err(not_a_file());
        }
        let stored = std::fs::read(path).map_err(|error| cannot_read(&name, error))?;
        let limit = ALWAYS_ALLOWED_BYTES + ALLOWED_RATIO * stored.len() as u64;
        let bytes = match compression {
            Compression::None => Ok(stored),
            Compression::Gzip => gunzip(&stored, limit),
            Compression::Zstandard => unzstd(&stored, limit),
        };
        let bytes = bytes.map_err(|error| {
            Error::data("cannot decompress").at(&*name).caused_by(error).hint("is the file whole?")
        })?;
        let text = String::from_utf8(bytes).map_err(|error| not_utf8(&name, &error))?;
        Ok(Self { name, layout, text })
    }

    /// The text without its byte-order mark.
    pub fn text(&self) -> &str {
        self.text.strip_prefix('\u{feff}').unwrap_or(&self.text)
    }

    /// `file:line:column` of a byte of the text; the column counts characters.
    pub fn place(&self, offset: usize) -> String {
        let before = &self.text().as_bytes()[..offset];
        let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let line = 1 + before.iter().filter(|&&byte| byte == b'\n').count();
        // Bytes that begin a character; an offset may stand inside one.
        let column = 1 + before[line_start..].iter().filter(|&&byte| byte & 0xC0 != 0x80).count();
        format!("{}:{line}:{column}", self.name)
    }
}

fn layout_of(path: &Path) -> Result<(Layout, Compression)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let (stem, compression) = if let Some(stem) = name.strip_suffix(".gz") {
        (stem, Compression::Gzip)
    } else if let Some(stem) = name.strip_suffix(".zst") {
        (stem, Compression::Zstandard)
    } else {
        (name.as_str(), Compression::None)
    };
    if stem.ends_with(".json") {
        Ok((Layout::Json, compression))
    } else if stem.ends_with(".jsonl") || stem.ends_with(".ndjson") {
        Ok((Layout::Lines, compression))
    } else {
        Err(Error::data("the file's name does not say what it holds")
            .at(path.display().to_string())
            .hint("expected .json (a list of objects) or .jsonl / .ndjson (one object a line), with .gz or .zst where compressed"))
    }
}

fn cannot_read(name: &str, error: io::Error) -> Error {
    let missing = error.kind() == io::ErrorKind::NotFound;
    let error = Error::file("read", name, error);
    if missing { error.with_kind(crate::error::ErrorKind::Data) } else { error }
}

fn not_utf8(name: &str, error: &std::string::FromUtf8Error) -> Error {
    let offset = error.utf8_error().valid_up_to();
    let bytes = error.as_bytes();
    let hint = match bytes {
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => "this looks like UTF-16: save it as UTF-8",
        _ => "save it as UTF-8",
    };
    Error::data(format!("not UTF-8: byte 0x{:02X} at byte offset {offset}", bytes[offset]))
        .at(name)
        .hint(hint)
}

fn gunzip(stored: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_limited(MultiGzDecoder::new(stored), &mut bytes, limit)?;
    Ok(bytes)
}

/// All frames, as the `zstd` program does; skippable ones are skipped.
fn unzstd(stored: &[u8], limit: u64) -> io::Result<Vec<u8>> {
    let (mut rest, mut bytes) = (stored, Vec::new());
    while !rest.is_empty() {
        let mut decoder = match StreamingDecoder::new(&mut rest) {
            Ok(decoder) => decoder,
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length, ..
            })) => {
                rest = rest.get(length as usize..).ok_or(io::ErrorKind::UnexpectedEof)?;
                continue;
            }
            Err(error) => return Err(io::Error::other(error)),
        };
        read_limited(&mut decoder, &mut bytes, limit)?;
        let frame = decoder.into_frame_decoder();
        if let Some(stored) = frame.get_checksum_from_data()
            && frame.get_calculated_checksum() != Some(stored)
        {
            return Err(io::Error::other("the checksum differs"));
        }
    }
    Ok(bytes)
}

fn read_limited(source: impl Read, bytes: &mut Vec<u8>, limit: u64) -> io::Result<()> {
    let left = limit - bytes.len() as u64;
    if source.take(left + 1).read_to_end(bytes)? as u64 > left {
        return Err(io::Error::other(format!(
            "it unfolds to more than {limit} bytes, out of proportion to its size"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn names_say_layout_and_compression() {
        let layout = |name: &str| layout_of(Path::new(name)).ok();
        assert_eq!(layout("a.json"), Some((Layout::Json, Compression::None)));
        assert_eq!(layout("a.JSONL.GZ"), Some((Layout::Lines, Compression::Gzip)));
        assert_eq!(layout("a.ndjson.zst"), Some((Layout::Lines, Compression::Zstandard)));
        assert_eq!(layout("a.txt"), None);
        assert_eq!(layout("json"), None);
    }

    #[test]
    fn zstandard_frames_follow_one_another_and_skippable_ones_are_skipped() {
        let frame = |text: &[u8]| {
            ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
        };
        let skippable = [0x50, 0x2A, 0x4D, 0x18, 3, 0, 0, 0, 9, 9, 9];
        let stored = [&frame(b"one ")[..], &skippable, &frame(b"two")].concat();
        assert_eq!(unzstd(&stored, 100).unwrap(), b"one two");
        assert!(unzstd(&stored[..stored.len() - 3], 100).is_err());
        assert!(unzstd(&skippable[..9], 100).is_err());
    }

    #[test]
    fn what_unfolds_out_of_proportion_is_refused() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&vec![b' '; 1 << 20]).unwrap();
        let stored = encoder.finish().unwrap();
        assert_eq!(gunzip(&stored, 1 << 20).unwrap().len(), 1 << 20);
        assert!(gunzip(&stored, (1 << 20) - 1).is_err());
        assert!(gunzip(&stored[..stored.len() / 2], 1 << 20).is_err(), "cut short");
    }
}
