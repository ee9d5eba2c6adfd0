//! What a run leaves: metrics with the documented fields, the best adapter, the rates that were asked for.

use std::f64::consts::PI;

use serde_json::{Value, json};

use crate::support::fixture;
use crate::workspace::{Workspace, samples};

fn keys(object: &Value) -> Vec<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// (tokens, labelled tokens) of every record.
fn counts(records: &str) -> Vec<(f64, f64)> {
    records
        .lines()
        .map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            let labels = record["labels"].as_array().unwrap();
            let labelled = labels.iter().skip(1).filter(|label| **label != -100).count();
            (labels.len() as f64, labelled as f64)
        })
        .collect()
}

#[test]
fn metrics_have_the_documented_fields() {
    let workspace = Workspace::with_data();
    let options = ["--val-data", "val.jsonl", "--batch-size", "3", "--gradient-accumulation-steps", "4"];
    workspace
        .train_into("out", &[&options[..], &["--shuffle", "false", "--num-epochs", "2"]].concat())
        .succeeded();
    let steps = workspace.steps("out");
    // 40 samples, 12 a step: the fourth step of each epoch is short, and nothing is left out.
    assert_eq!(steps.len(), 8);
    let expected =
        ["step", "epoch", "loss", "grad_norm", "learning_rate", "labelled_tokens", "tokens", "seconds"];
    let counts = counts(&samples(1, 40));
    for (number, step) in steps.iter().enumerate() {
        // The first step of an epoch names its order.
        let order: &[&str] = if number % 4 == 0 { &["order"] } else { &[] };
        assert_eq!(keys(step), [&expected[..], order].concat());
        assert_eq!((&step["step"], &step["epoch"]), (&json!(number + 1), &json!(number / 4 + 1)));
        let samples = &counts[number % 4 * 12..40.min(number % 4 * 12 + 12)];
        let sum = |of: fn(&(f64, f64)) -> f64| samples.iter().map(of).sum::<f64>();
        assert_eq!(step["tokens"].as_f64().unwrap(), sum(|count| count.0));
        assert_eq!(step["labelled_tokens"].as_f64().unwrap(), sum(|count| count.1));
        assert!(step["seconds"].as_f64().unwrap() > 0.0);
        assert!(step["grad_norm"].as_f64().unwrap() > 0.0);
    }
    // Validation at the end of each epoch, in the order of what happened.
    let places: Vec<usize> = workspace
        .metrics("out")
        .iter()
        .enumerate()
        .filter(|(_, object)| object.get("event").is_some())
        .map(|(place, _)| place)
        .collect();
    assert_eq!(places, [4, 9]);
    for (validation, step) in workspace.validations("out").iter().zip([4, 8]) {
        for key in ["event", "step", "loss", "perplexity", "by_hash"] {
            assert!(validation.get(key).is_some(), "{key}");
        }
        assert_eq!(validation["step"], step);
        let loss = validation["loss"].as_f64().unwrap();
        assert!((validation["perplexity"].as_f64().unwrap() / loss.exp() - 1.0).abs() < 1e-12);
        let by_hash = validation["by_hash"].as_object().unwrap();
        assert_eq!(by_hash.keys().collect::<Vec<_>>(), ["faq", "general", "math"]);
        // The whole is the mean of the parts, weighted by their labelled tokens.
        let (mut sum, mut labelled) = (0.0, 0.0);
        for (number, (_, count)) in self::counts(&samples(2, 6)).into_iter().enumerate() {
            let figures = &by_hash[["math", "faq", "general"][number % 3]];
            let (loss, perplexity) =
                (figures["loss"].as_f64().unwrap(), figures["perplexity"].as_f64().unwrap());
            assert!((perplexity / loss.exp() - 1.0).abs() < 1e-12);
            sum += loss * count;
            labelled += count;
        }
        assert!((sum / labelled / loss - 1.0).abs() < 1e-12, "{} against {loss}", sum / labelled);
    }
}

