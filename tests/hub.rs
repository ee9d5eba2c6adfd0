//! Promises about the hub, against a server in this process.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastlora::checkpoint::base::BaseModel;
use fastlora::checkpoint::hub::{HubSettings, ResolvedModel, resolve_with};
use fastlora::error::{Error, ErrorKind};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ID: &str = "org/tiny";

/// What the server knows about one file.
#[derive(Clone)]
struct Served {
    body: Vec<u8>,
    etag: String,
    announced_size: usize,
    /// Bytes sent by each answer in turn before the connection is cut.
    cuts: Vec<usize>,
    obeys_range: bool,
}

impl Served {
    fn new(body: Vec<u8>) -> Self {
        let etag = format!("{:x}", Sha256::digest(&body));
        Self { announced_size: body.len(), body, etag, cuts: Vec::new(), obeys_range: true }
    }
}

/// One request as it came.
#[derive(Clone, Debug)]
struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

#[derive(Default)]
struct State {
    files: Vec<(String, Served)>,
    requests: Vec<Request>,
    /// Status line and error code for every request, in place of an answer.
    refusal: Option<(&'static str, &'static str)>,
    /// Answers with 503 before the first real one.
    busy: usize,
}

struct Hub {
    address: String,
    state: Arc<Mutex<State>>,
    cache: TempDir,
}

impl Hub {
    fn new(files: Vec<(&str, Served)>) -> Self {
        let state = State {
            files: files.into_iter().map(|(name, file)| (name.to_owned(), file)).collect(),
            ..State::default()
        };
        let state = Arc::new(Mutex::new(state));
        // Large files come from a storage on another host, as on the real hub.
        let storage = serve(Arc::clone(&state), None).replace("127.0.0.1", "localhost");
        let address = serve(Arc::clone(&state), Some(storage));
        Self { address, state, cache: tempfile::tempdir().unwrap() }
    }

    fn tiny() -> Self {
        Self::new(tiny_files())
    }

    fn settings(&self) -> HubSettings {
        let mut settings = HubSettings::new(&self.address, self.cache.path());
        settings.retry_delay = Duration::from_millis(1);
        settings.attempts = 3;
        settings.token = Some("hf_secret".to_owned());
        settings
    }

    fn resolve(&self, name: &str) -> Result<ResolvedModel, Error> {
        resolve_with(name, &self.settings())
    }

    /// The error of a resolution, with its kind checked.
    fn error(&self, name: &str, kind: ErrorKind) -> String {
        let error = self.resolve(name).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        error.to_string()
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Served)) {
        let mut state = self.state.lock().unwrap();
        change(&mut state.files.iter_mut().find(|(found, _)| found == name).unwrap().1);
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn blob(&self, etag: &str) -> std::path::PathBuf {
        self.cache.path().join("models--org--tiny/blobs").join(etag)
    }
}

fn tiny_files() -> Vec<(&'static str, Served)> {
    let fixture = |file: &str| fs::read(format!("tests/fixtures/tiny_qwen2/{file}")).unwrap();
    vec![
        ("README.md", Served::new(b"not needed".to_vec())),
        ("config.json", Served::new(fixture("config.json"))),
        ("generation_config.json", Served::new(fixture("generation_config.json"))),
        ("tokenizer.json", Served::new(b"{}".to_vec())),
        ("model.safetensors", Served::new(fixture("model.safetensors"))),
    ]
}

/// Serves in a thread; with a storage, files redirect to it.
fn serve(state: Arc<Mutex<State>>, storage: Option<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (state, storage) = (Arc::clone(&state), storage.clone());
            std::thread::spawn(move || {
                // A client that hangs up early is part of the tests.
                let _ = stream.and_then(|stream| answer(stream, &state, storage.as_deref()));
            });
        }
    });
    address
}

