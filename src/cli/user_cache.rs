//! The user's folder for what may be lost.

use std::path::PathBuf;

/// `name` in fastlora's part of the user's cache folder; none where the environment names no such folder.
pub(super) fn user_cache(name: &str) -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(cache.join("fastlora").join(name))
}
