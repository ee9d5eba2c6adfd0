//! `--processes` and its relatives: several processes make one run.

use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;

use crate::faulty_files::Fault;
use crate::interruptions::{lines, long, start, wait, wait_until};
use crate::resume::Bits;
use crate::workspace::{Finished, Workspace, samples};

/// Twelve steps of 4 × 2 samples, five an epoch; validations, checkpoints, dropout and noise.
const RUN: [&str; 20] = [
    "--device",
    "cpu",
    "--val-data",
    "val.jsonl",
    "--batch-size",
    "2",
    "--gradient-accumulation-steps",
    "4",
    "--max-steps",
    "12",
    "--val-every",
    "5",
    "--save-every",
    "4",
    "--lora-dropout",
    "0.2",
    "--neftune-noise-alpha",
    "5",
    "--learning-rate",
    "0.003",
];

fn run(output: &'static str, more: &[&'static str]) -> Vec<&'static str> {
    Workspace::usual(output, &[&RUN[..], more].concat())
}

const TWO: [&str; 2] = ["--processes", "2"];

#[test]
fn two_processes_write_one_run_with_the_losses_of_one() {
    let workspace = Workspace::with_data();
    workspace.train(&run("one", &["-q"])).succeeded();
    let two = workspace.train(&run("two", &["--processes", "2", "--json"])).succeeded();
    // One object, of the first; and a log of JSON objects.
    assert_eq!(two.json()["steps"], 12);
    assert!(two.stderr.lines().all(|line| line.starts_with('{')), "{}", two.stderr);
    let names = |output: &str| -> Vec<String> {
        let root = workspace.path(output);
        let relative = |path: &std::path::Path| path.strip_prefix(&root).unwrap().display().to_string();
        workspace.snapshot(output).keys().map(|path| relative(path)).collect()
    };
    assert_eq!(names("two"), names("one"));
    for key in ["labelled_tokens", "tokens", "epoch", "learning_rate"] {
        assert_eq!(workspace.of_steps("two", key), workspace.of_steps("one", key), "{key}");
    }
    let validated = |output: &str| -> Vec<f64> {
        workspace.validations(output).iter().map(|object| object["loss"].as_f64().unwrap()).collect()
    };
    let losses = |output: &str| [workspace.of_steps(output, "loss"), validated(output)].concat();
    assert_eq!(losses("one").len(), 12 + 3);
    for (found, expected) in losses("two").into_iter().zip(losses("one")) {
        assert!((found / expected - 1.0).abs() <= 1e-5, "{found} against {expected}");
    }
    // The file that says how to run it again does not speak of the machine.
    let config = |output: &str| std::fs::read_to_string(workspace.path(output).join("training_config.json"));
    assert_eq!(config("two").unwrap().replace("two", "one"), config("one").unwrap());
}

/// Gradients go from the device to the others and back. An adapter's element that lies between two numbers of f16 may fall to
/// the other one, half a unit in 2¹⁰ away, which moves a loss by less than all of them would.
#[cfg(feature = "emulator")]
#[test]
fn two_processes_on_the_emulator_have_the_losses_of_one() {
    let workspace = Workspace::with_data();
    let train = |output: &'static str, more: &[&'static str]| {
        let small = ["--device", "emulator", "--dtype", "f16", "--max-steps", "4", "--batch-size", "2"];
        let dealt = ["--gradient-accumulation-steps", "2", "--learning-rate", "0.003"];
        workspace.train_into(output, &[&small[..], &dealt, more].concat()).succeeded();
        workspace.of_steps(output, "loss")
    };
    for (found, expected) in train("two", &TWO).into_iter().zip(train("one", &[])) {
        assert!((found / expected - 1.0).abs() <= 2.0_f64.powi(-11), "{found} against {expected}");
    }
}

#[test]
fn a_run_of_two_processes_that_is_stopped_goes_on_bit_for_bit() {
    let workspace = Workspace::with_data();
    workspace.train(&run("whole", &TWO)).succeeded();
    let expected = Bits::of(&workspace, "whole", 12);
    let resume = |output: &'static str| run(output, &["--processes", "2", "--resume"]);
    // Another number of processes adds up in another order, and may go on all the same.
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 11, kind: "term" };
    assert_eq!(workspace.train_with(fault, &run("alone", &TWO)).code, 75);
    let log = workspace.train(&run("alone", &["--resume"])).succeeded().stderr;
    assert!(log.contains("2 processes: its bits may differ from here on"), "{log}");
    // The first is asked to stop: inside an epoch, and in the line of a validation.
    for (output, at) in [("third", 3), ("sixth", 6)] {
        let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at, kind: "term" };
        let stopped = workspace.train_with(fault, &run(output, &TWO));
        assert_eq!(stopped.code, 75, "{}", stopped.stderr);
        assert!(stopped.stderr.contains("rank 1 stopped: "), "{}", stopped.stderr);
        workspace.train(&resume(output)).succeeded();
        Bits::of(&workspace, output, 12).assert_eq(&expected, output);
    }
    // The first is killed: the other ends by itself, and lets go of standard error.
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 7, kind: "kill" };
    let killed = workspace.train_with(fault, &run("killed", &TWO));
    assert_eq!(killed.code, 128 + libc::SIGKILL);
    assert!(killed.stderr.contains("rank 1 error: rank 0 is gone"), "{}", killed.stderr);
    workspace.train(&resume("killed")).succeeded();
    Bits::of(&workspace, "killed", 12).assert_eq(&expected, "killed");
}

/// The process that the run `of` started, once it trains.
#[cfg(target_os = "linux")]
fn worker(of: u32) -> i32 {
    let children = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap();
    children.trim().parse().expect("one process")
}

