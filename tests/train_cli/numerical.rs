//! A number that is not finite stops the run before anything is made of it: exit 7, and what was saved stays.

use fastlora::checkpoint::adapter::read_adapter;

use serde_json::{Value, json};

use crate::faulty_files::Fault;
use crate::resume::Bits;
use crate::support::fixture;
use crate::workspace::{Workspace, samples};

const SAVED: [&str; 3] = ["adapter_model.safetensors", "adapter_config.json", "fastlora.json"];

#[track_caller]
fn nothing_saved(workspace: &Workspace, output: &str) {
    for name in SAVED {
        assert!(!workspace.path(output).join(name).exists(), "{name}");
    }
    for line in workspace.metrics(output) {
        assert!(line["loss"].as_f64().is_some_and(f64::is_finite), "{line}");
    }
}

#[test]
fn an_adapter_whose_loss_overflows_stops_at_the_first_step() {
    let workspace = Workspace::with_data();
    let source = fixture("tiny_qwen2/adapter_init_brand");
    let mut weights = std::fs::read(source.join("adapter_model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    for value in weights[header..].chunks_exact_mut(4) {
        value.copy_from_slice(&1e30_f32.to_le_bytes());
    }
    workspace.write("huge/adapter_model.safetensors", weights);
    workspace.write("huge/adapter_config.json", std::fs::read(source.join("adapter_config.json")).unwrap());
    let arguments = ["--init-adapter", "huge", "--shuffle", "false", "--batch-size", "2"];
    let parts =
        ["step 1 (train.jsonl:1, train.jsonl:2)", "the loss is", "nothing was updated", "learning_rate"];
    workspace.train_into("out", &arguments).refused(7, &parts);
    nothing_saved(&workspace, "out");
}

#[test]
fn a_rate_that_ruins_the_weights_stops_at_the_next_step() {
    let workspace = Workspace::with_data();
    let absurd = ["--learning-rate", "1e30", "--shuffle", "false", "--batch-size", "10"];
    let finished = workspace.train_into("out", &absurd);
    finished.refused(7, &["step 2 (train.jsonl:11, train.jsonl:12", "and 2 more", "learning_rate"]);
    nothing_saved(&workspace, "out");
    assert_eq!(workspace.steps("out").len(), 1);
    // As an object too.
    let finished = workspace.train_into("json", &[&absurd[..], &["--json"]].concat());
    assert_eq!(finished.code, 7);
    let error = &finished.json()["error"];
    assert_eq!((error["kind"].as_str(), error["exit_code"].as_u64()), (Some("numerical"), Some(7)));
    assert!(error["where"].as_str().unwrap().starts_with("step 2"), "{error}");
}

#[test]
fn a_rate_beyond_f32_never_reaches_the_disk() {
    let workspace = Workspace::with_data();
    let finished = workspace.train_into("out", &["--learning-rate", "1e300", "--max-steps", "1"]);
    finished.refused(7, &["learning_rate"]);
    nothing_saved(&workspace, "out");
}

#[test]
fn the_best_adapter_outlives_a_run_that_fails_later() {
    let workspace = Workspace::with_data();
    // The first rate of the warm-up is 0, so the first validation is sound; the second step ruins the weights.
    let arguments =
        ["--val-data", "val.jsonl", "--val-every", "1", "--learning-rate", "1e30", "--warmup-steps", "1"];
    let finished = workspace.train_into("out", &arguments);
    finished.refused(7, &["validation at step 2 (val.jsonl:1", "the loss of sample"]);
    nothing_saved(&workspace, "out");
    let best = read_adapter(&workspace.path("out/best")).unwrap();
    let is_b = |name: &str| name.ends_with("lora_B.weight");
    assert!(
        best.tensors
            .iter()
            .filter(|tensor| is_b(&tensor.name))
            .all(|tensor| tensor.values.iter().all(|&b| b == 0.0))
    );
    assert_eq!(workspace.validations("out").len(), 1);
}

/// The token that the trap waits for.
const TRAP: u64 = 511;

/// Changes the elements of some tensors of a safetensors file.
fn change(bytes: &mut [u8], mut value: impl FnMut(&str, usize) -> Option<f32>) {
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    for (name, tensor) in tensors.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let [start, end] = [0, 1].map(|end| header + tensor["data_offsets"][end].as_u64().unwrap() as usize);
        for (index, element) in bytes[start..end].chunks_exact_mut(4).enumerate() {
            if let Some(value) = value(name, index) {
                element.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

/// A base whose feature 0 is zero but for one token, an adapter that overflows where it is not, and data in which
/// `is_trapped` says which records (from 1) have that token, as their fourth.
fn trap(workspace: &Workspace, is_trapped: impl Fn(usize) -> bool) {
    let width = 64;
    let model = workspace.path(&workspace.text_model("model")).join("model.safetensors");
    let mut bytes = std::fs::read(&model).unwrap();
    change(&mut bytes, |name, index| {
        let is_first = name == "model.embed_tokens.weight" && index % width == 0;
        is_first.then_some(if index == TRAP as usize * width { 1.0 } else { 0.0 })
    });
    std::fs::write(model, bytes).unwrap();

    let source = fixture("tiny_qwen2/adapter_init_brand");
    let mut bytes = std::fs::read(source.join("adapter_model.safetensors")).unwrap();
    change(&mut bytes, |name, index| match name.split_once("layers.0.self_attn.q_proj.lora_") {
        Some((_, "A.weight")) if index % width == 0 => Some(1e30),
        Some((_, "B.weight")) => Some(1e10),
        _ => Some(0.0),
    });
    workspace.write("trap/adapter_model.safetensors", bytes);
    workspace.write("trap/adapter_config.json", std::fs::read(source.join("adapter_config.json")).unwrap());

    let text = samples(1, 40).replace("511", "510");
    let records = text.lines().enumerate().map(|(number, line)| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        if is_trapped(number + 1) {
            record["input_ids"][3] = json!(TRAP);
        }
        record.to_string() + "\n"
    });
    workspace.write("train.jsonl", records.collect::<String>());
}

const TRAPPED: [&str; 18] = [
    "-m",
    "model",
    "--train-data",
    "train.jsonl",
    "--val-data",
    "none",
    "--init-adapter",
    "trap",
    "--shuffle",
    "false",
    "--lora-dropout",
    "0",
    "--learning-rate",
    "1e-12",
    "--max-steps",
    "10",
    "--save-every",
    "10",
];

#[test]
fn a_step_that_is_not_finite_names_layer_token_and_record() {
    let workspace = Workspace::new();
    trap(&workspace, |number| number == 6);
    let parts = [
        "step 2 (train.jsonl:5, train.jsonl:6",
        "the output of layer 0 is not finite at token 3 of train.jsonl:6",
        "nothing was updated",
    ];
    workspace.train(&[&TRAPPED[..], &["-o", "out"]].concat()).refused(7, &parts);
}

#[test]
fn steps_that_are_not_finite_may_be_skipped() {
    let workspace = Workspace::new();
    trap(&workspace, |number| number == 6 || number == 30);
    let arguments = |output| [&TRAPPED[..], &["--on-nan", "skip", "-o", output]].concat();
    let log = workspace.train(&arguments("out")).succeeded().stderr;
    for part in ["skipped: step 2 (train.jsonl:5", "skipped: step 8 (", "at token 3 of train.jsonl:30"] {
        assert!(log.contains(part), "expected `{part}` in {log}");
    }
    for (number, step) in workspace.steps("out").iter().enumerate() {
        let is_skipped = number == 1 || number == 7;
        assert_eq!(step["loss"].is_null(), is_skipped, "{step}");
        assert_eq!(step.get("skipped"), is_skipped.then_some(&json!(true)), "{step}");
    }
    let state: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("out/checkpoints/step-10/state.json")).unwrap())
            .unwrap();
    assert_eq!((&state["optimizer_steps"], &state["summary"]["skipped_steps"]), (&json!(8), &json!(2)));
    // Cut between the two and resumed.
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 5, kind: "term" };
    assert_eq!(workspace.train_with(fault, &arguments("cut")).code, 75);
    workspace.train(&[&arguments("cut")[..], &["--resume"]].concat()).succeeded();
    Bits::of(&workspace, "cut", 10).assert_eq(&Bits::of(&workspace, "out", 10), "with skipped steps");
}

#[test]
fn a_run_of_nothing_but_skipped_steps_ends() {
    let workspace = Workspace::new();
    trap(&workspace, |_| true);
    let arguments = [&TRAPPED[..], &["--on-nan", "skip", "--batch-size", "2", "-o", "out"]].concat();
    let arguments: Vec<&str> =
        arguments.into_iter().map(|argument| if argument == "10" { "20" } else { argument }).collect();
    workspace.train(&arguments).refused(7, &["step 11 (", "layer 0"]);
    assert_eq!(workspace.steps("out").len(), 10);
}
