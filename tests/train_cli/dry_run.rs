//! `train --dry-run` and `inspect`: the figures of a run before it, and nothing written.

use serde_json::{Value, json};

use crate::workspace::Workspace;

/// Ids and learned labels of the records in `train.jsonl`.
fn counted(workspace: &Workspace) -> (usize, usize) {
    let text = std::fs::read_to_string(workspace.path("train.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.fold((0, 0), |(tokens, learned), record| {
        let labels = record["labels"].as_array().unwrap();
        let carried = labels.iter().skip(1).filter(|label| **label != json!(-100)).count();
        (tokens + record["input_ids"].as_array().unwrap().len(), learned + carried)
    })
}

#[test]
fn a_dry_run_tells_what_the_run_then_does() {
    let workspace = Workspace::with_data();
    let (tokens, learned) = counted(&workspace);
    let arguments = ["--val-data", "val.jsonl", "--device", "cpu", "--num-epochs", "2", "--batch-size", "3"];
    let before = workspace.snapshot(".");
    let told =
        workspace.train_into("out", &[&arguments[..], &["--dry-run", "--json"]].concat()).succeeded().json();
    assert_eq!(workspace.snapshot("."), before, "nothing is written");
    assert_eq!(told["tokens_per_epoch"], tokens);
    assert_eq!(told["learned_tokens_per_epoch"], learned);
    assert_eq!((&told["steps_per_epoch"], &told["steps"]), (&json!(14), &json!(28)));
    assert_eq!(told["records"]["used"], 40);
    assert_eq!(told["hashes"], json!({"math": 14, "faq": 13, "general": 13}));
    assert_eq!(told["validation_samples"], 6);
    assert_eq!(told["samples"].as_array().unwrap().len(), 3);
    let memory = &told["memory_bytes"];
    let bytes = |key: &str| memory[key].as_u64().unwrap();
    let parts: u64 =
        ["weights", "adapters", "optimizer", "activations", "scratch", "answers"].map(bytes).iter().sum();
    assert_eq!(bytes("total"), parts);
    let trainable = told["trainable_parameters"].as_u64().unwrap();
    assert_eq!((bytes("adapters"), bytes("optimizer")), (8 * trainable, 8 * trainable));
    // Stored as f32, and read where the file is mapped.
    assert_eq!(bytes("weights"), 4 * told["frozen_parameters"].as_u64().unwrap());
    // A tiny model: any machine that runs the tests holds all samples at once.
    assert_eq!(told["largest_batch_size"], 40);

    let done = workspace.train_into("out", &[&arguments[..], &["--json"]].concat()).succeeded().json();
    assert_eq!(done["steps"], told["steps"]);
    let of_run = |key: &str| workspace.of_steps("out", key).iter().sum::<f64>();
    assert_eq!((of_run("tokens"), of_run("labelled_tokens")), (2.0 * tokens as f64, 2.0 * learned as f64));
    let (tensors, _) = workspace.adapter("out").described();
    assert_eq!(told["config"]["lora_r"], 8);
    assert!(!tensors.is_empty());
    // What is there does not keep a dry run from telling.
    workspace.train_into("out", &["--dry-run"]).succeeded();
}

#[test]
fn what_is_learned_is_marked() {
    let workspace = Workspace::new();
    let model = workspace.text_model("model");
    workspace.write(
        "train.jsonl",
        r#"{"instruction": "The \u001b[31msun?", "output": "It is out.", "hash": "faq"}"#,
    );
    let arguments = ["-m", &model, "--train-data", "train.jsonl", "--val-data", "none", "--dry-run"];
    let shown = workspace.train(&arguments).succeeded().stdout;
    let sample = "[hash: faq] User: The \\u{1b}[31msun?\nAssistant:⟦ It is out.<|im_end|>⟧";
    assert!(shown.contains(sample), "{shown}");
    for part in [
        "--- train.jsonl:1 · hash faq",
        "lengths in tokens",
        "activations",
        "trainable parameters",
        "largest batch_size",
    ] {
        assert!(shown.contains(part), "expected `{part}` in: {shown}");
    }
    assert!(!shown.contains('\u{1b}'), "{shown}");
    workspace.train(&[&arguments[..], &["--show", "0"]].concat()).succeeded();
    let usage = workspace.train(&["--show", "1"]);
    assert_eq!(usage.code, 2, "{}", usage.stderr);
}

