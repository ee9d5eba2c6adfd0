//! TensorBoard's event files, which its own program shows while a run goes.
//!
//! A file is a sequence of records as TensorFlow's TFRecord frames them: length, CRC of the length, bytes, CRC of the bytes.
//! Each record is a protobuf message `Event` (tensorflow/core/util/event.proto and framework/summary.proto), of which a few
//! fields are needed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::checkpoint::atomic::remove_file;
use crate::error::{Error, Result};
use crate::training::{StepReport, TrainingSummary, ValidationReport};

/// The folder inside the output folder that TensorBoard is pointed at.
pub const FOLDER: &str = "tensorboard";
/// The one file in it; TensorBoard knows it by the `tfevents` in its name.
const FILE: &str = "events.out.tfevents.fastlora";
/// What every event file begins with.
const VERSION: &str = "brain.Event:2";
/// Tags of validation begin with this, up to the first `/` or `_`.
const VALIDATION: &str = "validation";

/// The open file; every record is on its way to the disk as soon as it was written.
pub struct EventFile {
    path: PathBuf,
    file: BufWriter<File>,
}

impl EventFile {
    /// Creates the file in the output folder `output`, or empties it.
    ///
    /// # Errors
    /// A folder or file that cannot be created.
    pub fn create(output: &Path) -> Result<Self> {
        Self::open(output, 0)
    }

    /// Opens the file of a run that goes on after the steps of `summary`, and cuts off what came after them, so that no
    /// step stands twice.
    ///
    /// # Errors
    /// A file that cannot be read or cut.
    pub fn resume(output: &Path, summary: &TrainingSummary) -> Result<Self> {
        let path = output.join(FOLDER).join(FILE);
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            bytes => bytes.map_err(|source| Error::file("read", &path, source))?,
        };
        Self::open(output, kept_bytes(&bytes, summary))
    }

    /// Takes away what [`create`](Self::create) makes.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn remove(output: &Path) -> Result<()> {
        let folder = output.join(FOLDER);
        remove_file(&folder.join(FILE))?;
        // With files of others in it, it stays.
        let _ = std::fs::remove_dir(folder);
        Ok(())
    }

    fn open(output: &Path, kept_bytes: usize) -> Result<Self> {
        let folder = output.join(FOLDER);
        std::fs::create_dir_all(&folder).map_err(|source| Error::file("create", &folder, source))?;
        let path = folder.join(FILE);
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|file| file.set_len(kept_bytes as u64).map(|()| file))
            .map_err(|source| Error::file("open", &path, source))?;
        let mut events = Self { path, file: BufWriter::new(file) };
        if kept_bytes == 0 {
            let mut event = Message::default();
            event.double(1, now());
            event.bytes(3, VERSION.as_bytes());
            events.write(&event)?;
        }
        Ok(events)
    }

    /// Writes a step's figures.
    ///
    /// # Errors
    /// A write that fails.
    pub fn step(&mut self, report: &StepReport) -> Result<()> {
        let speed = report.tokens as f64 / report.seconds.max(1e-9);
        self.scalars(
            report.step,
            &[
                ("training/loss", report.loss),
                ("training/grad_norm", report.grad_norm),
                ("training/learning_rate", report.learning_rate),
                ("training/tokens_per_second", speed),
            ],
        )
    }

    /// Writes a validation's figures.
    ///
    /// # Errors
    /// A write that fails.
    pub fn validation(&mut self, report: &ValidationReport) -> Result<()> {
        let overall = report.evaluation.overall();
        let mut values: Vec<(String, f64)> = Vec::new();
        values.extend(overall.loss().map(|loss| (format!("{VALIDATION}/loss"), loss)));
        values.extend(overall.token_accuracy().map(|share| (format!("{VALIDATION}/token_accuracy"), share)));
        for (hash, figures) in report.evaluation.by_hash() {
            values.extend(figures.loss().map(|loss| (format!("{VALIDATION}_loss_by_hash/{hash}"), loss)));
        }
        let values: Vec<(&str, f64)> = values.iter().map(|(tag, value)| (&**tag, *value)).collect();
        self.scalars(report.step, &values)
    }

    /// Forces what was written to the disk.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn sync(&self) -> Result<()> {
        self.file.get_ref().sync_data().map_err(|source| Error::file("write", &self.path, source))
    }

    /// One event with the values of a step.
    fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut one = Message::default();
            one.bytes(1, tag.as_bytes());
            one.float(2, *value as f32);
            summary.bytes(1, &one.0);
        }
        let mut event = Message::default();
        event.double(1, now());
        event.integer(2, step);
        event.bytes(5, &summary.0);
        self.write(&event)
    }

    fn write(&mut self, event: &Message) -> Result<()> {
        let length = (event.0.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&event.0);
        record.extend(masked_crc(&event.0).to_le_bytes());
        self.file
            .write_all(&record)
            .and_then(|()| self.file.flush())
            .map_err(|source| Error::file("write", &self.path, source))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// Bytes of the records up to the steps of `summary`: those after the first one that is damaged or came later are not
/// wanted. None are without the record of the version.
fn kept_bytes(bytes: &[u8], summary: &TrainingSummary) -> usize {
    let mut kept = 0;
    while let Some(event) = record_at(&bytes[kept..]) {
        let is_kept = match kept {
            0 => field(event, 3) == Some(Field::Bytes(VERSION.as_bytes())),
            _ => {
                let step = match field(event, 2) {
                    Some(Field::Integer(step)) => step,
                    _ => 0,
                };
                let is_validation =
                    first_tag(event).is_some_and(|tag| tag.starts_with(VALIDATION.as_bytes()));
                step <= if is_validation { summary.last_validation_step } else { summary.steps }
            }
        };
        if !is_kept {
            break;
        }
        kept += 16 + event.len();
    }
    kept
}

/// The bytes of the record that begins here, where it is whole.
fn record_at(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (length_crc, rest) = rest.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*length_crc) != masked_crc(length) {
        return None;
    }
    let (event, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let (crc, _) = rest.split_first_chunk::<4>()?;
    (u32::from_le_bytes(*crc) == masked_crc(event)).then_some(event)
}

/// The tag of the first value of an event's summary.
fn first_tag(event: &[u8]) -> Option<&[u8]> {
    let bytes = |message, number| match field(message, number) {
        Some(Field::Bytes(bytes)) => Some(bytes),
        _ => None,
    };
    bytes(bytes(bytes(event, 5)?, 1)?, 1)
}

/// A protobuf message in the making (protobuf.dev, "Encoding").
#[derive(Default)]
struct Message(Vec<u8>);

/// How a field's value is encoded.
const VARINT: u64 = 0;
const EIGHT_BYTES: u64 = 1;
const WITH_LENGTH: u64 = 2;
const FOUR_BYTES: u64 = 5;

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, number: u64, encoding: u64) {
        self.varint(number << 3 | encoding);
    }

    fn integer(&mut self, number: u64, value: u64) {
        self.key(number, VARINT);
        self.varint(value);
    }

    fn double(&mut self, number: u64, value: f64) {
        self.key(number, EIGHT_BYTES);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, number: u64, value: f32) {
        self.key(number, FOUR_BYTES);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, number: u64, value: &[u8]) {
        self.key(number, WITH_LENGTH);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }
}

