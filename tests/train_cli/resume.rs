//! A run that was cut anywhere goes on bit for bit.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::faulty_files::Fault;
use crate::workspace::Workspace;

/// 44 steps of 2 × 2 samples: ten an epoch, the last epoch cut short; a validation every 7 steps and at the end,
/// checkpoints every 11, dropout, noise and LoRA+.
const RUN: [&str; 24] = [
    "--val-data",
    "val.jsonl",
    "--batch-size",
    "2",
    "--gradient-accumulation-steps",
    "2",
    "--max-steps",
    "44",
    "--val-every",
    "7",
    "--save-every",
    "11",
    "--keep-checkpoints",
    "1",
    "--lora-dropout",
    "0.2",
    "--neftune-noise-alpha",
    "5",
    "--loraplus-lr-ratio",
    "2",
    "--lr-scheduler",
    "cosine",
    "--learning-rate",
    "0.01",
];

/// What must be the same: adapters, moments, and all figures but the wall time.
#[derive(PartialEq)]
pub struct Bits {
    files: BTreeMap<&'static str, Vec<u8>>,
    metrics: Vec<Value>,
}

impl Bits {
    /// Those of a finished run whose last checkpoint is that of its last step.
    pub fn of(workspace: &Workspace, output: &str, last_step: u64) -> Self {
        let moments: &'static str = format!("checkpoints/step-{last_step}/optimizer.safetensors").leak();
        let mut names = vec!["adapter_model.safetensors", moments];
        if workspace.path(output).join("best").exists() {
            names.push("best/adapter_model.safetensors");
        }
        let read = |name| (name, std::fs::read(workspace.path(output).join(name)).unwrap());
        let mut metrics = workspace.metrics(output);
        for object in &mut metrics {
            object.as_object_mut().unwrap().remove("seconds").unwrap();
        }
        Self { files: names.into_iter().map(read).collect(), metrics }
    }

    /// Whether the figures are the same.
    pub fn metrics_equal(&self, other: &Self) -> bool {
        self.metrics == other.metrics
    }

    #[track_caller]
    pub fn assert_eq(&self, expected: &Self, what: &str) {
        for (number, (found, expected)) in self.metrics.iter().zip(&expected.metrics).enumerate() {
            assert_eq!(found, expected, "{what}: line {number} of the metrics");
        }
        assert_eq!(self.metrics.len(), expected.metrics.len(), "{what}");
        for (name, bytes) in &expected.files {
            assert!(self.files.get(name) == Some(bytes), "{what}: {name} differs");
        }
    }
}

/// The number of the write to `metrics.jsonl` that is for `step`, or for its validation.
fn write_of(metrics: &[Value], step: u64, is_validation: bool) -> usize {
    let is_it = |object: &Value| object["step"] == step && object.get("event").is_some() == is_validation;
    1 + metrics.iter().position(is_it).unwrap()
}