fn answer(stream: TcpStream, state: &Mutex<State>, storage: Option<&str>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let request = Request { method, path, headers };
    let mut stream = stream;
    let head = |status: &str, headers: &str, body_length: usize| {
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {body_length}\r\nconnection: close\r\n\r\n")
    };
    let mut state = state.lock().unwrap();
    state.requests.push(request.clone());
    if let Some((status, code)) = state.refusal {
        return stream.write_all(head(status, &format!("x-error-code: {code}\r\n"), 0).as_bytes());
    }
    if state.busy > 0 {
        state.busy -= 1;
        return stream.write_all(head("503 Busy", "", 0).as_bytes());
    }
    if request.path == format!("/api/models/{ID}/revision/main") {
        let siblings: Vec<_> =
            state.files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": siblings, "private": false }).to_string();
        return stream.write_all((head("200 OK", "", body.len()) + &body).as_bytes());
    }
    let prefix = format!("/{ID}/resolve/{COMMIT}/");
    let name = request.path.strip_prefix(&prefix).unwrap_or_default().to_owned();
    let Some((_, file)) =
        state.files.iter_mut().find(|(found, file)| *found == name && !file.etag.is_empty())
    else {
        return stream.write_all(head("404 Not Found", "x-error-code: EntryNotFound\r\n", 0).as_bytes());
    };
    if let Some(storage) = storage {
        let headers = format!(
            "location: {storage}{}\r\nx-linked-etag: \"{}\"\r\nx-linked-size: {}\r\n",
            request.path, file.etag, file.announced_size
        );
        return stream.write_all(head("302 Found", &headers, 0).as_bytes());
    }
    let start = request.headers.get("range").filter(|_| file.obeys_range).map_or(0, |range| {
        range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse::<usize>().unwrap()
    });
    let rest = file.body[start..].to_vec();
    let sent = if file.cuts.is_empty() { rest.len() } else { file.cuts.remove(0) };
    let (status, range) = match start {
        0 => ("200 OK", String::new()),
        _ => {
            let length = file.body.len();
            ("206 Partial Content", format!("content-range: bytes {start}-{}/{length}\r\n", length - 1))
        }
    };
    drop(state);
    stream.write_all(head(status, &range, rest.len()).as_bytes())?;
    stream.write_all(&rest[..sent])
}

fn assert_mentions(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not mention {part:?}");
    }
}

#[test]
fn a_download_has_the_cache_layout_of_the_hub_and_is_used_again() {
    let hub = Hub::tiny();
    let model = hub.resolve(ID).unwrap();
    assert_eq!((model.name.as_str(), model.revision.as_deref()), (ID, Some(COMMIT)));
    let repository = hub.cache.path().join("models--org--tiny");
    assert_eq!(model.folder, repository.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    for (name, file) in tiny_files() {
        let path = model.folder.join(name);
        if name == "README.md" {
            assert!(!path.exists(), "only what is needed");
            continue;
        }
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("../../blobs").join(&file.etag), "{name}");
        assert_eq!(fs::read(&path).unwrap(), file.body, "{name}");
    }
    let leftovers = fs::read_dir(repository.join("blobs")).unwrap();
    assert_eq!(leftovers.count(), 4, "no partial file is left");
    BaseModel::open(&model.folder).unwrap();

    let requests = hub.requests();
    assert!(requests.iter().any(|request| request.method == "HEAD"));
    assert_eq!(requests[0].headers["authorization"], "Bearer hf_secret");
    let host = hub.address.strip_prefix("http://").unwrap();
    let (to_hub, to_storage): (Vec<_>, Vec<_>) =
        requests.iter().partition(|request| request.headers["host"] == host);
    assert!(to_hub.iter().all(|request| request.headers.contains_key("authorization")));
    assert_eq!(to_storage.len(), 4);
    assert!(
        to_storage.iter().all(|request| !request.headers.contains_key("authorization")),
        "the token stays with the hub"
    );

    assert_eq!(hub.resolve(ID).unwrap(), model);
    assert_eq!(hub.resolve(&format!("{ID}@{COMMIT}")).unwrap(), model);
    let mut offline = hub.settings();
    offline.offline = true;
    assert_eq!(resolve_with(ID, &offline).unwrap(), model);
    assert!(hub.requests().is_empty(), "the cache answers");
}

