//! Messages around the ring of processes, and how all of them learn of an end.
//!
//! A message is one byte that says what it is, its length in bytes (u64) and its content. A process that fails says why to
//! the next rank, which passes it on and ends: so a reason goes around once, and the connections behind it close.

use std::io::{self, ErrorKind as Io, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::RangeInclusive;
use std::thread;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result, shorten};

/// What a message is.
const DATA: u8 = 1;
/// Why a process ends: the kind of its error (the exit code), and the text.
const END: u8 = 2;
/// Bytes of that text at most.
const MOST_TEXT: u64 = 64 << 10;
/// Characters of it that are sent.
const SENT_CHARACTERS: usize = 4096;
/// How long a process that cannot send waits for the reason to come around.
const REASON_PATIENCE: Duration = Duration::from_secs(2);

/// Bytes of a message that is passed over at most.
const MOST_SKIPPED: usize = 1 << 30;

/// A process's place among `world_size`, with its two neighbours.
#[derive(Debug)]
pub(super) struct Ring {
    pub rank: usize,
    pub world_size: usize,
    /// None where the process is alone, or the group has ended.
    neighbours: Option<Neighbours>,
}

#[derive(Debug)]
struct Neighbours {
    next: TcpStream,
    before: TcpStream,
}

/// What a neighbour did instead of sending what was expected.
enum Failure {
    /// It says why it ends.
    Told(Error),
    /// The connection failed.
    Broken(io::Error),
    /// It sent something else.
    Unexpected(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Broken(error)
    }
}

impl Ring {
    /// `next` and `before` may be one connection, and are none where the process is alone.
    pub(super) fn new(
        rank: usize,
        world_size: usize,
        next: Option<&TcpStream>,
        before: Option<&TcpStream>,
        patience: Duration,
    ) -> Result<Self> {
        let prepare = |stream: &TcpStream| {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            stream.try_clone()
        };
        let neighbours = match (next, before) {
            (Some(next), Some(before)) => {
                let prepared =
                    prepare(next).and_then(|next| Ok(Neighbours { next, before: prepare(before)? }));
                Some(prepared.map_err(|error| Error::io("cannot set up a connection").caused_by(error))?)
            }
            _ => None,
        };
        Ok(Self { rank, world_size, neighbours })
    }

    /// Sends `out` to the next rank while a message, whose length must be in `lengths`, comes from the one before. Both at
    /// once: if all were to send first, long messages would fill the buffers between them, and all would wait for ever.
    pub(super) fn shift(
        &mut self,
        out: &[u8],
        incoming: &mut Vec<u8>,
        lengths: RangeInclusive<usize>,
    ) -> Result<()> {
        let Neighbours { next, before } = self.neighbours()?;
        let exchanged: Result<_> = thread::scope(|scope| {
            let sender =
                thread::Builder::new().name("send".into()).spawn_scoped(scope, || write(next, DATA, out));
            let sender = sender.map_err(|error| Error::device("cannot start a thread").caused_by(error))?;
            let received = read(before, incoming, &lengths);
            let sent = sender.join().unwrap_or_else(|_| Err(io::Error::other("the sender panicked")));
            Ok((sent, received))
        });
        let (sent, received) = exchanged.inspect_err(|error| self.abort(error))?;
        self.finish(sent, received)
    }

    /// Sends `out` to the next rank.
    pub(super) fn send(&mut self, out: &[u8]) -> Result<()> {
        let sent = write(&self.neighbours()?.next, DATA, out);
        self.finish(sent, Ok(()))
    }

    /// Receives a message from the rank before.
    pub(super) fn receive(&mut self, incoming: &mut Vec<u8>, lengths: RangeInclusive<usize>) -> Result<()> {
        let received = read(&self.neighbours()?.before, incoming, &lengths);
        self.finish(Ok(()), received)
    }

    /// Tells the next rank, and through it all, why this process ends, and closes the connections.
    pub(super) fn abort(&mut self, reason: &Error) {
        let text = format!("rank {} has failed: {reason}", self.rank);
        self.end(reason.kind(), &text);
    }

    fn neighbours(&self) -> Result<&Neighbours> {
        self.neighbours.as_ref().ok_or_else(|| Error::io("the group of processes has ended"))
    }

