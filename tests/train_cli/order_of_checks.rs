//! Everything wrong at once: the faults are found in the documented order, each before anything later is touched.

use serde_json::json;

use crate::support::fixture;
use crate::workspace::Workspace;

#[test]
fn configuration_then_data_then_model_then_tokens_then_device() {
    let workspace = Workspace::new();
    let mut config = json!({
        "model_name": "model", "train_data": "train.jsonl", "val_data": null, "output_dir": "out",
        "device": "gpu", "lora_target_modules": "(", "lora_r": 0, "lerning_rate": 1, "max_steps": 1,
    });
    workspace.write("out/notes.txt", "mine");
    let train = |config: &serde_json::Value, code: i32, parts: &[&str]| {
        workspace.write("config.json", config.to_string());
        workspace.train(&["config.json"]).refused(code, parts);
        assert_eq!(workspace.snapshot("out").len(), 1, "{parts:?}");
    };
    // The configuration: keys, ranges, spelling, expressions; then the output folder.
    train(&config, 2, &["config.json", "`lerning_rate`", "did you mean `learning_rate`"]);
    config.as_object_mut().unwrap().remove("lerning_rate");
    train(&config, 2, &["lora_r", "1 to 4096"]);
    config["lora_r"] = json!(4);
    train(&config, 2, &["device", "`gpu` is no device"]);
    config["device"] = json!("cuda:99");
    train(&config, 2, &["lora_target_modules", "regular expression"]);
    config["lora_target_modules"] = json!(["q_prj"]);
    train(&config, 2, &["out", "not empty", "--overwrite"]);
    config["output_dir"] = json!("fresh");
    // Data files, read and parsed.
    train(&config, 3, &["train.jsonl"]);
    workspace.write("train.jsonl", "{\"input_ids\": [5, 6}\n");
    train(&config, 3, &["train.jsonl:1", "broken JSON"]);
    workspace.write("train.jsonl", "{\"input_ids\": [5, 999, 2]}\n");
    // Model files: there, sound, and with the modules that are to be adapted.
    train(&config, 4, &["model"]);
    let model = fixture("tiny_qwen2");
    let mut weights = std::fs::read(model.join("model.safetensors")).unwrap();
    let length = weights.len();
    workspace.write("model/config.json", std::fs::read(model.join("config.json")).unwrap());
    workspace.write("model/model.safetensors", &weights[..length - 1]);
    train(&config, 4, &["model.safetensors"]);
    weights[length - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    workspace.write("model/model.safetensors", &weights);
    train(&config, 4, &["model.safetensors", "NaN"]);
    workspace.write("model/model.safetensors", std::fs::read(model.join("model.safetensors")).unwrap());
    train(&config, 2, &["lora_target_modules", "`q_prj`", "q_proj", "up_proj"]);
    config["lora_target_modules"] = json!("all-linear");
    // Tokens and ids.
    train(&config, 3, &["train.jsonl:1", "999"]);
    workspace.write("train.jsonl", "{\"input_ids\": [5, 99, 2]}\n");
    // The device.
    train(&config, 5, &["cuda:99"]);
    config["device"] = json!("cpu");
    config["dtype"] = json!("bf16");
    train(&config, 5, &["dtype", "f32"]);
    config["dtype"] = json!("f32");
    assert!(!workspace.path("fresh").exists());
    workspace.write("config.json", config.to_string());
    workspace.train(&["config.json"]).succeeded();
}
