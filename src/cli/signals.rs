//! SIGTERM and SIGINT: the first asks to save what there is and stop, the second ends the process. SIGHUP ends nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag::{register, register_conditional_shutdown};

use crate::error::{Error, ErrorKind, Result};

/// The exit code of a process that a signal ended.
const INTERRUPTED: i32 = 130;

/// What the process was asked for.
pub(super) struct Interrupts {
    is_requested: Arc<AtomicBool>,
    /// The next signal ends the process as interrupted.
    ends_process: Arc<AtomicBool>,
    /// The next signal ends the process as one that can be resumed.
    ends_resumable: Arc<AtomicBool>,
}

impl Interrupts {
    /// From here on a signal ends the process at once, since there is nothing to save yet.
    ///
    /// # Errors
    /// A system that refuses the handlers.
    pub(super) fn install() -> Result<Self> {
        let interrupts = Self {
            is_requested: Arc::default(),
            ends_process: Arc::new(AtomicBool::new(true)),
            ends_resumable: Arc::default(),
        };
        interrupts.register().map_err(|source| Error::internal("cannot handle signals").caused_by(source))?;
        Ok(interrupts)
    }

    fn register(&self) -> std::io::Result<()> {
        let resumable = i32::from(ErrorKind::Stopped.exit_code());
        for signal in [SIGTERM, SIGINT] {
            // In this order: the first signal must not meet what it sets.
            register_conditional_shutdown(signal, INTERRUPTED, Arc::clone(&self.ends_process))?;
            register_conditional_shutdown(signal, resumable, Arc::clone(&self.ends_resumable))?;
            register(signal, Arc::clone(&self.ends_process))?;
            register(signal, Arc::clone(&self.is_requested))?;
        }
        // A terminal that goes away does not end the run; nobody reads this flag.
        register(SIGHUP, Arc::default()).map(drop)
    }

    /// The run will go on from a checkpoint: until it does, a signal ends the process as one that can be resumed.
    pub(super) fn is_resumable(&self) {
        self.ends_resumable.store(true, Ordering::Relaxed);
        self.ends_process.store(false, Ordering::Relaxed);
    }

    /// From here on the first signal asks to save and stop, and the second ends the process.
    pub(super) fn arm(&self) {
        self.ends_process.store(false, Ordering::Relaxed);
        self.ends_resumable.store(false, Ordering::Relaxed);
    }

    /// Asks for the same as a signal: one that another process of the run got.
    pub(super) fn request(&self) {
        self.is_requested.store(true, Ordering::Relaxed);
    }

    /// Whether the work should save and stop.
    pub(super) fn is_requested(&self) -> bool {
        self.is_requested.load(Ordering::Relaxed)
    }
}
