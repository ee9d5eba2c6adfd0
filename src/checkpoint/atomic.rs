//! Files that appear whole or not at all, whatever is cut off when.
//!
//! A save is staged in a folder beside its destination, forced to the disk, and then takes its place by renames.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes a new file and forces it to the disk.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        close(file)
    };
    write().map_err(|source| Error::file("write", path, source))
}

/// Closes a file; network file systems tell of failed writes only here, and dropping would not.
fn close(file: File) -> io::Result<()> {
    // SAFETY: the descriptor was the file's alone, and is used no more.
    let status = unsafe { libc::close(file.into_raw_fd()) };
    let error = io::Error::last_os_error();
    // Interrupted, it is closed all the same on Linux.
    if status == 0 || error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) }
}

/// Replaces the file `path`, or makes it: it has the old content or the new one, never a part.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = path.with_file_name(format!(".{name}.partial"));
    let replaced = remove_file(&staged).and_then(|()| write_synced(&staged, bytes)).and_then(|()| {
        fs::rename(&staged, path).map_err(|source| Error::file("replace", path, source))?;
        sync_folder(parent_of(path))
    });
    if replaced.is_err() {
        // The first error is the one to tell.
        let _ = remove_file(&staged);
    }
    replaced
}

/// Forces a folder's entries (names, not contents) to the disk.
pub fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|source| Error::file("sync", path, source))
}

/// A folder in which a save is built. It is removed when dropped, and so is what a dead run left under its name.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    /// Holds the only copy of something: not removed.
    is_kept: bool,
}

impl Staging {
    /// An empty folder `.NAME.partial` in `parent`, which is created where it is missing.
    pub fn new(parent: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(parent).map_err(|source| Error::file("create", parent, source))?;
        let path = parent.join(format!(".{name}.partial"));
        remove_folder(&path)?;
        fs::create_dir(&path).map_err(|source| Error::file("create", &path, source))?;
        Ok(Self { path, is_kept: false })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the staged folder the folder `destination` (a sibling of it) in one step. What stood there before is
    /// gone afterwards.
    pub fn replace_folder(self, destination: &Path) -> Result<()> {
        sync_folder(&self.path)?;
        let exchanged = if destination.symlink_metadata().is_ok() {
            exchange(&self.path, destination)
        } else {
            fs::rename(&self.path, destination)
        };
        exchanged.map_err(|source| Error::file("replace", destination, source))?;
        sync_folder(parent_of(destination))
    }

    /// Moves the staged files `names` into the folder `destination`, in that order; the last one is the commit
    /// point: its predecessor leaves first, so that a cut shows no mixture of old and new. A failure puts
    /// everything back.
    pub fn move_files(mut self, destination: &Path, names: &[String]) -> Result<()> {
        let mut renamed = Vec::new();
        let moved = self.move_in(destination, names, &mut renamed);
        if moved.is_err() {
            for (from, to) in renamed.iter().rev() {
                if let Err(source) = fs::rename(to, from) {
                    self.is_kept = true;
                    tracing::warn!("cannot put {} back, it is {}: {source}", from.display(), to.display());
                }
            }
        }
        moved
    }

    fn move_in(
        &self,
        destination: &Path,
        names: &[String],
        renamed: &mut Vec<(PathBuf, PathBuf)>,
    ) -> Result<()> {
        let previous = self.path.join("previous");
        fs::create_dir(&previous).map_err(|source| Error::file("create", &previous, source))?;
        sync_folder(&self.path)?;
        let mut rename = |from: PathBuf, to: PathBuf| {
            fs::rename(&from, &to).map_err(|source| Error::file("replace", &to, source))?;
            renamed.push((from, to));
            Ok(())
        };
        for name in names.iter().rev() {
            if destination.join(name).is_file() {
                rename(destination.join(name), previous.join(name))?;
            }
        }
        sync_folder(destination)?;
        for name in names {
            rename(self.path.join(name), destination.join(name))?;
        }
        sync_folder(destination)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        if let Err(error) = remove_folder(&self.path) {
            tracing::warn!("{error}");
        }
    }
}

/// The folder that holds `path`.
pub fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Removes a folder, which need not be there, with all that is in it.
pub fn remove_folder(path: &Path) -> Result<()> {
    unless_missing(path, fs::remove_dir_all(path))
}

/// Removes a file, which need not be there.
pub fn remove_file(path: &Path) -> Result<()> {
    unless_missing(path, fs::remove_file(path))
}

fn unless_missing(path: &Path, removed: io::Result<()>) -> Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", path, error)),
        _ => Ok(()),
    }
}