#[test]
fn a_run_cut_at_twenty_points_has_the_bits_of_the_uncut_one() {
    let workspace = Workspace::with_data();
    let whole = Workspace::usual("whole", &RUN);
    workspace.train(&whole).succeeded();
    let expected = Bits::of(&workspace, "whole", 44);
    let metrics = workspace.metrics("whole");
    assert_eq!(metrics.len(), 44 + 7);

    let written = |step, is_validation, kind| Fault {
        call: Some("write"),
        name: Some("metrics.jsonl"),
        at: write_of(&metrics, step, is_validation),
        kind,
    };
    let saving = |name, call, at, kind| Fault { call: Some(call), name: Some(name), at, kind };
    let cuts = [
        // Asked to stop: in the first step, inside an epoch, at an edge of epochs, at a checkpoint, before a validation
        // that is due, in its last lines, before the last step, after it.
        (written(1, false, "term"), Some(1)),
        (written(4, false, "term"), Some(4)),
        (written(10, false, "term"), Some(10)),
        (written(11, false, "term"), Some(11)),
        (written(20, false, "term"), Some(20)),
        (written(21, false, "term"), Some(21)),
        (written(21, true, "term"), Some(21)),
        (written(30, false, "term"), Some(30)),
        (written(43, false, "term"), Some(43)),
        (written(44, false, "term"), Some(44)),
        // Asked while a checkpoint is saved.
        (saving(".step-22.partial", "fsync", 3, "term"), Some(22)),
        (saving("step-33", "rename", 1, "term"), Some(33)),
        // Killed: between checkpoints, in a validation's line, while a checkpoint, the best and the last adapter are
        // saved, while an old checkpoint is removed.
        (written(5, false, "kill"), None),
        (written(14, true, "kill"), None),
        (written(40, false, "kill-after"), None),
        (saving(".step-22.partial", "write", 5, "kill"), None),
        (saving("step-22", "rename", 1, "kill"), None),
        (saving("step-22", "rename", 1, "kill-after"), None),
        (saving(".step-11.removed", "unlink", 2, "kill"), None),
        (saving("cut-19/adapter_model.safetensors", "rename", 1, "kill"), None),
    ];
    for (number, (fault, stopped_at)) in cuts.into_iter().enumerate() {
        let output = format!("cut-{number}");
        let arguments = Workspace::usual(&output, &RUN);
        let cut = workspace.train_with(fault, &arguments);
        match stopped_at {
            Some(step) => {
                assert_eq!(cut.code, 75, "{fault:?}: {}", cut.stderr);
                let place = format!("{output}/checkpoints/step-{step}");
                assert!(cut.stderr.contains(&format!("stopped: {place}: ")), "{}", cut.stderr);
                assert!(cut.stderr.contains(&format!("fastlora train --resume {output}")), "{}", cut.stderr);
                assert!(workspace.path(&place).join("SHA256SUMS").exists());
            }
            None => assert_eq!(cut.code, 128 + libc::SIGKILL, "{fault:?}: {}", cut.stderr),
        }
        assert!(
            !workspace.path(&output).join("adapter_model.safetensors").exists(),
            "{fault:?} came too late"
        );
        workspace.train(&[&arguments[..], &["--resume"]].concat()).succeeded();
        Bits::of(&workspace, &output, 44).assert_eq(&expected, &format!("{fault:?}"));
        std::fs::remove_dir_all(workspace.path(&output)).unwrap();
    }
}

#[test]
fn a_run_may_be_cut_again_and_again() {
    let workspace = Workspace::with_data();
    workspace.train(&Workspace::usual("whole", &RUN)).succeeded();
    let arguments = [&Workspace::usual("out", &RUN)[..], &["--resume", "auto"]].concat();
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 9, kind: "term" };
    let mut stops = 0;
    loop {
        let run = workspace.train_with(fault, &arguments);
        if run.code == 0 {
            break;
        }
        assert_eq!(run.code, 75, "{}", run.stderr);
        stops += 1;
    }
    // 51 lines in pieces of nine.
    assert_eq!(stops, 5);
    Bits::of(&workspace, "out", 44).assert_eq(&Bits::of(&workspace, "whole", 44), "cut five times");
}

/// The loss scale of f16 goes on too; and what is started from recordings in one run may not be in the other.
#[test]
fn a_run_on_the_emulator_goes_on_with_its_bits() {
    if !cfg!(feature = "emulator") {
        return;
    }
    let workspace = Workspace::with_data();
    let on_the_emulator = ["--device", "emulator", "--dtype", "f16"];
    let shorter = RUN.map(|argument| {
        if argument == "44" {
            "10"
        } else if argument == "11" {
            "4"
        } else {
            argument
        }
    });
    let run = [&shorter[..], &on_the_emulator].concat();
    workspace.train(&Workspace::usual("whole", &run)).succeeded();
    let expected = Bits::of(&workspace, "whole", 8);
    for (output, at, kind) in [("stopped", 3, "term"), ("killed", 7, "kill")] {
        let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at, kind };
        let arguments = Workspace::usual(output, &run);
        assert_ne!(workspace.train_with(fault, &arguments).code, 0);
        workspace.train(&[&arguments[..], &["--resume"]].concat()).succeeded();
        Bits::of(&workspace, output, 8).assert_eq(&expected, kind);
    }
}
