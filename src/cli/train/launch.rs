//! The processes that `--processes` starts, and their end.

use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tracing::warn;

use super::processes::LAUNCHED;
use crate::distributed::Group;
use crate::error::{Error, Result};

/// How long processes that have been told to end may take.
const GRACE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);

/// This process among the others.
pub(super) struct Joined {
    pub group: Group,
    pub workers: Workers,
}

impl Joined {
    /// Ends with `result`: the others learn of an error, and theirs is one where there would be none.
    pub(super) fn end(mut self, result: Result<()>) -> Result<()> {
        match result {
            Ok(()) => self.workers.finish(),
            Err(error) => {
                self.group.abort(&error);
                Err(error)
            }
        }
    }
}

/// Processes that this one started, with their ranks. They end with it.
#[derive(Default)]
pub(super) struct Workers {
    children: Vec<(usize, Child)>,
}

impl Workers {
    /// Starts ranks 1 to `count` − 1 with this process's own arguments; they find it at `address`.
    ///
    /// # Errors
    /// A system that starts no process.
    pub(super) fn start(count: usize, address: SocketAddr) -> Result<Self> {
        let mut workers = Self::default();
        for rank in 1..count {
            let start = || {
                Command::new(std::env::current_exe()?)
                    .args(std::env::args_os().skip(1))
                    .env(LAUNCHED, format!("{rank}@{address}"))
                    .stdin(Stdio::null())
                    // Results are the first's to tell.
                    .stdout(Stdio::null())
                    .spawn()
            };
            let child = start().map_err(|source| {
                Error::io(format!("cannot start the process of rank {rank}")).caused_by(source)
            })?;
            workers.children.push((rank, child));
        }
        Ok(workers)
    }

    /// # Errors
    /// One that has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        for (rank, child) in &mut self.children {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(ended(*rank, status));
            }
        }
        Ok(())
    }

    /// Waits until all have ended.
    ///
    /// # Errors
    /// One that did not end well.
    fn finish(&mut self) -> Result<()> {
        let mut result = Ok(());
        for (rank, mut child) in self.children.drain(..) {
            match child.wait() {
                Ok(status) if status.success() => {}
                Ok(status) => result = result.and(Err(ended(rank, status))),
                Err(error) => warn!("rank {rank} cannot be waited for: {error}"),
            }
        }
        result
    }
}

impl Drop for Workers {
    /// Where the run failed: they have been told, and are ended where they do not listen.
    fn drop(&mut self) {
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline && self.children.iter_mut().any(|(_, child)| is_running(child)) {
            std::thread::sleep(PAUSE);
        }
        for (_, child) in &mut self.children {
            if is_running(child) {
                // It ended just now, or it ends now.
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

fn is_running(child: &mut Child) -> bool {
    matches!(child.try_wait(), Ok(None))
}

fn ended(rank: usize, status: ExitStatus) -> Error {
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".into(),
    };
    Error::io(format!("the process of rank {rank} ended with {how}")).hint("its own log says why")
}
