//! What profilers see: ranges by name, and a window around some steps.

use std::process::Command;

use assert_cmd::cargo::cargo_bin;

use crate::support::fixture;
use crate::workspace::Workspace;

const DEVICES: &[&str] = if cfg!(feature = "emulator") { &["cpu", "emulator"] } else { &["cpu"] };

/// Trains one step under a made-up profiler; returns the ranges that it was told of, indented by depth.
fn ranges(workspace: &Workspace, device: &str) -> Vec<String> {
    let library = workspace.path("profiler.so");
    let source = fixture("fake_profiler.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).arg(&library).arg(source).status();
    assert!(built.unwrap().success());
    let model = fixture("tiny_qwen2");
    let output = Command::new(cargo_bin("fastlora"))
        .args(["train", "-m", model.to_str().unwrap(), "--train-data", "train.jsonl", "--val-data", "none"])
        .args(["-o", device, "--max-steps", "1", "--batch-size", "2", "--device", device])
        .current_dir(workspace.path(""))
        .env("NVTX_INJECTION64_PATH", &library)
        .env("FAKE_PROFILER", workspace.path("ranges.txt"))
        .output()
        .unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    assert!(!log.contains("layer 1"), "ranges are no log lines: {log}");
    let text = std::fs::read_to_string(workspace.path("ranges.txt")).unwrap();
    text.lines().map(str::to_string).collect()
}

#[test]
fn a_profiler_sees_every_step_layer_and_operation() {
    let workspace = Workspace::with_data();
    for device in DEVICES {
        let found = ranges(&workspace, device);
        assert!(found.contains(&"step 1".to_string()), "{found:?}");
        for layer in ["  layer 0", "  layer 1", "  head", "  layer backward 1", "  layer backward 0"] {
            assert!(found.contains(&layer.to_string()), "{layer}: {found:?}");
        }
        let layer = found.iter().position(|range| range == "  layer 1").expect("a layer");
        let operations =
            ["rms_norm", "linear", "attention", "linear", "rms_norm", "linear", "gated", "linear"];
        let expected = operations.map(|operation| format!("    {operation}"));
        assert_eq!(found[layer + 1..][..operations.len()], expected);
        assert!(found.contains(&"  adamw".to_string()), "{found:?}");
    }
}

#[test]
fn the_window_needs_a_gpu_and_two_numbers() {
    let workspace = Workspace::with_data();
    let arguments = ["--device", "cpu", "--profile-steps", "2:3"];
    workspace.train_into("out", &arguments).refused(5, &["no GPU profiler sees cpu", "--device cuda"]);
    let finished = workspace.train_into("out", &["--profile-steps", "3:2"]);
    assert_eq!(finished.code, 2, "{}", finished.stderr);
    assert!(finished.stderr.contains("FIRST:LAST"), "{}", finished.stderr);
    if cfg!(feature = "emulator") {
        let arguments = ["--device", "emulator", "--profile-steps", "1:2", "--max-steps", "2"];
        workspace.train_into("emulated", &arguments).succeeded();
    }
}

/// The counted work of a step is that of the model, and every operation has its time.
#[test]
fn the_time_of_a_step_is_told_by_operation() {
    let workspace = Workspace::with_data();
    for device in DEVICES {
        let steps = ["--device", device, "--max-steps", "4", "--profile", "--profile-steps", "2:3"];
        let finished = workspace.train_into(device, &[&steps[..], &["--json"]].concat()).succeeded();
        let times = finished.json()["time_by_operation"].take();
        assert_eq!(times["steps"], 2);
        let whole = times["seconds"].as_f64().unwrap();
        let operations = times["operations"].as_array().unwrap();
        let sum: f64 = operations.iter().map(|operation| operation["seconds"].as_f64().unwrap()).sum();
        assert!(0.0 < sum && sum <= whole, "{sum} of {whole}");
        let of = |name: &str| operations.iter().find(|operation| operation["operation"] == name).expect(name);
        // Two layers of four groups, two norms and one more at the end, in each of two steps.
        let calls = |name: &str| of(name)["calls"].as_u64().unwrap();
        assert_eq!([calls("linear"), calls("attention"), calls("adamw")], [16, 4, 2]);
        assert!(calls("rms_norm") >= 10, "some are computed again in the backward");
        assert!(of("linear")["flops"].as_f64().unwrap() > 0.0);
        assert_eq!(times["limits"].is_null(), *device != "cpu", "an emulator's time is no GPU's");
    }
    let finished = workspace.train_into("short", &["--device", "cpu", "--max-steps", "2", "--profile"]);
    assert!(finished.succeeded().stderr.contains("did not take all of the steps"));
    let table =
        workspace.train_into("table", &["--device", "cpu", "--max-steps", "8", "--profile"]).succeeded();
    for part in
        ["time by operation", "of the limit", "linear backward", "between them", "limits measured here"]
    {
        assert!(table.stderr.contains(part), "{part}: {}", table.stderr);
    }
}