#[test]
fn the_adapter_of_the_lowest_validation_loss_is_kept() {
    let workspace = Workspace::with_data();
    // Random tokens cannot be learned: after a while each step makes the validation worse.
    let common =
        ["--val-data", "val.jsonl", "--learning-rate", "0.02", "--lora-target-modules", "all-linear"];
    let train = |output: &str, steps: &str| {
        let arguments = [&common[..], &["--val-every", "3", "--max-steps", steps]].concat();
        workspace.train_into(output, &arguments).succeeded();
    };
    train("out", "20");
    let validations = workspace.validations("out");
    let steps: Vec<u64> = validations.iter().map(|validation| validation["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [3, 6, 9, 12, 15, 18, 20], "every 3 steps and at the end");
    let losses: Vec<f64> =
        validations.iter().map(|validation| validation["loss"].as_f64().unwrap()).collect();
    let (place, lowest) =
        losses.iter().copied().enumerate().min_by(|one, other| one.1.total_cmp(&other.1)).unwrap();
    assert!(place + 1 < losses.len(), "the test needs a loss that rises: {losses:?}");
    // A run that ends there has the same adapter.
    train("shorter", &steps[place].to_string());
    assert!(workspace.adapter_bytes("out/best") == workspace.adapter_bytes("shorter"));
    assert!(workspace.adapter_bytes("out/best") != workspace.adapter_bytes("out"));
    let provenance: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("out/best/fastlora.json")).unwrap()).unwrap();
    assert_eq!(
        (&provenance["step"], &provenance["losses"]["validation"]),
        (&json!(steps[place]), &json!(lowest))
    );
    // And evaluates to that loss.
    let output = std::process::Command::new(assert_cmd::cargo::cargo_bin("fastlora"))
        .args(["evaluate", "--json", "-m"])
        .arg(fixture("tiny_qwen2"))
        .arg("--adapter")
        .args([workspace.path("out/best"), workspace.path("val.jsonl")])
        .output()
        .unwrap();
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = object["overall"]["loss"].as_f64().unwrap();
    assert!((found / lowest - 1.0).abs() <= 1e-6, "{found} against {lowest}");
}

#[test]
fn max_steps_replaces_epochs_and_runs_past_them() {
    let workspace = Workspace::with_data();
    // 10 steps an epoch; the order of the second epoch is another.
    workspace.train_into("out", &["--num-epochs", "1", "--max-steps", "23"]).succeeded();
    let epochs = workspace.of_steps("out", "epoch");
    assert_eq!(epochs.len(), 23);
    assert_eq!((epochs[9], epochs[10], epochs[20], epochs[22]), (1.0, 2.0, 3.0, 3.0));
    let tokens = workspace.of_steps("out", "tokens");
    assert_ne!(tokens[..10], tokens[10..20]);
    assert_eq!(tokens[..10].iter().sum::<f64>(), tokens[10..20].iter().sum::<f64>());
    workspace.train_into("short", &["--num-epochs", "9", "--max-steps", "2"]).succeeded();
    assert_eq!(workspace.steps("short").len(), 2);
}

/// As transformers' `get_scheduler`: the rate is 0 at step `total`, which the last step, `total - 1`, comes close to.
#[test]
fn rates_follow_warm_up_and_schedule() {
    let workspace = Workspace::with_data();
    let (peak, warm_up, total) = (1e-3, 4.0, 12.0);
    for scheduler in ["constant", "linear", "cosine"] {
        let options = ["--warmup-steps", "4", "--max-steps", "12", "--learning-rate", "1e-3"];
        workspace.train_into(scheduler, &[&options[..], &["--lr-scheduler", scheduler]].concat()).succeeded();
        let rates = workspace.of_steps(scheduler, "learning_rate");
        assert_eq!(rates.len(), 12);
        for (step, rate) in rates.iter().enumerate() {
            let step = step as f64;
            let progress = (step - warm_up) / (total - warm_up);
            let expected = match scheduler {
                _ if step < warm_up => peak * step / warm_up,
                "linear" => peak * (1.0 - progress),
                "cosine" => peak * (0.5 + 0.5 * (PI * progress).cos()),
                _ => peak,
            };
            assert!((rate - expected).abs() <= 1e-15, "{scheduler} step {step}: {rate} against {expected}");
        }
    }
}

