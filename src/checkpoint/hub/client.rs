//! Requests to the hub, and its answers as errors that say what to do.

use std::io::Read;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::Response;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::{HubSettings, ModelId, is_plain};
use crate::error::{Error, Result};

const LONGEST_ANSWER_BYTES: u64 = 16 << 20;
const MOST_REDIRECTS: usize = 5;

/// A connection to the hub.
pub(super) struct Client<'a> {
    agent: Agent,
    settings: &'a HubSettings,
    id: &'a ModelId,
}

/// What the hub says about a file before it is fetched.
pub(super) struct FileMetadata {
    /// Name of its blob: SHA-256 of large files, Git's SHA-1 of others.
    pub(super) etag: String,
    pub(super) size: Option<u64>,
}

/// A model's commit and files.
#[derive(serde::Deserialize)]
pub(super) struct ModelInfo {
    #[serde(rename = "sha")]
    pub(super) commit: String,
    pub(super) siblings: Vec<Sibling>,
}

#[derive(serde::Deserialize)]
pub(super) struct Sibling {
    #[serde(rename = "rfilename")]
    pub(super) name: String,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a HubSettings, id: &'a ModelId) -> Result<Self> {
        let mut tls = TlsConfig::builder();
        if let Some(path) = &settings.certificates {
            let pem = std::fs::read(path).map_err(|error| Error::file("read", path, error))?;
            let roots = parse_pem(&pem).filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            });
            tls = tls.root_certs(RootCerts::from(roots));
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .user_agent(concat!("fastlora/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls.build())
            .build()
            .new_agent();
        Ok(Self { agent, settings, id })
    }

    fn authorization(&self) -> Option<String> {
        self.settings.token.as_ref().map(|token| format!("Bearer {token}"))
    }

    /// The address of a file at a commit.
    pub(super) fn file_address(&self, commit: &str, name: &str) -> String {
        format!("{}/{}/resolve/{commit}/{name}", self.settings.endpoint, self.id.name)
    }

    /// The commit that the revision stands for, and its files.
    pub(super) fn model_info(&self) -> Result<ModelInfo> {
        let revision = self.id.revision.replace('/', "%2F");
        let address = format!("{}/api/models/{}/revision/{revision}", self.settings.endpoint, self.id.name);
        let answer = retrying(self.settings, || self.get(&address, 0))?;
        let answer = self.successful(answer, &address)?;
        let info: ModelInfo = read_json(answer, &address)?;
        match is_plain(&info.commit) {
            true => Ok(info),
            false => {
                Err(Error::io(format!("the hub names the commit {:?}, expected a hash", info.commit))
                    .at(address))
            }
        }
    }

    /// Etag and size of a file. Large files redirect to a storage, whose own etag means nothing here.
    pub(super) fn file_metadata(&self, commit: &str, name: &str) -> Result<FileMetadata> {
        let mut address = self.file_address(commit, name);
        for _ in 0..MOST_REDIRECTS {
            let answer = retrying(self.settings, || self.head(&address))?;
            let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
            let linked = header("x-linked-etag");
            // Other redirects stay within the hub: renamed models, files behind its own cache.
            if let (true, None, Some(location)) =
                (answer.status().is_redirection(), linked, header("location"))
            {
                address = match location.strip_prefix('/') {
                    Some(path) => format!("{}/{path}", origin(&address)),
                    None if origin(location) == origin(&address) => location.to_owned(),
                    None => return Err(Error::io(format!("unexpected redirect to {location}")).at(address)),
                };
                continue;
            }
            if !answer.status().is_redirection() && !answer.status().is_success() {
                return Err(self.refused(&answer, &address));
            }
            let etag = linked.or_else(|| header("etag")).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            if !is_plain(&etag) {
                return Err(
                    Error::io(format!("the hub gives the etag {etag:?}, expected a hash")).at(address)
                );
            }
            let size = match answer.status().is_redirection() {
                true => header("x-linked-size"),
                false => header("x-linked-size").or_else(|| header("content-length")),
            };
            return Ok(FileMetadata { etag, size: size.and_then(|size| size.parse().ok()) });
        }
        Err(Error::io(format!("more than {MOST_REDIRECTS} redirects")).at(address))
    }

    fn head(&self, address: &str) -> Result<Response<Body>, Failure> {
        let mut request =
            self.agent.head(address).config().max_redirects(0).max_redirects_will_error(false).build();
        if let Some(authorization) = self.authorization() {
            request = request.header("authorization", authorization);
        }
        checked(request.call(), address)
    }

    /// Asks for the bytes of an address from `start` on.
    pub(super) fn get(&self, address: &str, start: u64) -> Result<Response<Body>, Failure> {
        let mut request = self.agent.get(address);
        if let Some(authorization) = self.authorization() {
            request = request.header("authorization", authorization);
        }
        if start > 0 {
            request = request.header("range", format!("bytes={start}-"));
        }
        checked(request.call(), address)
    }

    /// The answer, unless its status is an error.
    pub(super) fn successful(&self, answer: Response<Body>, address: &str) -> Result<Response<Body>> {
        if answer.status().is_success() { Ok(answer) } else { Err(self.refused(&answer, address)) }
    }

    fn refused(&self, answer: &Response<Body>, address: &str) -> Error {
        let id = &self.id.name;
        let code =
            answer.headers().get("x-error-code").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let status = answer.status().as_u16();
        let missing = |what: String| Error::model(what).at(format!("{id}@{}", self.id.revision));
        match (status, code) {
            (_, "RevisionNotFound") => missing(format!("the model has no revision \"{}\"", self.id.revision))
                .hint("name a branch, a tag or a commit after the @"),
            (_, "EntryNotFound") => missing(format!("the file {address} does not exist")),
            (_, "RepoNotFound") | (404, "") => {
                missing("there is no such folder, and no such model on the hub, or it is private".to_owned())
                    .hint(format!("check the name; for a private model set HF_TOKEN ({address} was asked)"))
            }
            (401 | 403, _) => {
                missing(format!("the model is gated or private (status {status})")).hint(format!(
                    "accept its licence at {}/{id}, and set HF_TOKEN to a token of that account",
                    self.settings.endpoint
                ))
            }
            _ => Error::io(format!("the hub answered with status {status} {code}")).at(address),
        }
    }
}

