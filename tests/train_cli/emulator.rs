//! Whole runs through the CUDA backend, on the emulator, beside the same runs on the CPU.

use std::process::Command;

use assert_cmd::cargo::cargo_bin;
use serde_json::Value;

use crate::support::fixture;
use crate::workspace::Workspace;

const KEYS: [&str; 4] = ["labelled_tokens", "tokens", "epoch", "learning_rate"];

/// Twelve steps with dropout, shuffled, validated, in two micro-batches each.
fn train(workspace: &Workspace, output: &str, device: &[&str]) {
    let start = fixture("tiny_qwen2/adapter_init_brand");
    let usual = [
        "--init-adapter",
        start.to_str().unwrap(),
        "--val-data",
        "val.jsonl",
        "--lora-dropout",
        "0.2",
        "--gradient-accumulation-steps",
        "2",
        "--max-steps",
        "12",
        "--lr-scheduler",
        "cosine",
        "--learning-rate",
        "5e-3",
    ];
    workspace.train_into(output, &[&usual, device].concat()).succeeded();
}

/// The largest difference of two runs' losses, of themselves.
fn distance(workspace: &Workspace, output: &str, other: &str) -> f64 {
    let [found, losses] = [output, other].map(|output| workspace.of_steps(output, "loss"));
    assert_eq!(found.len(), losses.len());
    found.iter().zip(&losses).map(|(found, loss)| (found / loss - 1.0).abs()).fold(0.0, f64::max)
}

/// The same batches, rates and dropout masks: losses then differ by the rounding of the compute type alone. With other
/// masks they differ by more, which the test shows.
#[test]
fn a_run_on_the_emulator_follows_the_cpu() {
    let workspace = Workspace::with_data();
    train(&workspace, "cpu", &["--device", "cpu"]);
    let distance = |output: &str, other: &str| distance(&workspace, output, other);
    for (dtype, unit) in [("bf16", 2f64.powi(-8)), ("f16", 2f64.powi(-11))] {
        train(&workspace, dtype, &["--device", "emulator", "--dtype", dtype]);
        for key in KEYS {
            assert_eq!(workspace.of_steps(dtype, key), workspace.of_steps("cpu", key), "{key}");
        }
        let found = distance(dtype, "cpu");
        println!("{dtype}: losses differ by at most {found:e} of themselves");
        assert!(found <= unit, "{dtype}: losses differ by {found:e} of themselves, allowed {unit:e}");
        let [cpu, emulator] = ["cpu", dtype].map(|output| workspace.validations(output));
        assert_eq!(cpu.len(), emulator.len());
        let loss = |validations: &[Value]| validations.last().unwrap()["loss"].as_f64().unwrap();
        assert!((loss(&emulator) / loss(&cpu) - 1.0).abs() <= unit);
    }
    // What makes the comparison sharp: the same order with other masks is far outside it.
    for seed in ["1", "2"] {
        train(&workspace, seed, &["--device", "cpu", "--shuffle", "false", "--seed", seed]);
    }
    let found = distance("1", "2");
    assert!(found > 2f64.powi(-8), "other masks differ by {found:e}");
}

/// Magnitudes, norms and a head that are trained, with dropout, on both kinds of kernels.
#[test]
fn a_run_beyond_plain_lora_follows_the_cpu() {
    let workspace = Workspace::with_data();
    let model = fixture("tiny_llama3rope");
    let whole = ["--use-dora", "true", "--modules-to-save", "lm_head,norm"];
    let train = |output: &str, variant: &[&str], device: &str, dtype: &str| {
        let usual = ["-m", model.to_str().unwrap(), "--train-data", "train.jsonl", "--val-data", "none"];
        let run = ["--max-steps", "6", "--set", "lora_target_modules=all-linear", "--learning-rate", "5e-3"];
        let place = ["--lora-dropout", "0.2", "-o", output, "--device", device, "--dtype", dtype];
        workspace.train(&[&usual[..], variant, &run, &place].concat()).succeeded();
    };
    train("cpu", &whole, "cpu", "auto");
    for (output, device, dtype, unit) in [
        ("f16", "emulator", "f16", 2f64.powi(-11)),
        ("bf16", "emulator", "bf16", 2f64.powi(-8)),
        ("hopper", "emulator:hopper", "bf16", 2f64.powi(-8)),
    ] {
        train(output, &whole, device, dtype);
        let found = distance(&workspace, output, "cpu");
        println!("{output}: losses differ by at most {found:e} of themselves");
        assert!(found <= unit, "{output}: losses differ by {found:e} of themselves, allowed {unit:e}");
    }
    // What makes the comparison sharp: without either part the same run is outside what f16 is allowed.
    for (output, variant) in [("without magnitudes", &whole[2..]), ("without norms and head", &whole[..2])] {
        train(output, variant, "cpu", "auto");
        let found = distance(&workspace, output, "cpu");
        assert!(found > 2f64.powi(-11), "{output}: losses differ by {found:e}");
    }
}

