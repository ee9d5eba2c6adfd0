//! Which samples an epoch has, in which order and in which rows.

use serde_json::{Value, json};

use crate::faulty_files::Fault;
use crate::resume::Bits;
use crate::workspace::{Workspace, samples};

/// `a.jsonl` with 30 samples of weight 2.5, `b.jsonl` with 20 of weight 1, in a configuration.
fn mixture() -> Workspace {
    let workspace = Workspace::new();
    workspace.write("a.jsonl", samples(1, 30));
    workspace.write("b.jsonl", samples(2, 20));
    workspace.write(
        "mix.json",
        json!({"train_data": [{"path": "a.jsonl", "weight": 2.5}, "b.jsonl"]}).to_string(),
    );
    workspace
}

const RUN: [&str; 12] = [
    "--val-data",
    "none",
    "--device",
    "cpu",
    "--batch-size",
    "2",
    "--lora-dropout",
    "0.1",
    "--learning-rate",
    "0.01",
    "--save-every",
    "7",
];

fn arguments<'a>(model: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["mix.json", "-m", model, "-o", output][..], &RUN, more].concat()
}

fn model() -> String {
    crate::support::fixture("tiny_qwen2").to_str().unwrap().to_string()
}

/// Orders that the metrics name, by epoch.
fn orders(workspace: &Workspace, output: &str) -> Vec<(u64, String)> {
    let named = |step: &Value| Some((step["epoch"].as_u64()?, step.get("order")?.as_str()?.to_string()));
    workspace.steps(output).iter().filter_map(named).collect()
}

#[test]
fn weights_are_how_often_samples_are_seen() {
    let (workspace, model) = (mixture(), model());
    let told = workspace
        .train(&arguments(&model, "out", &["--num-epochs", "3", "--dry-run", "--json"]))
        .succeeded()
        .json();
    assert_eq!((&told["samples_per_epoch"], &told["steps_per_epoch"]), (&json!(95), &json!(48)));
    assert_eq!(told["records"]["used"], 50);
    let run = workspace.train(&arguments(&model, "out", &["--num-epochs", "3"])).succeeded();
    assert!(run.stderr.contains("epoch 1: 95 samples in 48 steps, their order "), "{}", run.stderr);
    assert_eq!(workspace.steps("out").len(), 3 * 48);
    let tokens: f64 = workspace.of_steps("out", "tokens")[..48].iter().sum();
    assert_eq!(told["tokens_per_epoch"], tokens);

    // Balanced: the hash that weighs most has 30 · 2.5 / 3 + 7 of the 95.
    let balanced = ["--balance-by-hash", "true", "--dry-run", "--json"];
    let told = workspace.train(&arguments(&model, "out", &balanced)).succeeded().json();
    assert_eq!(told["samples_per_epoch"], 3 * (25 + 7));

    let refused = json!({"train_data": [{"path": "a.jsonl", "weight": 0}]}).to_string();
    workspace.write("mix.json", refused);
    workspace.train(&arguments(&model, "more", &[])).refused(2, &["a.jsonl", "`weight` is 0", "above 0"]);
}

#[test]
fn the_order_of_each_epoch_is_named_and_comparable() {
    let workspace = Workspace::with_data();
    let train = |output: &str, more: &[&str]| {
        let run = workspace.train_into(output, &[&["--num-epochs", "2"], more].concat()).succeeded();
        let orders = orders(&workspace, output);
        for (epoch, order) in &orders {
            let line = format!("epoch {epoch}: 40 samples in ");
            assert!(
                run.stderr.contains(&line) && run.stderr.contains(&format!("their order {order}")),
                "{}",
                run.stderr
            );
        }
        orders
    };
    let one = train("one", &[]);
    assert_eq!(one.iter().map(|(epoch, _)| *epoch).collect::<Vec<_>>(), [1, 2]);
    assert_ne!(one[0].1, one[1].1);
    // However it is cut into steps it is the same order; another seed has another, none has that of the data.
    assert_eq!(train("cut", &["--batch-size", "7"]), one);
    assert_ne!(train("seed", &["--seed", "7"])[0], one[0]);
    let fixed = train("fixed", &["--shuffle", "false"]);
    assert_eq!(fixed[0].1, fixed[1].1);
    // From Python's hashlib, over 0 to 39 as u32.
    assert_eq!(fixed[0].1, "11c971161d650650");
    let provenance: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("one/fastlora.json")).unwrap()).unwrap();
    assert!(provenance["data_sha256"]["order"].as_str().unwrap().starts_with(&one[0].1));
}