#[test]
fn the_adapter_folder_is_complete_and_names_its_origins() {
    let workspace = Workspace::new();
    let model = workspace.text_model("model");
    workspace.write(
        "train.jsonl",
        "{\"instruction\": \"2+2?\", \"output\": \"4\", \"hash\": \"math\"}\n".repeat(3),
    );
    let arguments = ["-m", &model, "--train-data", "train.jsonl", "--val-data", "train.jsonl", "-o", "out"];
    workspace.train(&arguments).succeeded();
    let names = |folder: &str| {
        let mut names: Vec<String> = std::fs::read_dir(workspace.path(folder))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let adapter = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fastlora.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names("out/best"), adapter);
    let mut all: Vec<&str> = adapter.to_vec();
    all.extend(["best", "metrics.jsonl", "report.html", "training_config.json"]);
    all.sort();
    assert_eq!(names("out"), all);
    let provenance: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("out/fastlora.json")).unwrap()).unwrap();
    let resolved: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("out/training_config.json")).unwrap()).unwrap();
    assert_eq!(provenance["config"], resolved);
    assert_eq!(provenance["step"], 3);
    for fingerprint in ["/base_sha256/model.safetensors", "/tokenizer_sha256", "/data_sha256/train"] {
        assert_eq!(provenance.pointer(fingerprint).unwrap().as_str().unwrap().len(), 64, "{fingerprint}");
    }
    let card = std::fs::read_to_string(workspace.path("out/README.md")).unwrap();
    assert!(card.contains("library_name: peft") && card.contains("`math`"), "{card}");
}

#[test]
fn a_run_without_gain_ends_early_and_is_complete() {
    let workspace = Workspace::with_data();
    // Random tokens: after the first steps each validation is worse.
    let arguments = [
        "--val-data",
        "val.jsonl",
        "--learning-rate",
        "0.02",
        "--lora-target-modules",
        "all-linear",
        "--val-every",
        "2",
        "--max-steps",
        "60",
        "--early-stopping-patience",
        "3",
    ];
    let log = workspace.train_into("out", &arguments).succeeded().stderr;
    assert!(log.contains("3 validations without a lower loss: the run ends early"), "{log}");
    let losses: Vec<f64> =
        workspace.validations("out").iter().map(|object| object["loss"].as_f64().unwrap()).collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert_eq!(losses.iter().position(|loss| *loss == best), Some(losses.len() - 4), "{losses:?}");
    assert_eq!(workspace.steps("out").len(), 2 * losses.len());
    let log = workspace.train_into("out", &[&arguments[..], &["--resume"]].concat()).succeeded().stderr;
    assert!(log.contains("the run is complete"), "{log}");
}

#[test]
fn a_share_of_the_samples_is_held_out() {
    let workspace = Workspace::with_data();
    let usual = Workspace::usual("out", &["--val-fraction", "0.2", "--num-epochs", "1", "--batch-size", "4"]);
    // Without `--val-data none`, which would be a second source.
    let place = usual.iter().position(|argument| *argument == "--val-data").unwrap();
    let usual = [&usual[..place], &usual[place + 2..]].concat();
    let log = workspace.train(&usual).succeeded().stderr;
    assert!(log.contains("8 samples are held out for validation"), "{log}");
    assert_eq!(workspace.steps("out").len(), 8, "32 samples in batches of 4");
    assert_eq!(workspace.validations("out").len(), 1);
    assert!(!log.contains("validation samples are also"), "{log}");
    let both = [&usual[..], &["--val-data", "val.jsonl", "--overwrite"]].concat();
    workspace.train(&both).refused(2, &["val_fraction", "not both"]);
}

#[test]
fn the_log_is_kept_in_a_file_with_its_end() {
    let workspace = Workspace::with_data();
    workspace.train_into("out", &["--max-steps", "2", "-q", "--log-file", "run.log"]).succeeded();
    workspace.train_into("out", &["--max-steps", "2", "--log-file", "run.log"]).refused(2, &["not empty"]);
    let log = std::fs::read_to_string(workspace.path("run.log")).unwrap();
    for part in ["INFO step 2/2 loss", "DEBUG", "INFO adapter: out", "error: out: the output folder"] {
        assert!(log.contains(part), "expected `{part}` in {log}");
    }
    assert!(log.lines().next().unwrap().starts_with("20"), "no time in {log}");
    workspace.train_into("new", &["--log-file", "no/such/run.log"]).refused(6, &["no/such/run.log"]);
}
