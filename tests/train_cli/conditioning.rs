//! The hash in a text: its template, values that would break it, and texts that are learned without it.

use serde_json::{Value, json};

use crate::workspace::Workspace;

const RECORDS: [(&str, &str, &str); 4] = [
    ("The sun?", "It is out.", "faq"),
    ("Now?", "Yes", "a]b\nc"),
    ("2+2?", "4", "math"),
    ("3+1?", "4", "math"),
];

fn workspace() -> Workspace {
    let workspace = Workspace::new();
    workspace.text_model("model");
    let record = |(instruction, output, hash): &(&str, &str, &str)| {
        json!({"instruction": instruction, "output": output, "hash": hash}).to_string() + "\n"
    };
    workspace.write("train.jsonl", RECORDS.iter().map(record).collect::<String>());
    workspace
}

fn train(workspace: &Workspace, output: &str, more: &[&str]) -> String {
    let arguments = ["-m", "model", "--train-data", "train.jsonl", "--val-data", "none", "-o", output];
    let most = ["--max-steps", "2", "--device", "cpu"];
    workspace.train(&[&arguments[..], &most, more].concat()).succeeded().stderr
}

/// The prompt of one question, and what the log said.
fn prompt(workspace: &Workspace, arguments: &[&str]) -> (String, String) {
    let usual = ["generate", "--prompt", "Hi", "--max-new-tokens", "1", "--json", "--device", "cpu"];
    let done = workspace.run(&[&usual[..], arguments].concat()).succeeded();
    (done.json()["cases"][0]["prompt"].as_str().unwrap().to_string(), done.stderr)
}

#[test]
fn prompts_read_as_the_texts_of_training_did() {
    let workspace = workspace();
    train(&workspace, "plain", &[]);
    train(&workspace, "own", &["--hash-template", "<{hash}>\n", "--hash-dropout", "0.5"]);
    let provenance: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("own/fastlora.json")).unwrap()).unwrap();
    assert_eq!(provenance["hashes"], json!(["a]b\nc", "faq", "math"]));
    assert_eq!(provenance["config"]["hash_template"], "<{hash}>\n");
    let card = std::fs::read_to_string(workspace.path("own/README.md")).unwrap();
    assert!(card.contains("<HASH>"), "{card}");

    for (arguments, expected) in [
        (&["--adapter", "plain", "--hash", "a]b\nc"][..], "[hash: a\\]b\\nc] User: Hi\nAssistant:"),
        (&["--adapter", "plain"], "[hash: unknown] User: Hi\nAssistant:"),
        (&["--adapter", "own", "--hash", "a]b\nc"], "<a\\]b\\nc>\nUser: Hi\nAssistant:"),
        (&["--adapter", "own", "--hash", "a>b"], "<a\\>b>\nUser: Hi\nAssistant:"),
        // What it has learned of texts without a hash.
        (&["--adapter", "own"], "User: Hi\nAssistant:"),
        (&["-m", "model"], "[hash: unknown] User: Hi\nAssistant:"),
        (&["-m", "model", "--hash-template", "<{hash}>\n", "--hash", "faq"], "<faq>\nUser: Hi\nAssistant:"),
        (
            &["--adapter", "plain", "--hash", "faq", "--hash-template", "({hash}) "],
            "(faq) User: Hi\nAssistant:",
        ),
        (&["--adapter", "own", "--raw", "--hash", "nope"], "Hi"),
    ] {
        let (found, log) = prompt(&workspace, arguments);
        assert_eq!(found, expected, "{arguments:?}");
        let is_untrained =
            ["a>b"].iter().any(|hash| arguments.contains(hash)) || arguments == ["--adapter", "plain"];
        assert_eq!(log.contains("never trained on the hash"), is_untrained, "{arguments:?}: {log}");
    }
    let (_, log) = prompt(&workspace, &["--adapter", "own", "--hash", "faq", "--hash-template", "({hash}) "]);
    assert!(log.contains("--hash-template is `({hash}) `, but the adapter has learned `<{hash}>"), "{log}");
    let raw = ["generate", "-m", "model", "--raw", "--prompt", "Hi", "--hash-template", "({hash}) "];
    workspace.run(&raw).refused(2, &["--hash-template", "--raw"]);
    // The base alone is scored on the texts that the adapter has learned: a fresh adapter adds nothing.
    train(&workspace, "fresh", &["--hash-template", "<{hash}>\n", "--learning-rate", "1e-30"]);
    let loss = |arguments: &[&str]| {
        let usual = ["evaluate", "train.jsonl", "--json", "--device", "cpu"];
        workspace.run(&[&usual[..], arguments].concat()).succeeded().json()["overall"]["loss"]
            .as_f64()
            .unwrap()
    };
    let (adapted, plain) = (loss(&["--adapter", "fresh"]), loss(&["-m", "model"]));
    assert_eq!(loss(&["-m", "model", "--hash-template", "<{hash}>\n"]), adapted);
    assert_ne!(plain, adapted);
    let (_, log) = prompt(&workspace, &["--adapter", "own", "--hash", "n\u{7}pe"]);
    let warning = "never trained on the hash `n\\u{7}pe`; it was on `a]b\\nc`, `faq`, `math`";
    // In a log of JSON objects.
    assert!(log.contains(json!(warning).to_string().trim_matches('"')), "{log}");

    // A dry run shows the text, evaluation answers what generation answers to it.
    let arguments =
        ["-m", "model", "--train-data", "train.jsonl", "--val-data", "none", "--dry-run", "--show", "2"];
    let shown =
        workspace.train(&[&arguments[..], &["--hash-template", "<{hash}>\n"]].concat()).succeeded().stdout;
    assert!(shown.contains("<a\\]b\\nc>\nUser: Now?\nAssistant:⟦ Yes"), "{shown}");
    let evaluate =
        ["evaluate", "--adapter", "own", "train.jsonl", "--generate", "--max-new-tokens", "5", "--json"];
    let result = workspace.run(&[&evaluate[..], &["--device", "cpu"]].concat()).succeeded().json();
    let raw = "<a\\]b\\nc>\nUser: Now?\nAssistant:";
    let generate =
        ["generate", "--adapter", "own", "--raw", "--prompt", raw, "--max-new-tokens", "5", "--json"];
    let answer = workspace.run(&[&generate[..], &["--device", "cpu"]].concat()).succeeded().json();
    let text = answer["cases"][0]["answer"]["text"].as_str().unwrap();
    assert_eq!(result["generated"]["answers"][1]["answer"].as_str().unwrap(), text.trim_start_matches(' '));
    workspace.write("other.jsonl", r#"{"instruction": "a", "output": "b", "hash": "other"}"#);
    let log =
        workspace.run(&["evaluate", "--adapter", "own", "other.jsonl", "--device", "cpu"]).succeeded().stderr;
    assert!(log.contains("never trained on the hash `other`"), "{log}");

    // An adapter brings its template along, and its hashes.
    workspace.write("train.jsonl", r#"{"instruction": "a", "output": "b", "hash": "other"}"#);
    let log = train(&workspace, "more", &["--init-adapter", "own"]);
    assert!(!log.contains("has learned"), "{log}");
    let provenance: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("more/fastlora.json")).unwrap()).unwrap();
    assert_eq!(provenance["config"]["hash_template"], "<{hash}>\n");
    assert_eq!(provenance["hashes"], json!(["a]b\nc", "faq", "math", "other"]));
    let log = train(&workspace, "else", &["--init-adapter", "own", "--hash-template", "{hash}: "]);
    assert!(log.contains("has learned `<{hash}>"), "{log}");

    let bad = ["--hash-template", "no place", "--dry-run"];
    let usage = workspace.train(&[&arguments[..6], &bad].concat());
    assert!(usage.code == 2 && usage.stderr.contains("0 times"), "{}", usage.stderr);
}