#[test]
fn packed_samples_have_the_losses_of_single_ones() {
    const TOLERANCE: f64 = 1e-6;
    let workspace = Workspace::with_data();
    // A step is an epoch, so that both have the same samples in a step; the order in it differs.
    let train = |output: &str, more: &[&str]| {
        let usual = ["--val-data", "val.jsonl", "--max-steps", "4", "--lora-dropout", "0.2"];
        let all = ["--lora-target-modules", "all-linear", "--max-length", "64"];
        workspace.train_into(output, &[&usual[..], &all, more].concat()).succeeded();
        let validations: Vec<f64> =
            workspace.validations(output).iter().map(|object| object["loss"].as_f64().unwrap()).collect();
        let of_steps = |key| workspace.of_steps(output, key);
        [of_steps("tokens"), of_steps("loss"), of_steps("grad_norm"), validations]
    };
    for shuffle in ["true", "false"] {
        let single = train(&format!("single-{shuffle}"), &["--shuffle", shuffle, "--batch-size", "40"]);
        for (batch_size, accumulation) in [("40", "1"), ("3", "14")] {
            let output = format!("packed-{shuffle}-{batch_size}");
            let cut = ["--batch-size", batch_size, "--gradient-accumulation-steps", accumulation];
            let packed = train(&output, &[&["--packing", "true", "--shuffle", shuffle], &cut[..]].concat());
            assert_eq!(packed[0], single[0]);
            assert_eq!(single[3].len(), 4);
            for place in 1..4 {
                for (found, expected) in packed[place].iter().zip(&single[place]) {
                    assert!((found / expected - 1.0).abs() <= TOLERANCE, "{output}: {found} {expected}");
                }
            }
        }
    }
    // 40 samples of 23 tokens in the mean need 14 rows of 64 or a few more.
    let told =
        workspace.train_into("out", &["--packing", "true", "--max-length", "64", "--dry-run", "--json"]);
    let told = told.succeeded().json();
    let tokens = told["tokens_per_epoch"].as_u64().unwrap();
    let rows = told["rows_per_epoch"].as_u64().unwrap();
    assert!(tokens.div_ceil(64) <= rows && rows <= tokens.div_ceil(64) + 2, "{rows} rows of {tokens} tokens");
    assert_eq!(told["steps_per_epoch"], rows.div_ceil(4));
}

#[test]
fn like_lengths_meet() {
    let workspace = Workspace::with_data();
    let train = |output: &str, more: &[&str]| {
        workspace
            .train_into(output, &[&["--num-epochs", "1", "--batch-size", "4"], more].concat())
            .succeeded();
        workspace.of_steps(output, "tokens")
    };
    let (plain, bucketed) = (train("plain", &[]), train("bucketed", &["--bucket-by-length", "true"]));
    let sum = |values: &[f64]| values.iter().sum::<f64>();
    assert_eq!(sum(&plain), sum(&bucketed));
    let variance = |values: &[f64]| {
        let mean = sum(values) / values.len() as f64;
        values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64
    };
    assert!(variance(&bucketed) > 2.0 * variance(&plain), "{plain:?} {bucketed:?}");
    assert!(!bucketed.is_sorted() && !bucketed.iter().rev().is_sorted(), "{bucketed:?}");
    workspace
        .train_into("no", &["--bucket-by-length", "true", "--shuffle", "false"])
        .refused(2, &["bucket_by_length"]);
}

#[test]
fn a_cut_run_has_the_same_visits_rows_and_orders() {
    let (workspace, model) = (mixture(), model());
    for (name, more) in [
        ("packed", &["--packing", "true", "--max-length", "64", "--balance-by-hash", "true"][..]),
        ("bucketed", &["--bucket-by-length", "true"]),
    ] {
        let whole = format!("{name}-whole");
        let more = [more, &["--num-epochs", "2"]].concat();
        workspace.train(&arguments(&model, &whole, &more)).succeeded();
        let last = workspace.steps(&whole).len() as u64;
        let saved = last - last % 7;
        let expected = Bits::of(&workspace, &whole, saved);
        // Inside the first epoch, at its end, in the second.
        let edge = workspace.steps(&whole).iter().filter(|step| step["epoch"] == 1).count();
        for at in [4, edge, edge + 2] {
            let output = format!("{name}-{at}");
            let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at, kind: "term" };
            let arguments = arguments(&model, &output, &more);
            assert_eq!(workspace.train_with(fault, &arguments).code, 75);
            workspace.train(&[&arguments[..], &["--resume"]].concat()).succeeded();
            Bits::of(&workspace, &output, saved).assert_eq(&expected, &output);
        }
        assert_eq!(orders(&workspace, &whole).len(), 2);
    }
}

#[test]
fn fault_47_other_weights_and_another_order_are_refused() {
    let (workspace, model) = (mixture(), model());
    let run = arguments(&model, "out", &["--max-steps", "9"]);
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 3, kind: "term" };
    assert_eq!(workspace.train_with(fault, &run).code, 75);
    let resume = [&run[..], &["--resume"]].concat();
    workspace
        .write("mix.json", json!({"train_data": [{"path": "a.jsonl", "weight": 2}, "b.jsonl"]}).to_string());
    workspace
        .train(&resume)
        .refused(2, &["the weights of train_data are [2.0,1.0], were [2.5,1.0] (take that back"]);
    workspace.write("mix.json", json!({"train_data": ["a.jsonl", "b.jsonl"]}).to_string());
    workspace.train(&resume).refused(2, &["the weights of train_data are all 1, were [2.5,1.0]"]);
    workspace.write(
        "mix.json",
        json!({"train_data": [{"path": "a.jsonl", "weight": 2.5}, "b.jsonl"]}).to_string(),
    );
    let balanced = [&resume[..], &["--balance-by-hash", "true"]].concat();
    workspace.train(&balanced).refused(2, &["balance_by_hash is true, was false"]);
    workspace.train(&resume).succeeded();
}
