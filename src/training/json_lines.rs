//! Files of JSON objects, one a line, that a run appends to and cuts back when it is resumed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// The open file; every object is on its way to the disk as soon as it was written.
pub struct JsonLines {
    path: PathBuf,
    file: BufWriter<File>,
}

impl JsonLines {
    /// Creates the file, or empties it.
    ///
    /// # Errors
    /// A file that cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|source| Error::file("create", path, source))?;
        Ok(Self { path: path.to_path_buf(), file: BufWriter::new(file) })
    }

    /// Opens the file of a run that goes on, which need not exist, and cuts off the first object that `is_kept` refuses with
    /// all after it.
    ///
    /// # Errors
    /// A file that cannot be read or cut.
    pub fn resume(path: &Path, mut is_kept: impl FnMut(&Value) -> bool) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|source| Error::file("read", path, source))?,
        };
        let mut kept_bytes = 0;
        for line in text.split_inclusive('\n') {
            // The last line of a run that was killed may be half a line.
            let object: Value = serde_json::from_str(line).unwrap_or_default();
            if !line.ends_with('\n') || !is_kept(&object) {
                break;
            }
            kept_bytes += line.len() as u64;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|file| file.set_len(kept_bytes).map(|()| file))
            .map_err(|source| Error::file("cut", path, source))?;
        Ok(Self { path: path.to_path_buf(), file: BufWriter::new(file) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends an object.
    ///
    /// # Errors
    /// A write that fails.
    pub fn write(&mut self, object: &Value) -> Result<()> {
        writeln!(self.file, "{object}")
            .and_then(|()| self.file.flush())
            .map_err(|source| Error::file("write", &self.path, source))
    }

    /// Forces what was written to the disk.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn sync(&self) -> Result<()> {
        self.file.get_ref().sync_data().map_err(|source| Error::file("write", &self.path, source))
    }
}
