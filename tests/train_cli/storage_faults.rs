//! Faults 48 to 51: the disk fails or the process dies in any file call of a run.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::checkpoint_faults::SMALL;
use crate::faulty_files::Fault;
use crate::resume::Bits;
use crate::workspace::Workspace;

/// Four steps: checkpoints after 2 and 4, of which one is kept, a validation after 3 and 4.
const TINY: [&str; 14] = [
    "--val-data",
    "val.jsonl",
    "--max-steps",
    "4",
    "--val-every",
    "3",
    "--save-every",
    "2",
    "--keep-checkpoints",
    "1",
    "--learning-rate",
    "0.01",
    "--threads",
    "1",
];

/// What a call may meet; with `FASTLORA_TEST_ALL_FAULTS` every call meets each of them, else one in turn.
const KINDS: [&str; 5] = ["EIO", "full", "EINTR", "short", "kill"];

#[test]
fn every_file_call_of_a_run_may_fail() {
    let workspace = Workspace::with_data();
    let calls = workspace.calls("", &Workspace::usual("whole", &TINY));
    let is_own = |call: &&String| call.contains(" whole");
    let count = calls.iter().filter(is_own).count();
    assert!(count > 150, "{count}");
    let expected = Bits::of(&workspace, "whole", 4);
    let with_all = std::env::var_os("FASTLORA_TEST_ALL_FAULTS").is_some();
    let faults: Vec<(usize, &str)> = (1..=count)
        .flat_map(|at| KINDS.iter().enumerate().map(move |(number, &kind)| (at, number, kind)))
        .filter(|&(at, number, _)| with_all || at % KINDS.len() == number)
        .map(|(at, _, kind)| (at, kind))
        .collect();

    let (next, failed, killed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        while let Some(&(at, kind)) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
            let output = format!("{kind}-{at}");
            let arguments = Workspace::usual(&output, &TINY);
            let run =
                workspace.train_with(Fault { name: Some(&output), at, kind, ..Fault::default() }, &arguments);
            match run.code {
                // What is no harm: an interrupted or short write, a file that was only read and does not close.
                0 => {}
                6 => _ = failed.fetch_add(1, Ordering::Relaxed),
                code if kind == "kill" && code == 128 + libc::SIGKILL => {
                    killed.fetch_add(1, Ordering::Relaxed);
                }
                code => panic!("{kind} in call {at} gives {code}: {}", run.stderr),
            }
            assert!(!run.stderr.contains("panicked"), "{kind} in call {at}: {}", run.stderr);
            let resumed = workspace.train(&[&arguments[..], &["--resume"]].concat());
            assert_eq!(resumed.code, 0, "{kind} in call {at}: {} then {}", run.stderr, resumed.stderr);
            assert!(!resumed.stderr.contains("damaged"), "{kind} in call {at}: {}", resumed.stderr);
            let found = if run.code == 0 && !workspace.path(&output).join("checkpoints/step-4").exists() {
                panic!("{kind} in call {at}: no checkpoint, and no error: {}", run.stderr)
            } else {
                Bits::of(&workspace, &output, 4)
            };
            found.assert_eq(&expected, &format!("{kind} in call {at}"));
            std::fs::remove_dir_all(workspace.path(&output)).unwrap();
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let (failed, killed) = (failed.into_inner(), killed.into_inner());
    println!("{count} calls, {} faults: {failed} runs failed, {killed} were killed", faults.len());
    assert!(failed * 4 > faults.len() && killed * (KINDS.len() + 1) > faults.len(), "{failed} {killed}");
}

/// What holds when the power fails: a file's bytes are on the disk before its name is, and the name before the next step.
#[test]
fn all_is_forced_to_the_disk_in_order() {
    let workspace = Workspace::with_data();
    let calls = workspace.calls("", &Workspace::usual("out", &TINY));
    let position = |call: &str| {
        calls.iter().position(|found| found == call).unwrap_or_else(|| panic!("no `{call}` in {calls:#?}"))
    };
    for step in [2, 4] {
        let partial = format!("out/checkpoints/.step-{step}.partial");
        let renamed = position(&format!("rename out/checkpoints/step-{step}"));
        let made = position(&format!("mkdir {partial}"));
        let within = |call: &str| {
            let place = calls[made..renamed].iter().rposition(|found| found == call);
            place.unwrap_or_else(|| panic!("no `{call}` before the rename"))
        };
        let folder = within(&format!("fsync {partial}"));
        let mut written = 0;
        for call in &calls[made..renamed] {
            let Some(file) = call.strip_prefix(&format!("write {partial}/")) else { continue };
            let synced = within(&format!("fsync {partial}/{file}"));
            assert!(within(&format!("write {partial}/{file}")) < synced, "{file}");
            assert!(within(&format!("close {partial}/{file}")) > synced && synced < folder, "{file}");
            written += 1;
        }
        assert_eq!(written, 7);
        // The metrics that the checkpoint counts on, before it; its name, before the next step.
        let last = |call: &str| calls[..made].iter().rposition(|found| found == call);
        assert!(last("fsync out/metrics.jsonl") > last("write out/metrics.jsonl"));
        let next = &calls[renamed + 1..renamed + 4];
        assert!(next.contains(&"fsync out/checkpoints".to_string()), "{next:?}");
    }
    let entry = position("mkdir out/checkpoints")..position("rename out/checkpoints/step-2");
    assert!(calls[entry].contains(&"fsync out".to_string()));
    assert!(
        calls.iter().rposition(|call| call == "fsync out")
            > Some(position("rename out/adapter_model.safetensors"))
    );
}

#[test]
fn fault_48_a_disk_without_room_is_found_before_anything_is_written() {
    let workspace = Workspace::with_data();
    let fault = Fault { kind: "no-space", ..Fault::default() };
    let parts = ["free, the run writes up to", "keep_checkpoints"];
    workspace.train_with(fault, &Workspace::usual("out", &SMALL)).refused(6, &parts);
    assert!(!workspace.path("out").exists());
}

#[test]
fn fault_48_a_disk_that_fills_up_takes_nothing_away() {
    let workspace = Workspace::with_data();
    workspace.train_into("whole", &SMALL).succeeded();
    let usual = Workspace::usual("out", &SMALL);
    // From the second checkpoint's moments on nothing can be written.
    let moments = "out/checkpoints/.step-8.partial/optimizer.safetensors";
    let calls = workspace.calls("/count", &Workspace::usual("count", &SMALL));
    let write = format!("write {}", moments.replace("out/", "count/"));
    let at = 1 + calls.iter().position(|call| *call == write).unwrap();
    let log = workspace.train_with(Fault { at, kind: "full", name: Some("/out"), call: None }, &usual);
    log.refused(6, &[moments, "No space left on device"]);
    assert!(!workspace.path("out/checkpoints/.step-8.partial").exists(), "half a checkpoint takes room");
    let log = workspace.train(&[&usual[..], &["--resume"]].concat()).succeeded().stderr;
    assert!(log.contains("resuming after step 4"), "{log}");
    Bits::of(&workspace, "out", 12).assert_eq(&Bits::of(&workspace, "whole", 12), "after a full disk");
}

#[test]
fn fault_49_an_error_at_fsync_or_close_is_an_error() {
    let workspace = Workspace::with_data();
    workspace.train_into("whole", &SMALL).succeeded();
    let expected = Bits::of(&workspace, "whole", 12);
    for (number, call) in ["fsync", "close"].into_iter().enumerate() {
        let output = format!("out-{number}");
        let usual = Workspace::usual(&output, &SMALL);
        let name = ".step-8.partial/optimizer.safetensors";
        let fault = Fault { call: Some(call), name: Some(name), at: 1, kind: "EIO" };
        workspace.train_with(fault, &usual).refused(6, &[name, "Input/output error"]);
        let log = workspace.train(&[&usual[..], &["--resume"]].concat()).succeeded().stderr;
        assert!(log.contains("resuming after step 4"), "{log}");
        Bits::of(&workspace, &output, 12).assert_eq(&expected, call);
    }
}

#[test]
fn fault_50_a_read_only_disk_is_found_before_anything_is_loaded() {
    let workspace = Workspace::with_data();
    let fault = Fault { call: Some("access"), name: None, at: 1, kind: "EROFS" };
    let refused = workspace.train_with(fault, &Workspace::usual("out", &SMALL));
    let refused = refused.refused(6, &["Read-only file system", "--output-dir"]);
    assert!(!refused.stderr.contains("records"), "{}", refused.stderr);
    assert!(!workspace.path("out").exists());
}

#[test]
fn fault_51_a_kill_before_and_after_the_rename_leaves_the_old_or_the_new() {
    let workspace = Workspace::with_data();
    workspace.train_into("whole", &SMALL).succeeded();
    let expected = Bits::of(&workspace, "whole", 12);
    for (kind, step) in [("kill", 4), ("kill-after", 8)] {
        let usual = Workspace::usual(kind, &SMALL);
        let fault = Fault { call: Some("rename"), name: Some("checkpoints/step-8"), at: 1, kind };
        assert_eq!(workspace.train_with(fault, &usual).code, 128 + libc::SIGKILL);
        let log = workspace.train(&[&usual[..], &["--resume"]].concat()).succeeded().stderr;
        assert!(log.contains(&format!("resuming after step {step} from")), "{log}");
        Bits::of(&workspace, kind, 12).assert_eq(&expected, kind);
    }
}

#[test]
fn fault_48_the_room_for_tokenizer_files_is_asked_for_too() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    // It is copied beside the final adapter, the best one and every checkpoint, each with one in the making.
    workspace.write("model/vocab.json", vec![b' '; 10 << 20]);
    let fault = Fault { kind: "no-space", ..Fault::default() };
    let arguments = ["-m", &model, "--train-data", "train.jsonl", "--val-data", "none", "-o", "out"];
    let refused = workspace.train_with(fault, &arguments).refused(6, &["the run writes up to"]).stderr;
    let needed = refused.split("writes up to ").nth(1).unwrap().split(' ').next().unwrap();
    let needed: f64 = needed.parse().unwrap();
    // Three checkpoints, three adapters, and what they hold besides.
    assert!((60.0..61.0).contains(&needed), "{needed}");
}
