//! Faults 54 to 57 and SIGKILL at any moment: a run is asked to stop, is stopped, loses its terminal, or has company.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::checkpoint_faults::SMALL;
use crate::faulty_files::Fault;
use crate::resume::Bits;
use crate::workspace::{Finished, Workspace, samples};

/// Three long steps of 50 micro-batches, and long validations after the second and third.
const LONG: [&str; 16] = [
    "--train-data",
    "long.jsonl",
    "--val-data",
    "long_val.jsonl",
    "--batch-size",
    "2",
    "--gradient-accumulation-steps",
    "50",
    "--max-steps",
    "3",
    "--val-every",
    "2",
    "--save-every",
    "3",
    "--lora-dropout",
    "0.1",
];

/// A workspace with the data of [`LONG`], whose uncut run is in `whole`.
fn long_runs() -> Workspace {
    let workspace = Workspace::new();
    workspace.write("long.jsonl", samples(1, 100));
    workspace.write("long_val.jsonl", samples(2, 100));
    workspace.train(&long("whole")).succeeded();
    workspace
}

pub fn long(output: &str) -> Vec<&str> {
    // Without the training data that `usual` names.
    let usual = Workspace::usual(output, &LONG);
    [&usual[..2], &usual[4..]].concat()
}

pub fn start(workspace: &Workspace, arguments: &[&str]) -> Child {
    let mut command: Command = workspace.command(&[&["train"], arguments].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
pub fn wait_until(is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(300), "it never came to that");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.matches('\n').count())
}

pub fn send(child: &Child, signal: i32) {
    // SAFETY: the child was not waited for, so its number is its own; a signal touches no memory of this process.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

pub fn wait(child: Child) -> Finished {
    Finished::of(child.wait_with_output().unwrap())
}

fn state(workspace: &Workspace, checkpoint: &str) -> Value {
    let path = workspace.path(checkpoint).join("state.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn fault_55_a_signal_before_the_first_step_leaves_nothing() {
    let workspace = Workspace::with_data();
    workspace.write("text.jsonl", r#"{"instruction": "one and two", "output": "three"}"#);
    let model = workspace.text_model("model");
    let arguments = |data| ["-m", &model, "--train-data", data, "--val-data", "none", "-o", "out"];
    // While the data, the weights and the tokenizer are read.
    for name in ["train.jsonl", "model.safetensors", "tokenizer.json"] {
        let data = if name == "tokenizer.json" { "text.jsonl" } else { "train.jsonl" };
        let fault = Fault { call: Some("open"), name: Some(name), at: 1, kind: "term" };
        let run = workspace.train_with(fault, &arguments(data));
        assert_eq!(run.code, 130, "{name}: {}", run.stderr);
        assert!(!workspace.path("out").exists(), "{name}");
    }
    // A run that goes on has something to resume.
    let resumed = [&arguments("train.jsonl")[..], &["--max-steps", "8", "--resume"]].concat();
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 3, kind: "term" };
    assert_eq!(workspace.train_with(fault, &resumed).code, 75);
    let before = workspace.snapshot("out");
    for name in ["step-3/state.json", "train.jsonl", "model/model.safetensors"] {
        let fault = Fault { call: Some("open"), name: Some(name), at: 1, kind: "term" };
        assert_eq!(workspace.train_with(fault, &resumed).code, 75, "{name}");
        assert!(workspace.snapshot("out") == before, "{name}");
    }
}

#[test]
fn fault_55_a_signal_inside_a_step_or_a_validation_leaves_a_checkpoint() {
    let workspace = long_runs();
    let expected = Bits::of(&workspace, "whole", 3);
    // After how many lines of metrics the signal is sent; the second and third step's validations follow their lines.
    for (written, signal, name) in [(1, libc::SIGTERM, "step"), (2, libc::SIGINT, "validation")] {
        let metrics = workspace.path(name).join("metrics.jsonl");
        let child = start(&workspace, &long(name));
        wait_until(|| lines(&metrics) == written);
        std::thread::sleep(Duration::from_millis(50));
        send(&child, signal);
        let run = wait(child);
        assert_eq!(run.code, 75, "{}", run.stderr);
        // Inside the second step: it was finished. In its validation: that was broken off.
        let state = state(&workspace, &format!("{name}/checkpoints/step-2"));
        assert_eq!(state["summary"]["last_validation_step"], 0, "{name}: the signal came too late");
        assert_eq!(lines(&metrics), 2);
        workspace.train(&["--resume", name]).succeeded();
        Bits::of(&workspace, name, 3).assert_eq(&expected, name);
    }
}

#[test]
fn fault_56_a_second_signal_ends_the_run_at_once() {
    let workspace = long_runs();
    let metrics = workspace.path("out/metrics.jsonl");
    let arguments = [&long("out")[..], &["--save-every", "1"]].concat();
    let arguments: Vec<&str> = without(&arguments, "3");
    let child = start(&workspace, &arguments);
    wait_until(|| workspace.path("out/checkpoints/step-1").exists());
    std::thread::sleep(Duration::from_millis(50));
    send(&child, libc::SIGINT);
    std::thread::sleep(Duration::from_millis(20));
    send(&child, libc::SIGTERM);
    let run = wait(child);
    assert_eq!(run.code, 130, "{}", run.stderr);
    assert_eq!(lines(&metrics), 1, "the second step was not waited for");
    let log = workspace.train(&["--resume", "out"]).succeeded().stderr;
    assert!(log.contains("resuming after step 1"), "{log}");
    Bits::of(&workspace, "out", 3).assert_eq(&Bits::of(&workspace, "whole", 3), "after a second signal");
}

/// Without the first `--save-every` and its value, which another one replaces.
fn without<'a>(arguments: &[&'a str], value: &str) -> Vec<&'a str> {
    let place = arguments.windows(2).position(|pair| pair[0] == "--save-every" && pair[1] == value).unwrap();
    [&arguments[..place], &arguments[place + 2..]].concat()
}