#[test]
fn the_same_run_has_the_same_bits_in_the_checker() {
    let workspace = Workspace::with_data();
    let short = |output: &str, device: &str| {
        workspace
            .train_into(output, &["--device", device, "--max-steps", "2", "--lora-dropout", "0.1"])
            .succeeded();
    };
    for (fast, checked) in [("emulator", "emulator:checked"), ("emulator:hopper", "emulator:hopper:checked")]
    {
        short(fast, fast);
        short(checked, checked);
        assert_eq!(workspace.adapter_bytes(fast), workspace.adapter_bytes(checked));
    }
}

fn verb(workspace: &Workspace, arguments: &[&str]) -> Value {
    let output =
        Command::new(cargo_bin("fastlora")).args(arguments).current_dir(workspace.path("")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn evaluate_and_generate_run_on_it_too() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let evaluate = |device: &str| {
        verb(&workspace, &["evaluate", "-m", &model, "val.jsonl", "--json", "--device", device])
    };
    let [cpu, emulator] = ["cpu", "emulator"].map(|device| evaluate(device)["overall"].clone());
    assert_eq!(cpu["labelled_tokens"], emulator["labelled_tokens"]);
    let loss = |figures: &Value| figures["loss"].as_f64().unwrap();
    assert!((loss(&emulator) / loss(&cpu) - 1.0).abs() <= 2f64.powi(-8), "{cpu} {emulator}");

    // Greedy decoding picks the same tokens as long as no two logits are within their rounding.
    let generate = |device: &str| {
        let arguments = ["generate", "-m", &model, "--prompt", "one two", "--json", "--max-new-tokens", "8"];
        verb(&workspace, &[&arguments[..], &["--device", device, "--dtype", "auto"]].concat())
    };
    let text = |object: Value| object["cases"][0]["answer"]["text"].as_str().unwrap().to_string();
    let [cpu, emulator] = ["cpu", "emulator"].map(|device| text(generate(device)));
    let first_word = |text: &str| text.split_whitespace().next().map(str::to_string);
    assert!(first_word(&cpu).is_some(), "the CPU answers with nothing: there is no word to compare");
    assert_eq!(first_word(&emulator), first_word(&cpu));
}

/// Answers take their memory before the steps do, and share their buffers: the recorded passes must not notice.
#[test]
fn answers_while_it_trains_change_no_bit() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    workspace.write("cases.json", r#"[{"instruction": "The sun?", "hash": "faq"}, {"instruction": "2+2?"}]"#);
    let train = |output: &str, more: &[&str]| {
        let usual = ["-m", &model, "--train-data", "train.jsonl", "--val-data", "val.jsonl", "-o", output];
        let steps =
            ["--device", "emulator", "--max-steps", "4", "--val-every", "2", "--learning-rate", "0.01"];
        workspace.train(&[&usual[..], &steps, more].concat()).succeeded();
    };
    train("without", &[]);
    train("with", &["--test-cases", "cases.json", "--sample-every", "1"]);
    assert_eq!(workspace.of_steps("with", "loss"), workspace.of_steps("without", "loss"));
    assert!(workspace.adapter_bytes("with") == workspace.adapter_bytes("without"));
    let samples = std::fs::read_to_string(workspace.path("with/samples.jsonl")).unwrap();
    assert_eq!(samples.lines().count(), 4, "{samples}");
}