#[test]
fn inspect_describes_models_adapters_and_data() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    workspace.write("model/chat_template.jinja", "{{ messages[0].content }}");
    let object =
        |arguments: &[&str]| workspace.run(&[&["inspect", "--json"], arguments].concat()).succeeded().json();

    let described = object(&[&model]);
    assert_eq!(described["kind"], "model");
    assert_eq!((&described["family"], &described["layers"]), (&json!("qwen2"), &json!(2)));
    assert_eq!(described["modules"].as_array().unwrap().len(), 7);
    assert_eq!(described["chat_template"], "yes");
    let text = workspace.run(&["inspect", &model]).succeeded().stdout;
    assert!(text.contains("family                  qwen2") && text.contains("KiB)"), "{text}");

    workspace
        .train(&[
            "-m",
            &model,
            "--train-data",
            "train.jsonl",
            "--val-data",
            "none",
            "-o",
            "out",
            "--max-steps",
            "1",
        ])
        .succeeded();
    let described = object(&["out"]);
    assert_eq!(
        (&described["kind"], &described["rank"], &described["scale"]),
        (&json!("adapter"), &json!(8), &json!(2.0))
    );
    assert_eq!((&described["modules"], &described["step"]), (&json!(["q_proj", "v_proj"]), &json!(1)));
    assert_eq!(described["adapted_linears"], 4);

    let (tokens, learned) = counted(&workspace);
    let described = object(&["train.jsonl", "-m", &model, "--max-length", "20"]);
    assert_eq!((&described["tokens"], &described["learned_tokens"]), (&json!(tokens), &json!(learned)));
    let overlong = std::fs::read_to_string(workspace.path("train.jsonl")).unwrap();
    let overlong = overlong.lines().filter(|line| line.matches(',').count() > 0).filter(|line| {
        serde_json::from_str::<Value>(line).unwrap()["input_ids"].as_array().unwrap().len() > 20
    });
    assert_eq!(described["overlong"], overlong.count());
    workspace.write("talk.json", r#"[{"messages": [{"role": "assistant", "content": "abcd"}]}, {"x": 1}]"#);
    let described = object(&["talk.json"]);
    assert_eq!(described["records"], json!({"used": 1, "skipped": 1}));
    assert_eq!((&described["kinds"], &described["lengths"]["longest"]), (&json!({"chat": 1}), &json!(4)));
    let text = workspace.run(&["inspect", "talk.json"]).succeeded().stdout;
    assert!(
        text.contains("1 of 2 records used, 1 skipped") && text.contains("lengths in characters"),
        "{text}"
    );

    workspace.run(&["inspect", "nothing/at/all"]).refused(4, &["nothing/at/all"]);
    workspace.run(&["inspect", "train.jsonl", "-m", "nowhere"]).refused(4, &["nowhere"]);
}

#[test]
fn a_dry_run_disturbs_no_run_and_makes_no_folder() {
    let workspace = Workspace::with_data();
    workspace.train_into("out", &["--max-steps", "1"]).succeeded();
    let before = workspace.snapshot("out");
    // As a run that goes on holds it.
    let folder = std::fs::File::open(workspace.path("out")).unwrap();
    folder.try_lock().unwrap();
    workspace.train_into("out", &["--dry-run"]).succeeded();
    workspace.train_into("out", &["--overwrite"]).refused(6, &["another process"]);
    assert!(workspace.snapshot("out") == before);
    workspace.train_into("new/er", &["--dry-run"]).succeeded();
    assert!(!workspace.path("new").exists());
}

#[test]
fn a_dry_run_counts_the_answers_to_the_test_cases() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let shape = workspace.run(&["inspect", &model, "--json"]).succeeded().json();
    let number = |key: &str| shape[key].as_u64().unwrap();
    let told = |more: &[&str]| {
        let usual = ["-m", &model, "--train-data", "train.jsonl", "--val-data", "none", "-o", "out"];
        let dry = ["--device", "cpu", "--dry-run", "--json"];
        workspace.train(&[&usual[..], &dry, more].concat()).succeeded().json()["memory_bytes"].clone()
    };
    workspace.write("cases.json", json!([{"instruction": "Now?"}, {"instruction": "The sun?"}]).to_string());
    let tokens = |prompt: &str| {
        let arguments = ["generate", "-m", &model, "--max-new-tokens", "1", "--json", "--prompt", prompt];
        let done = workspace.run(&arguments).succeeded().json();
        done["cases"][0]["prompt_token_count"].as_u64().unwrap()
    };
    let longest = tokens("Now?").max(tokens("The sun?"));
    let capacity = (longest + 128).min(number("max_positions"));
    // Keys and values in f32, for every layer.
    let bytes = 2 * 4 * number("layers") * capacity * number("key_value_heads") * number("head_dim");
    let (without, with) = (told(&[]), told(&["--test-cases", "cases.json"]));
    assert_eq!((&without["answers"], &with["answers"]), (&json!(0), &json!(bytes)));
    let total = |memory: &Value| memory["total"].as_u64().unwrap();
    assert!(total(&with) >= total(&without) + bytes);
    // A text of more rows than a batch needs a larger table of rotations at least.
    assert!(with["activations"].as_u64() > without["activations"].as_u64(), "{with} {without}");
}
