//! Promises about `config.json`: both spellings read alike, families differ where they should, absurd values are refused.

use fastlora::backend::Activation;
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
    for model in ["tiny_gemma", "tiny_gemma2", "tiny_gemma3", "tiny_phi3", "tiny_phi3_longrope"] {
        let version_5 = ModelConfig::from_json(&fixture(model, "config.json"), "config.json").unwrap();
        let version_4 = ModelConfig::from_json(&fixture(model, "config_v4.json"), "config_v4.json").unwrap();
        assert_eq!(version_5, version_4, "{model}");
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

/// A Gemma of the sizes above.
fn gemma(family: &str, changes: Value) -> Value {
    let mut gemma = json!({ "model_type": family, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": null,
        "rope_theta": null, "rms_norm_eps": 1e-6 });
    gemma.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    gemma
}

#[test]
fn gemma_has_its_own_defaults() {
    let first = read(gemma("gemma", json!({})));
    assert!(first.tied_embeddings);
    assert_eq!((first.head_dim, first.activation, first.embedding_scale), (256, Activation::GeluTanh, 8.0));
    assert_eq!((first.norm_weight_offset, first.post_norms, first.qk_norm), (1.0, false, false));
    assert_eq!((first.attention_soft_cap, first.logit_soft_cap), (None, None));
    assert_eq!((first.softmax_scale, first.rope.theta, first.local_rope), (1.0 / 16.0, 1e4, None));
    assert_eq!(first.windows, [None; 3]);
    // The first releases' name for the approximation.
    read(gemma("gemma", json!({ "hidden_act": "gelu" })));

    let second = read(gemma("gemma2", json!({ "query_pre_attn_scalar": 144, "head_dim": 16 })));
    assert_eq!((second.attention_soft_cap, second.logit_soft_cap), (Some(50.0), Some(30.0)));
    assert_eq!((second.softmax_scale, second.post_norms, second.qk_norm), (1.0 / 12.0, true, false));
    assert_eq!(second.windows, [Some(4096), None, Some(4096)]);
    let text = with(gemma("gemma2", json!({ "final_logit_softcapping": 5.0 })));
    let text = text.replacen('{', r#"{"attn_logit_softcapping": null,"#, 1);
    let second = ModelConfig::from_json(&text, "config.json").unwrap();
    assert_eq!((second.attention_soft_cap, second.logit_soft_cap), (None, Some(5.0)), "null is none");

    let third = read(gemma("gemma3_text", json!({ "sliding_window": 8, "sliding_window_pattern": 3 })));
    assert_eq!((third.attention_soft_cap, third.logit_soft_cap, third.qk_norm), (None, None, true));
    assert_eq!(third.windows, [Some(8), Some(8), None]);
    assert_eq!((third.rope.theta, third.local_rope.as_ref().unwrap().theta), (1e6, 1e4));
    assert_eq!(third.rope_table(5).len(), third.rope_table_length(5));
    assert_eq!(third.rope_table(5).len(), 2 * 5 * 256, "one table for each rotary embedding");
}

#[test]
fn phi3_has_fused_linears_and_heads_that_are_rotated_in_part() {
    let phi = |changes: Value| {
        let mut phi = json!({ "model_type": "phi3", "num_hidden_layers": 1 });
        phi.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        phi
    };
    let config = read(phi(json!({ "partial_rotary_factor": 0.75 })));
    assert_eq!((config.fused_linears, config.rotary_width, config.head_dim), (true, 12, 16));
    assert_eq!(config.windows, [None], "absent means none");
    assert_eq!(read(phi(json!({ "sliding_window": 6 }))).windows, [Some(6)]);
    let modules: Vec<_> = config.linear_modules().collect();
    let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
    assert_eq!(
        names,
        [
            "model.layers.0.self_attn.qkv_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.0.mlp.down_proj"
        ]
    );
    assert_eq!((modules[0].out_features, modules[2].out_features), (64 + 2 * 32, 2 * 128));
    assert_eq!(config.group_sizes(), [1; 4]);

    let scaling = json!({ "type": "longrope", "short_factor": [1, 1, 1, 1, 1, 1, 1, 1], "long_factor": [2, 2, 2, 2, 2, 2, 2, 2] });
    let long = |more: Value| {
        let mut scaling = scaling.clone();
        scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        phi(json!({ "rope_scaling": scaling, "original_max_position_embeddings": 64 }))
    };
    for name in ["longrope", "su", "yarn"] {
        let config = read(long(json!({ "type": name })));
        assert_eq!(config.rope.original_max_positions(), Some(64), "{name}");
        // max_position_embeddings is four times as much: √(1 + ln 4 / ln 64).
        let (frequencies, factor) = config.rope.inverse_frequencies(16);
        assert!((factor - (4.0f64 / 3.0).sqrt()).abs() < 1e-15, "{factor}");
        let (of_long, same) = config.rope.of_long_texts().unwrap().inverse_frequencies(16);
        assert_eq!(same, factor);
        assert!(frequencies.iter().zip(&of_long).all(|(short, long)| *short == 2.0 * long));
        assert_eq!(config.rope_table(5).len(), 2 * 5 * 16);
    }
    for (changes, named) in [
        (long(json!({ "short_factor": [1.0] })), "`short_factor`"),
        (long(json!({ "long_factor": [1, 1, 1, 1, 1, 1, 1, 0] })), "`long_factor`"),
        (long(json!({ "type": "linear", "factor": 2.0 })), "`linear`"),
        (phi(json!({ "partial_rotary_factor": 1.5 })), "`partial_rotary_factor` 1.5"),
        (phi(json!({ "partial_rotary_factor": 0.32 })), "makes 5 rotated columns"),
        (phi(json!({ "hidden_act": "gelu" })), "\"gelu\""),
    ] {
        let message = refusal(changes);
        assert!(message.contains(named), "{message}, expected {named}");
    }
}

/// Settings of released models, and their parameters as the hub counts them.
#[test]
fn released_models_have_the_parameters_that_the_hub_counts() {
    let gemma = |sizes: [u64; 6], more: Value| {
        let [hidden, intermediate, layers, heads, key_value_heads, vocabulary] = sizes;
        let mut config = json!({ "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": vocabulary,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16" });
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let phi = |sizes: [u64; 6], more: Value| {
        let mut config = gemma(
            sizes,
            json!({ "model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "tie_word_embeddings": false, "attention_bias": false, "embd_pdrop": 0.0, "resid_pdrop": 0.0 }),
        );
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let long = |pairs: usize| json!({ "type": "longrope", "short_factor": vec![1.0; pairs], "long_factor": vec![8.0; pairs] });
    for (name, config, count) in [
        (
            "gemma-2b",
            gemma(
                [2048, 16384, 18, 8, 1, 256_000],
                json!({ "model_type": "gemma", "head_dim": 256, "hidden_act": "gelu", "rope_theta": 10000.0 }),
            ),
            2_506_172_416,
        ),
        (
            "gemma-2-2b-it",
            gemma(
                [2304, 9216, 26, 8, 4, 256_000],
                json!({ "model_type": "gemma2", "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
                    "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
                    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid" }),
            ),
            2_614_341_888,
        ),
        (
            "gemma-3-1b-it",
            gemma(
                [1152, 6912, 26, 4, 1, 262_144],
                json!({ "model_type": "gemma3_text", "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
                    "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "rope_theta": 1e6,
                    "rope_local_base_freq": 10000, "rope_scaling": null, "attn_logit_softcapping": null,
                    "final_logit_softcapping": null, "max_position_embeddings": 32768 }),
            ),
            999_885_952,
        ),
        (
            "gemma-3-270m",
            gemma(
                [640, 2048, 18, 4, 1, 262_144],
                json!({ "model_type": "gemma3_text", "head_dim": 256, "use_bidirectional_attention": false,
                    "_sliding_window_pattern": 6, "max_position_embeddings": 32768, "sliding_window": 512 }),
            ),
            268_098_176,
        ),
        (
            "Phi-3-mini-4k-instruct",
            phi([3072, 8192, 32, 32, 32, 32_064], json!({ "sliding_window": 2047, "rope_scaling": null })),
            3_821_079_552,
        ),
        (
            "Phi-3.5-mini-instruct",
            phi(
                [3072, 8192, 32, 32, 32, 32_064],
                json!({ "rope_scaling": long(48), "sliding_window": 262_144, "max_position_embeddings": 131_072,
                    "original_max_position_embeddings": 4096 }),
            ),
            3_821_079_552,
        ),
        (
            "Phi-4-mini-instruct",
            phi(
                [3072, 8192, 32, 24, 8, 200_064],
                json!({ "rope_scaling": long(48), "partial_rotary_factor": 0.75, "tie_word_embeddings": true,
                    "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096 }),
            ),
            3_836_021_760,
        ),
        (
            "phi-4",
            phi(
                [5120, 17_920, 40, 40, 10, 100_352],
                json!({ "rope_theta": 250_000, "max_position_embeddings": 16_384 }),
            ),
            14_659_507_200_u64,
        ),
    ] {
        let config = ModelConfig::from_json(&config.to_string(), name).unwrap();
        assert_eq!(config.parameter_count(), count, "{name}");
    }
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
        (json!({ "model_type": "gemma3" }), "images and text"),
        (json!({ "model_type": "gemma3n_text" }), "\"gemma3n_text\""),
        (json!({ "model_type": "phi3small" }), "\"phi3small\""),
        (gemma("gemma2", json!({ "hidden_activation": "gelu" })), "`hidden_activation` \"gelu\""),
        (gemma("gemma", json!({ "hidden_act": "silu" })), "`hidden_act` \"silu\""),
        (gemma("gemma", json!({ "partial_rotary_factor": 0.5 })), "`partial_rotary_factor`"),
        (gemma("gemma2", json!({ "attn_logit_softcapping": -1.0 })), "`attn_logit_softcapping`"),
        (gemma("gemma2", json!({ "query_pre_attn_scalar": 0 })), "`query_pre_attn_scalar`"),
        (
            gemma("gemma3_text", json!({ "use_bidirectional_attention": true })),
            "`use_bidirectional_attention`",
        ),
        (gemma("gemma3_text", json!({ "rope_parameters": { "rope_type": "default" } })), "`full_attention`"),
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
