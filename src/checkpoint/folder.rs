//! Files of a model folder: found without ever leaving it.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result, shorten};

/// The path of `name` inside `folder`, or none where there is no such file.
///
/// A link is followed only to a target inside the folder, or inside the `blobs` of the hub's cache when the folder is
/// one of its snapshots.
///
/// # Errors
/// Model errors for a name that is not a plain file name and for a link that leaves the folder.
pub fn file_in_folder(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part == name);
    if !plain || name.contains('\\') {
        return Err(Error::model(format!(
            "\"{}\" is not a plain file name inside the folder",
            shorten(name, 200)
        ))
        .at(folder.display().to_string()));
    }
    let path = folder.join(name);
    let canonical = |path: &Path| std::fs::canonicalize(path);
    let target = match canonical(&path) {
        Ok(target) => target,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("open", &path, error)),
    };
    let home = canonical(folder).map_err(|error| Error::file("open", folder, error))?;
    let inside = target.starts_with(&home) || hub_blobs(&home).is_some_and(|blobs| target.starts_with(blobs));
    if inside {
        return Ok(Some(path));
    }
    Err(Error::model(format!("\"{name}\" is a link that leaves the model folder, to {}", target.display()))
        .at(path.display().to_string())
        .hint("put the file itself into the folder"))
}

/// The `blobs` beside `snapshots/REVISION` in a hub cache.
fn hub_blobs(snapshot: &Path) -> Option<PathBuf> {
    let snapshots = snapshot.parent()?;
    if snapshots.file_name()? != "snapshots" {
        return None;
    }
    std::fs::canonicalize(snapshots.parent()?.join("blobs")).ok()
}
