//! What a run shows of itself: curve, next commands, TensorBoard's files, the page, answers, the list of runs.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::faulty_files::Fault;
use crate::resume::Bits;
use crate::workspace::{Finished, Workspace};

/// 12 steps with a validation every 5 and a checkpoint every 4.
const RUN: [&str; 12] = [
    "--val-data",
    "val.jsonl",
    "--max-steps",
    "12",
    "--val-every",
    "5",
    "--save-every",
    "4",
    "--learning-rate",
    "0.01",
    "--report",
    "html,tensorboard",
];

/// A folder with the model `model`, ten records of text and two test cases.
fn with_text() -> Workspace {
    let workspace = Workspace::new();
    workspace.text_model("model");
    let record = |number: usize| {
        let (hash, output) =
            if number.is_multiple_of(2) { ("it's me", "Yes") } else { ("faq", "It is out.") };
        json!({ "instruction": format!("The sun {number}?"), "output": output, "hash": hash }).to_string()
            + "\n"
    };
    workspace.write("train.jsonl", (0..10).map(record).collect::<String>());
    workspace.write("my val.jsonl", (10..14).map(record).collect::<String>());
    let cases = json!([
        { "instruction": "The sun <3>?", "hash": "faq", "expected": "It is out." },
        { "instruction": "Now?\u{1b}[31m" },
    ]);
    workspace.write("cases.json", cases.to_string());
    workspace
}

/// Arguments that train `model` on the text.
fn on_text<'a>(output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let usual = ["-m", "model", "--train-data", "train.jsonl", "--val-data", "my val.jsonl", "-o", output];
    [&usual[..], more].concat()
}

#[test]
fn the_end_of_a_run_shows_its_curve_and_commands_that_work() {
    let workspace = with_text();
    let log = workspace.train(&on_text("out", &["--num-epochs", "2", "--device", "cpu"])).succeeded().stderr;
    let curve: Vec<&str> = log.lines().skip_while(|line| !line.ends_with("loss:")).skip(1).take(13).collect();
    assert!(curve[0].contains('┤') && curve[12].contains("⠒ training  ● validation"), "{log}");
    assert!(curve[11].contains("step 1 ") && curve[11].ends_with("step 6"), "{log}");
    assert_eq!(curve.join("").matches('●').count(), 3, "two validations and the legend: {log}");
    assert!(!log.contains('\u{1b}'), "{log:?}");

    let commands: Vec<&str> =
        log.lines().filter_map(|line| line.split_once("next: ")).map(|pair| pair.1).collect();
    let [generate, evaluate] = commands[..] else { panic!("{log}") };
    let binary = assert_cmd::cargo::cargo_bin("fastlora");
    let run = |command: &str| {
        let command = command.replacen("fastlora", &format!("'{}'", binary.display()), 1);
        let mut shell = std::process::Command::new("sh");
        shell.args(["-c", &(command + " --device cpu")]).current_dir(workspace.path(""));
        Finished::of(shell.output().unwrap()).succeeded().stdout
    };
    assert!(generate.contains("--hash faq --prompt TEXT"), "{generate}");
    run(&(generate.to_string() + " --max-new-tokens 2"));
    assert!(run(evaluate).contains("it's me"), "{evaluate}");
    // A resumed complete run says the same; a silent one says nothing.
    let again = workspace.train(&["--resume", "out"]).succeeded().stderr;
    assert!(again.contains("⠒ training") && again.contains(generate), "{again}");
    let quiet = workspace.train(&["--resume", "out", "-q"]).succeeded();
    assert_eq!((quiet.stdout.as_str(), quiet.stderr.as_str()), ("", ""));
}

