//! `fastlora tune`, and runs that take what it measured.

use std::process::Stdio;

use serde_json::{Value, json};

use crate::interruptions::{send, wait, wait_until};
use crate::workspace::{Finished, Workspace};

const HOPPER: [&str; 2] = ["--device", "emulator:hopper"];
/// Where the measurements of the emulated device go.
const TABLE: &str = "cache/fastlora/tiles/emulator-4.json";

fn tune(workspace: &Workspace, more: &[&str]) -> Finished {
    workspace.run(&[&["tune", "--rows", "64", "--json"], &HOPPER[..], more].concat())
}

fn train(workspace: &Workspace, output: &str, more: &[&str]) -> Finished {
    let steps = ["--max-steps", "2", "--lora-dropout", "0.1", "--lora-target-modules", "all-linear"];
    workspace.train_into(output, &[&HOPPER[..], &steps, more].concat()).succeeded()
}

fn table(workspace: &Workspace) -> Value {
    serde_json::from_slice(&std::fs::read(workspace.path(TABLE)).unwrap()).unwrap()
}

/// Writes the table with one choice for each product.
fn keep_only(workspace: &Workspace, mut table: Value, [columns, cluster_blocks]: [u64; 2]) {
    let is_kept = |choice: &Value| choice["columns"] == columns && choice["cluster_blocks"] == cluster_blocks;
    for product in table["products"].as_array_mut().unwrap() {
        product["choices"].as_array_mut().unwrap().retain(is_kept);
        assert_eq!(product["choices"].as_array().unwrap().len(), 1, "{product:#}");
    }
    workspace.write(TABLE, table.to_string());
}

#[test]
fn every_product_of_a_model_is_measured_with_every_choice() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let report = tune(&workspace, &["-m", &model, "--rank", "8"]).succeeded().json();
    assert_eq!((&report["is_real"], &report["device"]["name"]), (&json!(false), &json!("emulator")));
    let products = report["products"].as_array().unwrap();
    // q|k|v, o, gate|up, down and the head, each forward and backward.
    let names: Vec<_> = products.iter().map(|product| product["linear"].as_str().unwrap()).collect();
    for name in ["q|k|v", "o", "gate|up", "down", "head"] {
        assert!(names.contains(&name), "no {name} in {names:?}");
    }
    for product in products {
        let mut times = Vec::new();
        let mut widths = Vec::new();
        for choice in product["choices"].as_array().unwrap() {
            times.push(choice["microseconds"].as_f64().unwrap());
            widths.push(choice["columns"].as_u64().unwrap());
            assert!(choice["teraflops"].as_f64().unwrap() > 0.0, "{product:#}");
        }
        assert!(times.is_sorted() && times[0] > 0.0, "{product:#}");
        widths.sort_unstable();
        assert_eq!(widths, [128, 128, 192, 192, 256, 256], "{product:#}");
        assert!(widths.contains(&product["by_rule"]["columns"].as_u64().unwrap()));
        assert!(product["gain"].as_f64().unwrap() >= 0.0, "{product:#}");
    }
    assert_eq!(table(&workspace)["products"].as_array().unwrap().len(), products.len());

    // Another run adds to what is there; the same one replaces it.
    let text = workspace.run(&[&["tune", "--rows", "64", "--shapes", "64x72"], &HOPPER[..]].concat());
    let text = text.succeeded().stdout;
    assert!(text.contains("they say nothing of a GPU") && text.contains("64 × 64 → 72"), "{text}");
    tune(&workspace, &["-m", &model, "--rank", "8"]).succeeded();
    assert_eq!(table(&workspace)["products"].as_array().unwrap().len(), products.len() + 2);
}

#[test]
fn tiles_change_no_bit_of_a_run_wherever_they_come_from() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let untuned = train(&workspace, "untuned", &[]);
    assert!(untuned.stderr.contains("tiles: by rule; `fastlora tune` measures them"), "{}", untuned.stderr);
    let bits = workspace.adapter_bytes("untuned");
    tune(&workspace, &["-m", &model, "--rank", "8"]).succeeded();
    let measured = table(&workspace);
    for choice @ [columns, cluster_blocks] in [[128, 1], [192, 2], [256, 1], [256, 2]] {
        keep_only(&workspace, measured.clone(), choice);
        let output = format!("of-{columns}-{cluster_blocks}");
        let run = train(&workspace, &output, &[]);
        assert!(run.stderr.contains("tiles: tuned 2"), "{}", run.stderr);
        assert!(workspace.adapter_bytes(&output) == bits, "{choice:?} changes the adapter");
    }
    // The same file by name, and none.
    let named = train(&workspace, "named", &["--tiles", TABLE]);
    assert!(named.stderr.contains("tiles: tuned 2"), "{}", named.stderr);
    let by_rule = train(&workspace, "by_rule", &["--tiles", "rule"]);
    assert!(by_rule.stderr.contains("tiles: by rule\n"), "{}", by_rule.stderr);
    assert!(workspace.adapter_bytes("by_rule") == bits);
    // Where nothing is to be chosen nothing is said.
    let portable = workspace.train_into("portable", &["--device", "emulator", "--max-steps", "1"]);
    assert!(!portable.succeeded().stderr.contains("tiles:"));
}

