//! Data files as text, read piece by piece: decompressed, checked to be UTF-8, without byte-order mark.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use sha2::{Digest, Sha256};

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

/// Decompressed bytes that any file may have, so that a small hostile file cannot fill the memory.
const ALWAYS_ALLOWED_BYTES: u64 = 256 << 20;
/// Decompressed bytes allowed for each compressed one beyond that; text seldom passes 20.
const ALLOWED_RATIO: u64 = 256;
/// Bytes read at once.
const PIECE_BYTES: usize = 1 << 20;

/// A data file's text, of which a window is in memory.
pub(super) struct TextFile {
    pub name: Arc<str>,
    pub layout: Layout,
    source: Source,
    /// The text read and not yet taken.
    text: String,
    /// The bytes behind it, of a character that is not whole yet.
    rest: Vec<u8>,
    is_at_end: bool,
    /// Bytes of the file in front of the window, decompressed.
    offset: u64,
    /// Line and column of the window's start, from 1.
    line: usize,
    column: usize,
    /// Bytes read at once.
    pub piece_bytes: usize,
}

impl TextFile {
    /// Opens a file, of which nothing is read yet.
    pub fn open(path: &Path) -> Result<Self> {
        let name: Arc<str> = path.display().to_string().into();
        let (layout, compression) = layout_of(path)?;
        let not_a_file =
            || Error::data("not a file").at(&*name).hint("a data path is a .json or .jsonl file");
        let metadata = std::fs::metadata(path).map_err(|error| cannot_read(&name, error))?;
        if !metadata.is_file() {
            return Err(not_a_file());
        }
        let file = File::open(path).map_err(|error| cannot_read(&name, error))?;
        let mut hasher = Sha256::new();
        // The same bytes under another name may be other records.
        hasher.update([layout as u8, compression as u8]);
        let source = Source::new(Hashing { file, hasher }, compression, metadata.len());
        let (text, rest) = Default::default();
        Ok(Self {
            name,
            layout,
            source,
            text,
            rest,
            is_at_end: false,
            offset: 0,
            line: 1,
            column: 1,
            piece_bytes: PIECE_BYTES,
        })
    }

    /// The text that is in memory.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The line on which it begins.
    pub fn line(&self) -> usize {
        self.line
    }

    /// Whether it goes up to the file's end.
    pub fn is_at_end(&self) -> bool {
        self.is_at_end
    }

    /// Reads on until the window has `least` bytes, or the file ends.
    ///
    /// # Errors
    /// A file that cannot be read or decompressed, or is not UTF-8.
    pub fn fill(&mut self, least: usize) -> Result<()> {
        let mut piece = Vec::new();
        while self.text.len() < least && !self.is_at_end {
            piece.clear();
            piece.append(&mut self.rest);
            let had = piece.len();
            piece.resize(had + self.piece_bytes, 0);
            let count = self.source.read(&mut piece[had..]).map_err(|failure| failure.explain(&self.name))?;
            piece.truncate(had + count);
            self.is_at_end = count == 0;
            let text = match std::str::from_utf8(&piece) {
                Ok(text) => text,
                Err(error) => {
                    let (whole, rest) = piece.split_at(error.valid_up_to());
                    if self.is_at_end || error.error_len().is_some() {
                        let offset = self.offset + (self.text.len() + whole.len()) as u64;
                        return Err(not_utf8(&self.name, offset, rest));
                    }
                    self.rest = rest.to_vec();
                    std::str::from_utf8(whole).unwrap_or_default()
                }
            };
            let is_start = self.offset == 0 && self.text.is_empty();
            match text.strip_prefix('\u{feff}').filter(|_| is_start) {
                Some(text) => {
                    self.offset = '\u{feff}'.len_utf8() as u64;
                    self.text.push_str(text);
                }
                None => self.text.push_str(text),
            }
        }
        Ok(())
    }

    /// Gives up the first `count` bytes of the window.
    pub fn take(&mut self, count: usize) {
        (self.line, self.column) = self.position(count);
        self.offset += count as u64;
        self.text.drain(..count);
    }

    /// `file:line:column` of a byte of the window; the column counts characters.
    pub fn place(&self, offset: usize) -> String {
        let (line, column) = self.position(offset);
        format!("{}:{line}:{column}", self.name)
    }

