//! The hub's cache: `models--org--name/{refs/REVISION, snapshots/COMMIT/FILE → ../../blobs/ETAG}`.

use std::fs;
use std::path::{Path, PathBuf};

use super::{HubSettings, ModelId, is_plain};
use crate::checkpoint::shard_index::{INDEX, read_index, shard_names};
use crate::error::{Error, Result};

pub(super) const WEIGHTS: &str = "model.safetensors";
pub(super) const CONFIG: &str = "config.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";

/// One model's part of the cache.
pub(super) struct ModelCache {
    folder: PathBuf,
    locks: PathBuf,
}

/// One commit of a model in the cache, with configuration and weights complete.
pub(super) struct Snapshot {
    pub(super) folder: PathBuf,
    pub(super) commit: String,
    pub(super) has_tokenizer: bool,
}

impl ModelCache {
    pub(super) fn new(settings: &HubSettings, id: &ModelId) -> Self {
        let name = format!("models--{}", id.name.replace('/', "--"));
        Self { folder: settings.cache.join(&name), locks: settings.cache.join(".locks").join(name) }
    }

    /// The snapshot that a branch, tag or commit stood for when it was fetched, if it is complete.
    pub(super) fn find(&self, revision: &str) -> Option<Snapshot> {
        let commit = match fs::read_to_string(self.folder.join("refs").join(revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => revision.to_owned(),
        };
        is_plain(&commit).then(|| self.snapshot(&commit)).flatten()
    }

    /// The snapshot of a commit, if configuration and weights are complete.
    pub(super) fn snapshot(&self, commit: &str) -> Option<Snapshot> {
        let folder = self.snapshot_folder(commit);
        // A link whose blob is gone does not count.
        let has = |name: &str| folder.join(name).is_file();
        let weights =
            has(WEIGHTS) || shards(&folder.join(INDEX)).is_ok_and(|names| names.iter().all(|name| has(name)));
        let has_tokenizer = has(TOKENIZER);
        (has(CONFIG) && weights).then(|| Snapshot { commit: commit.to_owned(), has_tokenizer, folder })
    }

    pub(super) fn snapshot_folder(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Held while a blob is fetched, by `huggingface_hub` too. Waits for another process that fetches the same.
    pub(super) fn lock(&self, etag: &str) -> Result<fs::File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = fs::File::create(&path).map_err(|error| Error::file("create", &path, error))?;
        file.lock().map_err(|error| Error::file("lock", &path, error))?;
        Ok(file)
    }

    /// Makes the snapshot's file a link to its blob.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<()> {
        let path = self.snapshot_folder(commit).join(name);
        create_parent(&path)?;
        if path.symlink_metadata().is_ok() {
            fs::remove_file(&path).map_err(|error| Error::file("replace", &path, error))?;
        }
        let target = Path::new("../../blobs").join(etag);
        std::os::unix::fs::symlink(target, &path).map_err(|error| Error::file("link", &path, error))
    }

    /// Remembers which commit a branch or tag stands for.
    pub(super) fn set_reference(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(|error| Error::file("write", &path, error))
    }
}

pub(super) fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(|error| Error::file("create", parent, error)),
        None => Ok(()),
    }
}

/// The shards that an index file names, each a plain file name.
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let weight_map = read_index(index)?;
    let names = shard_names(&weight_map);
    match names.iter().find(|name| !is_plain(name)) {
        Some(name) => {
            let error = format!("shard {name:?} is not a plain file name");
            Err(Error::model(error).at(index.display().to_string()))
        }
        None => Ok(names.into_iter().map(str::to_owned).collect()),
    }
}
