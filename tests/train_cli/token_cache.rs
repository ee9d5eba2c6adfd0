//! Tokens that are kept for the next start: nothing but time and memory tells whether they were.

use std::path::PathBuf;

use serde_json::Value;

use crate::faulty_files::Fault;
use crate::workspace::{Finished, Workspace};

/// Text with four hashes, one bad record and some that are too long.
fn text() -> String {
    let record = |number: usize| {
        let words = "the sea is calm ".repeat(1 + number * 7 % 11);
        let hash = ["math", "faq", "general", "faq"][number % 4];
        format!(
            "{{\"instruction\": \"{words}{number}\", \"output\": \"It is {number}.\", \"hash\": \"{hash}\"}}\n"
        )
    };
    (0..40).map(record).collect::<String>() + "{\"instruction\": \"no output\"}\n" + &record(77)
}

fn workspace() -> Workspace {
    let workspace = Workspace::with_data();
    workspace.text_model("model");
    workspace.write("text.jsonl", text());
    workspace.write("more.json", format!("[{}]", text().lines().take(9).collect::<Vec<_>>().join(",\n")));
    workspace
}

const USUAL: [&str; 20] = [
    "-m",
    "model",
    "--train-data",
    "text.jsonl",
    "--on-bad-record",
    "skip",
    "--overlong",
    "truncate",
    "--max-length",
    "48",
    "--max-steps",
    "6",
    "--batch-size",
    "2",
    "--lora-dropout",
    "0.1",
    "--report",
    "tensorboard",
    "--val-data",
    "none",
];

fn with<'a>(output: &'a str, cache: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = USUAL.to_vec();
    if more.contains(&"--val-fraction") || more.contains(&"--val-data") {
        arguments.truncate(USUAL.len() - 2);
    }
    arguments.extend(["-o", output, "--token-cache", cache]);
    arguments.extend(more);
    arguments
}

/// The log's lines about records, and nothing of the cache.
fn account(run: &Finished) -> Vec<String> {
    let is_account = |line: &&str| {
        ["records", ".jsonl:", ".json:", "order", "samples", "held out", "epoch"]
            .iter()
            .any(|part| line.contains(part))
            && !line.contains("/tokens")
            && !line.contains("output_dir")
    };
    let lines = run.stderr.lines().filter(is_account);
    // Without the time in front.
    lines.map(|line| line.split_once(' ').map_or(line, |(_, rest)| rest).to_string()).collect()
}

/// Metrics without times.
fn figures(workspace: &Workspace, output: &str) -> Vec<Value> {
    let mut metrics = workspace.metrics(output);
    for line in &mut metrics {
        let line = line.as_object_mut().unwrap();
        line.retain(|key, _| !["seconds", "step_ms", "tokens_per_second"].contains(&key.as_str()));
    }
    metrics
}

fn files(workspace: &Workspace) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = workspace.snapshot("tokens").into_keys().collect();
    files.sort();
    files
}

#[test]
fn a_run_is_the_same_with_and_without_the_cache() {
    let weighted =
        r#"train_data=[{"path": "text.jsonl", "weight": 1.5}, {"path": "more.json", "weight": 0.5}]"#;
    for more in [
        &[][..],
        &["--set", weighted],
        &["--set", weighted, "--balance-by-hash", "true", "--hash-dropout", "0.4"],
        &["--packing", "true", "--val-fraction", "0.2", "--val-every", "3"],
        &["--bucket-by-length", "true", "--val-data", "more.json", "--val-every", "3"],
        &["--train-data", "train.jsonl", "--shuffle", "false"],
    ] {
        // `--train-data` once.
        let arguments = |output, cache| {
            let mut arguments = with(output, cache, more);
            if more.contains(&weighted) || more.contains(&"--train-data") {
                arguments.drain(2..4);
            }
            arguments
        };
        let workspace = workspace();
        let without = workspace.train(&arguments("off", "off")).succeeded();
        let first = workspace.train(&arguments("first", "tokens")).succeeded();
        let second = workspace.train(&arguments("second", "tokens")).succeeded();
        assert!(!without.stderr.contains("tokens of an earlier run"));
        assert!(first.stderr.contains("the tokens, for later runs"), "{}", first.stderr);
        assert!(
            second.stderr.contains("tokens of an earlier run; nothing is tokenised"),
            "{}",
            second.stderr
        );
        assert!(!second.stderr.contains("for later runs"), "{}", second.stderr);
        for (output, run) in [("first", &first), ("second", &second)] {
            assert_eq!(account(run), account(&without), "{more:?}");
            assert_eq!(figures(&workspace, output), figures(&workspace, "off"), "{more:?}");
            assert!(workspace.adapter_bytes(output) == workspace.adapter_bytes("off"), "{more:?}");
            let provenance = |output: &str| -> Value {
                let text = std::fs::read(workspace.path(output).join("fastlora.json")).unwrap();
                serde_json::from_slice(&text).unwrap()
            };
            for key in ["data_sha256", "hashes", "weights"] {
                assert_eq!(provenance(output)[key], provenance("off")[key], "{more:?}");
            }
        }
    }
}

