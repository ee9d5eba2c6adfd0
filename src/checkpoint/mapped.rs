//! Read-only memory maps of weight files that survive damage to the file.
//!
//! When a mapped file is truncated by another program, or its disk fails, reading the lost part raises SIGBUS. A handler,
//! installed with the first map, puts zero pages in place of the lost part and marks the file; [`check_intact`] then
//! reports it. Loading, training and generation ask between steps, so that nothing computed from zeros is ever kept.

use std::ffi::c_int;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A whole file mapped read-only. Dropping it unmaps the file.
pub struct MappedFile {
    map: Mmap,
    path: PathBuf,
    slot: usize,
}

/// One live map, as the signal handler sees it.
struct Slot {
    /// First address; 0 while the slot is free.
    start: AtomicUsize,
    end: AtomicUsize,
    damaged: AtomicBool,
}

/// The handler may not lock, so maps live in a table of fixed size.
static SLOTS: [Slot; 1024] = [const {
    Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), damaged: AtomicBool::new(false) }
}; 1024];
static ANY_DAMAGED: AtomicBool = AtomicBool::new(false);
/// The paths of the slots in use; also the lock under which slots are taken and given back.
static PATHS: Mutex<Vec<Option<PathBuf>>> = Mutex::new(Vec::new());
static PREVIOUS_ACTION: OnceLock<libc::sigaction> = OnceLock::new();
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(4096);

impl MappedFile {
    /// Maps the regular file at `path`.
    ///
    /// # Errors
    /// Model errors when it is missing, empty or no regular file; I/O errors else.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::model("the file is missing").at(path.display().to_string())
            }
            _ => Error::file("open", path, error),
        })?;
        let metadata = file.metadata().map_err(|error| Error::file("inspect", path, error))?;
        if !metadata.is_file() || metadata.len() == 0 {
            let found = if metadata.is_file() { "the file is empty" } else { "found no regular file" };
            return Err(Error::model(format!("{found}, expected weights")).at(path.display().to_string()));
        }
        install_handler()?;
        // SAFETY: the map is read-only and private to this type, which hands out only shared byte slices. Another program
        // may still change the file: changed bytes are valid bytes, and loss of the file's end is caught by the handler.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::file("map", path, error))?;
        let slot = register(&map, path)?;
        Ok(Self { map, path: path.to_owned(), slot })
    }

    /// The mapped bytes. Bytes that the file lost read as zero; see [`MappedFile::check_intact`].
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fails when a part of this file was found lost.
    pub fn check_intact(&self) -> Result<()> {
        match SLOTS[self.slot].damaged.load(Ordering::Acquire) {
            true => Err(damaged(&self.path)),
            false => Ok(()),
        }
    }

    /// Takes the file's pages out of the process's memory; they are read again when they are touched.
    pub(crate) fn release(&self) {
        // SAFETY: the map is shared and read-only, so that a page which is dropped comes back from the file as it was; one
        // that the handler replaced comes back as zeros, as it was too.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    /// Asks the system to read the file ahead.
    pub(crate) fn read_ahead(&self) {
        // Only advice: without it pages are read when touched.
        let _ = self.map.advise(memmap2::Advice::WillNeed);
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        let mut paths = paths();
        SLOTS[self.slot].start.store(0, Ordering::Release);
        SLOTS[self.slot].damaged.store(false, Ordering::Release);
        paths[self.slot] = None;
    }
}

/// Fails when any file mapped now was found damaged since it was mapped: what was computed from it is worthless.
///
/// Costs one atomic load while all is well.
///
/// # Errors
/// A model error that names the file.
pub fn check_intact() -> Result<()> {
    if !ANY_DAMAGED.load(Ordering::Acquire) {
        return Ok(());
    }
    let paths = paths();
    let lost = paths.iter().zip(&SLOTS).find(|(_, slot)| slot.damaged.load(Ordering::Acquire));
    match lost {
        Some((Some(path), _)) => Err(damaged(path)),
        _ => Ok(()),
    }
}

