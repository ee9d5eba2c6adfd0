//! `fastlora evaluate` through the binary, against golden values of transformers and PEFT.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;
use serde_json::{Value, json};
use support::{Tensors, fixture};
use tempfile::TempDir;

fn evaluate(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("fastlora")).arg("evaluate").args(arguments).output().unwrap()
}

fn json_of(arguments: &[&str]) -> Value {
    let output = evaluate(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The golden batch's samples as pre-tokenised records, one of them under another hash.
struct GoldenData {
    folder: TempDir,
    samples: Vec<(Vec<u32>, Vec<i32>)>,
}

impl GoldenData {
    fn new(model: &str) -> Self {
        let golden = Tensors::open(fixture(model).join("forward.safetensors"));
        let (shape, ids) = golden.get("input_ids");
        let (_, labels) = golden.get("labels");
        let (_, mask) = golden.get("attention_mask");
        let width = shape[1];
        let samples: Vec<(Vec<u32>, Vec<i32>)> = (0..shape[0])
            .map(|row| {
                let length = mask[row * width..][..width].iter().filter(|&&mask| mask == 1.0).count();
                let ids = ids[row * width..][..length].iter().map(|&id| id as u32).collect();
                (ids, labels[row * width..][..length].iter().map(|&label| label as i32).collect())
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let lines = samples.iter().enumerate().map(|(row, (ids, labels))| {
            let hash = if row == 1 { "one" } else { "other" };
            json!({"input_ids": ids, "labels": labels, "hash": hash}).to_string() + "\n"
        });
        std::fs::write(folder.path().join("data.jsonl"), lines.collect::<String>()).unwrap();
        Self { folder, samples }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("data.jsonl")
    }
}

/// Loss sum, labelled tokens and hits of one golden sample, from the float64 logits.
fn expected_figures(model: &str, row: usize, labels: &[i32]) -> (f64, u64, u64) {
    let (shape, logits) = Tensors::open(fixture(model).join("forward.safetensors")).get("logits_f64");
    let (width, vocabulary) = (shape[1], shape[2]);
    let mut figures = (0.0, 0, 0);
    for (position, &label) in labels.iter().enumerate().skip(1).filter(|(_, label)| **label >= 0) {
        let logits = &logits[(row * width + position - 1) * vocabulary..][..vocabulary];
        let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|logit| (logit - highest).exp()).sum();
        figures.0 += sum.ln() + highest - logits[label as usize];
        figures.1 += 1;
        figures.2 += u64::from(logits[label as usize] == highest);
    }
    figures
}

fn assert_close(found: &Value, expected: f64, what: &str) {
    let found = found.as_f64().unwrap();
    // The issue's bound for losses in f32 against float64.
    assert!((found - expected).abs() <= 1e-5 * expected.abs(), "{what}: {found} for {expected}");
}

#[test]
fn figures_are_those_of_float64_overall_and_by_hash() {
    for model in ["tiny_qwen2", "tiny_qwen3", "tiny_llama3rope"] {
        let data = GoldenData::new(model);
        let (path, folder) = (data.path(), fixture(model));
        let figures: Vec<(f64, u64, u64)> =
            (0..3).map(|row| expected_figures(model, row, &data.samples[row].1)).collect();
        let sum = |rows: &[usize]| {
            rows.iter().fold((0.0, 0, 0), |sum, &row| {
                (sum.0 + figures[row].0, sum.1 + figures[row].1, sum.2 + figures[row].2)
            })
        };
        for batch_size in ["1", "8"] {
            let options =
                ["-m", folder.to_str().unwrap(), path.to_str().unwrap(), "--batch-size", batch_size];
            let object = json_of(&options);
            for (figures, (loss_sum, labelled, correct)) in [
                (&object["overall"], sum(&[0, 1, 2])),
                (&object["by_hash"]["one"], sum(&[1])),
                (&object["by_hash"]["other"], sum(&[0, 2])),
            ] {
                let loss = loss_sum / labelled as f64;
                assert_close(&figures["loss"], loss, model);
                assert!((figures["perplexity"].as_f64().unwrap().ln() - loss).abs() <= 1e-5 * loss);
                assert_eq!(figures["labelled_tokens"], labelled);
                assert_close(&figures["token_accuracy"], correct as f64 / labelled as f64, model);
            }
            assert_eq!(object["overall"]["samples"], 3);
            assert_eq!(object["records"]["used"], 3);
        }
    }
}

#[test]
fn adapters_of_peft_give_the_golden_losses() {
    for model in ["tiny_qwen2", "tiny_qwen3", "tiny_llama3rope"] {
        let golden: Value =
            serde_json::from_slice(&std::fs::read(fixture(model).join("golden.json")).unwrap()).unwrap();
        let (data, folder) = (GoldenData::new(model), fixture(model));
        let path = data.path();
        for (adapter, run, loss) in [
            ("adapter_init_b0", "b0_f64", "/losses/0"),
            ("adapter_init_brand", "brand_f64", "/losses/0"),
            ("adapter_final_b0", "b0_f32", "/loss_after_10"),
            ("adapter_final_brand", "brand_f32", "/loss_after_10"),
        ] {
            let adapter_folder = folder.join(adapter);
            let model_options =
                ["-m", folder.to_str().unwrap(), "--adapter", adapter_folder.to_str().unwrap()];
            let object = json_of(&[&model_options[..], &[path.to_str().unwrap()]].concat());
            let expected = golden["runs"][run].pointer(loss).unwrap().as_f64().unwrap();
            assert_close(&object["overall"]["loss"], expected, &format!("{model} {adapter}"));
        }
    }
}

#[test]
fn the_table_has_a_row_for_each_hash() {
    let data = GoldenData::new("tiny_qwen2");
    let (path, folder) = (data.path(), fixture("tiny_qwen2"));
    let output = evaluate(&["-m", folder.to_str().unwrap(), path.to_str().unwrap()]);
    let table = String::from_utf8(output.stdout).unwrap();
    for part in ["hash", "perplexity", "token accuracy", "│ one ", "│ other ", "│ all "] {
        assert!(table.contains(part), "{part}: {table}");
    }
}

fn refusal_of(folder: &Path, file: &Path, options: &[&str]) -> (i32, String) {
    let output = evaluate(&[&["-m", folder.to_str().unwrap(), file.to_str().unwrap()], options].concat());
    assert!(output.stdout.is_empty());
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn what_cannot_be_is_refused_with_its_exit_code() {
    let (folder, directory) = (fixture("tiny_qwen2"), tempfile::tempdir().unwrap());
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let good = file("good.jsonl", r#"{"input_ids": [5, 6, 7]}"#);
    let beyond = file("beyond.jsonl", r#"{"input_ids": [5, 512]}"#);
    let masked = file("masked.jsonl", r#"{"input_ids": [5, 6], "labels": [-100, -100]}"#);
    let text = file("text.jsonl", r#"{"instruction": "a", "output": "b"}"#);
    let missing = directory.path().join("missing.jsonl");
    let cases: &[(&Path, &Path, &[&str], i32, &str)] = &[
        (&folder, &good, &["--batch-size", "0"], 2, "expected at least 1"),
        (&folder, &good, &["--max-length", "0"], 2, "expected at least 1"),
        (&folder, &good, &["--device", "cuda:99"], 5, "cuda:99"),
        (&folder, &good, &["--max-length", "2"], 3, "max_length"),
        (&folder, &beyond, &[], 3, "beyond.jsonl:1"),
        (&folder, &masked, &[], 3, "masked.jsonl:1"),
        (&folder, &missing, &[], 3, "missing.jsonl"),
        (&folder, &text, &[], 4, "no tokenizer.json"),
        (directory.path(), &good, &[], 4, "config.json"),
    ];
    for (model, data, options, expected, part) in cases {
        let (code, stderr) = refusal_of(model, data, options);
        assert_eq!(code, *expected, "{part}: {stderr}");
        assert!(stderr.contains(part), "{part}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}
