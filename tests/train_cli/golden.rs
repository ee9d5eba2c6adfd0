//! Ten steps of the binary against transformers + PEFT in float64 (`tests/fixtures/README.md`).

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Tensors, fixture, largest_difference};
use crate::workspace::Workspace;

/// The rows of `forward.safetensors` without their padding, as records.
fn records(model: &Path) -> String {
    let forward = Tensors::open(model.join("forward.safetensors"));
    let (shape, ids) = forward.get("input_ids");
    let (_, mask) = forward.get("attention_mask");
    let (_, labels) = forward.get("labels");
    let integers = |values: &[f64]| values.iter().map(|&value| value as i64).collect::<Vec<_>>();
    (0..shape[0])
        .map(|row| {
            let length = mask[row * shape[1]..][..shape[1]].iter().filter(|&&kept| kept == 1.0).count();
            let range = row * shape[1]..row * shape[1] + length;
            let record =
                json!({ "input_ids": integers(&ids[range.clone()]), "labels": integers(&labels[range]) });
            record.to_string() + "\n"
        })
        .collect()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
}

fn check(name: &str, variant: &str) {
    let model = fixture(name);
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(model.join("golden.json")).unwrap()).unwrap();
    let in_f64 = &golden["runs"][format!("{variant}_f64")];
    let optimizer = &golden["optim"];
    let workspace = Workspace::new();
    workspace.write("train.jsonl", records(&model));
    let config = json!({
        "model_name": model, "train_data": "train.jsonl", "val_data": null, "output_dir": "out",
        "learning_rate": optimizer["lr"], "lr_scheduler": optimizer["schedule"],
        "adam_beta1": optimizer["betas"][0], "adam_beta2": optimizer["betas"][1],
        "adam_epsilon": optimizer["eps"], "weight_decay": optimizer["weight_decay"],
        "max_grad_norm": optimizer["clip_grad_norm"], "lora_dropout": 0.0,
        "batch_size": 3, "shuffle": false, "max_steps": 10,
    });
    workspace.write("golden.json", config.to_string());
    let start = model.join(format!("adapter_init_{variant}"));
    workspace.train(&["golden.json", "--init-adapter", start.to_str().unwrap()]).succeeded();

    for (key, golden_key, tolerance) in [("loss", "losses", 1e-5), ("grad_norm", "grad_norms", 1e-4)] {
        let (found, expected) = (workspace.of_steps("out", key), numbers(&in_f64[golden_key]));
        assert_eq!(found.len(), 10);
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let relative = (found / expected - 1.0).abs();
            assert!(relative <= tolerance, "{name} {variant} {key} {step}: {found} against {expected}");
        }
    }

    // Adam amplifies rounding where a gradient is tiny, so the bound is the peers' own drift, or 1 % of the way.
    let drift = golden["runs"][format!("{variant}_final_adapter_max_abs_diff_f32_f64")].as_f64().unwrap();
    let bound = (5.0 * drift).max(0.01 * optimizer["lr"].as_f64().unwrap() * 10.0);
    let adapter = workspace.adapter("out");
    let expected =
        Tensors::open(model.join(format!("adapter_final_{variant}/adapter_model_f64.safetensors")));
    for tensor in expected.names() {
        let ((shape, found), (expected_shape, expected)) = (adapter.get(&tensor), expected.get(&tensor));
        assert_eq!(shape, expected_shape, "{tensor}");
        let (difference, place) = largest_difference(&found, &expected);
        let (found, expected) = (found[place], expected[place]);
        assert!(difference <= bound, "{name} {variant} {tensor} [{place}]: {found} against {expected}");
    }

    // The file is PEFT's: the same names, element types and metadata.
    let peers = model.join(format!("adapter_final_{variant}"));
    let peers_weights = Tensors::open(peers.join("adapter_model.safetensors"));
    assert_eq!(adapter.described(), peers_weights.described());
    let config = |folder: &Path| -> Value {
        serde_json::from_str(&std::fs::read_to_string(folder.join("adapter_config.json")).unwrap()).unwrap()
    };
    let (found, expected) = (config(&workspace.path("out")), config(&peers));
    for (key, value) in found.as_object().unwrap() {
        match key.as_str() {
            "base_model_name_or_path" => assert_eq!(value, model.to_str().unwrap()),
            "target_modules" => {
                let sorted = |list: &Value| {
                    let mut names: Vec<String> = serde_json::from_value(list.clone()).unwrap();
                    names.sort();
                    names
                };
                assert_eq!(sorted(value), sorted(&expected[key]));
            }
            _ => assert_eq!(value, &expected[key], "{key}"),
        }
    }
    for key in ["peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora"] {
        assert!(found.get(key).is_some(), "{key}");
    }
}

#[test]
fn tiny_qwen2_trains_as_in_float64() {
    check("tiny_qwen2", "b0");
    check("tiny_qwen2", "brand");
}

#[test]
fn tiny_qwen3_trains_as_in_float64() {
    check("tiny_qwen3", "b0");
    check("tiny_qwen3", "brand");
}

#[test]
fn tiny_llama3_with_scaled_rope_trains_as_in_float64() {
    check("tiny_llama3rope", "b0");
    check("tiny_llama3rope", "brand");
}