/// Why a request brought no answer, and whether to ask again.
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) transient: bool,
}

fn checked(answer: Result<Response<Body>, ureq::Error>, address: &str) -> Result<Response<Body>, Failure> {
    match answer {
        Ok(answer) if answer.status().is_server_error() || [408, 429].contains(&answer.status().as_u16()) => {
            let message = format!("the hub answered with status {}", answer.status().as_u16());
            Err(Failure { error: Error::io(message).at(address), transient: true })
        }
        Ok(answer) => Ok(answer),
        Err(error) => {
            use ureq::Error::{ConnectionFailed, Io, Protocol, Timeout};
            let distrusted = error.to_string().contains("certificate");
            let transient =
                matches!(error, Io(_) | Timeout(_) | ConnectionFailed | Protocol(_)) && !distrusted;
            let hint = match distrusted {
                true => {
                    "behind a proxy with a certificate of its own, set SSL_CERT_FILE to its root certificates"
                }
                false => {
                    "check the network, HF_ENDPOINT and the proxy; with HF_HUB_OFFLINE=1 only the cache is used"
                }
            };
            let error = Error::io("cannot reach the hub").at(address).caused_by(error).hint(hint);
            Err(Failure { error, transient })
        }
    }
}

/// Asks again after transient failures.
fn retrying<T>(settings: &HubSettings, mut ask: impl FnMut() -> Result<T, Failure>) -> Result<T> {
    let mut attempt = 1;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(failure) if failure.transient && attempt < settings.attempts => {
                pause(settings, attempt);
                attempt += 1;
            }
            Err(failure) => return Err(failure.error),
        }
    }
}

/// Waits before attempt `attempt + 1`.
pub(super) fn pause(settings: &HubSettings, attempt: u32) {
    std::thread::sleep(settings.retry_delay.saturating_mul(1 << (attempt - 1).min(5)));
}

/// `scheme://host[:port]` of an address.
fn origin(address: &str) -> &str {
    let host = address.find("://").map_or(0, |end| end + 3);
    address[host..].find('/').map_or(address, |end| &address[..host + end])
}

fn read_json<T: DeserializeOwned>(mut answer: Response<Body>, address: &str) -> Result<T> {
    let body = answer.body_mut().as_reader().take(LONGEST_ANSWER_BYTES);
    serde_json::from_reader(body).map_err(|error| {
        Error::io("the hub's answer is not what was expected")
            .at(address)
            .caused_by(error)
            .hint("is HF_ENDPOINT the address of a hub?")
    })
}