    fn finish(&mut self, sent: io::Result<()>, received: Result<(), Failure>) -> Result<()> {
        let (next, before) =
            ((self.rank + 1) % self.world_size, (self.rank + self.world_size - 1) % self.world_size);
        let error = match (received, sent) {
            (Ok(()), Ok(())) => return Ok(()),
            (Err(Failure::Told(error)), _) => error,
            (Err(Failure::Broken(error)), _) => lost(before, error),
            (Err(Failure::Unexpected(what)), _) => {
                Error::internal(format!("rank {before} {what}: the processes do not do the same"))
            }
            // The next rank may have ended because of another, whose name comes the other way round.
            (Ok(()), Err(error)) => self.reason().unwrap_or_else(|| lost(next, error)),
        };
        self.end(error.kind(), error.message());
        Err(error)
    }

    /// What the rank before says of the end, if it does so soon.
    fn reason(&self) -> Option<Error> {
        let before = &self.neighbours.as_ref()?.before;
        before.set_read_timeout(Some(REASON_PATIENCE)).ok()?;
        let mut skipped = Vec::new();
        loop {
            match read(before, &mut skipped, &(0..=MOST_SKIPPED)) {
                Ok(()) => {}
                Err(Failure::Told(error)) => return Some(error),
                Err(_) => return None,
            }
        }
    }

    fn end(&mut self, kind: ErrorKind, text: &str) {
        let Some(Neighbours { next, before }) = self.neighbours.take() else { return };
        let mut content = vec![kind.exit_code()];
        content.extend(shorten(text, SENT_CHARACTERS).as_bytes());
        // Who does not listen any more needs no reason.
        let _ = next.set_write_timeout(Some(REASON_PATIENCE));
        let _ = write(&next, END, &content);
        let _ = next.shutdown(Shutdown::Write);
        drop(before);
    }
}

/// A process is gone, or silent for too long.
pub(super) fn lost(rank: usize, source: io::Error) -> Error {
    let what = match source.kind() {
        Io::WouldBlock | Io::TimedOut => "has said nothing for too long",
        _ => "is gone",
    };
    Error::io(format!("rank {rank} {what}"))
        .caused_by(source)
        .hint("its own log may say why; start all processes again, with --resume to go on from the newest checkpoint")
}

fn write(mut stream: &TcpStream, what: u8, content: &[u8]) -> io::Result<()> {
    let mut head = [what; 9];
    head[1..].copy_from_slice(&(content.len() as u64).to_ne_bytes());
    stream.write_all(&head)?;
    stream.write_all(content)
}

/// Reads a message into `content`, which grows only as far as `lengths` allows.
fn read(
    mut stream: &TcpStream,
    content: &mut Vec<u8>,
    lengths: &RangeInclusive<usize>,
) -> Result<(), Failure> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let [what, length @ ..] = head;
    let length = u64::from_ne_bytes(length);
    match what {
        DATA if usize::try_from(length).is_ok_and(|length| lengths.contains(&length)) => {
            content.resize(length as usize, 0);
            Ok(stream.read_exact(content)?)
        }
        END if (1..=MOST_TEXT).contains(&length) => {
            let mut content = vec![0; length as usize];
            stream.read_exact(&mut content)?;
            Err(Failure::Told(told(content[0], &content[1..])))
        }
        DATA => {
            let (least, most) = (lengths.start(), lengths.end());
            Err(Failure::Unexpected(format!("sent {length} bytes, expected {least} to {most}")))
        }
        _ => Err(Failure::Unexpected("sent what is no message".into())),
    }
}

/// The error of another process.
fn told(exit_code: u8, text: &[u8]) -> Error {
    use ErrorKind::{Config, Corrupt, Data, Device, Internal, Model, Numerical, Stopped};
    let kinds = [Internal, Config, Data, Model, Device, Numerical, Corrupt, Stopped];
    let kind = kinds.into_iter().find(|kind| kind.exit_code() == exit_code).unwrap_or(ErrorKind::Io);
    Error::new(kind, String::from_utf8_lossy(text)).hint(
        "once that is mended, start all processes again, with --resume to go on from the newest checkpoint",
    )
}