/// Swaps two directory entries in one step, so that `destination` is never missing.
fn exchange(staged: &Path, destination: &Path) -> io::Result<()> {
    let staged_name = CString::new(staged.as_os_str().as_bytes())?;
    let destination_name = CString::new(destination.as_os_str().as_bytes())?;
    // SAFETY: both names are NUL-terminated and live through the call, which keeps neither.
    let status = unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            staged_name.as_ptr(),
            libc::AT_FDCWD,
            destination_name.as_ptr(),
            libc::RENAME_EXCHANGE,
        )
    };
    if status == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) {
        return Err(error);
    }
    // A file system without the exchange (NFS): the old one steps aside, and comes back if the new one cannot enter.
    let aside = staged.join("previous");
    fs::rename(destination, &aside)?;
    let entered = fs::rename(staged, destination);
    match entered {
        Ok(()) => fs::remove_dir_all(destination.join("previous")),
        Err(error) => fs::rename(&aside, destination).and(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staged(parent: &Path, files: &[(&str, &str)]) -> Staging {
        let staging = Staging::new(parent, "save").unwrap();
        for (name, text) in files {
            write_synced(&staging.path().join(name), text.as_bytes()).unwrap();
        }
        staging
    }

    fn entries(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let parent = tempfile::tempdir().unwrap();
        let destination = parent.path().join("best");
        staged(parent.path(), &[("a", "old"), ("b", "old")]).replace_folder(&destination).unwrap();
        assert_eq!(entries(&destination), ["a", "b"]);
        staged(parent.path(), &[("a", "new")]).replace_folder(&destination).unwrap();
        assert_eq!(entries(&destination), ["a"]);
        assert_eq!(fs::read_to_string(destination.join("a")).unwrap(), "new");
        assert_eq!(entries(parent.path()), ["best"]);
    }

    #[test]
    fn files_move_in_beside_others() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("metrics"), "kept").unwrap();
        fs::write(parent.path().join("model"), "old").unwrap();
        let names = ["config".to_string(), "model".to_string()];
        staged(parent.path(), &[("config", "new"), ("model", "new")])
            .move_files(parent.path(), &names)
            .unwrap();
        assert_eq!(entries(parent.path()), ["config", "metrics", "model"]);
        assert_eq!(fs::read_to_string(parent.path().join("model")).unwrap(), "new");
    }

    #[test]
    fn a_move_that_fails_puts_the_old_files_back() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("config"), "old").unwrap();
        fs::write(parent.path().join("model"), "old").unwrap();
        // A folder in the way of a file: the rename fails after others succeeded.
        fs::create_dir_all(parent.path().join("card/inside")).unwrap();
        let names = ["config".to_string(), "card".to_string(), "model".to_string()];
        let staging = staged(parent.path(), &[("config", "new"), ("card", "new"), ("model", "new")]);
        let error = staging.move_files(parent.path(), &names).unwrap_err();
        assert!(error.to_string().contains("card"), "{error}");
        assert_eq!(entries(parent.path()), ["card", "config", "model"]);
        for name in ["config", "model"] {
            assert_eq!(fs::read_to_string(parent.path().join(name)).unwrap(), "old", "{name}");
        }
    }

    #[test]
    fn fault_52_leftovers_of_a_dead_run_are_cleaned() {
        let parent = tempfile::tempdir().unwrap();
        fs::create_dir(parent.path().join(".save.partial")).unwrap();
        fs::write(parent.path().join(".save.partial/half"), "").unwrap();
        let staging = Staging::new(parent.path(), "save").unwrap();
        assert_eq!(entries(staging.path()), [""; 0]);
        drop(staging);
        assert_eq!(entries(parent.path()), [""; 0]);
    }
}