#[test]
fn shards_are_fetched_as_the_index_says() {
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    let mut files = tiny_files();
    files.retain(|(name, _)| *name != "model.safetensors");
    files.push(("model.safetensors.index.json", Served::new(index.into())));
    files.push(("model-00001-of-00002.safetensors", Served::new(vec![1; 10])));
    let hub = Hub::new(files.clone());
    assert_mentions(&hub.error(ID, ErrorKind::Model), &["model-00002-of-00002.safetensors", "does not have"]);
    files.push(("model-00002-of-00002.safetensors", Served::new(vec![2; 20])));
    let hub = Hub::new(files.clone());
    let folder = hub.resolve(ID).unwrap().folder;
    assert_eq!(fs::read(folder.join("model-00002-of-00002.safetensors")).unwrap(), [2; 20]);
    // A shard that is gone makes the snapshot incomplete, and only that shard is fetched again.
    fs::remove_file(folder.join("model-00001-of-00002.safetensors")).unwrap();
    fs::remove_file(hub.blob(&format!("{:x}", Sha256::digest([1; 10])))).unwrap();
    hub.requests();
    hub.resolve(ID).unwrap();
    let fetched: Vec<_> = hub.requests().into_iter().map(|request| request.path).collect();
    assert!(
        fetched.iter().skip(1).all(|path| path.ends_with("model-00001-of-00002.safetensors")),
        "{fetched:?}"
    );

    files.retain(|(name, _)| !name.starts_with("model"));
    let outside = r#"{"weight_map": {"a": "../secret"}}"#;
    let twice = r#"{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}"#;
    for (index, mentions) in [(outside, ["\"../secret\"", "plain file name"]), (twice, ["`a`", "twice"])] {
        files.push(("model.safetensors.index.json", Served::new(index.into())));
        assert_mentions(&Hub::new(files.clone()).error(ID, ErrorKind::Model), &mentions);
        files.pop();
    }
}

