//! What the command line says, compared with `tests/snapshots/`: help, errors, tables.
//!
//! `UPDATE_SNAPSHOTS=1 cargo test --test train_cli snapshots` writes them anew; the difference is then read in the commit.

use std::path::Path;

use clap::CommandFactory;
use fastlora::cli::Cli;
use serde_json::json;

use crate::faulty_files::Fault;
use crate::workspace::Workspace;

/// Compares with the file, or writes it.
#[track_caller]
fn compare(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        return std::fs::write(path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((number, (expected, found))) =
        expected.lines().zip(found.lines()).enumerate().find(|(_, (expected, found))| expected != found)
    {
        panic!("{name}:{}:\n  was {expected}\n  is  {found}\n(UPDATE_SNAPSHOTS=1 accepts it)", number + 1);
    }
    assert_eq!(found.lines().count(), expected.lines().count(), "lines of {name}");
}

/// The text with every number as N, and blanks and rules that follow from their width as one: figures and times are
/// other tests' matter.
fn without_figures(text: &str) -> String {
    let mut normal = String::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let is_number = |next: &char| next.is_ascii_digit() || *next == '.';
        if character.is_ascii_digit() {
            while characters.next_if(is_number).is_some() {}
            normal.push('N');
        } else if !(matches!(character, ' ' | '─' | '═') && normal.ends_with(character)) {
            normal.push(character);
        }
    }
    normal
}

#[test]
fn help_is_what_it_was() {
    let workspace = Workspace::new();
    let mut verbs: Vec<Vec<String>> = vec![vec![]];
    for verb in Cli::command().get_subcommands() {
        verbs.push(vec![verb.get_name().into()]);
        for part in verb.get_subcommands() {
            verbs.push(vec![verb.get_name().into(), part.get_name().into()]);
        }
    }
    for verb in verbs {
        let mut arguments: Vec<&str> = verb.iter().map(String::as_str).collect();
        let name = if verb.is_empty() { "fastlora".to_string() } else { verb.join("-") };
        arguments.push("--help");
        compare(&format!("help/{name}.txt"), &workspace.run(&arguments).succeeded().stdout);
    }
}

/// A folder with a model, text, tokens, and a finished run `out`.
fn workspace() -> Workspace {
    let workspace = Workspace::with_data();
    workspace.text_model("model");
    let record =
        |hash: &str| json!({ "instruction": "The sun?", "output": "It is out.", "hash": hash }).to_string();
    workspace.write("text.jsonl", [record("faq"), record("math"), record("faq")].join("\n"));
    workspace
        .write("broken.jsonl", "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"a\",\n");
    workspace.write("bad.jsonl", "{\"instruction\": \"a\", \"output\": null}\n");
    workspace.write("config.json", "{\"lora_rnk\": 8}");
    let train = ["-m", "model", "--train-data", "text.jsonl", "--val-data", "text.jsonl", "--device", "cpu"];
    for (output, rank) in [("out", "4"), ("outputs/other", "2")] {
        workspace.train(&[&train[..], &["-o", output, "--lora-r", rank]].concat()).succeeded();
    }
    workspace
}

#[test]
fn errors_are_what_they_were() {
    let workspace = workspace();
    let usual = ["train", "-m", "model", "--val-data", "none", "-q"];
    let on = |data: &'static str, more: &[&'static str]| -> Vec<&'static str> {
        [&usual[..], &["--train-data", data], more].concat()
    };
    let cases: Vec<Vec<&str>> = vec![
        vec!["train", "config.json"],
        vec!["train", "nowhere.json"],
        vec!["train", "--set", "lora_r"],
        vec!["train", "--set", "lora_r=0"],
        vec!["train", "--lora-r", "many"],
        vec!["train", "--lora-rnk", "8"],
        vec!["train", "--report", "pdf"],
        vec!["train", "--sample-every", "5"],
        vec!["fly"],
        on("text.jsonl", &["-o", "out"]),
        on("text.jsonl", &["-o", "new", "--lora-target-modules", "query"]),
        on("text.jsonl", &["-o", "new", "--max-length", "8"]),
        on("nowhere.jsonl", &["-o", "new"]),
        on("broken.jsonl", &["-o", "new"]),
        on("bad.jsonl", &["-o", "new"]),
        on("text.jsonl", &["--resume", "out", "--seed", "3"]),
        on("text.jsonl", &["-o", "new", "--device", "gpu"]),
        vec![
            "train",
            "-m",
            "nowhere/",
            "--train-data",
            "text.jsonl",
            "--val-data",
            "none",
            "-q",
            "-o",
            "new",
        ],
        vec!["generate", "--adapter", "model", "--prompt", "a", "-q"],
        vec!["evaluate", "-m", "model"],
        vec!["inspect", "nowhere"],
        vec!["runs", "show", "model"],
        vec!["merge", "-m", "model"],
    ];
    let mut text = String::new();
    for arguments in cases {
        let run = workspace.run(&arguments);
        assert!(run.code != 0 && run.stdout.is_empty(), "{arguments:?}: {}", run.stdout);
        text += &format!("$ fastlora {}\n[{}] {}\n\n", arguments.join(" "), run.code, run.stderr.trim_end());
    }
    compare("errors.txt", &text);
}

#[test]
fn tables_are_what_they_were() {
    let workspace = workspace();
    let stop = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 3, kind: "term" };
    let train = ["-m", "model", "--train-data", "text.jsonl", "--val-data", "none", "--device", "cpu"];
    let run = workspace.train_with(stop, &[&train[..], &["-o", "outputs/stopped"]].concat());
    assert_eq!(run.code, 75, "{}", run.stderr);
    let mut text = String::new();
    let cases: [&[&str]; 7] = [
        &["runs", "list", "outputs/other", "out"],
        &["runs", "list", "outputs/stopped"],
        &["runs", "compare", "out", "outputs/other"],
        &["evaluate", "-m", "model", "--adapter", "out", "text.jsonl", "--device", "cpu", "-q"],
        &["inspect", "text.jsonl", "-m", "model", "-q"],
        &["inspect", "out", "-q"],
        &["verify", "out", "-q"],
    ];
    for arguments in cases {
        let run = workspace.run(arguments).succeeded();
        text += &format!("$ fastlora {}\n{}\n", arguments.join(" "), without_figures(&run.stdout));
    }
    // What the device is and holds is another machine's.
    let dry = ["train", "-m", "model", "--train-data", "text.jsonl", "--val-data", "none", "--dry-run", "-q"];
    let run = workspace.run(&[&dry[..], &["--device", "cpu"]].concat()).succeeded().stdout;
    let plan = run.split("memory on").next().unwrap();
    text += &format!("$ fastlora {}\n{}\n", dry.join(" "), without_figures(plan));
    compare("tables.txt", &text);
}