#[test]
fn a_run_resumes_bit_for_bit_whether_tokens_are_kept_or_not() {
    let workspace = workspace();
    let more = ["--save-every", "2", "--hash-dropout", "0.3"];
    workspace.train(&with("whole", "off", &more)).succeeded();
    for (name, before, after) in [("a", "off", "tokens"), ("b", "tokens", "tokens"), ("c", "tokens", "off")] {
        let at = Fault { call: Some("rename"), name: Some("step-4"), at: 1, kind: "kill-after" };
        let cut = workspace.train_with(at, &with(name, before, &more));
        assert_eq!(cut.code, 137, "{}", cut.stderr);
        let resumed = workspace.train(&[&with(name, after, &more)[..], &["--resume"]].concat()).succeeded();
        assert!(resumed.stderr.contains("resuming after step 4"), "{}", resumed.stderr);
        assert_eq!(figures(&workspace, name), figures(&workspace, "whole"), "{name}");
        assert!(workspace.adapter_bytes(name) == workspace.adapter_bytes("whole"), "{name}");
    }
}

#[test]
fn damaged_tokens_are_made_again() {
    let workspace = workspace();
    workspace.train(&with("first", "tokens", &[])).succeeded();
    let [file] = &files(&workspace)[..] else { panic!("{:?}", files(&workspace)) };
    let whole = std::fs::read(file).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (number, (damage, part)) in [
        (flipped, "its SHA-256 is another"),
        (whole[..whole.len() / 2].to_vec(), "its size is not what it says"),
        (Vec::new(), "the file is empty"),
        (b"something else ".repeat(20), "no file of samples"),
    ]
    .into_iter()
    .enumerate()
    {
        std::fs::write(file, damage).unwrap();
        let output = format!("again-{number}");
        let run = workspace.train(&with(&output, "tokens", &[])).succeeded();
        assert!(run.stderr.contains(part) && run.stderr.contains("tokenised again"), "{}", run.stderr);
        assert!(workspace.adapter_bytes(&output) == workspace.adapter_bytes("first"));
        assert!(std::fs::read(file).unwrap() == whole, "it is what it was");
    }
    assert_eq!(files(&workspace).len(), 1);
}

#[test]
fn other_data_and_other_settings_are_other_tokens() {
    let workspace = workspace();
    let count = |arguments: &[&str]| {
        workspace.train(&[&with("out", "tokens", arguments)[..], &["--overwrite"]].concat()).succeeded();
        files(&workspace).len()
    };
    assert_eq!(count(&[]), 1);
    // What makes no token.
    assert_eq!(count(&["--lora-r", "4", "--packing", "true", "--seed", "5"]), 1);
    for (number, more) in [
        ["--max-length", "40"],
        ["--loss-on", "all"],
        ["--overlong", "drop"],
        ["--hash-template", "<{hash}> "],
        ["--hash-dropout", "0.5"],
        ["--output-key", "output"],
    ]
    .iter()
    .enumerate()
    {
        // A flag that is given twice is refused.
        let mut arguments = with("out", "tokens", &[]);
        if let Some(place) = arguments.iter().position(|argument| argument == &more[0]) {
            arguments.drain(place..place + 2);
        }
        arguments.extend(more);
        arguments.push("--overwrite");
        workspace.train(&arguments).succeeded();
        assert_eq!(files(&workspace).len(), 2 + number, "{more:?}");
    }
    workspace.write("text.jsonl", text().replace("calm", "wild"));
    assert_eq!(count(&[]), 8);
    // The same data under another name.
    workspace.write("text.jsonl", text());
    std::fs::rename(workspace.path("text.jsonl"), workspace.path("moved.jsonl")).unwrap();
    let mut arguments = with("out", "tokens", &["--overwrite"]);
    arguments[3] = "moved.jsonl";
    let run = workspace.train(&arguments).succeeded();
    assert!(run.stderr.contains("nothing is tokenised"), "{}", run.stderr);
    assert!(run.stderr.contains("moved.jsonl:41: skipped"), "{}", run.stderr);
}

