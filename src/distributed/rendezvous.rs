//! How processes find each other. Rank 0 listens at an address that all know. Every other rank connects to it, says who it
//! is and where it listens itself, and is told where the next rank does. The connections with rank 0 of its two
//! neighbours become part of the ring, the others end.

use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tracing::{debug, warn};

use super::Group;
use super::handshake::{Hello, Stranger, answer, hear_answer};
use super::ring::Ring;
use crate::error::{Error, Result};

/// How long `fastlora train` waits for a process: to come, and in a run for its next message. A process that dies is noticed at
/// once, by its connections; this is for one that hangs, or whose machine went away without a word.
pub const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Between two looks for a connection.
const PAUSE: Duration = Duration::from_millis(10);

/// Rank 0 before the others have come.
#[derive(Debug)]
pub struct Host {
    listener: TcpListener,
    address: SocketAddr,
    world_size: usize,
}

impl Host {
    /// Listens at `address` alone; port 0 is any that is free.
    ///
    /// # Errors
    /// No process (config), an address that is not this machine's, or in use.
    pub fn bind(address: impl ToSocketAddrs, world_size: usize) -> Result<Self> {
        check_place(0, world_size)?;
        let listen = || {
            let listener = TcpListener::bind(address)?;
            let address = listener.local_addr()?;
            // Connections are looked for, so that waiting can end.
            listener.set_nonblocking(true).map(|()| (listener, address))
        };
        let (listener, address) = listen().map_err(|source| {
            Error::io("cannot listen for the other processes")
                .caused_by(source)
                .hint("rank 0 runs on the machine that the rendezvous names; another port may be free")
        })?;
        Ok(Self { listener, address, world_size })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the others. Connections that are none of theirs are dropped, with a line in the log. `check` is asked while
    /// there is nothing to do, and ends the waiting with its error.
    ///
    /// # Errors
    /// A process that does not come within `patience`, which is also the time that each later message may take.
    pub fn accept(self, patience: Duration, mut check: impl FnMut() -> Result<()>) -> Result<Group> {
        let Self { listener, world_size, .. } = self;
        let deadline = Instant::now() + patience;
        let mut members: Vec<Option<(TcpStream, SocketAddr)>> = (1..world_size).map(|_| None).collect();
        while members.iter().any(Option::is_none) {
            let missing = || {
                let ranks: Vec<String> = (1..world_size)
                    .filter(|rank| members[rank - 1].is_none())
                    .map(|rank| rank.to_string())
                    .collect();
                format!("rank {}", ranks.join(", "))
            };
            let (stream, hello) = next_member(&listener, world_size, deadline, &mut check, &missing)?;
            let place = (hello.rank as usize).checked_sub(1).and_then(|index| members.get_mut(index));
            match (place, stream.peer_addr()) {
                (Some(place), Ok(peer)) if place.is_none() => {
                    debug!("rank {} is at {peer}", hello.rank);
                    *place = Some((stream, SocketAddr::new(peer.ip(), hello.port)));
                }
                (_, Ok(_)) => refuse(&stream, &format!("there is a rank {} already", hello.rank)),
                (_, Err(error)) => warn!("a process came and left: {error}"),
            }
        }
        let members: Vec<(TcpStream, SocketAddr)> = members.into_iter().flatten().collect();
        for (index, (stream, _)) in members.iter().enumerate() {
            let next = members.get(index + 1).map(|(_, address)| address.to_string()).unwrap_or_default();
            answer(stream, Ok(&next)).map_err(|source| gone(index + 1, source))?;
        }
        let streams = (members.first(), members.last());
        Ring::new(
            0,
            world_size,
            streams.0.map(|(next, _)| next),
            streams.1.map(|(before, _)| before),
            patience,
        )
        .map(Group::new)
    }
}

/// Rank `rank` of `world_size`, from 1 on: connects to rank 0 at `address`, trying again while nobody listens there; then
/// `check` is asked, and ends the trying with its error.
///
/// # Errors
/// A rank that is none of theirs (config), an address that means nothing, nobody there within `patience`, or a refusal by rank
/// 0 (config).
pub fn join(
    address: &str,
    rank: usize,
    world_size: usize,
    patience: Duration,
    mut check: impl FnMut() -> Result<()>,
) -> Result<Group> {
    check_place(rank, world_size)?;
    if rank == 0 {
        return Err(Error::config("rank 0 is the one that the others join"));
    }
    let deadline = Instant::now() + patience;
    let host = loop {
        match connect(address, deadline) {
            Ok(stream) => break stream,
            Err(source) if Instant::now() >= deadline => {
                return Err(Error::io("rank 0 cannot be reached")
                    .at(address.to_string())
                    .caused_by(source)
                    .hint("is it running, and is this its address as seen from here?"));
            }
            Err(error) => debug!("{address}: {error}"),
        }
        check()?;
        sleep(20 * PAUSE);
    };
    let with_host = |source| gone(0, source);
    // On the way by which rank 0 is reached.
    let own = SocketAddr::new(host.local_addr().map_err(with_host)?.ip(), 0);
    let listener = Host::bind(own, world_size)?;
    let hello = Hello { world_size: world_size as u32, rank: rank as u32, port: listener.address.port() };
    hello.send(&host).map_err(with_host)?;
    let left = |deadline: Instant| Some(deadline.saturating_duration_since(Instant::now()).max(PAUSE));
    host.set_read_timeout(left(deadline)).map_err(with_host)?;
    let next_address = hear_answer(&host).map_err(with_host)?.map_err(|reason| {
        Error::config(format!("rank 0 at {address} does not take this process: {reason}"))
            .hint("each process needs a rank of its own, and all the same number of them")
    })?;

    // First all connect, then all accept and answer: nobody waits in a circle.
    let next_rank = (rank + 1) % world_size;
    let with_next = |source| gone(next_rank, source);
    let next = match next_rank {
        0 => None,
        _ => {
            let stream = connect(&next_address, deadline).map_err(with_next)?;
            hello.send(&stream).map_err(with_next)?;
            Some(stream)
        }
    };
    let before = match rank {
        1 => None,
        _ => Some(loop {
            let missing = || format!("rank {}", rank - 1);
            let (stream, hello) =
                next_member(&listener.listener, world_size, deadline, &mut || Ok(()), &missing)?;
            if hello.rank as usize == rank - 1 {
                answer(&stream, Ok("")).map_err(|source| gone(rank - 1, source))?;
                break stream;
            }
            refuse(&stream, &format!("rank {rank} waits for rank {}", rank - 1));
        }),
    };
    if let Some(next) = &next {
        next.set_read_timeout(left(deadline)).map_err(with_next)?;
        hear_answer(next)
            .map_err(with_next)?
            .map_err(|reason| Error::io(format!("rank {next_rank} does not take this process: {reason}")))?;
    }
    let (next, before) = (next.as_ref().unwrap_or(&host), before.as_ref().unwrap_or(&host));
    Ring::new(rank, world_size, Some(next), Some(before), patience).map(Group::new)
}

/// The next connection of a process of this program; others are dropped.
fn next_member(
    listener: &TcpListener,
    world_size: usize,
    deadline: Instant,
    check: &mut impl FnMut() -> Result<()>,
    missing: &impl Fn() -> String,
) -> Result<(TcpStream, Hello)> {
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                let hello = match stream.set_nonblocking(false) {
                    Ok(()) => Hello::receive(&stream, world_size),
                    Err(error) => Err(Stranger::Foreign(error.to_string())),
                };
                match hello {
                    Ok(hello) => return Ok((stream, hello)),
                    Err(Stranger::Foreign(reason)) => warn!("a connection from {peer} is dropped: {reason}"),
                    Err(Stranger::Refused(reason)) => refuse(&stream, &reason),
                }
            }
            // Nobody yet, or one who left before it was let in.
            Err(_) => {
                check()?;
                sleep(PAUSE);
            }
        }
        if Instant::now() >= deadline {
            return Err(Error::io(format!("{} did not come", missing()))
                .hint("start all processes; the log of the one that is missing may say why"));
        }
    }
}

fn check_place(rank: usize, world_size: usize) -> Result<()> {
    if rank < world_size && u32::try_from(world_size).is_ok() {
        return Ok(());
    }
    Err(Error::config(format!("there is no rank {rank} among {world_size} processes")))
}

fn refuse(stream: &TcpStream, reason: &str) {
    warn!("a process is refused: {reason}");
    // Whether it hears that is its own affair.
    let _ = answer(stream, Err(reason));
}

fn connect(address: &str, deadline: Instant) -> std::io::Result<TcpStream> {
    let mut last = None;
    for address in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now()).max(PAUSE);
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| std::io::Error::other("the name has no address")))
}

fn gone(rank: usize, source: std::io::Error) -> Error {
    super::ring::lost(rank, source)
}
