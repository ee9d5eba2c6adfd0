//! Faults 40, 47, 52 and 53: a resumed run is the run that was begun, from a checkpoint that is whole.

use std::path::Path;

use crate::faulty_files::Fault;
use crate::resume::Bits;
use crate::workspace::{Workspace, samples};

/// Twelve steps, ten an epoch; checkpoints after 4, 8 and 12, a validation after 6 and 12.
pub const SMALL: [&str; 12] = [
    "--val-data",
    "val.jsonl",
    "--max-steps",
    "12",
    "--val-every",
    "6",
    "--save-every",
    "4",
    "--learning-rate",
    "0.01",
    "--lora-r",
    "4",
];

/// The workspace of a run that was killed after its ninth step, with checkpoints after 4 and 8, and its bits uncut.
fn killed_run() -> (Workspace, Bits) {
    let workspace = Workspace::with_data();
    workspace.train_into("whole", &SMALL).succeeded();
    // Ten lines: nine steps and a validation.
    let fault = Fault { call: Some("write"), name: Some("out/metrics.jsonl"), at: 10, kind: "kill-after" };
    assert_eq!(workspace.train_with(fault, &Workspace::usual("out", &SMALL)).code, 128 + libc::SIGKILL);
    let bits = Bits::of(&workspace, "whole", 12);
    (workspace, bits)
}

#[track_caller]
fn refused(workspace: &Workspace, arguments: &[&str], code: i32, parts: &[&str]) {
    let before = workspace.snapshot("out");
    workspace.train(&[arguments, &["--resume"]].concat()).refused(code, parts);
    assert!(workspace.snapshot("out") == before, "the run that was begun has changed");
}

#[test]
fn fault_47_another_configuration_is_refused_with_the_differences() {
    let (workspace, expected) = killed_run();
    let usual = Workspace::usual("out", &SMALL);
    let other = [&usual[..], &["--set", "lora_r=8", "--set", "seed=1", "--batch-size", "8"]].concat();
    // A flag wins over --set.
    let parts = ["out/checkpoints/step-8", "seed is 1, was 42", "batch_size is 8, was 4", "--overwrite"];
    refused(&workspace, &other, 2, &parts);
    assert_eq!(workspace.train(&[&usual[..], &["--resume", "--overwrite"]].concat()).code, 2);
    workspace.train(&[&usual[..], &["--resume", "nowhere"]].concat()).refused(2, &["`nowhere`", "--resume"]);
    let elsewhere = ["--resume", "out", "-o", "other"];
    workspace.train(&elsewhere).refused(2, &["output_dir", "its own folder"]);
    // What changes no bit may change, and so may the places of equal files.
    std::fs::rename(workspace.path("train.jsonl"), workspace.path("moved.jsonl")).unwrap();
    std::fs::rename(workspace.path("out"), workspace.path("elsewhere")).unwrap();
    let moved =
        ["--resume", "elsewhere", "--train-data", "moved.jsonl", "--threads", "1", "--save-every", "6"];
    let log = workspace.train(&moved).succeeded().stderr;
    assert!(log.contains("resuming after step 8 from elsewhere/checkpoints/step-8"), "{log}");
    Bits::of(&workspace, "elsewhere", 12).assert_eq(&expected, "moved");
}

#[test]
fn fault_47_another_base_is_refused() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let more = [&SMALL[..], &["-m", &model]].concat();
    let usual: Vec<&str> = Workspace::usual("out", &more).into_iter().skip(2).collect();
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 5, kind: "term" };
    assert_eq!(workspace.train_with(fault, &usual).code, 75);
    let path = workspace.path("model/model.safetensors");
    let mut weights = std::fs::read(&path).unwrap();
    *weights.last_mut().unwrap() ^= 1;
    std::fs::write(&path, weights).unwrap();
    refused(
        &workspace,
        &usual,
        2,
        &["out/checkpoints/step-5", "the base model is \"model\"", "other weights"],
    );
}