/// CRC-32C bit by bit, and masked as TFRecord does.
fn masked_crc(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    let crc = !crc;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// (number, value) of a protobuf message's fields: numbers, or bytes of any other kind.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let length = bytes.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        let (own, rest) = bytes.split_at(length);
        *bytes = rest;
        own.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f))
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (number, length) = match key & 7 {
            0 => (varint(&mut bytes), 0),
            1 => (0, 8),
            2 => (0, varint(&mut bytes) as usize),
            5 => (0, 4),
            other => panic!("wire type {other}"),
        };
        let (own, rest) = bytes.split_at(length);
        bytes = rest;
        found.push((key >> 3, number, own.to_vec()));
    }
    found
}

/// (step, tag) → value of every scalar, none of which may stand twice.
fn scalars(workspace: &Workspace, output: &str) -> BTreeMap<(u64, String), f32> {
    let folder = workspace.path(output).join("tensorboard");
    let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [file] = &names[..] else { panic!("{names:?}") };
    let bytes = std::fs::read(file).unwrap();
    let (mut place, mut found, mut is_first) = (0, BTreeMap::new(), true);
    while place < bytes.len() {
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let length = u64::from_le_bytes(bytes[place..place + 8].try_into().unwrap()) as usize;
        assert_eq!(number(place + 8), masked_crc(&bytes[place..place + 8]));
        let event = &bytes[place + 12..place + 12 + length];
        assert_eq!(number(place + 12 + length), masked_crc(event));
        place += 16 + length;
        let parts = fields(event);
        let of = |wanted: u64| parts.iter().find(|part| part.0 == wanted);
        let time = f64::from_le_bytes(of(1).unwrap().2[..].try_into().unwrap());
        assert!(time > 1.7e9, "{time}");
        if std::mem::take(&mut is_first) {
            assert_eq!(of(3).unwrap().2, b"brain.Event:2");
            continue;
        }
        for (number, _, value) in fields(&of(5).unwrap().2) {
            assert_eq!(number, 1);
            let value = fields(&value);
            let tag = String::from_utf8(value[0].2.clone()).unwrap();
            let scalar = f32::from_le_bytes(value[1].2[..].try_into().unwrap());
            assert_eq!((value[0].0, value[1].0, value.len()), (1, 2, 2));
            let before = found.insert((of(2).unwrap().1, tag.clone()), scalar);
            assert_eq!(before, None, "{tag} stands twice");
        }
    }
    found
}

#[test]
fn tensorboard_gets_every_figure_once_also_of_a_resumed_run() {
    let workspace = Workspace::with_data();
    workspace.train_into("whole", &RUN).succeeded();
    let check = |output: &str| {
        let found = scalars(&workspace, output);
        let mut expected = BTreeMap::new();
        for step in workspace.steps(output) {
            let number = |key: &str| step[key].as_f64().unwrap();
            for (tag, value) in [
                ("loss", number("loss")),
                ("grad_norm", number("grad_norm")),
                ("learning_rate", number("learning_rate")),
                ("tokens_per_second", number("tokens") / number("seconds")),
            ] {
                expected.insert((number("step") as u64, format!("training/{tag}")), value as f32);
            }
        }
        for validation in workspace.validations(output) {
            let step = validation["step"].as_u64().unwrap();
            let mut add = |tag: String, value: &Value| {
                expected.insert((step, tag), value.as_f64().unwrap() as f32);
            };
            add("validation/loss".into(), &validation["loss"]);
            add("validation/token_accuracy".into(), &validation["token_accuracy"]);
            for (hash, figures) in validation["by_hash"].as_object().unwrap() {
                add(format!("validation_loss_by_hash/{hash}"), &figures["loss"]);
            }
        }
        assert_eq!(found.len(), 12 * 4 + 3 * 5);
        assert_eq!(found, expected);
    };
    check("whole");
    // Asked to stop, killed after steps that the checkpoint does not know of, killed inside a record.
    let cuts = [("metrics.jsonl", 7, "term"), ("metrics.jsonl", 12, "kill"), ("tfevents", 9, "kill")];
    for (number, (name, at, kind)) in cuts.into_iter().enumerate() {
        let output = format!("cut-{number}");
        let arguments = Workspace::usual(&output, &RUN);
        let fault = Fault { call: Some("write"), name: Some(name), at, kind };
        assert_ne!(workspace.train_with(fault, &arguments).code, 0);
        workspace.train(&[&arguments[..], &["--resume"]].concat()).succeeded();
        check(&output);
        Bits::of(&workspace, &output, 12).assert_eq(&Bits::of(&workspace, "whole", 12), kind);
    }
    // What shows a run may change when it resumes, and goes with it when it is replaced.
    workspace.train_into("whole", &["--max-steps", "2", "--overwrite", "--set", "report=[]"]).succeeded();
    for name in ["tensorboard", "report.html"] {
        assert!(!workspace.path("whole").join(name).exists(), "{name}");
    }
}

