//! Tokenised data, kept in a file for the next start and mapped into memory instead of being held there.
//!
//! A file is named by its key: the SHA-256 of the data files' contents, the tokenizer and every setting that makes
//! tokens. It is written under another name, forced to the disk and renamed, so that runs that make the same one at
//! once do not meet; it is never changed, and may be deleted at any time.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::json;
use tempfile::NamedTempFile;
use tracing::{debug, info, warn};

use super::super::user_cache::user_cache;
use super::data::TextData;
use crate::checkpoint::atomic::sync_folder;
use crate::checkpoint::mapped::MappedFile;
use crate::checkpoint::volume::free_bytes;
use crate::config::{DataSource, TokenCache};
use crate::error::{Error, Result};
use crate::tokens::{Pages, SampleBuilder, SampleFile, SampleKey, SampleOptions, SampleSet, Tokenizer};

/// Overrides where `auto` keeps tokens.
const VARIABLE: &str = "FASTLORA_TOKEN_CACHE";
/// Bytes of data files from which on `auto` keeps tokens: fewer are tokenised in an instant.
const LEAST_BYTES: u64 = 16 << 20;
/// Bytes of tokens that text can well make, over its own.
const BYTES_PER_BYTE: u64 = 4;
/// Digits of the key in a file's name.
const NAME_DIGITS: usize = 32;
/// What ends the name of a file, and of one in the making.
const ENDING: &str = "tokens";
const PARTIAL: &str = "partial";
/// A file in the making is locked by then, if it is not a dead run's.
const LOCKED_AFTER: Duration = Duration::from_secs(60);

impl Pages for MappedFile {
    fn release(&self) {
        MappedFile::release(self);
    }
}

/// Samples to be made of data.
pub(super) struct Making<'a> {
    pub data: &'a TextData<'a>,
    pub tokenizer: Option<&'a Tokenizer>,
    pub options: &'a SampleOptions,
}