/// A field's value, where it is of a kind that is read here.
#[derive(Debug, PartialEq)]
enum Field<'a> {
    Integer(u64),
    Bytes(&'a [u8]),
    Fixed,
}

/// The first field `number` of a message.
fn field(mut message: &[u8], number: u64) -> Option<Field<'_>> {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if *byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
    fn skip<'a>(bytes: &mut &'a [u8], count: u64) -> Option<&'a [u8]> {
        let (skipped, rest) = bytes.split_at_checked(usize::try_from(count).ok()?)?;
        *bytes = rest;
        Some(skipped)
    }
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let value = match key & 7 {
            VARINT => Field::Integer(varint(&mut message)?),
            EIGHT_BYTES => skip(&mut message, 8).map(|_| Field::Fixed)?,
            FOUR_BYTES => skip(&mut message, 4).map(|_| Field::Fixed)?,
            WITH_LENGTH => {
                let length = varint(&mut message)?;
                Field::Bytes(skip(&mut message, length)?)
            }
            _ => return None,
        };
        if key >> 3 == number {
            return Some(value);
        }
    }
    None
}

/// CRC-32C (Castagnoli) by byte, reflected polynomial 0x82f63b78 (RFC 3720, appendix B.4).
const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| crc >> 8 ^ CRC_TABLE[(crc as u8 ^ byte) as usize])
}

/// As TFRecord masks it, so that a CRC of bytes that hold CRCs is a good one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of RFC 3720, appendix B.4.
    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&std::array::from_fn::<u8, 32, _>(|place| place as u8)), 0x46dd_794e);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn what_came_after_the_checkpoint_or_is_damaged_is_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path()).unwrap();
        let path = folder.path().join(FOLDER).join(FILE);
        let version = std::fs::metadata(&path).unwrap().len() as usize;
        let mut ends = vec![];
        for (step, tag) in [
            (1, "training/loss"),
            (300, "training/loss"),
            (300, "validation_loss_by_hash/a"),
            (301, "training/loss"),
        ] {
            file.scalars(step, &[(tag, 0.5), ("x", f64::NAN)]).unwrap();
            ends.push(std::fs::metadata(&path).unwrap().len() as usize);
        }
        let bytes = std::fs::read(&path).unwrap();
        let kept = |bytes: &[u8], steps, last_validation_step| {
            kept_bytes(bytes, &TrainingSummary { steps, last_validation_step, ..TrainingSummary::default() })
        };
        assert_eq!(kept(&bytes, 0, 0), version);
        assert_eq!(kept(&bytes, 1, 0), ends[0]);
        assert_eq!(kept(&bytes, 300, 0), ends[1], "a validation that the checkpoint does not know of");
        assert_eq!(kept(&bytes, 300, 300), ends[2]);
        assert_eq!(kept(&bytes, 400, 400), bytes.len());
        for cut in ends[1]..ends[2] {
            assert_eq!(kept(&bytes[..cut], 400, 400), ends[1]);
            let mut flipped = bytes.clone();
            flipped[cut] ^= 0x10;
            assert_eq!(kept(&flipped, 400, 400), ends[1]);
        }
        assert_eq!(kept(&bytes[ends[0]..], 400, 400), 0, "no version");
        let summary = TrainingSummary { steps: 1, ..TrainingSummary::default() };
        drop(EventFile::resume(folder.path(), &summary).unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), bytes[..ends[0]]);
        EventFile::remove(folder.path()).unwrap();
        assert!(!folder.path().join(FOLDER).exists());
        EventFile::remove(folder.path()).unwrap();
    }
}