/// The answers in `samples.jsonl` by step.
fn samples(workspace: &Workspace, output: &str) -> Vec<(u64, Value)> {
    let text = std::fs::read_to_string(workspace.path(output).join("samples.jsonl")).unwrap();
    let line = |line: &str| {
        let mut object: Value = serde_json::from_str(line).unwrap();
        (object["step"].as_u64().unwrap(), object["samples"].take())
    };
    text.lines().map(line).collect()
}

#[test]
fn answers_come_as_the_run_goes_and_change_no_bit() {
    let workspace = with_text();
    let steps = ["--max-steps", "8", "--save-every", "4", "--learning-rate", "0.01", "--device", "cpu"];
    let asking = ["--test-cases", "cases.json", "--sample-every", "3"];
    workspace.train(&on_text("without", &steps)).succeeded();
    let log = workspace.train(&on_text("with", &[&steps[..], &asking].concat())).succeeded().stderr;
    Bits::of(&workspace, "with", 8).assert_eq(&Bits::of(&workspace, "without", 8), "asked");
    assert!(!workspace.path("without/samples.jsonl").exists());
    let found = samples(&workspace, "with");
    assert_eq!(found.iter().map(|line| line.0).collect::<Vec<_>>(), [3, 6, 8], "every 3 and at the end");
    assert!(log.contains("answers after step 8:") && log.contains("[faq] The sun <3>? → "), "{log}");
    assert!(!log.contains('\u{1b}'), "{log:?}");
    // The last ones are what the adapter says that was saved.
    let generate = ["generate", "--adapter", "with", "--cases", "cases.json", "--json", "--device", "cpu"];
    let said = workspace.run(&generate).succeeded().json();
    for (sample, case) in found[2].1.as_array().unwrap().iter().zip(said["cases"].as_array().unwrap()) {
        assert_eq!((&sample["hash"], &sample["instruction"]), (&case["hash"], &case["instruction"]));
        assert_eq!(
            (&sample["answer"], &sample["exact"]),
            (&case["answer"]["text"], &case["answer"]["exact"])
        );
    }
    // Cut after the sixth step and its answers, resumed from the fourth: the same answers once each.
    let arguments = on_text("cut", &[&steps[..], &asking].concat());
    for fault in [
        Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 9, kind: "kill" },
        Fault { call: Some("write"), name: Some("samples.jsonl"), at: 2, kind: "kill" },
        Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 3, kind: "term" },
    ] {
        assert_ne!(workspace.train_with(fault, &arguments).code, 0);
        workspace.train(&[&arguments[..], &["--resume"]].concat()).succeeded();
        assert_eq!(samples(&workspace, "cut"), found, "{fault:?}");
        Bits::of(&workspace, "cut", 8).assert_eq(&Bits::of(&workspace, "without", 8), "asked and cut");
        std::fs::remove_dir_all(workspace.path("cut")).unwrap();
    }
    // Once each epoch where no number of steps is given; prompts that cannot be are refused before anything is written.
    let each_epoch = ["--test-cases", "cases.json", "--num-epochs", "2", "--device", "cpu"];
    workspace.train(&on_text("epochs", &each_epoch)).succeeded();
    assert_eq!(samples(&workspace, "epochs").iter().map(|line| line.0).collect::<Vec<_>>(), [3, 6]);
    workspace.write("long.json", json!([{ "instruction": "sauce ".repeat(600) }]).to_string());
    workspace.train(&on_text("no", &["--test-cases", "long.json"])).refused(3, &["test_cases, case 1"]);
    workspace.train(&on_text("no", &["--test-cases", "none.json"])).refused(3, &["none.json"]);
    workspace.train(&on_text("no", &["--sample-every", "2"])).refused(2, &["sample_every", "test_cases"]);
    assert!(!workspace.path("no").exists());
}