#[test]
fn fault_48_a_disk_that_fills_up_leaves_the_tokens_in_memory() {
    let workspace = workspace();
    workspace.train(&with("expected", "off", &[])).succeeded();
    let name = Some(".partial");
    for (number, fault) in [
        Fault { call: Some("write"), name, at: 1, kind: "ENOSPC" },
        Fault { call: Some("write"), name, at: 2, kind: "EIO" },
        Fault { call: Some("fsync"), name, at: 1, kind: "ENOSPC" },
        Fault { call: Some("rename"), name: Some("tokens/"), at: 1, kind: "EIO" },
    ]
    .into_iter()
    .enumerate()
    {
        let output = format!("out-{number}");
        let run = workspace.train_with(fault, &with(&output, "tokens", &[])).succeeded();
        assert!(run.stderr.contains("cannot be kept in tokens"), "{fault:?}: {}", run.stderr);
        assert!(workspace.adapter_bytes(&output) == workspace.adapter_bytes("expected"));
        assert!(files(&workspace).is_empty(), "{fault:?}");
    }
    // Short writes and interruptions are gone on with.
    for (at, kind) in [(1, "short"), (2, "short"), (1, "EINTR")] {
        let fault = Fault { call: Some("write"), name, at, kind };
        let run = workspace.train_with(fault, &with("out", "tokens", &["--overwrite"])).succeeded();
        assert!(run.stderr.contains("for later runs"), "{fault:?}: {}", run.stderr);
        std::fs::remove_dir_all(workspace.path("tokens")).unwrap();
    }
    // The disk is asked beforehand; here the run has no room either.
    let fault = Fault { kind: "no-space", ..Fault::default() };
    let run =
        workspace.train_with(fault, &with("out", "tokens", &["--overwrite"])).refused(6, &["the run writes"]);
    assert!(run.stderr.contains("cannot be kept in tokens: 4096 bytes are free"), "{}", run.stderr);
    // A folder that cannot be made.
    workspace.write("file", "");
    let run = workspace.train(&with("out", "file/tokens", &["--overwrite"])).succeeded();
    assert!(run.stderr.contains("cannot be kept in file/tokens"), "{}", run.stderr);
}

#[test]
fn fault_52_a_run_that_dies_while_it_keeps_tokens_leaves_nothing_that_counts() {
    let workspace = workspace();
    let kill = |call, kind| {
        let fault = Fault { call: Some(call), name: Some("tokens/"), at: 1, kind };
        let run = workspace.train_with(fault, &with("killed", "tokens", &[]));
        assert_eq!(run.code, 137, "{}", run.stderr);
    };
    kill("fsync", "kill");
    kill("rename", "kill");
    let leftovers = files(&workspace);
    assert_eq!(leftovers.len(), 2);
    assert!(leftovers.iter().all(|path| path.to_str().unwrap().ends_with(".partial")), "{leftovers:?}");
    // Files that are not old may be another run's that begins just now.
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    std::fs::File::open(&leftovers[0]).unwrap().set_modified(long_ago).unwrap();
    workspace.train(&with("out", "tokens", &[])).succeeded();
    let left = files(&workspace);
    assert!(!left.contains(&leftovers[0]) && left.contains(&leftovers[1]), "{left:?}");
    assert_eq!(left.len(), 2);

    // After the rename the file counts.
    std::fs::remove_dir_all(workspace.path("tokens")).unwrap();
    kill("rename", "kill-after");
    let run = workspace.train(&with("next", "tokens", &[])).succeeded();
    assert!(run.stderr.contains("nothing is tokenised"), "{}", run.stderr);
}

#[test]
fn runs_that_keep_the_same_tokens_at_once_do_not_meet() {
    let workspace = workspace();
    workspace.train(&with("expected", "off", &[])).succeeded();
    let names: Vec<String> = (0..4).map(|number| format!("out-{number}")).collect();
    let children: Vec<_> = names
        .iter()
        .map(|name| {
            let arguments = with(name, "tokens", &["--threads", "1"]);
            let mut command = workspace.command(&[&["train"], &arguments[..]].concat());
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            command.spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    for name in &names {
        assert!(workspace.adapter_bytes(name) == workspace.adapter_bytes("expected"));
    }
    assert_eq!(files(&workspace).len(), 1);
}

#[test]
fn the_variable_says_where_and_small_data_are_not_kept_by_themselves() {
    let workspace = workspace();
    let run = |variable: Option<&str>, output| {
        let arguments = with(output, "auto", &[]);
        let mut command = workspace.command(&[&["train"], &arguments[..]].concat());
        command.env("XDG_CACHE_HOME", workspace.path("cache"));
        if let Some(variable) = variable {
            command.env("FASTLORA_TOKEN_CACHE", variable);
        }
        Finished::of(command.output().unwrap()).succeeded()
    };
    run(None, "a");
    assert!(!workspace.path("cache").exists());
    let named = run(Some("tokens"), "b");
    assert!(named.stderr.contains("for later runs"), "{}", named.stderr);
    run(Some("off"), "c");
    assert!(!workspace.path("cache").exists());
}
