//! What the hub's cache holds, and whether it can hold more.

use std::fs;
use std::path::Path;

use crate::checkpoint::volume::{check_writable, free_bytes};
use crate::error::Error;

/// The state of the hub's cache.
#[derive(Debug)]
pub struct CacheUsage {
    /// Each model's id and bytes, by name.
    pub models: Vec<(String, u64)>,
    /// Bytes that the file system has left for it, where that can be told.
    pub free_bytes: Option<u64>,
    /// Why nothing can be written there.
    pub obstacle: Option<Error>,
}

/// Looks at a cache folder, which need not exist yet.
pub fn cache_usage(folder: &Path) -> CacheUsage {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut models: Vec<(String, u64)> = entries
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().strip_prefix("models--")?.replace("--", "/");
            Some((name, bytes_below(&entry.path())))
        })
        .collect();
    models.sort();
    CacheUsage { models, free_bytes: free_bytes(folder), obstacle: check_writable(folder).err() }
}

/// Bytes of the files below `folder`; links, such as a snapshot's to its blobs, count nothing.
fn bytes_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let kind = entry.file_type().ok()?;
            match () {
                () if kind.is_dir() => Some(bytes_below(&entry.path())),
                () if kind.is_file() => Some(entry.metadata().ok()?.len()),
                () => None,
            }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_listed_with_the_bytes_of_their_blobs_alone() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("models--org--name");
        fs::create_dir_all(model.join("blobs")).unwrap();
        fs::create_dir_all(model.join("snapshots/1")).unwrap();
        fs::write(model.join("blobs/a"), [0; 300]).unwrap();
        std::os::unix::fs::symlink("../../blobs/a", model.join("snapshots/1/model.safetensors")).unwrap();
        fs::write(folder.path().join("version.txt"), "1").unwrap();
        let usage = cache_usage(folder.path());
        assert_eq!(usage.models, [("org/name".to_owned(), 300)]);
        assert!(usage.obstacle.is_none() && usage.free_bytes.is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn a_folder_to_come_is_judged_by_its_place() {
        let folder = tempfile::tempdir().unwrap();
        assert!(cache_usage(&folder.path().join("a/b/hub")).obstacle.is_none());
        fs::write(folder.path().join("file"), "").unwrap();
        let obstacle = cache_usage(&folder.path().join("file/hub")).obstacle.unwrap();
        assert_eq!(obstacle.kind().exit_code(), 6);
    }
}