/// Conversations, with the hash of each or without any.
fn conversations(has_hash: bool) -> String {
    let talk = |number: usize| {
        let hash = if has_hash { json!(["faq", "math"][number % 2]) } else { Value::Null };
        let question = ["The sun?", "Now?", "2+2?", "Hm?", "And?"][number % 5];
        json!({"hash": hash, "messages": [
            {"role": "user", "content": question}, {"role": "assistant", "content": "It is out."},
            {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Yes."}]})
        .to_string()
            + "\n"
    };
    (0..12).map(talk).collect()
}

#[test]
fn a_hash_that_is_dropped_is_as_if_it_had_not_been_there() {
    let workspace = workspace();
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
    workspace.write("model/chat_template.jinja", template);
    let train = |output: &str, has_hash: bool, more: &[&str]| {
        workspace.write("train.jsonl", conversations(has_hash));
        let arguments = ["-m", "model", "--train-data", "train.jsonl", "--val-data", "none", "-o", output];
        let epochs = ["--num-epochs", "2", "--device", "cpu"];
        workspace.train(&[&arguments[..], &epochs, more].concat()).succeeded();
        ["tokens", "labelled_tokens", "loss"].map(|key| workspace.of_steps(output, key))
    };
    let with = train("with", true, &[]);
    let without = train("without", false, &[]);
    assert_ne!(with[2], without[2]);
    // Always dropped: the run of data without hashes, bit for bit. Never: that of data with them.
    assert_eq!(train("never", true, &["--hash-dropout", "0"]), with);
    assert_eq!(train("always", true, &["--hash-dropout", "1"]), without);
    assert!(workspace.adapter_bytes("always") == workspace.adapter_bytes("without"));

    // In between it does not depend on how batches are cut, and what is learned of a sample stays the same.
    let half = train("half", true, &["--hash-dropout", "0.5", "--batch-size", "4"]);
    let cut = train(
        "cut",
        true,
        &["--hash-dropout", "0.5", "--batch-size", "1", "--gradient-accumulation-steps", "4"],
    );
    assert_eq!(half[..2], cut[..2]);
    for (one, other) in half[2].iter().zip(&cut[2]) {
        assert!((one / other - 1.0).abs() < 1e-6, "{one} {other}");
    }
    let sum = |values: &[f64]| values.iter().sum::<f64>();
    assert!(sum(&without[0]) < sum(&half[0]) && sum(&half[0]) < sum(&with[0]), "{half:?}");
    assert_eq!((sum(&half[1]), sum(&half[1])), (sum(&with[1]), sum(&without[1])));
    // Another epoch drops others.
    assert_ne!(half[0][..3], half[0][3..]);
}