fn damaged(path: &Path) -> Error {
    Error::model("the file was truncated or became unreadable while in use")
        .at(path.display().to_string())
        .hint("restore the file and run again; nothing computed from it was kept")
}

fn paths() -> MutexGuard<'static, Vec<Option<PathBuf>>> {
    PATHS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn register(map: &Mmap, path: &Path) -> Result<usize> {
    let mut paths = paths();
    let slot = paths.iter().position(Option::is_none).unwrap_or(paths.len());
    if slot == SLOTS.len() {
        return Err(Error::io(format!("more than {} weight files open at once", SLOTS.len()))
            .at(path.display().to_string()));
    }
    if slot == paths.len() {
        paths.push(None);
    }
    paths[slot] = Some(path.to_owned());
    let start = map.as_ptr().addr();
    SLOTS[slot].end.store(start + map.len(), Ordering::Release);
    SLOTS[slot].start.store(start, Ordering::Release);
    Ok(slot)
}

fn install_handler() -> Result<()> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    // SAFETY: sysconf and sigaction get valid arguments; an all-zero sigaction is a valid value. `PREVIOUS_ACTION` and
    // `PAGE_BYTES` are set before the handler can run.
    let status = unsafe {
        if let Ok(bytes) = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)) {
            PAGE_BYTES.store(bytes, Ordering::Release);
        }
        let mut previous: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous);
        let _ = PREVIOUS_ACTION.set(previous);
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut())
    };
    if status != 0 {
        return Err(Error::io("cannot install a SIGBUS handler").caused_by(std::io::Error::last_os_error()));
    }
    *installed = true;
    Ok(())
}

/// Runs in signal context: atomics and system calls only.
extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for a handler with SA_SIGINFO; si_addr is meaningful for codes above 0,
    // which the kernel alone sets.
    let address = unsafe { if (*info).si_code > 0 { (*info).si_addr().addr() } else { 0 } };
    if address != 0 && replace_lost_pages(address) {
        return;
    }
    chain(signal, info, context);
}

/// Maps zero pages from the page of `address` to the end of the map that it lies in, if it is one of ours.
fn replace_lost_pages(address: usize) -> bool {
    for slot in &SLOTS {
        let start = slot.start.load(Ordering::Acquire);
        let end = slot.end.load(Ordering::Acquire);
        if start == 0 || !(start..end).contains(&address) {
            continue;
        }
        let page = address & !(PAGE_BYTES.load(Ordering::Acquire) - 1);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let target = std::ptr::without_provenance_mut(page);
        // SAFETY: page..end lies inside a live map of this module: the faulting thread reads through a borrow of it, so it
        // cannot be unmapped now, and MAP_FIXED replaces nothing else. The range stays readable throughout.
        let replaced = unsafe { libc::mmap(target, end - page, libc::PROT_READ, flags, -1, 0) };
        if replaced == libc::MAP_FAILED {
            return false;
        }
        slot.damaged.store(true, Ordering::Release);
        ANY_DAMAGED.store(true, Ordering::Release);
        return true;
    }
    false
}

/// What would have happened without this module.
fn chain(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    type WithInfo = extern "C" fn(c_int, *mut libc::siginfo_t, *mut libc::c_void);
    type Plain = extern "C" fn(c_int);
    let previous = PREVIOUS_ACTION.get();
    match previous {
        Some(previous) if ![libc::SIG_DFL, libc::SIG_IGN].contains(&previous.sa_sigaction) => {
            // SAFETY: the address was registered as a handler of exactly this signature, which sa_flags tells.
            unsafe {
                if previous.sa_flags & libc::SA_SIGINFO != 0 {
                    std::mem::transmute::<usize, WithInfo>(previous.sa_sigaction)(signal, info, context);
                } else {
                    std::mem::transmute::<usize, Plain>(previous.sa_sigaction)(signal);
                }
            }
        }
        // SAFETY: both calls are async-signal-safe; returning re-runs the faulting instruction, which then ends the
        // process as it should. A signal sent by a process is sent again.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
            if (*info).si_code <= 0 {
                libc::raise(signal);
            }
        },
    }
}
