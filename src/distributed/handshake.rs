//! What two processes say first: who is who, and that they speak of the same run.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Begins every hello. What follows is in the machine's own byte order: a machine of the other one has another version.
const MAGIC: [u8; 8] = *b"fastlora";
/// Of everything that is said on a connection.
const VERSION: u32 = 1;
/// A member says hello at once: who is silent for longer is none.
const SILENCE: Duration = Duration::from_secs(5);
/// Bytes of a text in an answer at most.
const MOST_TEXT: usize = 4096;

/// What a process says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub world_size: u32,
    pub rank: u32,
    /// Where the rank before it can connect, on the address that the hello comes from.
    pub port: u16,
}

/// Why a connection is not taken.
#[derive(Debug)]
pub(super) enum Stranger {
    /// No process of this program: not worth an answer.
    Foreign(String),
    /// One that would like to be a member and is told why it is none.
    Refused(String),
}

impl Hello {
    /// Says it.
    pub(super) fn send(&self, mut stream: &TcpStream) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        for number in [VERSION, self.world_size, self.rank] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes.extend(self.port.to_ne_bytes());
        stream.write_all(&bytes)
    }

    /// Hears it, from a member of a group of `world_size`.
    pub(super) fn receive(mut stream: &TcpStream, world_size: usize) -> Result<Self, Stranger> {
        let foreign = |error: io::Error| Stranger::Foreign(error.to_string());
        stream.set_read_timeout(Some(SILENCE)).map_err(foreign)?;
        stream.set_write_timeout(Some(SILENCE)).map_err(foreign)?;
        let mut magic = [0; MAGIC.len()];
        stream.read_exact(&mut magic).map_err(foreign)?;
        if magic != MAGIC {
            return Err(Stranger::Foreign("it is no fastlora".into()));
        }
        let mut numbers = [0; 3];
        for number in &mut numbers {
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).map_err(foreign)?;
            *number = u32::from_ne_bytes(bytes);
        }
        let mut port = [0; 2];
        stream.read_exact(&mut port).map_err(foreign)?;
        let [version, size, rank] = numbers;
        if version != VERSION {
            return Err(Stranger::Refused(
                "it is another version of fastlora, or of another byte order".into(),
            ));
        }
        if size as usize != world_size || rank >= size {
            return Err(Stranger::Refused(format!(
                "it is rank {rank} of {size} processes, here are {world_size}"
            )));
        }
        Ok(Self { world_size: size, rank, port: u16::from_ne_bytes(port) })
    }
}

/// Answers a hello: it is taken, with an address to connect to (or none), or refused with a reason.
pub(super) fn answer(mut stream: &TcpStream, answer: Result<&str, &str>) -> io::Result<()> {
    let (code, text) = match answer {
        Ok(text) => (0, text),
        Err(text) => (1, text),
    };
    let mut bytes = vec![code];
    bytes.extend((text.len() as u32).to_ne_bytes());
    bytes.extend(text.as_bytes());
    stream.write_all(&bytes)
}

/// The answer to a hello.
///
/// # Errors
/// A connection that fails, within it the refusal.
pub(super) fn hear_answer(mut stream: &TcpStream) -> io::Result<Result<String, String>> {
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let length = u32::from_ne_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if head[0] > 1 || length > MOST_TEXT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is none of fastlora's"));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    Ok(if head[0] == 0 { Ok(text) } else { Err(text) })
}
