//! `chat`, `evaluate --generate` and `evaluate --swap-hash`, each against what other verbs say.

use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::workspace::{Finished, Workspace};

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// A folder with the model `model`, which has a chat template.
fn workspace() -> Workspace {
    let workspace = Workspace::new();
    workspace.text_model("model");
    workspace.write("model/chat_template.jinja", TEMPLATE);
    workspace
}

/// The binary with `input` as its standard input.
fn with_input(workspace: &Workspace, arguments: &[&str], input: &str) -> Finished {
    let mut command = workspace.command(arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Finished::of(child.wait_with_output().unwrap())
}

/// What the model says to a text, on one line or more.
fn answer_to(workspace: &Workspace, prompt: &str) -> String {
    let arguments = [
        "generate",
        "-m",
        "model",
        "--raw",
        "--prompt",
        prompt,
        "--max-new-tokens",
        "6",
        "--json",
        "--device",
        "cpu",
    ];
    let result = workspace.run(&arguments).succeeded().json();
    result["cases"][0]["answer"]["text"].as_str().unwrap().to_string()
}

#[test]
fn a_conversation_reads_what_was_said_and_answers_as_generate_does() {
    let workspace = workspace();
    let chat = ["chat", "-m", "model", "--max-new-tokens", "6", "--device", "cpu"];
    let said = with_input(
        &workspace,
        &chat,
        "/hash faq\nThe sun?\n\nNow?\n/reset\nThe sun?\n/nope\n/quit\nnever read\n",
    );
    let said = said.succeeded().stdout;
    let first_prompt = "<|im_start|>user\n[hash: faq] The sun?<|im_end|>\n<|im_start|>assistant\n";
    let first = answer_to(&workspace, first_prompt);
    let second_prompt =
        format!("{first_prompt}{first}<|im_end|>\n<|im_start|>user\nNow?<|im_end|>\n<|im_start|>assistant\n");
    let second = answer_to(&workspace, &second_prompt);
    let expected =
        [&first, &second, &first].map(|answer| answer.trim_start_matches(' ').to_string() + "\n").concat();
    assert!(said.starts_with(&expected), "{said:?} {expected:?}");
    let rest = &said[expected.len()..];
    assert!(rest.starts_with("no command `/nope`\n/hash X"), "{rest}");

    // Without a template, or as instruction records are learned.
    let plain = with_input(&workspace, &[&chat[..], &["--plain", "--hash", "faq"]].concat(), "The sun?\n");
    let expected = answer_to(&workspace, "[hash: faq] User: The sun?\nAssistant:");
    assert_eq!(plain.succeeded().stdout, expected.trim_start_matches(' ').to_string() + "\n");
    std::fs::remove_file(workspace.path("model/chat_template.jinja")).unwrap();
    with_input(&workspace, &chat, "hi\n").refused(4, &["the model has none", "--plain"]);
    // More than the model has room for is said, and is no end.
    let long = format!("{}\nhi\n", "sauce ".repeat(400));
    let told = with_input(&workspace, &[&chat[..], &["--plain"]].concat(), &long).succeeded().stdout;
    assert!(told.starts_with("that makes ") && told.lines().count() >= 2, "{told}");
    workspace.run(&[&chat[..], &["--json"]].concat()).refused(2, &["fastlora generate"]);
}

const RECORDS: [(&str, &str, &str); 5] = [
    ("The sun?", "It is out.", "faq"),
    ("Now?", "Yes", "faq"),
    ("2+2?", "4", "math"),
    ("3+1?", "4", "math"),
    ("Hm?", "Hm.", "talk"),
];

fn records(hash_of: impl Fn(&str) -> String) -> String {
    let record = |(instruction, output, hash): &(&str, &str, &str)| {
        json!({"instruction": instruction, "output": output, "hash": hash_of(hash)}).to_string() + "\n"
    };
    RECORDS.iter().map(record).collect()
}

fn evaluate(workspace: &Workspace, arguments: &[&str]) -> Finished {
    workspace.run(&[&["evaluate", "-m", "model", "--json", "--device", "cpu"], arguments].concat())
}

#[test]
fn answers_are_scored_by_hash() {
    let workspace = workspace();
    workspace.write("data.jsonl", records(str::to_string));
    let arguments = [
        "data.jsonl",
        "--generate",
        "--max-new-tokens",
        "6",
        "--regex",
        "math=^.",
        "--regex",
        "*=(?s)^.*$",
        "--regex",
        "faq=^$",
    ];
    let result = evaluate(&workspace, &arguments).succeeded().json();
    let generated = &result["generated"];
    let answers = generated["answers"].as_array().unwrap();
    assert_eq!(answers.len(), 5);
    for (answer, (instruction, output, hash)) in answers.iter().zip(RECORDS) {
        let text = answer_to(&workspace, &format!("[hash: {hash}] User: {instruction}\nAssistant:"));
        assert_eq!(answer["answer"].as_str().unwrap(), text.trim_start_matches(' '), "{instruction}");
        assert_eq!(answer["exact"], text.trim() == output);
    }
    let share = |hash: &str, key: &str| {
        let of_hash: Vec<&Value> = answers.iter().filter(|answer| answer["hash"] == hash).collect();
        let value = |answer: &&Value| {
            answer[key].as_bool().map_or(answer[key].as_f64(), |yes| Some(f64::from(u8::from(yes))))
        };
        of_hash.iter().map(|answer| value(answer).unwrap()).sum::<f64>() / of_hash.len() as f64
    };
    for hash in ["faq", "math", "talk"] {
        for key in ["exact", "token_f1", "regex"] {
            let found = generated["by_hash"][hash][key].as_f64().unwrap();
            assert!((found - share(hash, key)).abs() < 1e-12, "{hash} {key}");
        }
    }
    let empty = answers[..2].iter().filter(|answer| answer["answer"] == "").count();
    assert_eq!(generated["by_hash"]["faq"]["regex"].as_f64().unwrap(), empty as f64 / 2.0);
    assert_eq!(generated["overall"]["answers"], 5);
    let table = workspace.run(&[
        "evaluate",
        "-m",
        "model",
        "--device",
        "cpu",
        "data.jsonl",
        "--generate",
        "--max-new-tokens",
        "1",
    ]);
    assert!(table.succeeded().stdout.contains("token F1"));

    evaluate(&workspace, &["data.jsonl", "--generate", "--regex", "nope=x"])
        .refused(2, &["`nope`", "--regex"]);
    let usage = evaluate(&workspace, &["data.jsonl", "--generate", "--regex", "math=("]);
    assert_eq!(usage.code, 2, "{}", usage.stderr);
    workspace.write("tokens.jsonl", r#"{"input_ids": [5, 6, 7]}"#);
    evaluate(&workspace, &["tokens.jsonl", "--generate"])
        .refused(3, &["tokens.jsonl:1", "records with text"]);
    // A conversation is asked for its last assistant turn.
    let talk = json!({"hash": "faq", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]});
    workspace.write("talk.jsonl", talk.to_string());
    let result =
        evaluate(&workspace, &["talk.jsonl", "--generate", "--max-new-tokens", "6"]).succeeded().json();
    let prompt = "<|im_start|>user\n[hash: faq] a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n";
    let answer = &result["generated"]["answers"][0];
    assert_eq!(answer["answer"].as_str().unwrap(), answer_to(&workspace, prompt).trim_start_matches(' '));
    assert_eq!(answer["expected"], "d");
}

#[test]
fn a_swapped_hash_gives_the_loss_of_records_that_have_it() {
    let workspace = workspace();
    workspace.write("data.jsonl", records(str::to_string));
    let swapped = &evaluate(&workspace, &["data.jsonl", "--swap-hash"]).succeeded().json()["swapped_hash"];
    let loss = |value: &Value| value.as_f64().unwrap();
    let mut sums = (0.0, 0.0);
    for other in ["faq", "math", "talk"] {
        // The same records, each under the other hash, in files of their own.
        for own in ["faq", "math", "talk"].into_iter().filter(|own| *own != other) {
            let lines = records(|hash| if hash == own { other.to_string() } else { "left out".to_string() });
            let kept: Vec<&str> = lines.lines().filter(|line| !line.contains("left out")).collect();
            workspace.write("swapped.jsonl", kept.join("\n"));
            let expected = evaluate(&workspace, &["swapped.jsonl"]).succeeded().json();
            let found = loss(&swapped["by_hash"][own]["loss_under"][other]);
            assert!((found - loss(&expected["overall"]["loss"])).abs() < 1e-5, "{own} under {other}");
            let tokens = loss(&expected["overall"]["labelled_tokens"]);
            sums = (sums.0 + tokens * loss(&expected["overall"]["loss"]), sums.1 + tokens);
        }
    }
    assert!((loss(&swapped["overall"]["swapped_loss"]) - sums.0 / sums.1).abs() < 1e-5);
    let table = workspace.run(&["evaluate", "-m", "model", "--device", "cpu", "data.jsonl", "--swap-hash"]);
    assert!(table.succeeded().stdout.contains("under other hashes"));
    workspace.write("one.jsonl", records(|_| "same".to_string()));
    evaluate(&workspace, &["one.jsonl", "--swap-hash"]).refused(3, &["one hash"]);
    workspace.write("tokens.jsonl", r#"{"input_ids": [5, 6, 7]}"#);
    evaluate(&workspace, &["tokens.jsonl", "--swap-hash"])
        .refused(3, &["tokens.jsonl:1", "none can be swapped"]);
}
