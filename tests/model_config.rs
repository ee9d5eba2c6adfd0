//! Promises about `config.json`: both spellings read alike, families differ where they should, absurd values are refused.

use fastlora::dtype::DType;
use fastlora::error::ErrorKind;
use fastlora::model::config::{Family, ModelConfig};
use fastlora::model::rope::RopeScaling;
use serde_json::{Value, json};

fn fixture(model: &str, file: &str) -> String {
    std::fs::read_to_string(format!("tests/fixtures/{model}/{file}")).unwrap()
}

/// The base configuration with some fields replaced; null removes one.
fn with(changes: Value) -> String {
    let mut config = json!({ "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": true });
    for (key, value) in changes.as_object().unwrap() {
        match value.is_null() {
            true => drop(config.as_object_mut().unwrap().remove(key)),
            false => config[key] = value.clone(),
        }
    }
    config.to_string()
}

fn read(changes: Value) -> ModelConfig {
    ModelConfig::from_json(&with(changes), "config.json").unwrap()
}

fn refusal(changes: Value) -> String {
    let error = ModelConfig::from_json(&with(changes.clone()), "config.json").err();
    let error = error.unwrap_or_else(|| panic!("{changes} was accepted"));
    assert_eq!(error.kind(), ErrorKind::Model);
    assert!(error.to_string().starts_with("config.json"), "{error}");
    error.to_string()
}

#[test]
fn both_spellings_give_the_same_configuration() {
    for model in ["tiny_qwen2", "tiny_qwen3", "tiny_llama3rope"] {
        let version_5 = ModelConfig::from_json(&fixture(model, "config.json"), "config.json").unwrap();
        let version_4 = ModelConfig::from_json(&fixture(model, "config_v4.json"), "config_v4.json").unwrap();
        assert_eq!(version_5, version_4, "{model}");
        assert_eq!(version_5.stored_dtype, Some(DType::F32));
        assert_eq!(version_5.eos_token_ids, [2]);
        assert_eq!((version_5.bos_token_id, version_5.pad_token_id), (Some(1), Some(0)));
    }
    let llama = ModelConfig::from_folder("tests/fixtures/tiny_llama3rope").unwrap();
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_max_positions: 32.0,
    };
    assert_eq!((llama.rope.theta, llama.rope.scaling), (10000.0, llama3));
    assert_eq!((llama.rms_norm_epsilon, llama.max_positions, llama.head_dim), (1e-5, 256, 16));
}

#[test]
fn families_differ_in_biases_norms_and_head_width() {
    let kinds = |config: &ModelConfig| (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm);
    let bias = json!({ "attention_bias": true, "mlp_bias": true });
    let family = |family: &str, changes: &Value| {
        let mut changes = changes.clone();
        changes["model_type"] = json!(family);
        read(changes)
    };
    assert_eq!(kinds(&family("llama", &json!({}))), (false, false, false, false));
    assert_eq!(kinds(&family("llama", &bias)), (true, true, true, false));
    assert_eq!(kinds(&family("mistral", &bias)), (false, false, false, false));
    assert_eq!(kinds(&family("qwen2", &json!({}))), (true, false, false, false));
    assert_eq!(kinds(&family("qwen3", &json!({}))), (false, false, false, true));
    assert_eq!(kinds(&family("qwen3", &bias)), (true, true, false, true));
    assert_eq!(family("qwen3", &json!({})).family, Family::Qwen3);
    assert_eq!(family("qwen3", &json!({})).head_dim, 128);
    assert_eq!(family("llama", &json!({})).head_dim, 16);
    assert_eq!(family("llama", &json!({ "head_dim": 40 })).query_width(), 160);
    assert_eq!(family("llama", &json!({ "num_key_value_heads": null })).key_value_heads, 4);
    assert!(!family("llama", &json!({ "tie_word_embeddings": null })).tied_embeddings);
}

