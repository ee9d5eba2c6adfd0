//! From a model's name to its folder: a folder as it is, else the hub's cache, else the hub.
//!
//! The cache is the one that `huggingface_hub` keeps, in its layout, so that both tools share what either has fetched.
//! The few requests are made here and not by the crate `hf-hub`, which knows neither `HF_HUB_CACHE`, `HF_TOKEN` nor
//! `HF_HUB_OFFLINE`, does not compare what it received with the hash, and reports a gated model as a bare status.

mod cache;
mod client;
mod download;
mod usage;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use usage::{CacheUsage, cache_usage};

use crate::error::{Error, Result};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";

/// Where the hub and its cache are, and how to ask.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// Address of the hub, without a slash at the end.
    pub endpoint: String,
    /// Folder of the cache, which holds `models--org--name`.
    pub cache: PathBuf,
    /// Access token, for gated and private models.
    pub token: Option<String>,
    /// Only the cache, no request.
    pub offline: bool,
    /// File of root certificates in PEM to trust instead of the built-in ones.
    pub certificates: Option<PathBuf>,
    /// Attempts without progress before a download is given up.
    pub attempts: u32,
    /// Pause before the second attempt; each later pause is twice as long.
    pub retry_delay: Duration,
    /// Whether a download draws a progress bar, if standard error is a terminal.
    pub progress: bool,
}

/// A model's folder and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedModel {
    /// Folder with `config.json`, weights and tokenizer.
    pub folder: PathBuf,
    /// The folder as it was named, or the hub id without its revision.
    pub name: String,
    /// Commit of a hub model.
    pub revision: Option<String>,
}

/// The folder of a model that is named by a folder or by a hub id, `org/name[@revision]`; downloads it where needed.
///
/// ```
/// let model = fastlora::checkpoint::hub::resolve("tests/fixtures/tiny_qwen2")?;
/// assert_eq!(model.name, "tests/fixtures/tiny_qwen2");
/// assert_eq!(model.revision, None);
/// # Ok::<(), fastlora::error::Error>(())
/// ```
///
/// # Errors
/// Model errors for what does not exist, is gated or is not in the cache while offline; I/O errors for network and disk.
pub fn resolve(model_name: &str) -> Result<ResolvedModel> {
    resolve_with(model_name, &HubSettings::from_env())
}

/// [`resolve`] with settings of the caller's.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_with(model_name: &str, settings: &HubSettings) -> Result<ResolvedModel> {
    let path = Path::new(model_name);
    if path.is_dir() {
        return Ok(ResolvedModel { folder: path.to_owned(), name: model_name.to_owned(), revision: None });
    }
    if path.is_file() {
        let error = Error::model("found a file, expected a model folder").at(model_name);
        return Err(match path.extension().is_some_and(|extension| extension == "gguf") {
            true => error.hint("turn it into a model folder with `fastlora import FILE.gguf -o FOLDER`"),
            false => error.hint("name the folder that holds config.json and the weights"),
        });
    }
    let Some(id) = ModelId::parse(model_name) else {
        return Err(Error::model(
            "there is no such folder, and it is no hub id of the form org/name[@revision] either",
        )
        .at(model_name));
    };
    let cache = cache::ModelCache::new(settings, &id);
    let cached = cache.find(&id.revision);
    if let Some(snapshot) = &cached
        && (snapshot.has_tokenizer || settings.offline)
    {
        return Ok(resolved(&id, snapshot));
    }
    if settings.offline {
        return Err(Error::model(format!(
            "neither a folder nor in the hub's cache, {}",
            settings.cache.display()
        ))
        .at(model_name)
        .hint("HF_HUB_OFFLINE is set: unset it to download the model"));
    }
    match download::download(settings, &id, &cache) {
        Ok(snapshot) => Ok(resolved(&id, &snapshot)),
        // Weights without a tokenizer train on pre-tokenised data, so they are worth having without a network.
        Err(error) => match cached {
            Some(snapshot) => {
                tracing::warn!("using the cached model without a tokenizer: {error}");
                Ok(resolved(&id, &snapshot))
            }
            None => Err(error),
        },
    }
}

fn resolved(id: &ModelId, snapshot: &cache::Snapshot) -> ResolvedModel {
    ResolvedModel {
        folder: snapshot.folder.clone(),
        name: id.name.clone(),
        revision: Some(snapshot.commit.clone()),
    }
}