#[test]
fn measurements_that_are_of_no_use_cost_a_line_and_no_run() {
    let workspace = Workspace::with_data();
    tune(&workspace, &["--shapes", "64x72"]).succeeded();
    let whole = std::fs::read_to_string(workspace.path(TABLE)).unwrap();
    let other_device = whole.replace("\"emulator\"", "\"another\\u001b[31m\"");
    let cut = &whole[..whole.len() / 2];
    for (output, content, parts) in [
        ("other", other_device.as_bytes(), &["INFO tiles: by rule; ", "measured on another\\u{1b}"][..]),
        ("cut", cut.as_bytes(), &["WARN tiles: by rule; ", TABLE, "no table", "run `fastlora tune` again"]),
        ("binary", b"\xff\x00\x1b", &["WARN tiles: by rule; ", "UTF-8"]),
        ("empty", b"", &["WARN tiles: by rule; ", "no table"]),
    ] {
        workspace.write(TABLE, content);
        let run = train(&workspace, output, &[]);
        for part in parts {
            assert!(run.stderr.contains(part), "no `{part}` in {}", run.stderr);
        }
    }
    // Tuning makes a new one in its place.
    tune(&workspace, &["--shapes", "64x72"]).succeeded();
    assert!(train(&workspace, "again", &[]).stderr.contains("tiles: tuned 2"));
}

#[test]
fn what_was_measured_before_a_signal_is_kept() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let rows: Vec<String> = (1..=40).map(|tiles| (64 * tiles).to_string()).collect();
    let rows = rows.join(",");
    let arguments = ["tune", "-m", &model, "--rank", "8", "--rows", &rows];
    let mut command = workspace.command(&[&arguments, &HOPPER[..]].concat());
    let run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(|| workspace.path(TABLE).exists());
    send(&run, libc::SIGINT);
    let run = wait(run);
    assert_eq!(run.code, 75, "{}", run.stderr);
    // Five linears, forward and backward; the head has fewer rows at once.
    let measured = table(&workspace)["products"].as_array().unwrap().len();
    assert!((1..8 * 40).contains(&measured), "{measured} products");
    assert!(run.stderr.contains(&format!("stopped: {measured} of ")), "{}", run.stderr);
    assert!(run.stdout.contains("written to"), "{}", run.stdout);
    let later = train(&workspace, "out", &[]);
    assert!(later.stderr.contains("tiles: tuned 2"), "{}", later.stderr);
}

#[test]
fn what_cannot_be_tuned_is_refused() {
    let workspace = Workspace::with_data();
    for (device, part) in [("cpu", "no tiles to choose from"), ("emulator", "one kind of tile")] {
        workspace.run(&["tune", "--shapes", "64x72", "--device", device]).refused(5, &[part]);
    }
    workspace.run(&[&["tune", "--shapes", "64x71"], &HOPPER[..]].concat()).refused(5, &["multiple of 8"]);
    for shape in ["64", "64x", "0x64", "64x64x64"] {
        let run = workspace.run(&["tune", "--shapes", shape]);
        assert_eq!(run.code, 2, "{shape}: {}", run.stderr);
    }
    assert_eq!(workspace.run(&["tune"]).code, 2);
    assert_eq!(workspace.run(&["tune", "--shapes", "64x72", "--rows", "0"]).code, 2);
    // A file that is something else is not written over.
    let before = workspace.snapshot("train.jsonl");
    tune(&workspace, &["--shapes", "64x72", "--out", "train.jsonl"]).refused(2, &["train.jsonl", "no table"]);
    assert_eq!(workspace.snapshot("train.jsonl"), before);
    let nowhere = ["--tiles", "nowhere.json"];
    workspace
        .train_into("out", &nowhere)
        .refused(2, &["tiles: there is no file nowhere.json", "auto and rule"]);
    assert!(!workspace.path("out").exists());
    let mut command = workspace.command(&[&["train"], &Workspace::usual("out", &[])[..]].concat());
    let output = command.env("FASTLORA_TILES", "nowhere.json").output().unwrap();
    Finished::of(output).refused(2, &["FASTLORA_TILES", "no file nowhere.json"]);
}