#[test]
fn windows_follow_family_and_layer_types() {
    let windows = |changes| read(changes).windows;
    let all = |window| vec![window; 3];
    assert_eq!(windows(json!({ "sliding_window": 8 })), all(None), "Llama has none");
    let mistral = |more: Value| {
        let mut changes = json!({ "model_type": "mistral" });
        changes.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        windows(changes)
    };
    assert_eq!(mistral(json!({ "sliding_window": 8 })), all(Some(8)));
    assert_eq!(mistral(json!({})), all(Some(4096)), "absent means 4096");
    let text = with(json!({ "model_type": "mistral" })).replacen('{', r#"{"sliding_window": null,"#, 1);
    assert_eq!(ModelConfig::from_json(&text, "config.json").unwrap().windows, all(None));

    let qwen = json!({ "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1 });
    assert_eq!(windows(qwen.clone()), all(None), "use_sliding_window is false");
    let mut sliding = qwen.clone();
    sliding["use_sliding_window"] = json!(true);
    assert_eq!(windows(sliding.clone()), [None, Some(8), Some(8)]);
    sliding["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention"]);
    assert_eq!(windows(sliding.clone()), [Some(8), None, None], "layer_types wins");
    sliding["layer_types"] = json!(["full_attention"]);
    assert!(refusal(sliding.clone()).contains("list of 3 layer types"));
    sliding["layer_types"] = json!(["linear_attention", "full_attention", "full_attention"]);
    assert!(refusal(sliding.clone()).contains("linear_attention"));
    sliding["use_sliding_window"] = json!(false);
    sliding["layer_types"] = json!(["sliding_attention", "full_attention", "full_attention"]);
    assert!(refusal(sliding).contains("no `sliding_window` is in force"));
}

#[test]
fn end_tokens_come_from_both_files() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), with(json!({ "eos_token_id": 2, "pad_token_id": -1 })))
        .unwrap();
    let end_tokens = || ModelConfig::from_folder(folder.path()).map(|config| config.eos_token_ids);
    assert_eq!(end_tokens().unwrap(), [2]);
    let generation = folder.path().join("generation_config.json");
    std::fs::write(&generation, r#"{"eos_token_id": [7, 2, 9]}"#).unwrap();
    assert_eq!(end_tokens().unwrap(), [7, 2, 9]);
    std::fs::write(&generation, r#"{"eos_token_id": 5}"#).unwrap();
    assert_eq!(end_tokens().unwrap(), [5, 2]);
    std::fs::write(&generation, r#"{"eos_token_id": "</s>"}"#).unwrap();
    let error = end_tokens().unwrap_err().to_string();
    assert!(error.contains("generation_config.json") && error.contains("eos_token_id"), "{error}");
    assert_eq!(ModelConfig::from_folder(folder.path().join("none")).unwrap_err().kind(), ErrorKind::Model);
    assert_eq!(read(json!({ "pad_token_id": -1 })).pad_token_id, None);
}

#[test]
fn tensors_and_modules_of_a_layer() {
    let config = read(json!({ "model_type": "qwen2", "num_hidden_layers": 2 }));
    let tensors: Vec<_> = config.expected_tensors().collect();
    assert_eq!(tensors.len(), 2 + 2 * 12, "tied: no head");
    let shape = |name: &str| tensors.iter().find(|(found, _)| found == name).map(|(_, shape)| shape.clone());
    assert_eq!(shape("model.layers.1.self_attn.k_proj.weight"), Some(vec![32, 64]));
    assert_eq!(shape("model.layers.1.self_attn.k_proj.bias"), Some(vec![32]));
    assert_eq!(shape("model.layers.0.mlp.down_proj.weight"), Some(vec![64, 128]));
    assert_eq!(shape("lm_head.weight"), None);
    let counted: u64 = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
    assert_eq!(config.parameter_count(), counted);
    let modules: Vec<_> = config.linear_modules().collect();
    assert_eq!(modules.len(), 14);
    assert_eq!(modules[7].name, "model.layers.1.self_attn.q_proj");
    assert_eq!((modules[13].in_features, modules[13].out_features), (128, 64));
    for module in modules {
        let weight = shape(&format!("{}.weight", module.name)).unwrap();
        assert_eq!(weight, [module.out_features, module.in_features], "{}", module.name);
        assert_eq!(module.bias, shape(&format!("{}.bias", module.name)).is_some());
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    for (changes, named) in [
        (json!({ "model_type": "gemma3" }), "\"gemma3\""),
        (json!({ "model_type": "qwen2_moe" }), "\"qwen2_moe\""),
        (json!({ "model_type": null }), "`model_type` is missing"),
        (json!({ "hidden_act": "gelu" }), "\"gelu\""),
        (json!({ "quantization_config": { "quant_method": "gptq" } }), "`gptq`"),
        (json!({ "num_local_experts": 8 }), "`num_local_experts`"),
        (json!({ "partial_rotary_factor": 0.5 }), "`partial_rotary_factor`"),
        (json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }), "`dynamic`"),
        (json!({ "use_mrope": true }), "`use_mrope`"),
    ] {
        let message = refusal(changes);
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn a_missing_field_is_named() {
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    {
        assert!(refusal(json!({ key: null })).contains(&format!("`{key}` is missing")));
    }
    assert!(
        refusal(json!({ "model_type": "qwen2", "num_key_value_heads": null }))
            .contains("`num_key_value_heads` is missing")
    );
}

#[test]
fn fault_05_broken_or_deep_config_is_refused() {
    for text in ["", "{", "[]", "\"x\"", "{\"model_type\": \"llama\",}", &"[".repeat(100_000), "{} {}"] {
        let error = ModelConfig::from_json(text, "config.json").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().len() < 300, "{error}");
    }
    ModelConfig::from_json(&format!("\u{feff}{}", with(json!({}))), "config.json").unwrap();
}

#[test]
fn fault_21_absurd_values_are_refused() {
    for (changes, named) in [
        (json!({ "num_attention_heads": 0 }), "`num_attention_heads` is 0"),
        (json!({ "num_key_value_heads": 0 }), "`num_key_value_heads` is 0"),
        (json!({ "num_key_value_heads": 3 }), "multiple of `num_key_value_heads`, 3"),
        (json!({ "num_key_value_heads": 8 }), "multiple of `num_key_value_heads`, 8"),
        (json!({ "num_hidden_layers": 0 }), "`num_hidden_layers` is 0"),
        (json!({ "num_hidden_layers": 1_000_000_000 }), "`num_hidden_layers` is 1000000000"),
        (json!({ "num_hidden_layers": -1 }), "`num_hidden_layers` is -1"),
        (json!({ "num_hidden_layers": 2.5 }), "`num_hidden_layers` is 2.5"),
        (json!({ "num_hidden_layers": "3" }), "`num_hidden_layers` is \"3\""),
        (json!({ "hidden_size": 0 }), "`hidden_size` is 0"),
        (json!({ "hidden_size": 66 }), "`hidden_size` is 66"),
        (json!({ "hidden_size": u64::MAX }), "`hidden_size`"),
        (json!({ "hidden_size": 60 }), "is 15, expected an even number"),
        (json!({ "head_dim": 33 }), "is 33, expected an even number"),
        (json!({ "head_dim": 0 }), "`head_dim` is 0"),
        (json!({ "vocab_size": 0 }), "`vocab_size` is 0"),
        (json!({ "intermediate_size": 0 }), "`intermediate_size` is 0"),
        (json!({ "max_position_embeddings": 0 }), "`max_position_embeddings` is 0"),
        (json!({ "rms_norm_eps": 0.0 }), "`rms_norm_eps` is 0"),
        (json!({ "rms_norm_eps": "1e-5" }), "`rms_norm_eps` is \"1e-5\""),
        (json!({ "eos_token_id": u64::MAX }), "`eos_token_id`"),
        (
            json!({ "hidden_size": 1 << 24, "head_dim": 1 << 14, "num_attention_heads": 1 << 16, "vocab_size": 1 << 28 }),
            "parameters",
        ),
        (
            json!({ "hidden_size": 1 << 20, "head_dim": 64, "intermediate_size": 1 << 20, "num_hidden_layers": 10_000 }),
            "parameters",
        ),
    ] {
        let message = refusal(changes);
        assert!(message.contains(named), "{message}, expected {named}");
    }
}
