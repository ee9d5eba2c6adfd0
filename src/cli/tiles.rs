//! Which tiles Hopper's products take, and where `fastlora tune` keeps what it measured.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::user_cache::user_cache;
use crate::backend::cuda::CudaBackend;
use crate::backend::cuda::tiles::{DeviceKind, TileTable, Unusable};
use crate::config::TileSource;
use crate::device::Device;
use crate::error::{Error, Result, escape_control};

/// Overrides what `auto` means.
const VARIABLE: &str = "FASTLORA_TILES";
/// More than any table takes: a few hundred bytes for a product.
const MOST_BYTES: u64 = 16 << 20;

/// The source that is meant: where the configuration says `auto`, the variable's.
///
/// # Errors
/// A file that is not there.
pub(super) fn resolve(source: &TileSource) -> Result<TileSource> {
    let source = match (source, std::env::var(VARIABLE)) {
        (TileSource::Auto, Ok(text)) if !text.is_empty() => {
            let named: TileSource = text.parse().map_err(|error: Error| error.at(VARIABLE))?;
            named.check().map_err(|error| error.at(VARIABLE))?;
            named
        }
        _ => source.clone(),
    };
    source.check()?;
    Ok(source)
}

/// The file of devices of this kind; none where the user has no cache folder.
pub(super) fn file_of(device: &DeviceKind) -> Option<PathBuf> {
    let plain = |character: char| if character.is_ascii_alphanumeric() { character } else { '-' };
    let name: String = device.name.to_lowercase().chars().take(100).map(plain).collect();
    Some(user_cache("tiles")?.join(format!("{name}-{}.json", device.multiprocessors)))
}

/// Where `source` has the table of such devices, if anywhere.
pub(super) fn path_of(source: TileSource, device: &DeviceKind) -> Option<PathBuf> {
    match source {
        TileSource::Rule => None,
        TileSource::Auto => file_of(device),
        TileSource::File(path) => Some(path),
    }
}

/// The table in `path` for the kernels of this build on `device`; none where there is no file.
///
/// # Errors
/// Why it is of no use.
pub(super) fn read(path: &Path, device: &DeviceKind) -> Result<Option<TileTable>, Unusable> {
    let damaged = |reason: &dyn std::fmt::Display| Unusable::Damaged(reason.to_string());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(damaged(&error)),
    };
    let mut text = String::new();
    let read = file.take(MOST_BYTES).read_to_string(&mut text);
    read.map_err(|error| damaged(&error))?;
    TileTable::parse(&text, device).map(Some)
}

/// `backend` with the tiles that `source` names, and a line of the log about them. A table that is of no use costs speed and
/// nothing else, so it is told and left aside.
///
/// # Errors
/// As [`resolve`].
pub(super) fn with_tiles<D: Device>(backend: CudaBackend<D>, source: &TileSource) -> Result<CudaBackend<D>> {
    if !backend.has_choice_of_tiles() {
        return Ok(backend);
    }
    let device = DeviceKind::of(backend.device());
    let Some(path) = path_of(resolve(source)?, &device) else {
        info!("tiles: by rule");
        return Ok(backend);
    };
    let name = path.display();
    match read(&path, &device) {
        Ok(Some(table)) => {
            info!("tiles: {} ({name})", summary(&table));
            return Ok(backend.with_tiles(table.tiles()));
        }
        Ok(None) => info!("tiles: by rule; `fastlora tune` measures them on this device"),
        Err(Unusable::Foreign(reason)) => info!("tiles: by rule; {name}: {}", escape_control(&reason)),
        Err(Unusable::Damaged(reason)) => {
            let reason = escape_control(&reason);
            warn!("tiles: by rule; {name} is no table: {reason}; {REMEDY}");
        }
    }
    Ok(backend)
}

/// What to do about a damaged table.
pub(super) const REMEDY: &str = "run `fastlora tune` again, or delete the file";

/// When and what, in words.
pub(super) fn summary(table: &TileTable) -> String {
    format!("tuned {} for {} products", table.tuned_at.format("%Y-%m-%d"), table.products.len())
}
