//! A number that is not finite stops the run before anything is made of it: exit 7, and what was saved stays.

use fastlora::checkpoint::adapter::read_adapter;

use crate::support::fixture;
use crate::workspace::Workspace;

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
