//! Downloads into the hub's cache: resumed where they were cut, verified, linked when whole.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::Response;

use super::cache::{CONFIG, ModelCache, Snapshot, TOKENIZER, WEIGHTS, create_parent, shards};
use super::client::{Client, FileMetadata, pause};
use super::{HubSettings, ModelId};
use crate::checkpoint::shard_index::INDEX;
use crate::error::{Error, Result};

/// What is fetched besides the weights, where there is such a file.
const SMALL_FILES: [&str; 7] = [
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];
const SHA_256_DIGITS: usize = 64;
const BUFFER_BYTES: usize = 1 << 18;

/// Fetches what is missing of a model; weights come last, so that weights in the cache mean that all is there.
pub(super) fn download(settings: &HubSettings, id: &ModelId, cache: &ModelCache) -> Result<Snapshot> {
    let client = Client::new(settings, id)?;
    let info = client.model_info()?;
    let offered = |name: &str| info.siblings.iter().any(|sibling| sibling.name == name);
    let at_model = |message: String| Error::model(message).at(format!("{}@{}", id.name, id.revision));
    if !offered(CONFIG) {
        return Err(
            at_model(format!("the model has no {CONFIG}")).hint("expected a model in transformers' format")
        );
    }
    let indexed = !offered(WEIGHTS);
    if indexed && !offered(INDEX) {
        let pickled = info.siblings.iter().find(|sibling| sibling.name.ends_with(".bin"));
        let found =
            pickled.map_or_else(String::new, |sibling| format!(", only pickled ones, {}", sibling.name));
        return Err(at_model(format!("the model has no safetensors weights{found}")).hint(
            "look for a converted revision, or convert it with transformers: save_pretrained(FOLDER)",
        ));
    }
    let fetch = Fetch { settings, client: &client, cache, commit: &info.commit };
    for name in SMALL_FILES.into_iter().filter(|name| offered(name)) {
        fetch.file(name)?;
    }
    if indexed {
        let names = shards(&fetch.file(INDEX)?)?;
        if let Some(name) = names.iter().find(|name| !offered(name)) {
            return Err(at_model(format!("the index names {name}, which the model does not have")));
        }
        names.iter().try_for_each(|name| fetch.file(name).map(drop))?;
    } else {
        fetch.file(WEIGHTS)?;
    }
    cache.set_reference(&id.revision, &info.commit)?;
    cache.snapshot(&info.commit).ok_or_else(|| {
        Error::io("files vanished during the download").at(settings.cache.display().to_string())
    })
}

/// The fetching of one commit's files.
struct Fetch<'a> {
    settings: &'a HubSettings,
    client: &'a Client<'a>,
    cache: &'a ModelCache,
    commit: &'a str,
}

/// A file on its way, resumed where an earlier attempt ended.
struct Partial {
    file: File,
    path: PathBuf,
    length: u64,
    hash: Sha256,
}

/// How the body of an answer ended.
enum Received {
    /// All there is, which may still be of the wrong size.
    All,
    /// The connection ended before.
    Part(Error),
}