/// All text below an element.
fn text_of(node: roxmltree::Node<'_, '_>) -> String {
    node.descendants().filter(|node| node.is_text()).filter_map(|node| node.text()).collect()
}

#[test]
fn the_page_is_well_formed_and_escapes_what_the_run_brings() {
    let workspace = with_text();
    let hash = "</td><script>alert('x')</script>&amp;\"\u{7}\u{ffff}";
    let record = json!({ "instruction": "<b>2+2?</b>", "output": "4", "hash": hash }).to_string() + "\n";
    workspace.write("hostile <b> & \"val.jsonl", record.repeat(3));
    workspace.write("cases.json", json!([{ "instruction": "<img src=x>&", "hash": hash }]).to_string());
    let arguments = [
        "-m",
        "model",
        "--train-data",
        "train.jsonl",
        "--val-data",
        "hostile <b> & \"val.jsonl",
        "--val-data",
        "my val.jsonl",
        "-o",
        "out <i>",
        "--test-cases",
        "cases.json",
        "--num-epochs",
        "2",
        "--device",
        "cpu",
    ];
    workspace.train(&arguments).succeeded();
    let page = std::fs::read_to_string(workspace.path("out <i>/report.html")).unwrap();
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let tree = roxmltree::Document::parse_with_options(&page, options).unwrap();
    let names: Vec<&str> = tree.descendants().map(|node| node.tag_name().name()).collect();
    for absent in ["script", "img", "b", "link", "iframe", "object"] {
        assert!(!names.contains(&absent), "{absent}");
    }
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("url("), "no network");
    assert!(names.iter().filter(|name| **name == "svg").count() >= 5, "{names:?}");
    let shown = "</td><script>alert('x')</script>&amp;\"\\u{7}\\u{ffff}";
    let cells: Vec<String> = tree.descendants().filter(|node| node.has_tag_name("td")).map(text_of).collect();
    assert_eq!(
        cells.iter().filter(|cell| *cell == shown).count(),
        3,
        "by hash, and in two samples: {cells:?}"
    );
    for part in ["<img src=x>&", "all"] {
        assert!(cells.iter().any(|cell| cell == part), "{part}: {cells:?}");
    }
    let heading = tree.descendants().find(|node| node.has_tag_name("h1")).unwrap();
    assert_eq!(text_of(heading), "out <i>");
    // The figures are the run's, every key is there, and what computed.
    let validation = &workspace.validations("out <i>")[1];
    let loss = format!("{:.4}", validation["loss"].as_f64().unwrap());
    assert!(cells.contains(&loss), "{loss}: {cells:?}");
    let rows: Vec<String> = tree.descendants().filter(|node| node.has_tag_name("th")).map(text_of).collect();
    for key in fastlora::config::Options::keys() {
        assert!(rows.contains(&key), "{key}");
    }
    assert!(cells.iter().any(|cell| cell.contains("thread")), "{cells:?}");
    assert!(page.contains("prefers-color-scheme: dark"));
    // A stopped run has a page too, and one that cannot be written is no failure.
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 3, kind: "term" };
    let stopped = workspace.train_with(fault, &on_text("stopped", &["--device", "cpu"]));
    assert_eq!(stopped.code, 75, "{}", stopped.stderr);
    assert!(workspace.path("stopped/report.html").exists());
    let fault = Fault { call: None, name: Some(".report.html"), at: 2, kind: "EIO" };
    let run =
        workspace.train_with(fault, &on_text("failed", &["--max-steps", "2", "--device", "cpu"])).succeeded();
    assert!(run.stderr.contains("no report: "), "{}", run.stderr);
}