    fn position(&self, offset: usize) -> (usize, usize) {
        let before = &self.text.as_bytes()[..offset];
        let breaks = before.iter().filter(|&&byte| byte == b'\n').count();
        let line_start = before.iter().rposition(|&byte| byte == b'\n').map(|at| at + 1);
        // Bytes that begin a character; an offset may stand inside one.
        let characters =
            before[line_start.unwrap_or(0)..].iter().filter(|&&byte| byte & 0xC0 != 0x80).count();
        (self.line + breaks, characters + if line_start.is_some() { 1 } else { self.column })
    }

    /// SHA-256, in hexadecimal, of what was read of the stored bytes (all, once the file is at its end) and of how they
    /// are read.
    pub fn fingerprint(&self) -> String {
        format!("{:x}", self.source.hashing().hasher.clone().finalize())
    }
}

/// Why nothing more comes from a file.
enum Failure {
    Read(io::Error),
    Decompress(io::Error),
}

impl Failure {
    fn explain(self, name: &str) -> Error {
        match self {
            Failure::Read(error) => cannot_read(name, error),
            Failure::Decompress(error) => {
                Error::data("cannot decompress").at(name).caused_by(error).hint("is the file whole?")
            }
        }
    }
}

/// A file that knows the hash of what was read of it.
struct Hashing {
    file: File,
    hasher: Sha256,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// A file's bytes, decompressed.
struct Source {
    decoder: Decoder,
    /// Bytes that may still come, and all that may.
    left: u64,
    limit: u64,
}

enum Decoder {
    Plain(Hashing),
    Gzip(Box<MultiGzDecoder<BufReader<Hashing>>>),
    Zstandard(Box<ZstandardFrames<BufReader<Hashing>>>),
}

impl Source {
    fn new(file: Hashing, compression: Compression, stored_bytes: u64) -> Self {
        let limit = match compression {
            Compression::None => u64::MAX,
            _ => ALWAYS_ALLOWED_BYTES.saturating_add(ALLOWED_RATIO.saturating_mul(stored_bytes)),
        };
        let decoder = match compression {
            Compression::None => Decoder::Plain(file),
            Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(BufReader::new(file)))),
            Compression::Zstandard => {
                Decoder::Zstandard(Box::new(ZstandardFrames::new(BufReader::new(file))))
            }
        };
        Self { decoder, left: limit, limit }
    }

    fn hashing(&self) -> &Hashing {
        match &self.decoder {
            Decoder::Plain(file) => file,
            Decoder::Gzip(decoder) => decoder.get_ref().get_ref(),
            Decoder::Zstandard(frames) => frames.source.get_ref(),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Failure> {
        let count = match &mut self.decoder {
            Decoder::Plain(file) => uninterrupted(file, buffer).map_err(Failure::Read),
            Decoder::Gzip(decoder) => uninterrupted(decoder, buffer).map_err(Failure::Decompress),
            Decoder::Zstandard(frames) => uninterrupted(frames, buffer).map_err(Failure::Decompress),
        }?;
        self.left = self.left.checked_sub(count as u64).ok_or_else(|| {
            Failure::Decompress(io::Error::other(format!(
                "it unfolds to more than {} bytes, out of proportion to its size",
                self.limit
            )))
        })?;
        Ok(count)
    }
}

fn uninterrupted(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// All frames of a file, as the `zstd` program reads them; skippable ones are skipped.
struct ZstandardFrames<R> {
    source: R,
    decoder: FrameDecoder,
    is_in_frame: bool,
}

impl<R: BufRead> ZstandardFrames<R> {
    fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), is_in_frame: false }
    }

    /// Whether there is another frame, which is begun.
    fn begin_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    if io::copy(&mut (&mut self.source).take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for ZstandardFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.is_in_frame && !self.begin_frame()? {
                return Ok(0);
            }
            self.is_in_frame = true;
            // A decoder keeps the last window back until the frame is finished.
            while self.decoder.can_collect() < buffer.len() && !self.decoder.is_finished() {
                let wanted = BlockDecodingStrategy::UptoBytes(buffer.len() - self.decoder.can_collect());
                self.decoder.decode_blocks(&mut self.source, wanted).map_err(io::Error::other)?;
            }
            let count = self.decoder.read(buffer)?;
            if count > 0 {
                return Ok(count);
            }
            self.is_in_frame = false;
            if let Some(stored) = self.decoder.get_checksum_from_data()
                && self.decoder.get_calculated_checksum() != Some(stored)
            {
                return Err(io::Error::other("the checksum differs"));
            }
        }
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