impl HubSettings {
    /// Settings for a hub at `endpoint` and a cache folder, online, without a token.
    pub fn new(endpoint: &str, cache: impl Into<PathBuf>) -> Self {
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: cache.into(),
            token: None,
            offline: false,
            certificates: None,
            attempts: 5,
            retry_delay: Duration::from_secs(1),
            progress: true,
        }
    }

    /// The settings that `huggingface_hub` would take from the environment: `HF_ENDPOINT`, `HF_HUB_CACHE`, `HF_HOME`,
    /// `XDG_CACHE_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`; `SSL_CERT_FILE` and `REQUESTS_CA_BUNDLE` too.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// [`HubSettings::from_env`] with another source of variables. An empty value counts as absent.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| {
            variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let first = |names: &[&str]| names.iter().find_map(|name| get(name));
        let user_cache = || match get("XDG_CACHE_HOME") {
            Some(folder) => PathBuf::from(folder),
            None => PathBuf::from(get("HOME").unwrap_or_else(|| ".".to_owned())).join(".cache"),
        };
        let home = get("HF_HOME").map_or_else(|| user_cache().join("huggingface"), PathBuf::from);
        let cache =
            first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map_or_else(|| home.join("hub"), PathBuf::from);
        let token_file = get("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let stored_token = || {
            let text = std::fs::read_to_string(token_file).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let truth = |name: &str| {
            get(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        let mut settings =
            Self::new(&get("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()), cache);
        settings.token = first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]).or_else(stored_token);
        settings.offline = truth("HF_HUB_OFFLINE") || truth("TRANSFORMERS_OFFLINE");
        settings.certificates = first(&["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]).map(PathBuf::from);
        settings
    }
}

/// A model on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ModelId {
    /// `org/name`.
    name: String,
    /// Branch, tag or commit.
    revision: String,
}

impl ModelId {
    /// `org/name[@revision]`, or none where the text cannot be one. Nothing accepted here can leave the cache's folder.
    fn parse(text: &str) -> Option<Self> {
        let (name, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (organization, model) = name.split_once('/')?;
        let revision_parts_are_plain = revision.split('/').all(is_plain);
        (is_plain(organization) && is_plain(model) && !name.contains("--") && revision_parts_are_plain)
            .then(|| Self { name: name.to_owned(), revision: revision.to_owned() })
    }
}

/// Whether `text` can be one part of a path and of an address: letters, digits, `-`, `_` and `.`, no leading dot.
fn is_plain(text: &str) -> bool {
    (1..=128).contains(&text.len())
        && !text.starts_with('.')
        && !text.contains("..")
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_parsed_and_paths_are_not_ids() {
        let id = |name: &str, revision: &str| {
            Some(ModelId { name: name.to_owned(), revision: revision.to_owned() })
        };
        assert_eq!(ModelId::parse("org/name"), id("org/name", "main"));
        assert_eq!(ModelId::parse("Qwen/Qwen2.5-0.5B@refs/pr/1"), id("Qwen/Qwen2.5-0.5B", "refs/pr/1"));
        for text in [
            "",
            "name",
            "/org/name",
            "./org/name",
            "../name",
            "org/..",
            "a/b/c",
            "org/na me",
            "org/name@",
            "org/name@../x",
        ] {
            assert_eq!(ModelId::parse(text), None, "{text}");
        }
    }

    #[test]
    fn settings_follow_the_variables_of_huggingface_hub() {
        let home = tempfile::tempdir().unwrap();
        let of = |pairs: &[(&str, &str)]| {
            let find =
                |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
            HubSettings::from_variables(find)
        };
        let plain = of(&[("HOME", "/home/u"), ("HF_TOKEN", "")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/home/u/.cache/huggingface/hub"));
        assert_eq!((plain.token, plain.offline), (None, false));
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x")]).cache, Path::new("/x/huggingface/hub"));
        assert_eq!(of(&[("HF_HOME", "/h")]).cache, Path::new("/h/hub"));
        assert_eq!(of(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
        assert_eq!(of(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
        assert!(of(&[("HF_HUB_OFFLINE", "true")]).offline && !of(&[("HF_HUB_OFFLINE", "0")]).offline);
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let folder = home.path().to_str().unwrap();
        assert_eq!(of(&[("HF_HOME", folder)]).token.as_deref(), Some("hf_file"));
        assert_eq!(of(&[("HF_HOME", folder), ("HF_TOKEN", "hf_env")]).token.as_deref(), Some("hf_env"));
    }
}