impl Making<'_> {
    /// The samples: those of an earlier run, or made and kept for a later one. Where they cannot be kept they are in
    /// memory, and a warning says why.
    ///
    /// # Errors
    /// What the data, the tokenizer or the chat template have wrong.
    pub(super) fn samples(&self, cache: &TokenCache) -> Result<SampleSet> {
        if let Some(folder) = folder_of(cache, self.data.sources)? {
            let key = self.key();
            let path = folder.join(&key.name()[..NAME_DIGITS]).with_extension(ENDING);
            if let Some(set) = self.kept(&path, &key) {
                return Ok(set);
            }
            if let Some(set) = self.keep(&folder, &path, &key)? {
                return Ok(set);
            }
        }
        let mut builder = self.builder()?;
        self.data.tokenise(&mut builder)?;
        Ok(builder.finish(&self.data.survey().accounting)?.into_set())
    }

    fn builder(&self) -> Result<SampleBuilder<'_>> {
        let builder = SampleBuilder::new(self.data.kinds(), self.tokenizer, self.options)?;
        Ok(builder.of_sources(self.data.sources))
    }

    /// Paths and weights are no part of it: they change no token.
    fn key(&self) -> SampleKey {
        let TextData { sources, options, .. } = self.data;
        let files: Vec<_> = sources
            .iter()
            .zip(&self.data.survey().files)
            .map(|(source, file)| {
                let DataSource { instruction_key, output_key, hash_key, hash, .. } = source;
                json!([file.fingerprint, instruction_key, output_key, hash_key, hash])
            })
            .collect();
        SampleKey::new(&json!({
            "files": files,
            "keys": [options.instruction_key, options.output_key, options.hash_key],
            "on_bad_record": options.on_bad_record,
            "tokenizer": self.tokenizer.map(Tokenizer::identity),
            "samples": self.options,
        }))
    }

    /// The samples in `path`, if they are whole and these.
    fn kept(&self, path: &Path, key: &SampleKey) -> Option<SampleSet> {
        if !path.exists() {
            return None;
        }
        match self.open(path, key) {
            Ok(set) => {
                info!("{}: tokens of an earlier run; nothing is tokenised", path.display());
                // Tells which files are in use; that it cannot be told hurts nobody.
                let _ = File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
                Some(set)
            }
            Err(reason) => {
                warn!("{}: {reason}; the data are tokenised again", path.display());
                None
            }
        }
    }

    fn open(&self, path: &Path, key: &SampleKey) -> Result<SampleSet, String> {
        let map = MappedFile::open(path).map_err(|error| error.message().to_string())?;
        SampleSet::from_file(Arc::new(map), key, self.data.sources, &self.data.survey().accounting)
    }

    /// Makes the samples in a file; none where that cannot be written.
    fn keep(&self, folder: &Path, path: &Path, key: &SampleKey) -> Result<Option<SampleSet>> {
        let stored = stored_bytes(self.data.sources);
        let cannot = |reason: &dyn std::fmt::Display| {
            warn!("tokens cannot be kept in {}: {reason}; they are in memory", folder.display());
            Ok(None)
        };
        let file = match begin(folder) {
            Ok(file) => file,
            Err(error) => return cannot(&error),
        };
        let wanted = stored.saturating_mul(BYTES_PER_BYTE);
        if let Some(free) = free_bytes(folder).filter(|free| *free < wanted) {
            return cannot(&format!("{free} bytes are free, {wanted} may be needed"));
        }
        let sample_file = match file.as_file().try_clone().and_then(SampleFile::new) {
            Ok(sample_file) => sample_file,
            Err(error) => return cannot(&error),
        };
        let mut builder = self.builder()?.into_file(sample_file);
        let made = self.data.tokenise(&mut builder);
        if let Some(error) = builder.write_error() {
            return cannot(error);
        }
        made?;
        let built = builder.finish(&self.data.survey().accounting)?;
        let finished = built.write(key).and_then(|()| {
            let staged = file.into_temp_path();
            fs::rename(&staged, path)?;
            // It has left.
            drop(staged.keep());
            sync_folder(folder).map_err(io::Error::other)
        });
        if let Err(error) = finished {
            return cannot(&error);
        }
        match self.open(path, key) {
            Ok(set) => {
                info!("{}: the tokens, for later runs", path.display());
                Ok(Some(set))
            }
            Err(reason) => cannot(&reason),
        }
    }
}

/// Where these data are kept; none: nowhere.
fn folder_of(cache: &TokenCache, sources: &[DataSource]) -> Result<Option<PathBuf>> {
    let variable = match (cache, std::env::var(VARIABLE)) {
        (TokenCache::Auto, Ok(text)) if !text.is_empty() => {
            text.parse().map_err(|error: Error| error.at(VARIABLE))?
        }
        _ => cache.clone(),
    };
    Ok(match variable {
        TokenCache::Off => None,
        TokenCache::Folder(folder) => Some(folder),
        TokenCache::Auto if stored_bytes(sources) < LEAST_BYTES => None,
        TokenCache::Auto => user_cache("tokens"),
    })
}

fn stored_bytes(sources: &[DataSource]) -> u64 {
    sources.iter().filter_map(|source| fs::metadata(&source.path).ok()).map(|metadata| metadata.len()).sum()
}

/// A file in the making, which is removed when it is dropped; so is what dead runs left.
fn begin(folder: &Path) -> io::Result<NamedTempFile> {
    fs::create_dir_all(folder)?;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new(PARTIAL)) && is_abandoned(&path) {
            debug!("removing {}, which a dead run left", path.display());
            // Another run may be doing the same.
            let _ = fs::remove_file(&path);
        }
    }
    let file = tempfile::Builder::new().suffix(&format!(".{PARTIAL}")).tempfile_in(folder)?;
    // The lock ends with the process. Where there are no locks, what dead runs left stays.
    let _ = file.as_file().try_lock();
    Ok(file)
}

fn is_abandoned(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let age = file.metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
    matches!(age, Ok(Ok(age)) if age > LOCKED_AFTER) && file.try_lock().is_ok()
}
