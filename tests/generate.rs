//! `fastlora generate` through the binary, on a tiny model with a tokenizer of single characters.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use assert_cmd::cargo::cargo_bin;
use fastlora::backend::cpu::CpuBackend;
use fastlora::checkpoint::base::BaseModel;
use fastlora::inference::{NextTokenLogits, Session};
use fastlora::model::Transformer;
use fastlora::tokens::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A copy of a tiny model with a tokenizer whose tokens are single characters.
fn model_folder(model: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(fixture(model).join(file), folder.path().join(file)).unwrap();
    }
    let special = ["<pad>", "<bos>", "<eos>"].map(String::from);
    // All of the model's ids have a character, so that whatever it says can be shown.
    let characters = ('\n'..='~').chain('À'..).map(String::from);
    let vocabulary: serde_json::Map<String, Value> = special
        .into_iter()
        .chain(characters)
        .take(512)
        .zip(0u32..)
        .map(|(token, id)| (token, id.into()))
        .collect();
    let tokenizer = json!({
        "version": "1.0",
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "decoder": {"type": "Fuse"},
    });
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<eos>"}"#).unwrap();
    folder
}

/// An adapter folder of the fixtures that names `base` as its base.
fn adapter_folder(adapter: &str, base: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let weights = "adapter_model.safetensors";
    std::fs::copy(fixture(adapter).join(weights), folder.path().join(weights)).unwrap();
    let config = std::fs::read_to_string(fixture(adapter).join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["base_model_name_or_path"] = json!(base);
    std::fs::write(folder.path().join("adapter_config.json"), config.to_string()).unwrap();
    folder
}

fn generate(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("fastlora")).arg("generate").args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn stdout_of(arguments: &[&str]) -> String {
    let output = generate(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_str(&stdout_of(&[arguments, &["--json"]].concat())).unwrap()
}

fn refusal_of(arguments: &[&str]) -> (i32, String) {
    let output = generate(arguments);
    assert!(output.stdout.is_empty(), "{arguments:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Greedy text without a cache between tokens: each is computed from the whole text again. Also its token count.
fn greedy_by_recomputation(folder: &Path, prompt: &str, count: usize) -> (String, usize) {
    let base = BaseModel::open(folder).unwrap();
    let backend = std::sync::Arc::new(CpuBackend::new(Some(1)).unwrap());
    let mut model = Transformer::load(backend, &base, None).unwrap();
    let tokenizer = Tokenizer::from_folder(folder).unwrap();
    let mut ids = tokenizer.encode(prompt).unwrap();
    let prompt_length = ids.len();
    let mut logits = Vec::new();
    for _ in 0..count {
        Session::new(&mut model, ids.len()).unwrap().next_token_logits(&ids, &mut logits).unwrap();
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let token_id = logits.iter().position(|&logit| logit == highest).unwrap() as u32;
        if Some(token_id) == tokenizer.eos_id() {
            break;
        }
        ids.push(token_id);
    }
    (tokenizer.decode(&ids[prompt_length..]).unwrap(), ids.len() - prompt_length)
}

#[test]
fn greedy_text_is_that_of_recomputation() {
    for model in ["tiny_qwen2", "tiny_qwen3", "tiny_llama3rope"] {
        let folder = model_folder(model);
        let path = folder.path().to_str().unwrap();
        let (expected, count) =
            greedy_by_recomputation(folder.path(), "[hash: faq] User: Hello\nAssistant:", 20);
        let expected = expected.strip_prefix(' ').unwrap_or(&expected);
        let options = ["-m", path, "--prompt", "Hello", "--hash", "faq", "--max-new-tokens", "20"];
        assert_eq!(stdout_of(&options).strip_suffix('\n').unwrap(), expected, "{model}");

        let object = json_of(&options);
        let case = &object["cases"][0];
        assert_eq!(case["prompt"], "[hash: faq] User: Hello\nAssistant:");
        assert_eq!(case["prompt_token_count"], 34);
        assert_eq!(case["answer"]["text"], expected);
        assert_eq!(case["answer"]["token_count"], count);
        assert_eq!(case["answer"]["stop_reason"], if count < 20 { "eos" } else { "length" });
        assert_eq!(object["cases"].as_array().unwrap().len(), 1);

        let (raw, _) = greedy_by_recomputation(folder.path(), "as it is", 5);
        let options = ["-m", path, "--raw", "--prompt", "as it is", "--max-new-tokens", "5"];
        assert_eq!(stdout_of(&options).strip_suffix('\n').unwrap(), raw);
    }
}

#[test]
fn standard_input_is_a_prompt() {
    use std::io::Write;
    let folder = model_folder("tiny_qwen2");
    let options = ["-m", folder.path().to_str().unwrap(), "--max-new-tokens", "12"];
    let expected = stdout_of(&[&options[..], &["--prompt", "two\nlines"]].concat());
    let mut child = Command::new(cargo_bin("fastlora"))
        .arg("generate")
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"two\nlines\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

#[test]
fn every_eos_of_the_model_ends_the_text() {
    let folder = model_folder("tiny_qwen2");
    let path = folder.path().to_str().unwrap();
    let options = ["-m", path, "--raw", "--prompt", "Hello", "--max-new-tokens", "20"];
    let text = json_of(&options)["cases"][0]["answer"]["text"].as_str().unwrap().to_string();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    // The token after a few others becomes a second EOS.
    let ids = tokenizer.encode(&text).unwrap();
    let place = (1..ids.len()).find(|&place| !ids[..place].contains(&ids[place])).unwrap();
    let config = json!({ "eos_token_id": [2, ids[place]] });
    std::fs::write(folder.path().join("generation_config.json"), config.to_string()).unwrap();
    let answer = &json_of(&options)["cases"][0]["answer"];
    assert_eq!(answer["stop_reason"], "eos");
    assert_eq!(answer["token_count"], place);
    assert!(text.starts_with(answer["text"].as_str().unwrap()));
}

#[test]
fn the_seed_and_nothing_else_decides_what_is_drawn() {
    let folder = model_folder("tiny_qwen2");
    let path = folder.path().to_str().unwrap();
    let drawn = |seed: &str, threads: &str| {
        let options = ["-m", path, "--prompt", "Hello", "--max-new-tokens", "24", "--seed", seed];
        let sampling = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"];
        stdout_of(&[&options[..], &sampling, &["--repetition-penalty", "1.2", "--threads", threads]].concat())
    };
    assert_eq!(drawn("1", "1"), drawn("1", "2"));
    assert_ne!(drawn("1", "1"), drawn("2", "1"));
}

#[test]
fn cases_run_with_the_adapter_and_without() {
    let base = model_folder("tiny_qwen2");
    let base_path = base.path().to_str().unwrap();
    let adapter = adapter_folder("tiny_qwen2/adapter_final_brand", base.path());
    let adapter_path = adapter.path().to_str().unwrap();
    let one = |model: &[&str], hash: &str, prompt: &str| {
        let options = ["--prompt", prompt, "--hash", hash, "--max-new-tokens", "10"];
        json_of(&[model, &options].concat())["cases"][0]["answer"]["text"].clone()
    };
    let without = one(&["-m", base_path], "math", "2+2?");
    let with = one(&["-m", base_path, "--adapter", adapter_path], "math", "2+2?");
    assert_ne!(without, with);
    // The adapter knows its base.
    assert_eq!(one(&["--adapter", adapter_path], "math", "2+2?"), with);
    let other = one(&["--adapter", adapter_path], "given", "Who?");

    let cases = adapter.path().join("cases.json");
    let list = json!([
        {"instruction": "2+2?", "hash": "math", "expected": with},
        {"instruction": "Who?"},
    ]);
    std::fs::write(&cases, list.to_string()).unwrap();
    let options = ["--adapter", adapter_path, "--cases", cases.to_str().unwrap()];
    let options = [&options[..], &["--hash", "given", "--max-new-tokens", "10", "--compare-base"]].concat();
    let object = json_of(&options);
    assert_eq!(object["cases"][0]["answer"]["text"], with);
    assert_eq!(object["cases"][0]["answer"]["exact"], true);
    assert_eq!(object["cases"][0]["base_answer"]["text"], without);
    assert_eq!(object["cases"][0]["base_answer"]["exact"], false);
    assert_eq!(object["cases"][1]["answer"]["text"], other);
    assert_eq!(object["cases"][1]["answer"]["exact"], Value::Null);
    assert_eq!(object["model"], base_path);

    let table = stdout_of(&options);
    for part in ["hash", "instruction", "expected", "with adapter", "without", "2+2?", "given"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert!(table.ends_with("exact answers: 1 of 1 with the adapter, 0 without\n"), "{table}");
}

#[test]
fn a_reader_that_leaves_ends_it_quietly() {
    let folder = model_folder("tiny_qwen2");
    let mut child = Command::new(cargo_bin("fastlora"))
        .args([
            "generate",
            "-m",
            folder.path().to_str().unwrap(),
            "--prompt",
            "Hello",
            "--max-new-tokens",
            "200",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{stderr}");
    assert!(!stderr.contains("error"), "{stderr}");
}

#[test]
fn what_cannot_be_is_refused_with_its_exit_code() {
    let folder = model_folder("tiny_qwen2");
    let path = folder.path().to_str().unwrap();
    let long = "x".repeat(300);
    let missing = folder.path().join("missing");
    let missing = missing.to_str().unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (
            &["-m", path, "--prompt", "a", "--temperature", "-1"],
            2,
            "temperature is -1, expected a number ≥ 0",
        ),
        (&["-m", path, "--prompt", "a", "--temperature", "1", "--top-p", "0"], 2, "above 0, at most 1"),
        (&["-m", path, "--prompt", "a", "--temperature", "1", "--top-p", "1.5"], 2, "above 0, at most 1"),
        (&["-m", path, "--prompt", "a", "--temperature", "1", "--min-p", "2"], 2, "from 0 to 1"),
        (&["-m", path, "--prompt", "a", "--temperature", "1", "--top-k", "0"], 2, "at least 1"),
        (&["-m", path, "--prompt", "a", "--repetition-penalty", "0"], 2, "above 0"),
        (&["-m", path, "--prompt", "a", "--top-p", "0.5"], 2, "no effect at temperature 0"),
        (&["-m", path, "--prompt", "a", "--threads", "0"], 2, "expected 1 to 1024"),
        (&["-m", path, "--prompt", "a", "--device", "gpu"], 2, "`gpu` is no device"),
        (&["-m", path, "--prompt", "a", "--compare-base"], 2, "--adapter"),
        (&["--prompt", "a"], 2, "--model"),
        (&["-m", path, "--cases", missing], 3, "cannot read the cases"),
        (&["-m", path, "--raw", "--prompt", ""], 3, "the prompt has no tokens"),
        (&["-m", path, "--raw", "--prompt", &long], 3, "300 tokens, the model has room for 256"),
        (&["-m", missing, "--prompt", "a"], 4, "missing"),
        (&["-m", path, "--adapter", missing, "--prompt", "a"], 4, "cannot read the adapter"),
        (&["-m", path, "--prompt", "a", "--device", "cuda:99"], 5, "cuda:99"),
        (&["-m", path, "--prompt", "a", "--device", "cpu", "--dtype", "bf16"], 5, "computes in f32"),
    ];
    for (arguments, expected, part) in cases {
        let (code, stderr) = refusal_of(arguments);
        assert_eq!(code, *expected, "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{part}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn fault_61_an_adapter_of_another_base_is_refused() {
    let folder = model_folder("tiny_qwen2");
    let adapter = adapter_folder("tiny_qwen3/adapter_final_b0", folder.path());
    let (code, stderr) = refusal_of(&["--adapter", adapter.path().to_str().unwrap(), "--prompt", "a"]);
    assert_eq!(code, 4, "{stderr}");
    assert!(stderr.contains("the adapter belongs to another base"), "{stderr}");
    assert!(stderr.contains("layers.0.self_attn.q_proj.lora_B.weight"), "{stderr}");
}

#[test]
fn json_errors_are_objects() {
    let folder = model_folder("tiny_qwen2");
    let path = folder.path().to_str().unwrap();
    let output = generate(&["-m", path, "--prompt", "a", "--temperature", "-1", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["error"]["exit_code"], 2);
    assert_eq!(object["error"]["where"], "--temperature");
}

#[test]
fn usage_errors_are_objects_too() {
    for (arguments, part) in [
        (&["--json"][..], "--model"),
        (&["-m", "x", "--json", "--prompt"], "--prompt"),
        (&["--json", "--promt"], "--promt"),
    ] {
        let output = generate(arguments);
        assert_eq!(output.status.code(), Some(2));
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(object["error"]["kind"], "config");
        assert!(object["error"]["message"].as_str().unwrap().contains(part), "{object}");
    }
    assert!(generate(&["--promt"]).stdout.is_empty());
}

/// A log that nobody reads any more is no reason to stop (fault 57, in part).
#[test]
fn a_closed_log_does_not_end_the_run() {
    let folder = model_folder("tiny_qwen2");
    let path = folder.path().to_str().unwrap();
    let options = ["-m", path, "--prompt", "a", "--max-new-tokens", "3"];
    let expected = stdout_of(&options);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(cargo_bin("fastlora"));
    let output = command.arg("generate").args(options).stdin(Stdio::null()).stderr(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

/// The real model, where `scripts/quickstart` has put it.
#[test]
fn smollm2_answers_in_its_chat_format() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m-instruct");
    if !folder.join("model.safetensors").exists() {
        println!("skipped: models/smollm2-135m-instruct is not there");
        return;
    }
    let prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
    let options = ["-m", folder.to_str().unwrap(), "--raw", "--prompt", prompt, "--max-new-tokens", "40"];
    let object = json_of(&options);
    let answer = &object["cases"][0]["answer"];
    assert_eq!(object["cases"][0]["prompt_token_count"], 16);
    assert_eq!(answer["text"], "The capital of France is Paris.");
    assert_eq!(answer["stop_reason"], "eos");
    assert_eq!(stdout_of(&options), "The capital of France is Paris.\n");
}
