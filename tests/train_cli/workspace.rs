//! A folder to train in, and the binary that trains.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Tensors, fixture};

/// Ids of the tiny models.
pub const VOCABULARY: u64 = 512;

/// A temporary folder that runs of the binary have as their working folder.
pub struct Workspace {
    folder: TempDir,
}

/// What a run of the binary left: exit code and both streams.
pub struct Finished {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// What a process left; of one that a signal ended, the code is what a shell would say.
    pub fn of(output: Output) -> Self {
        let code = output.status.code().or(output.status.signal().map(|signal| 128 + signal));
        Self {
            code: code.unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The standard error of a run that must succeed.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self
    }

    /// Checks a refusal: the exit code, one line of error without a panic, and its parts.
    #[track_caller]
    pub fn refused(self, code: i32, parts: &[&str]) -> Self {
        assert_eq!(self.code, code, "{}", self.stderr);
        // With --json each line of the log is an object.
        let message = |line: &str| {
            let object: Value = serde_json::from_str(line).unwrap_or_default();
            object["fields"]["message"].as_str().map_or(line.to_string(), str::to_string)
        };
        let errors: Vec<String> =
            self.stderr.lines().map(message).filter(|line| line.starts_with("error: ")).collect();
        let [error] = &errors[..] else { panic!("expected one error: {}", self.stderr) };
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        for part in parts {
            assert!(error.contains(part), "expected `{part}` in: {error}");
        }
        self
    }

    /// The result on standard output.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

impl Workspace {
    /// An empty folder.
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    /// A folder with pre-tokenised `train.jsonl` (40 samples) and `val.jsonl` (6 others).
    pub fn with_data() -> Self {
        let workspace = Self::new();
        workspace.write("train.jsonl", samples(1, 40));
        workspace.write("val.jsonl", samples(2, 6));
        workspace
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A copy of tiny_qwen2 with the tokenizer of 512 ids.
    pub fn text_model(&self, name: &str) -> String {
        for file in ["config.json", "generation_config.json", "model.safetensors"] {
            self.write(&format!("{name}/{file}"), std::fs::read(fixture("tiny_qwen2").join(file)).unwrap());
        }
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let bytes = std::fs::read(fixture("tiny_tokenizer").join(file)).unwrap();
            self.write(&format!("{name}/{file}"), bytes);
        }
        name.to_string()
    }

    /// The binary with exactly these arguments, to be started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(cargo_bin("fastlora"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            // Nothing of the caller's cache or of the network.
            .env("HF_HOME", self.path("hub"))
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_ENDPOINT")
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env_remove("FASTLORA_TOKEN_CACHE")
            .env_remove("FASTLORA_TILES")
            .env_remove("WORLD_SIZE")
            .env_remove("NO_COLOR");
        command
    }

    /// The binary with exactly these arguments.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        Finished::of(self.command(arguments).output().unwrap())
    }

    /// `fastlora train` with exactly these arguments.
    pub fn train(&self, arguments: &[&str]) -> Finished {
        self.run(&[&["train"], arguments].concat())
    }

    /// Arguments that train tiny_qwen2 on `train.jsonl` into `output`, without validation unless `more` has it.
    pub fn usual<'a>(output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        static MODEL: LazyLock<String> =
            LazyLock::new(|| fixture("tiny_qwen2").to_str().unwrap().to_string());
        let usual = ["-m", &MODEL, "--train-data", "train.jsonl", "-o", output];
        let validation: &[&str] = if more.contains(&"--val-data") { &[] } else { &["--val-data", "none"] };
        [&usual, validation, more].concat()
    }

    /// [`train`](Self::train) with the [`usual`](Self::usual) arguments.
    pub fn train_into(&self, output: &str, arguments: &[&str]) -> Finished {
        self.train(&Self::usual(output, arguments))
    }

    /// The objects of `OUTPUT/metrics.jsonl`.
    pub fn metrics(&self, output: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The steps among [`metrics`](Self::metrics).
    pub fn steps(&self, output: &str) -> Vec<Value> {
        self.metrics(output).into_iter().filter(|object| object.get("event").is_none()).collect()
    }

    /// One number of every step.
    pub fn of_steps(&self, output: &str, key: &str) -> Vec<f64> {
        self.steps(output).iter().map(|step| step[key].as_f64().expect(key)).collect()
    }

    /// The validations among [`metrics`](Self::metrics).
    pub fn validations(&self, output: &str) -> Vec<Value> {
        self.metrics(output).into_iter().filter(|object| object["event"] == "validation").collect()
    }

    /// The saved adapter.
    pub fn adapter(&self, output: &str) -> Tensors {
        Tensors::open(self.path(output).join("adapter_model.safetensors"))
    }

    pub fn adapter_bytes(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.path(output).join("adapter_model.safetensors")).unwrap()
    }

    /// Every file below `name` with its bytes.
    pub fn snapshot(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        collect(&self.path(name), &mut files);
        files
    }
}

fn collect(path: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap() {
            collect(&entry.unwrap().path(), files);
        }
    } else if path.exists() {
        files.insert(path.to_path_buf(), std::fs::read(path).unwrap());
    }
}

/// Pre-tokenised records of 5 to 40 tokens, the first third of each masked, with three hashes.
pub fn samples(seed: u64, count: usize) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut draw = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    (0..count)
        .map(|number| {
            let length = 5 + draw(36) as usize;
            let ids: Vec<u64> = (0..length).map(|_| 3 + draw(VOCABULARY - 3)).collect();
            let label = |(position, id): (usize, &u64)| if position < length / 3 { -100 } else { *id as i64 };
            let labels: Vec<i64> = ids.iter().enumerate().map(label).collect();
            let hash = ["math", "faq", "general"][number % 3];
            json!({ "input_ids": ids, "labels": labels, "hash": hash }).to_string() + "\n"
        })
        .collect()
}