impl Fetch<'_> {
    /// Fetches one file, unless it is there, and returns its path in the snapshot.
    fn file(&self, name: &str) -> Result<PathBuf> {
        let path = self.cache.snapshot_folder(self.commit).join(name);
        if path.is_file() {
            return Ok(path);
        }
        let metadata = self.client.file_metadata(self.commit, name)?;
        let blob = self.cache.blob(&metadata.etag);
        let lock = self.cache.lock(&metadata.etag)?;
        if !blob.is_file() {
            self.blob(name, &metadata, &blob)?;
        }
        drop(lock);
        self.cache.link(self.commit, name, &metadata.etag)?;
        Ok(path)
    }

    fn blob(&self, name: &str, metadata: &FileMetadata, blob: &Path) -> Result<()> {
        create_parent(blob)?;
        let address = self.client.file_address(self.commit, name);
        let mut partial = Partial::open(blob.with_added_extension("incomplete"))?;
        if metadata.size.is_some_and(|size| partial.length > size) {
            partial.restart()?;
        }
        let bar = self.progress_bar(name, metadata.size, partial.length);
        let fetched = self.receive_all(&address, metadata, &mut partial, &bar);
        bar.finish_and_clear();
        fetched?;
        partial.verify(metadata, &address)?;
        partial.file.sync_all().map_err(|error| Error::file("write", &partial.path, error))?;
        fs::rename(&partial.path, blob).map_err(|error| Error::file("rename", &partial.path, error))
    }

    /// Receives until all bytes are there; goes on where a connection was cut, as long as there is progress.
    fn receive_all(
        &self,
        address: &str,
        metadata: &FileMetadata,
        partial: &mut Partial,
        bar: &ProgressBar,
    ) -> Result<()> {
        let (mut attempt, mut furthest) = (1, partial.length);
        loop {
            if metadata.size.is_some_and(|size| partial.length >= size) {
                return Ok(());
            }
            let cut = match self.client.get(address, partial.length) {
                Ok(answer) => match self.receive(answer, address, metadata, partial, bar)? {
                    Received::All => return Ok(()),
                    Received::Part(cause) => cause,
                },
                Err(failure) if failure.transient => failure.error,
                Err(failure) => return Err(failure.error),
            };
            if partial.length > furthest {
                (attempt, furthest) = (1, partial.length);
            } else if attempt >= self.settings.attempts {
                return Err(cut
                    .at(address)
                    .hint(format!("{} bytes are kept: run again to go on from there", partial.length)));
            } else {
                attempt += 1;
            }
            tracing::debug!("{address}: {cut}; going on at byte {}", partial.length);
            pause(self.settings, attempt);
        }
    }

    /// Receives one answer's body.
    fn receive(
        &self,
        answer: Response<Body>,
        address: &str,
        metadata: &FileMetadata,
        partial: &mut Partial,
        bar: &ProgressBar,
    ) -> Result<Received> {
        const PARTIAL_CONTENT: u16 = 206;
        const RANGE_NOT_SATISFIABLE: u16 = 416;
        let range = answer.headers().get("content-range").and_then(|value| value.to_str().ok());
        let goes_on = range.is_some_and(|range| range.starts_with(&format!("bytes {}-", partial.length)));
        let status = answer.status().as_u16();
        if status == RANGE_NOT_SATISFIABLE || (status == PARTIAL_CONTENT && !goes_on) {
            partial.restart()?;
            return Ok(Received::Part(Error::io("the hub cannot go on where the file was cut")));
        }
        let mut body = self.client.successful(answer, address)?.into_body();
        if status != PARTIAL_CONTENT {
            partial.restart()?;
        }
        let mut reader = body.as_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            bar.set_position(partial.length);
            // Whatever comes beyond the announced size is an error already; it need not fill the disk.
            if metadata.size.is_some_and(|size| partial.length > size) {
                return Ok(Received::All);
            }
            match reader.read(&mut buffer) {
                Ok(0) if metadata.size.is_none_or(|size| partial.length >= size) => return Ok(Received::All),
                Ok(0) => return Ok(Received::Part(Error::io("the connection was closed early"))),
                Ok(count) => partial.append(&buffer[..count])?,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Ok(Received::Part(Error::io("the connection was cut").caused_by(error)));
                }
            }
        }
    }

    fn progress_bar(&self, name: &str, size: Option<u64>, received: u64) -> ProgressBar {
        const SHOWN_FROM_BYTES: u64 = 1 << 20;
        let Some(size) = size.filter(|&size| size >= SHOWN_FROM_BYTES) else { return ProgressBar::hidden() };
        tracing::info!("downloading {name}, {:.1} MB", size as f64 / 1e6);
        if !self.settings.progress {
            return ProgressBar::hidden();
        }
        // Draws nothing where standard error is no terminal.
        let bar = ProgressBar::new(size).with_message(name.to_owned()).with_position(received);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        match ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }
}

impl Partial {
    fn open(path: PathBuf) -> Result<Self> {
        let failed = |error| Error::file("open", &path, error);
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let mut hash = Sha256::new();
        let length = std::io::copy(&mut file, &mut hash).map_err(failed)?;
        Ok(Self { file, path, length, hash })
    }

    fn restart(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map_err(|error| Error::file("write", &self.path, error))?;
        (self.length, self.hash) = (0, Sha256::new());
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| Error::file("write", &self.path, error))?;
        self.hash.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Compares with what the hub announced; a file that differs is removed, since going on from it is no use.
    fn verify(&self, metadata: &FileMetadata, address: &str) -> Result<()> {
        let sha256 = format!("{:x}", self.hash.clone().finalize());
        let is_sha256 = metadata.etag.len() == SHA_256_DIGITS
            && metadata.etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let difference = match metadata.size {
            Some(size) if size != self.length => format!("received {} bytes, expected {size}", self.length),
            _ if is_sha256 && !metadata.etag.eq_ignore_ascii_case(&sha256) => {
                format!("received SHA-256 {sha256}, expected {}", metadata.etag)
            }
            _ => return Ok(()),
        };
        fs::remove_file(&self.path).map_err(|error| Error::file("remove", &self.path, error))?;
        Err(Error::io(difference)
            .at(address)
            .hint("what was received is removed: run again to fetch the file anew"))
    }
}