#[test]
fn fault_57_closed_streams_and_a_lost_terminal_end_nothing() {
    let workspace = Workspace::with_data();
    workspace.train_into("whole", &SMALL).succeeded();
    let mut child = start(&workspace, &Workspace::usual("out", &SMALL));
    drop((child.stdout.take(), child.stderr.take()));
    wait_until(|| lines(&workspace.path("out/metrics.jsonl")) > 0);
    send(&child, libc::SIGHUP);
    assert_eq!(wait(child).code, 0);
    Bits::of(&workspace, "out", 12).assert_eq(&Bits::of(&workspace, "whole", 12), "without a terminal");
}

#[test]
fn fault_54_a_second_run_into_the_same_folder_is_refused() {
    let workspace = long_runs();
    let child = start(&workspace, &long("out"));
    wait_until(|| lines(&workspace.path("out/metrics.jsonl")) == 1);
    for more in ["--overwrite", "--resume"] {
        let second = workspace.train(&[&long("out")[..], &[more]].concat());
        second.refused(6, &["out", "another process", "--output-dir"]);
    }
    send(&child, libc::SIGTERM);
    let run = wait(child);
    assert_eq!(run.code, 75, "{}", run.stderr);
    // The lock went with the process.
    workspace.train(&["--resume", "out"]).succeeded();
    Bits::of(&workspace, "out", 3).assert_eq(&Bits::of(&workspace, "whole", 3), "beside a second run");
}

/// Kills at moments all over a run, each followed by a resumed one; `FASTLORA_TEST_KILLS` says how many.
#[test]
fn fault_51_killed_at_any_moment_a_run_goes_on_with_the_right_bits() {
    let kills: u32 = std::env::var("FASTLORA_TEST_KILLS").map_or(20, |text| text.parse().unwrap());
    let workspace = Workspace::with_data();
    let started = Instant::now();
    workspace.train_into("whole", &SMALL).succeeded();
    let whole = started.elapsed();
    let expected = Bits::of(&workspace, "whole", 12);
    let arguments = [&Workspace::usual("out", &SMALL)[..], &["--resume"]].concat();
    let (mut killed, mut finished, mut resumed) = (0, 0, 0);
    // Multiples of the golden ratio: moments spread evenly over a run's time and a little more.
    let mut moment = 0.0_f64;
    while killed < kills {
        moment = (moment + 0.618_033_988_75).fract();
        let mut child = start(&workspace, &arguments);
        std::thread::sleep(whole.mul_f64(1.1 * moment));
        child.kill().unwrap();
        let run = wait(child);
        assert!(!run.stderr.contains("damaged"), "{}", run.stderr);
        resumed += u32::from(run.stderr.contains("resuming after"));
        if run.code == 0 {
            finished += 1;
            Bits::of(&workspace, "out", 12).assert_eq(&expected, "after kills");
            std::fs::remove_dir_all(workspace.path("out")).unwrap();
        } else {
            assert_eq!(run.code, 128 + libc::SIGKILL, "{}", run.stderr);
            killed += 1;
        }
    }
    let run = workspace.train(&arguments).succeeded();
    Bits::of(&workspace, "out", 12).assert_eq(&expected, "after the last kill");
    println!("{killed} kills, {} runs came to their end, {resumed} went on from a checkpoint", finished + 1);
    assert!(!run.stderr.contains("damaged"));
}
