//! Checkpoints of a run: the folders `step-N`, each whole and checked by SHA-256, or not there at all.
//!
//! | file | content |
//! |---|---|
//! | the files of an adapter folder | the adapter after N steps |
//! | `optimizer.safetensors` | both moments of every adapter tensor: `first_moment.NAME`, `second_moment.NAME` |
//! | `state.json` | what else the trainer needs to go on |
//! | `SHA256SUMS` | of all files above; `sha256sum -c SHA256SUMS` checks them too |
//!
//! A folder is built under a name that begins with a dot, forced to the disk and renamed.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::adapter::{
    ADAPTER_WEIGHTS, Adapter, AdapterConfig, Companions, pretty, read_adapter, read_tensors, stage,
    to_safetensors,
};
use super::atomic::{Staging, parent_of, remove_folder, sync_folder, write_synced};
use crate::error::{Error, Result, escape_control};
use crate::tensor::NamedTensor;

/// The folder of the checkpoints inside the output folder.
pub const CHECKPOINTS: &str = "checkpoints";
/// The trainer's values in a checkpoint.
pub const STATE: &str = "state.json";
/// Where a checkpoint comes from, as in every adapter folder.
const PROVENANCE: &str = "fastlora.json";
/// The optimizer's moments in a checkpoint.
const MOMENTS: &str = "optimizer.safetensors";
/// SHA-256 of the other files.
pub const CHECKSUMS: &str = "SHA256SUMS";
/// What the names of the moments begin with.
const MOMENT_PREFIXES: [&str; 2] = ["first_moment.", "second_moment."];

/// What a checkpoint gives back.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The adapter.
    pub adapter: Adapter,
    /// First and second moment of every adapter tensor, under its name.
    pub moments: [Vec<NamedTensor>; 2],
    /// `state.json`.
    pub state: Value,
    /// `fastlora.json`.
    pub provenance: Value,
}

/// What a checkpoint is made of.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// Hyper-parameters of the adapter.
    pub config: &'a AdapterConfig,
    /// The adapter's tensors.
    pub adapter: &'a [NamedTensor],
    /// The rest of the adapter folder.
    pub companions: Companions<'a>,
    /// First and second moment of every adapter tensor, under its name.
    pub moments: &'a [Vec<NamedTensor>; 2],
    /// `state.json`.
    pub state: &'a Value,
}

/// The checkpoints of one run, in one folder.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    folder: PathBuf,
}

impl Checkpoints {
    /// Those in `folder`, which need not exist.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The folder of the checkpoint after `step` steps.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("step-{step}"))
    }

    /// Saves the checkpoint after `step` steps, in one move: until then, and after any failure, all is as it was.
    ///
    /// # Errors
    /// A value that is not finite, or a file that cannot be written.
    pub fn save(&self, step: u64, contents: Contents<'_>) -> Result<()> {
        if !self.folder.is_dir() {
            fs::create_dir_all(&self.folder).map_err(|source| Error::file("create", &self.folder, source))?;
            sync_folder(parent_of(&self.folder))?;
        }
        let staging = Staging::new(&self.folder, &format!("step-{step}"))?;
        let folder = staging.path();
        let mut names = stage(folder, contents.config, contents.adapter, &contents.companions)?;
        let mut write = |name: &str, bytes: &[u8]| {
            names.push(name.to_string());
            write_synced(&folder.join(name), bytes)
        };
        let moments: Vec<NamedTensor> = MOMENT_PREFIXES
            .iter()
            .zip(contents.moments)
            .flat_map(|(prefix, tensors)| tensors.iter().map(move |tensor| (prefix, tensor)))
            .map(|(prefix, tensor)| NamedTensor {
                name: format!("{prefix}{}", tensor.name),
                ..tensor.clone()
            })
            .collect();
        write(MOMENTS, &to_safetensors(&moments)?)?;
        write(STATE, pretty(contents.state)?.as_bytes())?;
        let mut checksums = String::new();
        for name in &names {
            checksums.push_str(&format!("{}  {name}\n", sha256(&folder.join(name))?));
        }
        write_synced(&folder.join(CHECKSUMS), checksums.as_bytes())?;
        staging.replace_folder(&self.path(step))
    }

    /// The steps of the checkpoints there are, valid or not, ascending.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let step = |name: String| name.strip_prefix("step-")?.parse().ok();
        let mut steps: Vec<u64> = self.names()?.into_iter().filter_map(step).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The newest checkpoint that is valid, with its steps; none where there are no checkpoints. A warning names each
    /// one that is passed over.
    ///
    /// # Errors
    /// Checkpoints of which none is valid (kind corrupt).
    pub fn newest(&self) -> Result<Option<(u64, Checkpoint)>> {
        let steps = self.steps()?;
        let mut damage = None;
        for &step in steps.iter().rev() {
            match read_checkpoint(&self.path(step)) {
                Ok(checkpoint) => {
                    if damage.is_some() {
                        tracing::warn!("going back to {}", self.path(step).display());
                    }
                    return Ok(Some((step, checkpoint)));
                }
                Err(error) => {
                    tracing::warn!("{}", escape_control(&error.to_string()));
                    damage = damage.or(Some(error));
                }
            }
        }
        match damage {
            None => Ok(None),
            Some(newest) => {
                let message = format!("none of {} checkpoints is valid: {}", steps.len(), newest.message());
                Err(Error::corrupt(message)
                    .at(newest.location().unwrap_or_default())
                    .hint("--overwrite starts again; check this disk"))
            }
        }
    }

    /// Removes all but the newest `count`.
    ///
    /// # Errors
    /// A folder that cannot be removed.
    pub fn keep(&self, count: usize) -> Result<()> {
        let steps = self.steps()?;
        self.remove(&steps[..steps.len().saturating_sub(count)])
    }

    /// Removes the checkpoints after `step`: a run that goes on from there makes its own.
    ///
    /// # Errors
    /// A folder that cannot be removed.
    pub fn remove_after(&self, step: u64) -> Result<()> {
        let steps = self.steps()?;
        self.remove(&steps[steps.partition_point(|&other| other <= step)..])
    }

    /// Removes every checkpoint and what a dead run left.
    ///
    /// # Errors
    /// A folder that cannot be removed.
    pub fn remove_all(&self) -> Result<()> {
        self.clean()?;
        self.remove(&self.steps()?)
    }

    /// Removes what a dead run left: half a save, half a removal.
    ///
    /// # Errors
    /// A folder that cannot be removed.
    pub fn clean(&self) -> Result<()> {
        for name in self.names()?.into_iter().filter(|name| name.starts_with(".step-")) {
            let path = self.folder.join(name);
            tracing::info!("removing {}, which a dead run left", path.display());
            remove_folder(&path)?;
        }
        Ok(())
    }

    /// A checkpoint leaves by a rename first, so that none is ever seen in parts.
    fn remove(&self, steps: &[u64]) -> Result<()> {
        for step in steps {
            let leaving = self.folder.join(format!(".step-{step}.removed"));
            remove_folder(&leaving)?;
            fs::rename(self.path(*step), &leaving)
                .map_err(|source| Error::file("remove", self.path(*step), source))?;
            remove_folder(&leaving)?;
        }
        if steps.is_empty() { Ok(()) } else { sync_folder(&self.folder) }
    }

    fn names(&self) -> Result<Vec<String>> {
        let failed = |source| Error::file("read", &self.folder, source);
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry.map_err(failed)?.file_name().into_string());
        }
        Ok(names)
    }
}

