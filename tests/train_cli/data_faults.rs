//! Faults of data through the binary: exit 3 and the place, or taken for what it is and said so.

use crate::support::fixture;
use crate::workspace::{Workspace, samples};

const TOKENS: &str = r#"{"input_ids": [5, 6, 7, 2]}"#;

/// Trains one step on `content` as `name`, which must be refused with exit code 3, and nothing written.
#[track_caller]
fn refused(name: &str, content: impl AsRef<[u8]>, arguments: &[&str], parts: &[&str]) {
    let workspace = Workspace::new();
    let model = workspace.text_model("model");
    workspace.write(name, content);
    let usual = ["-m", &model, "--train-data", name, "--val-data", "none", "-o", "out", "--max-steps", "1"];
    workspace.train(&[&usual, arguments].concat()).refused(3, parts);
    assert!(!workspace.path("out").exists());
}

/// Trains one step on `content` as `name`; the log.
#[track_caller]
fn accepted(name: &str, content: impl AsRef<[u8]>, arguments: &[&str]) -> String {
    let workspace = Workspace::new();
    let model = workspace.text_model("model");
    workspace.write(name, content);
    let usual = ["-m", &model, "--train-data", name, "--val-data", "none", "-o", "out", "--max-steps", "1"];
    let finished = workspace.train(&[&usual, arguments].concat()).succeeded();
    assert_eq!(workspace.steps("out").len(), 1);
    finished.stderr
}

#[test]
fn fault_24_an_id_beyond_the_embedding_never_reaches_the_device() {
    let content = format!("{TOKENS}\n{{\"input_ids\": [5, 512, 2]}}\n");
    refused("train.jsonl", &content, &[], &["train.jsonl:2", "token id 512", "512 rows"]);
    let content = format!("{TOKENS}\n{{\"input_ids\": [5, 6], \"labels\": [-100, 600]}}\n");
    refused("train.jsonl", &content, &[], &["train.jsonl:2", "600"]);
}