#[test]
fn fault_40_data_that_changed_since_the_checkpoint_are_refused() {
    let (workspace, _) = killed_run();
    let usual = Workspace::usual("out", &SMALL);
    let changed = "changed since the checkpoint";
    workspace.write("val.jsonl", samples(3, 6));
    refused(&workspace, &usual, 3, &["validation samples of [\"val.jsonl\"]", changed]);
    workspace.write("train.jsonl", samples(1, 39));
    refused(&workspace, &usual, 3, &["training samples of [\"train.jsonl\"]", "; the validation", changed]);
    // Other files by name: that is another configuration.
    workspace.write("other.jsonl", samples(5, 40));
    let other = [&usual[..], &["--train-data", "other.jsonl"]].concat();
    let other: Vec<&str> = other.into_iter().filter(|argument| *argument != "train.jsonl").collect();
    let place = other.iter().position(|argument| *argument == "--train-data").unwrap();
    let other = [&other[..place], &other[place + 1..]].concat();
    refused(&workspace, &other, 2, &["train_data is [\"other.jsonl\"], was [\"train.jsonl\"]"]);
}

fn flip_a_bit(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn fault_53_a_damaged_checkpoint_is_passed_over() {
    let (workspace, expected) = killed_run();
    let newest = workspace.path("out/checkpoints/step-8");
    let names: Vec<String> = workspace
        .snapshot("out/checkpoints/step-8")
        .into_keys()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_string())
        .collect();
    assert_eq!(names.len(), 7, "{names:?}");
    for name in &names {
        let output = format!("damaged-{name}");
        copy(&workspace.path("out"), &workspace.path(&output));
        flip_a_bit(&workspace.path(&output).join("checkpoints/step-8").join(name));
        let log = workspace.train(&["--resume", &output]).succeeded().stderr;
        for part in ["step-8/", "the checkpoint is damaged", "going back to", "resuming after step 4"] {
            assert!(log.contains(part), "{name}: expected `{part}` in {log}");
        }
        Bits::of(&workspace, &output, 12).assert_eq(&expected, name);
    }
    // A file that is missing, and then no valid checkpoint at all.
    std::fs::remove_file(newest.join("optimizer.safetensors")).unwrap();
    copy(&workspace.path("out"), &workspace.path("missing"));
    let log = workspace.train(&["--resume", "missing"]).succeeded().stderr;
    assert!(log.contains("optimizer.safetensors: the checkpoint is damaged"), "{log}");
    flip_a_bit(&workspace.path("out/checkpoints/step-4/state.json"));
    let parts = ["none of 2 checkpoints is valid", "step-8/optimizer.safetensors", "--overwrite"];
    refused(&workspace, &Workspace::usual("out", &SMALL), 8, &parts);
    let one = workspace.path("out/checkpoints/step-4");
    workspace.train(&["--resume", one.to_str().unwrap()]).refused(8, &["step-4/state.json", "auto"]);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() {
            copy(&from, &to);
        } else {
            std::fs::copy(from, to).unwrap();
        }
    }
}