#[test]
fn with_json_the_log_is_json_too() {
    let workspace = Workspace::with_data();
    let run = workspace.train_into("out", &["--json", "--max-steps", "2"]).succeeded();
    assert_eq!(run.json()["steps"], 2);
    let lines: Vec<Value> = run.stderr.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let has =
        |part: &str| lines.iter().any(|line| line["fields"]["message"].as_str().unwrap().contains(part));
    assert!(has("step 2/2 loss") && has("adapter: out"), "{}", run.stderr);
    assert!(
        lines.iter().all(|line| ["INFO", "WARN"].contains(&line["level"].as_str().unwrap())),
        "{}",
        run.stderr
    );
    let refused = workspace.train_into("out", &["--json"]);
    assert_eq!((refused.code, refused.json()["error"]["exit_code"].as_i64()), (2, Some(2)));
    let last: Value = serde_json::from_str(refused.stderr.lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "ERROR");
    assert!(last["fields"]["message"].as_str().unwrap().starts_with("error: out: "), "{last}");
}

#[test]
fn runs_are_listed_shown_and_compared() {
    let workspace = Workspace::with_data();
    let runs = |arguments: &[&str]| workspace.run(&[&["runs"], arguments].concat());
    assert!(runs(&["list"]).succeeded().stdout.contains("no runs in outputs*"));
    let train = |output: &str, more: &[&str]| {
        workspace
            .train_into(output, &[&["--val-data", "val.jsonl", "--max-steps", "6"], more].concat())
            .succeeded()
    };
    train("outputs/first", &["--lora-r", "4"]);
    train("outputs-2/deep/er/second", &[]);
    let stop = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 3, kind: "term" };
    assert_eq!(workspace.train_with(stop, &Workspace::usual("outputs/stopped", &[])).code, 75);
    let kill = Fault { kind: "kill", ..stop };
    assert_ne!(workspace.train_with(kill, &Workspace::usual("outputs/killed", &[])).code, 0);
    train("elsewhere", &[]);

    let listed = runs(&["list", "--json"]).succeeded().json();
    let states: BTreeMap<&str, (&str, u64)> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|run| {
            let text = |key: &str| run[key].as_str().unwrap();
            (text("run"), (text("state"), run["steps"].as_u64().unwrap()))
        })
        .collect();
    let expected = [
        ("outputs-2/deep/er/second", ("complete", 6)),
        ("outputs/first", ("complete", 6)),
        ("outputs/killed", ("failed", 2)),
        ("outputs/stopped", ("stopped", 3)),
    ];
    assert_eq!(states, BTreeMap::from(expected));
    let first = listed.as_array().unwrap().iter().find(|run| run["run"] == "outputs/first").unwrap();
    let losses = workspace.of_steps("outputs/first", "loss");
    assert_eq!((&first["first_loss"], &first["last_loss"]), (&json!(losses[0]), &json!(losses[5])));
    assert_eq!(first["best_validation_loss"], workspace.validations("outputs/first")[0]["loss"]);
    let table = runs(&["list"]).succeeded().stdout;
    for part in ["outputs/first", "outputs/killed", "failed", &format!("{:.4}", losses[5])] {
        assert!(table.contains(part), "expected `{part}` in {table}");
    }
    assert!(!table.contains("elsewhere"), "{table}");
    assert!(runs(&["list", "elsewhere"]).succeeded().stdout.contains("elsewhere"));

    let shown = runs(&["show", "outputs/first"]).succeeded().stdout;
    for part in ["outputs/first: complete", "⠒ training", "general", "lora_r                          4"] {
        assert!(shown.contains(part), "expected `{part}` in {shown}");
    }
    let shown = runs(&["show", "outputs/stopped", "--json"]).succeeded().json();
    assert_eq!((&shown["checkpoint"], &shown["config"]["lora_r"]), (&json!(3), &json!(8)));

    let compared = runs(&["compare", "outputs/first", "elsewhere", "--json"]).succeeded().json();
    assert_eq!(compared["config"], json!({ "lora_r": [4, 8], "output_dir": ["outputs/first", "elsewhere"] }));
    assert_eq!(compared["runs"][0]["last_loss"], json!(losses[5]));
    let compared = runs(&["compare", "outputs/first", "elsewhere"]).succeeded().stdout;
    assert!(compared.contains("lora_r") && !compared.contains("seed"), "{compared}");
    runs(&["show", "data"]).refused(2, &["data", "metrics.jsonl"]);
}

