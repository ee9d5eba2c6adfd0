//! What can be known of a disk before anything is written to it.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::atomic::parent_of;
use crate::error::{Error, Result};

/// Refuses a folder (or, where it does not exist yet, the one it will be made in) that takes no new files.
///
/// # Errors
/// A file system that is read-only, or a folder without the right to write.
pub fn check_writable(folder: &Path) -> Result<()> {
    let folder = nearest_existing(folder);
    let name = c_name(folder)?;
    // SAFETY: the name is NUL-terminated and lives through the call, which keeps nothing.
    if unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) } == 0 {
        return Ok(());
    }
    Err(Error::file("write into", folder, io::Error::last_os_error()))
}

/// Bytes that the file system of a folder, or of the one it will be made in, has left for this user; none where it does
/// not tell.
pub fn free_bytes(folder: &Path) -> Option<u64> {
    let name = c_name(nearest_existing(folder)).ok()?;
    // SAFETY: all zeros is a value of this plain struct.
    let mut figures: libc::statvfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: the name is NUL-terminated, and both live through the call.
    let status = unsafe { libc::statvfs64(name.as_ptr(), &mut figures) };
    (status == 0 && figures.f_blocks > 0).then(|| figures.f_bavail.saturating_mul(figures.f_frsize))
}

/// Refuses a folder whose file system has fewer than `needed_bytes` left for this user.
///
/// # Errors
/// Too little space, with both numbers. A file system that does not tell is taken.
pub fn check_space(folder: &Path, needed_bytes: u64) -> Result<()> {
    let Some(free_bytes) = free_bytes(folder).filter(|free| *free < needed_bytes) else { return Ok(()) };
    Err(Error::io(format!(
        "{} free, the run writes up to {}",
        mebibytes(free_bytes),
        mebibytes(needed_bytes)
    ))
    .at(nearest_existing(folder).display().to_string())
    .hint("free some, name another folder with --output-dir, or lower keep_checkpoints or lora_r"))
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn nearest_existing(folder: &Path) -> &Path {
    let mut folder = folder;
    while !folder.exists() && parent_of(folder) != folder {
        folder = parent_of(folder);
    }
    folder
}

fn c_name(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::config("a folder's name has no NUL").at(path.display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_48_too_little_space_is_found_beforehand() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("not/yet/there");
        check_space(&inside, 1).unwrap();
        let error = check_space(&inside, u64::MAX).unwrap_err();
        assert_eq!(error.kind().exit_code(), 6);
        assert!(error.message().contains("MiB free"), "{error}");
        assert_eq!(error.location(), folder.path().to_str());
    }

    #[test]
    fn relative_folders_end_at_the_working_folder() {
        assert_eq!(nearest_existing(Path::new("no/such/folder")), Path::new("."));
        check_writable(Path::new("no/such/folder")).unwrap();
    }
}