#[test]
fn fault_52_leftovers_of_a_dead_run_are_ignored_and_cleaned() {
    let (workspace, expected) = killed_run();
    let leftovers = [
        "out/.adapter.partial/adapter_model.safetensors",
        "out/.best.partial/README.md",
        "out/.training_config.json.partial",
        "out/checkpoints/.step-12.partial/state.json",
        "out/checkpoints/.step-2.removed/state.json",
    ];
    for name in leftovers {
        workspace.write(name, "half");
    }
    workspace.write("out/checkpoints/notes.txt", "mine");
    workspace.train(&["--resume", "out"]).succeeded();
    Bits::of(&workspace, "out", 12).assert_eq(&expected, "with leftovers");
    let entries = |folder: &str| {
        let entries = std::fs::read_dir(workspace.path(folder)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(entries("out/checkpoints"), ["notes.txt", "step-12", "step-8"]);
    assert!(entries("out").iter().all(|name| !name.starts_with('.')), "{:?}", entries("out"));
}

#[test]
fn a_checkpoint_can_be_named_and_is_an_adapter() {
    let (workspace, expected) = killed_run();
    let log = workspace.train(&["--resume", "out/checkpoints/step-4"]).succeeded().stderr;
    assert!(log.contains("resuming after step 4"), "{log}");
    Bits::of(&workspace, "out", 12).assert_eq(&expected, "from the named checkpoint");
    fastlora::checkpoint::adapter::read_adapter(&workspace.path("out/checkpoints/step-8")).unwrap();
    workspace
        .train_into("next", &["--init-adapter", "out/checkpoints/step-8", "--max-steps", "1"])
        .succeeded();
}

#[test]
fn a_run_that_is_complete_is_left_alone() {
    let workspace = Workspace::with_data();
    let usual = [&Workspace::usual("out", &SMALL)[..], &["--json", "--resume"]].concat();
    // Nothing to resume yet: it begins.
    let first = workspace.train(&usual).succeeded();
    let before = workspace.snapshot("out");
    let again = workspace.train(&usual).succeeded();
    assert!(again.stderr.contains("the run is complete"), "{}", again.stderr);
    assert_eq!(again.json(), first.json());
    assert!(workspace.snapshot("out") == before);
    workspace.train(&[&usual[..], &["--set", "seed=3"]].concat()).refused(2, &["seed is 3, was 42"]);
}

#[test]
fn the_newest_are_kept_and_time_can_be_the_interval() {
    let workspace = Workspace::with_data();
    let steps = |output: &str| -> Vec<u64> {
        fastlora::checkpoint::run::Checkpoints::new(workspace.path(output).join("checkpoints"))
            .steps()
            .unwrap()
    };
    let train = |output: &str, more: &[&str]| {
        workspace.train_into(output, &[&["--max-steps", "9"], more].concat()).succeeded();
        steps(output)
    };
    assert_eq!(train("two", &["--save-every", "2"]), [6, 8]);
    assert_eq!(train("three", &["--save-every", "2", "--keep-checkpoints", "3"]), [4, 6, 8]);
    assert_eq!(train("never", &["--save-every", "never"]), [0; 0]);
    assert_eq!(train("minutes", &["--save-every", "10m"]), [0; 0]);
}

#[test]
fn fault_53_inspecting_a_checkpoint_finds_the_damage() {
    let workspace = Workspace::with_data();
    workspace.train_into("out", &SMALL).succeeded();
    let checkpoint = "out/checkpoints/step-8";
    let described = workspace.run(&["inspect", checkpoint, "--json"]).succeeded().json();
    assert_eq!((&described["kind"], &described["step"]), (&"checkpoint".into(), &8.into()));
    assert!(described["checksums"].as_str().unwrap().contains("SHA256SUMS"), "{described}");
    assert!(workspace.run(&["inspect", "out", "--json"]).succeeded().json()["checksums"].is_null());
    for name in ["optimizer.safetensors", "state.json", "adapter_model.safetensors", "README.md"] {
        let path = workspace.path(checkpoint).join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        std::fs::write(&path, flipped).unwrap();
        workspace.run(&["inspect", checkpoint]).refused(8, &[name, "the checkpoint is damaged", "SHA-256"]);
        std::fs::remove_file(&path).unwrap();
        workspace.run(&["inspect", checkpoint]).refused(8, &[name, "the checkpoint is damaged"]);
        std::fs::write(&path, whole).unwrap();
    }
    std::fs::remove_file(workspace.path(checkpoint).join("SHA256SUMS")).unwrap();
    workspace.run(&["inspect", checkpoint]).refused(8, &["SHA256SUMS", "it cannot be read"]);
}

#[test]
fn a_best_adapter_that_is_gone_is_told_when_a_run_goes_on() {
    let (workspace, expected) = killed_run();
    std::fs::remove_dir_all(workspace.path("out/best")).unwrap();
    let resume = [&Workspace::usual("out", &SMALL)[..], &["--resume"]].concat();
    let run = workspace.train(&resume).succeeded();
    assert!(run.stderr.contains("out/best is missing: the adapter of step 6"), "{}", run.stderr);
    let found = Bits::of(&workspace, "out", 12);
    assert!(found.metrics_equal(&expected), "the run is the same");
    // A later validation that was lower has its adapter there; else the end tells that there is none.
    let losses: Vec<f64> =
        workspace.validations("out").iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert_eq!(workspace.path("out/best").exists(), losses[1] < losses[0]);
    std::fs::remove_dir_all(workspace.path("out/best"))
        .or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })
        .unwrap();
    let told = workspace.train(&resume).succeeded().stderr;
    assert!(told.contains("whose adapter is no longer there"), "{told}");
    assert!(!told.contains("--adapter out/best"), "{told}");
}