/// `bytes` begin with the one at `offset` that is at fault.
fn not_utf8(name: &str, offset: u64, bytes: &[u8]) -> Error {
    let hint = match (offset, bytes) {
        (0, [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..]) => "this looks like UTF-16: save it as UTF-8",
        _ => "save it as UTF-8",
    };
    let byte = bytes.first().copied().unwrap_or_default();
    Error::data(format!("not UTF-8: byte 0x{byte:02X} at byte offset {offset}")).at(name).hint(hint)
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

    /// All text of a file of these bytes.
    fn text_of(name: &str, bytes: &[u8]) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let mut file = TextFile::open(&path)?;
        file.fill(usize::MAX)?;
        assert!(file.is_at_end());
        Ok(file.text().to_string())
    }

    #[test]
    fn zstandard_frames_follow_one_another_and_skippable_ones_are_skipped() {
        let frame = |text: &[u8]| {
            ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
        };
        let skippable = [0x50, 0x2A, 0x4D, 0x18, 3, 0, 0, 0, 9, 9, 9];
        let long = "text ".repeat(PIECE_BYTES / 2);
        let stored = [&frame(b"one ")[..], &skippable, &frame(long.as_bytes()), &frame(b"two")].concat();
        assert_eq!(text_of("a.json.zst", &stored).unwrap(), format!("one {long}two"));
        assert!(text_of("a.json.zst", &stored[..stored.len() - 3]).is_err());
        assert!(text_of("a.json.zst", &skippable[..9]).is_err());
    }

    #[test]
    fn what_unfolds_out_of_proportion_is_refused() {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&vec![b' '; 1 << 20]).unwrap();
        let stored = encoder.finish().unwrap();
        assert_eq!(text_of("a.json.gz", &stored).unwrap().len(), 1 << 20);
        assert!(text_of("a.json.gz", &stored[..stored.len() / 2]).is_err(), "cut short");
        let unfold = |limit| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.gz");
            std::fs::write(&path, &stored).unwrap();
            let file = Hashing { file: File::open(path).unwrap(), hasher: Sha256::new() };
            let mut source = Source { limit, left: limit, ..Source::new(file, Compression::Gzip, 0) };
            let (mut piece, mut sum) = ([0; 1000], 0);
            loop {
                match source.read(&mut piece).ok()? {
                    0 => return Some(sum),
                    count => sum += count,
                }
            }
        };
        assert_eq!(unfold(1 << 20), Some(1 << 20));
        assert_eq!(unfold((1 << 20) - 1), None);
    }

    #[test]
    fn a_window_knows_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let line = "ä".repeat(PIECE_BYTES / 4) + "x";
        std::fs::write(&path, format!("\u{feff}{line}\n{line}{line}\nend")).unwrap();
        let mut file = TextFile::open(&path).unwrap();
        file.fill(10).unwrap();
        file.take(2);
        assert!(file.place(0).ends_with("a.json:1:2"));
        file.fill(usize::MAX).unwrap();
        // Into the second line, then to its end.
        file.take(line.len() + 1);
        assert!(file.place(0).ends_with("a.json:2:2"), "{}", file.place(0));
        assert!(file.place(2).ends_with("a.json:2:3"), "{}", file.place(2));
        let end = file.text().find("\ne").unwrap();
        let place = format!("a.json:2:{}", 2 * line.chars().count() + 1);
        assert!(file.place(end).ends_with(&place), "{}", file.place(end));
        assert!(file.place(end + 2).ends_with("a.json:3:2"), "{}", file.place(end + 2));
        // A character that lies across two pieces is whole; one that the file cuts is not.
        assert_eq!(
            text_of("a.json", format!(" {line}{line}{line}").as_bytes()).unwrap().len(),
            3 * line.len() + 1
        );
        let cut = [&b"ab"[..], &"ä".as_bytes()[..1]].concat();
        let error = text_of("a.json", &cut).unwrap_err();
        assert!(error.message().contains("byte 0xC3 at byte offset 2"), "{error}");
    }
}