/// In long steps, so that there is one to be met in.
#[cfg(target_os = "linux")]
#[test]
fn fault_65_a_worker_that_is_killed_or_asked_to_stop_ends_the_run() {
    let workspace = Workspace::new();
    workspace.write("long.jsonl", samples(1, 100));
    workspace.write("long_val.jsonl", samples(2, 100));
    let two = |output| [&long(output)[..], &["--device", "cpu"], &TWO].concat();
    workspace.train(&two("whole")).succeeded();
    let expected = Bits::of(&workspace, "whole", 3);
    for (output, signal, code) in [("killed", libc::SIGKILL, 6), ("asked", libc::SIGTERM, 75)] {
        let child = start(&workspace, &two(output));
        let metrics = workspace.path(output).join("metrics.jsonl");
        wait_until(|| lines(&metrics) == 1);
        // SAFETY: the run does not wait for its process while it trains; a signal touches no memory of this one.
        assert_eq!(unsafe { libc::kill(worker(child.id()), signal) }, 0);
        let cut = wait(child);
        assert_eq!(cut.code, code, "{}", cut.stderr);
        if code == 6 {
            cut.refused(6, &["rank 1 is gone", "--resume"]);
            assert!(workspace.path(output).join("error.json").exists());
        }
        assert!(!workspace.path(output).join("adapter_model.safetensors").exists(), "too late");
        workspace.train(&[&["--resume", output][..], &TWO].concat()).succeeded();
        Bits::of(&workspace, output, 3).assert_eq(&expected, output);
    }
}

/// A port that was free a moment ago.
fn rendezvous() -> (String, String) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    (format!("127.0.0.1:{port}"), port.to_string())
}

/// Ranks 0 and 1, started by hand with `arguments` of each.
fn by_hand(workspace: &Workspace, variables: &[(&str, &str)], ranks: [Vec<&str>; 2]) -> [Finished; 2] {
    let children: Vec<_> = ranks
        .iter()
        .enumerate()
        .map(|(rank, arguments)| {
            let mut command = workspace.command(&[&["train"], &arguments[..]].concat());
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            if !variables.is_empty() {
                command.envs(variables.iter().copied()).env("RANK", rank.to_string());
            }
            command.spawn().unwrap()
        })
        .collect();
    let finished: Vec<Finished> = children.into_iter().map(wait).collect();
    finished.try_into().ok().unwrap()
}

#[test]
fn processes_that_something_else_starts_are_the_same_run() {
    let workspace = Workspace::with_data();
    workspace.train(&run("launched", &TWO)).succeeded();
    let expected = Bits::of(&workspace, "launched", 12);
    let (address, _) = rendezvous();
    let flags = |rank| ["--world-size", "2", "--rank", rank, "--rendezvous", address.as_str()];
    let arguments = ["0", "1"].map(|rank| [&run("flags", &[])[..], &flags(rank)].concat());
    for finished in by_hand(&workspace, &[], arguments) {
        finished.succeeded();
    }
    Bits::of(&workspace, "flags", 12).assert_eq(&expected, "flags");
    let (_, port) = rendezvous();
    let torchrun = [("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", port.as_str())];
    let [first, second] = by_hand(&workspace, &torchrun, [run("torch", &[]), run("torch", &[])]);
    assert!(first.succeeded().stderr.contains("adapter: torch"));
    // The other has nothing to say.
    let second = second.succeeded();
    assert_eq!((second.stdout.as_str(), second.stderr.as_str()), ("", ""));
    Bits::of(&workspace, "torch", 12).assert_eq(&expected, "torch");
}

#[test]
fn fault_66_processes_that_would_not_do_the_same_are_refused() {
    let workspace = Workspace::with_data();
    let (address, _) = rendezvous();
    let flags = |rank| ["--world-size", "2", "--rank", rank, "--rendezvous", address.as_str()];
    let first = [&run("out", &[])[..], &flags("0")].concat();
    let second = [&run("elsewhere", &["--lora-r", "4", "--seed", "5"])[..], &flags("1")].concat();
    let differences = ["lora_r is 4 at rank 1, 8 at rank 0", "seed is 5 at rank 1, 42 at rank 0"];
    let [first, second] = by_hand(&workspace, &[], [first, second]);
    first.refused(2, &differences);
    assert_eq!(second.code, 2);
    for difference in differences {
        assert!(second.stderr.contains(difference), "{}", second.stderr);
    }
    assert!(!workspace.path("out").exists() && !workspace.path("elsewhere").exists());
}

#[test]
fn fault_66_what_cannot_be_dealt_or_is_one_process_is_refused() {
    let workspace = Workspace::with_data();
    let refused = |more: &[&'static str], parts: &[&str]| {
        workspace.train_into("out", &[&["--processes", "2"], more].concat()).refused(2, parts);
        assert!(!workspace.path("out").exists());
    };
    refused(&[], &["gradient_accumulation_steps", "raise it to a multiple of 2 and lower batch_size"]);
    let dealt = ["--gradient-accumulation-steps", "2"];
    refused(&[&dealt[..], &["--dry-run"]].concat(), &["a dry run is one process"]);
    refused(&[&dealt[..], &["--device", "cuda:1"]].concat(), &["`cuda:1` is one GPU, for 2 processes"]);
    // What the first finds before it starts the others is told once.
    let arguments =
        [&dealt[..], &["--device", "cpu", "--lora-target-modules", "nothing", "--processes", "2"]].concat();
    workspace.train_into("out", &arguments).refused(2, &["lora_target_modules"]);
}