#[test]
fn fault_28_a_model_that_would_never_stop_is_warned_about() {
    let log = accepted("train.jsonl", r#"{"input_ids": [1, 1, 5, 6]}"#, &[]);
    assert!(log.contains("EOS is in no sample's labels") && log.contains("train.jsonl:1"), "{log}");
    assert!(log.contains("begins with BOS twice"), "{log}");
    let log = accepted("train.jsonl", TOKENS, &[]);
    assert!(!log.contains("EOS is in no") && !log.contains("BOS twice"), "{log}");
    // Truncation takes EOS from every text.
    let long = format!("{{\"instruction\": \"1\", \"output\": \"{}\"}}", "sauce ".repeat(99));
    let log = accepted("train.jsonl", long, &["--overlong", "truncate", "--max-length", "48"]);
    assert!(log.contains("EOS is in no sample's labels") && log.contains("cut to 48"), "{log}");
}

#[test]
fn fault_29_broken_json_is_placed() {
    refused("train.jsonl", format!("{TOKENS}\n\n{{\"a\": tru}}"), &[], &["train.jsonl:3:10", "broken JSON"]);
    refused("train.json", format!("[{TOKENS},\n]"), &[], &["train.json:2:1", "broken JSON"]);
}

#[test]
fn fault_30_mixed_kinds_of_record_are_refused() {
    let mixed = format!("{TOKENS}\n{{\"instruction\": \"1\", \"output\": \"2\"}}\n");
    refused("train.jsonl", mixed, &[], &["train.jsonl:2", "mixed kinds"]);
}

#[test]
fn fault_31_byte_order_mark_and_carriage_returns_are_taken() {
    let log = accepted("train.jsonl", format!("\u{feff}{TOKENS}\r\n\r\n{TOKENS}\r\n"), &[]);
    assert!(log.contains("2 of 2 records used"), "{log}");
}

#[test]
fn fault_32_bytes_that_are_not_utf_8_are_placed() {
    refused("train.json", b"[{\"a\": \"caf\xe9\"}]", &[], &["train.json", "offset 11"]);
}

#[test]
fn fault_33_a_line_of_100_megabytes_is_read() {
    let long = "x".repeat(100 << 20);
    let content = format!("{{\"note\": \"{long}\", \"input_ids\": [5, 6, 2]}}\n{TOKENS}\n");
    let log = accepted("train.jsonl", content, &[]);
    assert!(log.contains("2 of 2 records used"), "{log}");
}

#[test]
fn fault_34_empty_files_and_lists_are_refused() {
    for (name, content) in [("train.json", ""), ("train.json", "[]"), ("train.jsonl", "\n")] {
        refused(name, content, &[], &[name, "no record"]);
    }
}

#[test]
fn fault_35_a_bad_record_is_refused_or_skipped_and_accounted_for() {
    let content = "{\"instruction\": \"1\", \"output\": \"2\"}\n{\"instruction\": \"1\"}\n{\"instruction\": \"\", \"output\": \"3\"}";
    refused("train.jsonl", content, &[], &["train.jsonl:2", "no output", "train.jsonl:3", "on_bad_record"]);
    let log = accepted("train.jsonl", content, &["--on-bad-record", "skip"]);
    for part in
        ["1 of 3 records used, 2 skipped", "train.jsonl:2: skipped: no output", "train.jsonl:3: skipped"]
    {
        assert!(log.contains(part), "expected `{part}` in: {log}");
    }
    // Where nothing is left, the warnings that the error speaks of are there.
    let workspace = Workspace::new();
    workspace.write("train.jsonl", "{\"instruction\": \"1\"}");
    let finished = workspace.train_into("out", &["--on-bad-record", "skip"]);
    let finished = finished.refused(3, &["no usable record: 0 of 1 records used, 1 skipped"]);
    assert!(finished.stderr.contains("train.jsonl:1: skipped: no output"), "{}", finished.stderr);
}

#[test]
fn fault_37_a_record_without_labels_is_refused_or_skipped() {
    let content = format!("{TOKENS}\n{{\"input_ids\": [5, 6], \"labels\": [5, -100]}}\n");
    refused("train.jsonl", &content, &[], &["train.jsonl:2", "every label is masked"]);
    let log = accepted("train.jsonl", &content, &["--on-bad-record", "skip"]);
    assert!(log.contains("train.jsonl:2: skipped: every label is masked"), "{log}");
}

#[test]
fn fault_38_overlong_samples_are_refused_truncated_or_dropped() {
    let long =
        format!("{{\"instruction\": \"{}\", \"output\": \"4\", \"hash\": \"math\"}}\n", "2+".repeat(99));
    let content = format!("{long}{{\"instruction\": \"1\", \"output\": \"2\"}}\n");
    let limit = ["--max-length", "48"];
    let over = ["train.jsonl:1", "1 of 2 samples are longer than max_length = 48", "≤64: 1", "overlong"];
    refused("train.jsonl", &content, &limit, &over[..2]);
    refused("train.jsonl", &content, &limit, &["lengths in tokens", "longest", "overlong"]);
    let log = accepted("train.jsonl", &content, &[&limit[..], &["--overlong", "truncate"]].concat());
    assert!(
        log.contains("2 of 2 records used, 1 truncated") && log.contains("train.jsonl:1: truncated"),
        "{log}"
    );
    let log = accepted("train.jsonl", &content, &[&limit[..], &["--overlong", "drop"]].concat());
    assert!(
        log.contains("1 of 2 records used, 1 dropped") && log.contains("train.jsonl:1: dropped"),
        "{log}"
    );
    refused(
        "train.jsonl",
        &long,
        &[&limit[..], &["--overlong", "drop"]].concat(),
        &["no sample is left", "longest"],
    );
}

#[test]
fn fault_39_without_any_target_there_is_no_run() {
    let masked = "{\"input_ids\": [5, 6], \"labels\": [-100, -100]}\n";
    refused(
        "train.jsonl",
        masked.repeat(3),
        &["--on-bad-record", "skip"],
        &["no sample is left", "3 skipped"],
    );
    // One token alone predicts nothing; beside others it is left out, and the loss stays finite.
    let log =
        accepted("train.jsonl", format!("{{\"input_ids\": [5]}}\n{TOKENS}"), &["--on-bad-record", "skip"]);
    assert!(log.contains("1 of 2 records used, 1 skipped"), "{log}");
}

#[test]
fn fault_41_validation_samples_among_the_training_samples_are_counted() {
    let workspace = Workspace::with_data();
    let shared: String = samples(1, 40).lines().take(5).map(|line| line.to_string() + "\n").collect();
    workspace.write("val.jsonl", shared + &samples(2, 3));
    let log =
        workspace.train_into("out", &["--val-data", "val.jsonl", "--max-steps", "1"]).succeeded().stderr;
    assert!(log.contains("5 of 8 validation samples are training samples too"), "{log}");
    workspace.write("val.jsonl", samples(2, 3));
    let log =
        workspace.train_into("apart", &["--val-data", "val.jsonl", "--max-steps", "1"]).succeeded().stderr;
    assert!(!log.contains("training samples too"), "{log}");
}

#[test]
fn fault_42_control_characters_of_data_never_reach_the_terminal() {
    let visible = |log: &str| !log.chars().any(|character| character.is_control() && character != '\n');
    // In an error, in an account, in a hash of the validation's figures, and in a file's name.
    let workspace = Workspace::with_data();
    let hostile = "{\"instruction\": \"1\", \"\\u001b[31mred\\u0007\": \"2\"}\n";
    workspace.write("bad.jsonl", hostile);
    let finished =
        workspace.train_into("out", &["--train-data", "bad.jsonl"]).refused(3, &["\\u{1b}[31mred\\u{7}"]);
    assert!(visible(&finished.stderr), "{:?}", finished.stderr);
    let name = "\u{1b}[2Jval.jsonl";
    workspace.write(name, r#"{"input_ids": [5, 6, 2], "hash": "\u001b]0;title\u0007"}"#);
    workspace.write(
        "bad.jsonl",
        format!("{hostile}{}", r#"{"instruction": "1", "output": "2", "hash": "\u001b[1m"}"#),
    );
    let model = workspace.text_model("model");
    let arguments = [
        "-m",
        &model,
        "--on-bad-record",
        "skip",
        "--train-data",
        "bad.jsonl",
        "--val-data",
        name,
        "-o",
        "out",
    ];
    let finished = workspace.train(&arguments).succeeded();
    for part in ["\\u{1b}[31mred", "\\u{1b}]0;title\\u{7}", "\\u{1b}[2Jval.jsonl"] {
        assert!(finished.stderr.contains(part), "expected `{part}` in {}", finished.stderr);
    }
    assert!(visible(&finished.stderr), "{:?}", finished.stderr);
}

#[test]
fn several_files_are_merged_in_order_and_counted() {
    let workspace = Workspace::with_data();
    workspace.write("more.json", format!("[{TOKENS}]"));
    let model = fixture("tiny_qwen2");
    let sources = ["--train-data", "more.json", "--train-data", "train.jsonl"];
    let usual = ["-m", model.to_str().unwrap(), "--val-data", "none", "-o", "out", "--shuffle", "false"];
    let options = ["--batch-size", "1", "--max-steps", "1"];
    let log = workspace.train(&[&sources[..], &usual, &options].concat()).succeeded().stderr;
    for part in ["more.json: 1 records", "train.jsonl: 40 records", "41 of 41 records used"] {
        assert!(log.contains(part), "{log}");
    }
    assert_eq!(workspace.of_steps("out", "tokens"), [4.0]);
}