#[test]
fn a_run_that_goes_is_listed_as_running() {
    let workspace = Workspace::with_data();
    workspace.train_into("out", &["--max-steps", "2"]).succeeded();
    let folder = std::fs::File::open(workspace.path("out")).unwrap();
    let state = || workspace.run(&["runs", "show", "out", "--json"]).succeeded().json()["state"].clone();
    assert_eq!(state(), "complete");
    folder.try_lock().unwrap();
    assert_eq!(state(), "running");
}

#[test]
fn a_run_that_an_error_ended_tells_so_until_it_goes_on() {
    let workspace = Workspace::with_data();
    let runs = |arguments: &[&str]| workspace.run(&[&["runs"], arguments].concat()).succeeded();
    // A checkpoint after the very step before the one that fails.
    let ruin = ["--learning-rate", "1e30", "--save-every", "1", "--batch-size", "10", "--shuffle", "false"];
    workspace.train_into("outputs/bad", &ruin).refused(7, &["step 2"]);
    let page = std::fs::read_to_string(workspace.path("outputs/bad/report.html")).unwrap();
    assert!(page.contains("ended by an error") && page.contains("nothing was updated"), "{page}");
    roxmltree::Document::parse(page.trim_start_matches("<!DOCTYPE html>")).unwrap();
    let listed = runs(&["list", "--json"]).json();
    assert_eq!((&listed[0]["state"], &listed[0]["checkpoint"]), (&json!("failed"), &json!(1)));
    assert_eq!(listed[0]["error"]["exit_code"], 7);
    let shown = runs(&["show", "outputs/bad"]).stdout;
    assert!(shown.contains("outputs/bad: failed") && shown.contains("ended by an error: step 2"), "{shown}");

    // A file that cannot be written once: the run goes on, and nothing tells of the error any more.
    let usual = ["--max-steps", "3", "--save-every", "1"];
    let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at: 2, kind: "EIO" };
    workspace.train_with(fault, &Workspace::usual("outputs/disk", &usual)).refused(6, &["metrics.jsonl"]);
    assert_eq!(runs(&["show", "outputs/disk", "--json"]).json()["state"], "failed");
    workspace.train_into("outputs/disk", &[&usual[..], &["--resume"]].concat()).succeeded();
    let shown = runs(&["show", "outputs/disk", "--json"]).json();
    assert_eq!((&shown["state"], &shown["error"]), (&json!("complete"), &Value::Null));
    let page = std::fs::read_to_string(workspace.path("outputs/disk/report.html")).unwrap();
    assert!(!page.contains("ended by an error"), "{page}");
    // So does one that begins anew.
    workspace.train_into("outputs/bad", &["--max-steps", "1", "--overwrite"]).succeeded();
    assert_eq!(runs(&["show", "outputs/bad", "--json"]).json()["state"], "complete");
    // An error before the run begins leaves nothing.
    workspace.train_into("outputs/none", &["--lora-target-modules", "nothing"]).refused(2, &["nothing"]);
    assert!(!workspace.path("outputs/none").exists());
}