/// Reads a checkpoint whose files all have their checksums.
///
/// # Errors
/// A file that is missing or damaged (kind corrupt), or that cannot be read.
pub fn read_checkpoint(folder: &Path) -> Result<Checkpoint> {
    verify_checkpoint(folder)?;
    let mut moments: [Vec<NamedTensor>; 2] = Default::default();
    for mut tensor in read_tensors(&folder.join(MOMENTS))? {
        let place = MOMENT_PREFIXES.iter().position(|prefix| tensor.name.starts_with(prefix));
        let Some(place) = place else {
            return Err(Error::corrupt("no moment of an adapter tensor").at(tensor.name));
        };
        tensor.name.drain(..MOMENT_PREFIXES[place].len());
        moments[place].push(tensor);
    }
    Ok(Checkpoint {
        adapter: read_adapter(folder)?,
        moments,
        state: read_json(&folder.join(STATE))?,
        provenance: read_json(&folder.join(PROVENANCE))?,
    })
}

/// Reads a JSON file that this program wrote.
///
/// # Errors
/// A file that cannot be read (I/O), or that is no JSON (kind corrupt).
pub fn read_json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).map_err(|source| Error::file("read", path, source))?;
    serde_json::from_slice(&bytes)
        .map_err(|source| Error::corrupt("no JSON").at(path.display().to_string()).caused_by(source))
}

/// Compares every file of a checkpoint with its checksum.
///
/// # Errors
/// A file that is missing or damaged, or has no checksum (kind corrupt).
pub fn verify_checkpoint(folder: &Path) -> Result<()> {
    let path = folder.join(CHECKSUMS);
    let corrupt = |name: &str, what: &str| {
        Error::corrupt(format!("the checkpoint is damaged: {what}"))
            .at(folder.join(name).display().to_string())
    };
    let text = fs::read(&path).map_err(|source| corrupt(CHECKSUMS, "it cannot be read").caused_by(source))?;
    let text = String::from_utf8(text).map_err(|_| corrupt(CHECKSUMS, "not UTF-8"))?;
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let (expected, name) = line.split_once("  ").ok_or_else(|| corrupt(CHECKSUMS, "not a checksum"))?;
        let is_plain = Path::new(name).file_name().is_some_and(|file| file == name);
        if !is_plain {
            return Err(corrupt(CHECKSUMS, "not a file's name"));
        }
        let found = sha256(&folder.join(name)).map_err(|error| corrupt(name, &error.to_string()))?;
        if found != expected {
            return Err(corrupt(name, &format!("its SHA-256 is {found}, not {expected}")));
        }
        names.insert(name);
    }
    for name in [ADAPTER_WEIGHTS, super::adapter::ADAPTER_CONFIG, MOMENTS, STATE, PROVENANCE] {
        if !names.contains(name) {
            return Err(corrupt(name, "it has no checksum"));
        }
    }
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    File::open(path)
        .and_then(|mut file| io::copy(&mut file, &mut hasher))
        .map_err(|source| Error::file("read", path, source))?;
    Ok(format!("{:x}", hasher.finalize()))
}