#[test]
fn a_cut_connection_goes_on_where_it_was_cut() {
    let hub = Hub::tiny();
    hub.change("model.safetensors", |file| file.cuts = vec![100_000, 50_000, 0, 0, 1]);
    let folder = hub.resolve(ID).unwrap().folder;
    BaseModel::open(folder).unwrap();
    let ranges: Vec<_> =
        hub.requests().into_iter().filter_map(|request| request.headers.get("range").cloned()).collect();
    // Each is asked of the hub and of its storage.
    let expected = ["100000", "150000", "150000", "150000", "150001"].map(|start| format!("bytes={start}-"));
    assert_eq!(ranges.chunks(2).map(|pair| pair[1].clone()).collect::<Vec<_>>(), expected);
    assert!(ranges.chunks(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_dead_connection_keeps_its_bytes_for_the_next_run() {
    let hub = Hub::tiny();
    hub.change("model.safetensors", |file| file.cuts = vec![100_000, 0, 0, 0]);
    assert_mentions(&hub.error(ID, ErrorKind::Io), &["model.safetensors", "cut", "100000 bytes are kept"]);
    let (_, file) = tiny_files().pop().unwrap();
    let partial = hub.blob(&format!("{}.incomplete", file.etag));
    assert_eq!(fs::metadata(&partial).unwrap().len(), 100_000);
    assert!(!hub.cache.path().join("models--org--tiny/refs/main").exists());
    hub.requests();
    hub.resolve(ID).unwrap();
    assert!(
        hub.requests()
            .iter()
            .any(|request| request.headers.get("range").is_some_and(|range| range == "bytes=100000-"))
    );
    assert!(!partial.exists());
    // A leftover that is longer than the file is of no use.
    let hub = Hub::tiny();
    let partial = hub.blob(&format!("{}.incomplete", file.etag));
    fs::create_dir_all(partial.parent().unwrap()).unwrap();
    fs::write(&partial, vec![0; file.body.len() + 1]).unwrap();
    BaseModel::open(hub.resolve(ID).unwrap().folder).unwrap();
}

#[test]
fn a_server_that_ignores_ranges_is_read_from_the_start() {
    let hub = Hub::tiny();
    hub.change("model.safetensors", |file| (file.obeys_range, file.cuts) = (false, vec![100_000]));
    BaseModel::open(hub.resolve(ID).unwrap().folder).unwrap();
    // And not for ever.
    let hub = Hub::tiny();
    hub.change("model.safetensors", |file| (file.obeys_range, file.cuts) = (false, vec![1000; 100]));
    hub.error(ID, ErrorKind::Io);
}

#[test]
fn a_busy_hub_is_asked_again() {
    let hub = Hub::tiny();
    hub.state.lock().unwrap().busy = 2;
    hub.resolve(ID).unwrap();
    let hub = Hub::tiny();
    hub.state.lock().unwrap().busy = 1000;
    assert_mentions(&hub.error(ID, ErrorKind::Io), &["status 503"]);
}

#[test]
fn a_wrong_size_is_refused_and_not_kept() {
    let hub = Hub::tiny();
    hub.change("model.safetensors", |file| file.announced_size -= 5);
    let (_, file) = tiny_files().pop().unwrap();
    assert_mentions(
        &hub.error(ID, ErrorKind::Io),
        &["model.safetensors", &format!("expected {}", file.body.len() - 5)],
    );
    assert!(!hub.blob(&file.etag).exists() && !hub.blob(&format!("{}.incomplete", file.etag)).exists());
    hub.change("model.safetensors", |file| file.announced_size += 5);
    hub.resolve(ID).unwrap();
}

#[test]
fn a_wrong_hash_is_refused_and_not_kept() {
    let hub = Hub::tiny();
    let (_, file) = tiny_files().pop().unwrap();
    hub.change("model.safetensors", |file| file.body[1000] ^= 1);
    assert_mentions(&hub.error(ID, ErrorKind::Io), &["model.safetensors", "SHA-256", &file.etag]);
    assert!(!hub.blob(&file.etag).exists() && !hub.blob(&format!("{}.incomplete", file.etag)).exists());
    hub.change("model.safetensors", |file| file.body[1000] ^= 1);
    BaseModel::open(hub.resolve(ID).unwrap().folder).unwrap();
}

#[test]
fn a_missing_file_model_or_revision_is_named() {
    let hub = Hub::tiny();
    hub.change("model.safetensors", |file| file.etag.clear());
    assert_mentions(&hub.error(ID, ErrorKind::Model), &["model.safetensors does not exist"]);
    let refuse = |status, code| hub.state.lock().unwrap().refusal = Some((status, code));
    refuse("404 Not Found", "RepoNotFound");
    assert_mentions(
        &hub.error("org/none", ErrorKind::Model),
        &["org/none", "no such folder", "no such model on the hub"],
    );
    refuse("401 Unauthorized", "RepoNotFound");
    assert_mentions(&hub.error("org/none", ErrorKind::Model), &["no such model on the hub", "HF_TOKEN"]);
    refuse("404 Not Found", "RevisionNotFound");
    assert_mentions(&hub.error("org/tiny@v9", ErrorKind::Model), &["org/tiny@v9", "no revision \"v9\""]);

    let without =
        |name: &str| Hub::new(tiny_files().into_iter().filter(|(found, _)| *found != name).collect());
    assert_mentions(&without("config.json").error(ID, ErrorKind::Model), &["no config.json"]);
    assert_mentions(&without("model.safetensors").error(ID, ErrorKind::Model), &["no safetensors weights"]);
}

#[test]
fn a_gated_model_says_what_to_do() {
    let hub = Hub::tiny();
    for (status, code) in
        [("403 Forbidden", "GatedRepo"), ("401 Unauthorized", "GatedRepo"), ("401 Unauthorized", "")]
    {
        hub.state.lock().unwrap().refusal = Some((status, code));
        let licence = format!("accept its licence at {}/{ID}", hub.address);
        assert_mentions(&hub.error(ID, ErrorKind::Model), &[ID, "gated", &licence, "HF_TOKEN"]);
    }
}

#[test]
fn offline_without_a_cache_asks_nothing() {
    let hub = Hub::tiny();
    let mut settings = hub.settings();
    settings.offline = true;
    let error = resolve_with(ID, &settings).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    assert_mentions(&error.to_string(), &[ID, "neither a folder nor in the hub's cache", "HF_HUB_OFFLINE"]);
    assert!(hub.requests().is_empty());
}

#[test]
fn an_unreachable_hub_is_a_network_error() {
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let hub = Hub::tiny();
    let mut settings = hub.settings();
    settings.endpoint = address.clone();
    let error = resolve_with(ID, &settings).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_mentions(&error.to_string(), &[&address, "cannot reach the hub", "HF_ENDPOINT"]);
}

#[test]
fn names_that_are_neither_folder_nor_id_say_so() {
    let hub = Hub::tiny();
    for name in ["", "./none", "/none/at/all", "tiny", "org/tiny/more", "../org", "org/../x"] {
        assert_mentions(&hub.error(name, ErrorKind::Model), &["no such folder", "no hub id"]);
    }
    let file = hub.cache.path().join("model.gguf");
    fs::write(&file, "").unwrap();
    assert_mentions(
        &hub.error(file.to_str().unwrap(), ErrorKind::Model),
        &["found a file", "fastlora import"],
    );
    assert!(hub.requests().is_empty());
    let folder = hub.resolve("tests/fixtures/tiny_qwen2").unwrap();
    assert_eq!((folder.folder.as_path(), folder.revision), (Path::new("tests/fixtures/tiny_qwen2"), None));
}
