//! What becomes of an adapter: verified, merged, exported; configurations written and described.

use serde_json::{Value, json};

use crate::support::fixture;
use crate::workspace::{Finished, Workspace};

/// A folder with a trained adapter `out` of the model `model`, which knows text.
fn trained(arguments: &[&str]) -> Workspace {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let usual =
        ["-m", &model, "--train-data", "train.jsonl", "--val-data", "none", "-o", "out", "--max-steps", "3"];
    let rate = ["--learning-rate", "0.02", "--set", "lora_target_modules=all-linear", "--device", "cpu"];
    workspace.train(&[&usual[..], &rate, arguments].concat()).succeeded();
    workspace
}

fn logits_of(workspace: &Workspace, arguments: &[&str]) -> Value {
    let evaluate = ["evaluate", "--json", "--device", "cpu", "train.jsonl"];
    workspace.run(&[&evaluate, arguments].concat()).succeeded().json()["overall"].clone()
}

fn close(one: &Value, other: &Value, tolerance: f64) -> bool {
    (one["loss"].as_f64().unwrap() - other["loss"].as_f64().unwrap()).abs() < tolerance
}

#[test]
fn a_merged_folder_computes_what_base_and_adapter_compute() {
    let workspace = trained(&["--use-rslora", "true"]);
    let merge = ["merge", "--adapter", "out", "-o", "merged", "--json", "--device", "cpu"];
    let report = workspace.run(&[&merge[..], &["--max-shard-size", "200KB"]].concat()).succeeded().json();
    let shards = report["shards"].as_u64().unwrap();
    assert!(shards > 1, "{report}");
    assert_eq!(report["changed"], 14, "seven linears in two layers");
    // f32 sums of about 64 products each, rounded in another order: a few units of the last place of logits below 8.
    assert!(report["largest_logit_difference"].as_f64().unwrap() < 1e-4, "{report}");
    assert_eq!(report["same_first_choice"], report["compared_positions"]);
    let index = std::fs::read_to_string(workspace.path("merged/model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], report["bytes"]);
    for file in index["weight_map"].as_object().unwrap().values() {
        assert!(
            std::fs::metadata(workspace.path("merged").join(file.as_str().unwrap())).unwrap().len() < 400_000
        );
    }
    assert!(workspace.path("merged/tokenizer.json").exists());

    let [pair, alone, base] = [&["--adapter", "out"][..], &["-m", "merged"], &["-m", "model"]]
        .map(|arguments| logits_of(&workspace, arguments));
    assert!(close(&pair, &alone, 1e-5), "{pair} {alone}");
    assert!(!close(&pair, &base, 1e-2), "the adapter does something: {pair} {base}");

    workspace.run(&merge).refused(2, &["merged", "not empty", "--overwrite"]);
    workspace.run(&[&merge[..], &["--overwrite"]].concat()).succeeded();
    assert!(workspace.path("merged/model.safetensors").exists(), "one shard under the default size");
    assert!(!workspace.path("merged/model.safetensors.index.json").exists());
    workspace.write("merged/mine.txt", "precious");
    workspace.run(&[&merge[..], &["--overwrite"]].concat()).refused(2, &["mine.txt", "merge did not write"]);
    workspace.run(&["merge", "-m", "model", "-o", "nowhere"]).refused(2, &["nothing to merge"]);
    let usage = workspace.run(&[&merge[..], &["--max-shard-size", "big"]].concat());
    assert_eq!(usage.code, 2, "{}", usage.stderr);
}

#[test]
fn a_baked_scale_changes_nothing_but_the_configuration() {
    let workspace = trained(&["--use-rslora", "true", "--lora-r", "4"]);
    workspace.run(&["export", "out", "-o", "baked", "--bake-alpha"]).succeeded();
    let config = std::fs::read_to_string(workspace.path("baked/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        (&config["lora_alpha"], &config["r"], &config["use_rslora"]),
        (&json!(4), &json!(4), &json!(false))
    );
    let [one, other] = ["out", "baked"].map(|adapter| logits_of(&workspace, &["--adapter", adapter]));
    assert!(close(&one, &other, 1e-6), "{one} {other}");
    workspace.run(&["export", "out", "-o", "baked", "--bake-alpha"]).refused(2, &["baked", "--overwrite"]);
    let usage = workspace.run(&["export", "out", "-o", "x"]);
    assert_eq!(usage.code, 2, "{}", usage.stderr);
}

/// Name, axes (the fastest first) and values.
pub type GgufTensor = (String, Vec<u64>, Vec<f32>);

/// The little of GGUF that the test needs: text and number metadata, and where tensors stand.
pub fn gguf(bytes: &[u8]) -> (Vec<(String, String)>, Vec<GgufTensor>) {
    let mut at = 8;
    let mut number = |length: usize| {
        let mut value = [0; 8];
        value[..length].copy_from_slice(&bytes[at..at + length]);
        at += length;
        (u64::from_le_bytes(value), at)
    };
    let (tensor_count, _) = number(8);
    let (pair_count, _) = number(8);
    let text = |number: &mut dyn FnMut(usize) -> (u64, usize)| {
        let (length, start) = number(8);
        for _ in 0..length {
            number(1);
        }
        String::from_utf8(bytes[start..start + length as usize].to_vec()).unwrap()
    };
    let mut metadata = Vec::new();
    for _ in 0..pair_count {
        let key = text(&mut number);
        let value = match number(4).0 {
            8 => text(&mut number),
            6 => f32::from_bits(number(4).0 as u32).to_string(),
            other => panic!("{other}"),
        };
        metadata.push((key, value));
    }
    let mut infos = Vec::new();
    for _ in 0..tensor_count {
        let name = text(&mut number);
        let axes: Vec<u64> = (0..number(4).0).map(|_| number(8).0).collect();
        assert_eq!(number(4).0, 0, "f32");
        infos.push((name, axes, number(8).0));
    }
    let start = number(0).1.next_multiple_of(32);
    let tensors = infos.into_iter().map(|(name, axes, offset)| {
        let place = start + offset as usize;
        let count = axes.iter().product::<u64>() as usize;
        let values = bytes[place..place + 4 * count]
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        (name, axes, values.collect())
    });
    (metadata, tensors.collect())
}

#[test]
fn an_adapter_becomes_a_gguf_file() {
    let workspace = trained(&["--use-rslora", "true", "--lora-r", "4", "--lora-alpha", "6"]);
    workspace.run(&["export", "out", "-o", "out.gguf", "--gguf"]).succeeded();
    let (metadata, tensors) = gguf(&std::fs::read(workspace.path("out.gguf")).unwrap());
    let pair = |key: &str, value: &str| (key.to_string(), value.to_string());
    // llama.cpp scales by α/r: 12/4 is rsLoRA's 6/√4.
    assert_eq!(
        metadata,
        [
            pair("general.architecture", "qwen2"),
            pair("general.type", "adapter"),
            pair("adapter.type", "lora"),
            pair("adapter.lora.alpha", "12")
        ]
    );
    assert_eq!(tensors.len(), 28);
    let adapter = workspace.adapter("out");
    let (shape, values) = adapter.get("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight");
    let (_, axes, found) = tensors.iter().find(|(name, ..)| name == "blk.1.ffn_down.weight.lora_b").unwrap();
    assert_eq!(*axes, [shape[1] as u64, shape[0] as u64]);
    assert!(found.iter().zip(&values).all(|(one, other)| f64::from(*one) == *other));
    // Over what is there only where that is wanted.
    workspace.run(&["export", "out", "-o", "out.gguf", "--gguf"]).refused(2, &["out.gguf", "--overwrite"]);
    workspace.run(&["export", "out", "-o", "out.gguf", "--gguf", "--overwrite", "--bake-alpha"]).succeeded();
    let (metadata, _) = gguf(&std::fs::read(workspace.path("out.gguf")).unwrap());
    assert_eq!(metadata[3], pair("adapter.lora.alpha", "4"));
}

#[test]
fn ranks_scales_and_layers_of_their_own_are_trained_saved_and_told() {
    let workspace = trained(&[
        "--set",
        r#"lora_target_modules=["q_proj", "up_proj", "model.layers.0.mlp.down_proj"]"#,
        "--rank-pattern",
        "up_proj=3,.*proj=6",
        "--alpha-pattern",
        "^model.layers.1.*=3",
        "--layers-to-transform",
        "1",
        "--use-rslora",
        "true",
    ]);
    let text = std::fs::read_to_string(workspace.path("out/adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["rank_pattern"].to_string(), r#"{"up_proj":3,".*proj":6}"#, "in the order given");
    assert_eq!(config["alpha_pattern"], json!({"^model.layers.1.*": 3}));
    assert_eq!(config["layers_to_transform"], json!([1]));
    let adapter = workspace.adapter("out");
    let shape = |name: &str| adapter.get(&format!("base_model.model.model.{name}")).0;
    assert_eq!(shape("layers.1.mlp.up_proj.lora_A.weight")[0], 3);
    assert_eq!(shape("layers.1.self_attn.q_proj.lora_B.weight")[1], 6);
    assert_eq!(shape("layers.0.mlp.down_proj.lora_B.weight")[1], 6);
    assert_eq!(adapter.names().len(), 6);

    let told = workspace.run(&["inspect", "out", "--json"]).succeeded().json();
    assert_eq!((&told["rank_pattern"], &told["layers_to_transform"]), (&config["rank_pattern"], &json!([1])));
    let verified = workspace.run(&["verify", "out", "--json"]).succeeded().stdout;
    for part in ["of rank 3, 6", "after fastlora export --bake-alpha", "keeps every module's scale"] {
        assert!(verified.contains(part), "expected `{part}` in {verified}");
    }
    let report = workspace.run(&["merge", "--adapter", "out", "-o", "merged", "--json"]).succeeded().json();
    assert!(report["largest_logit_difference"].as_f64().unwrap() < 1e-4, "{report}");
    assert_eq!(report["changed"], 3);
    workspace.run(&["export", "out", "-o", "baked", "--bake-alpha"]).succeeded();
    let verified = workspace.run(&["verify", "baked", "--json"]).succeeded().stdout;
    assert!(!verified.contains("bake-alpha"), "{verified}");

    // llama.cpp has one α for the file; what it computes is α/r·B·A with each tensor's r.
    workspace.run(&["export", "out", "-o", "out.gguf", "--gguf"]).succeeded();
    let (metadata, tensors) = gguf(&std::fs::read(workspace.path("out.gguf")).unwrap());
    let alpha: f64 = metadata[3].1.parse().unwrap();
    for (peft, ours, rank, own_alpha) in [
        ("layers.0.mlp.down_proj", "blk.0.ffn_down", 6.0f64, 16.0),
        ("layers.1.self_attn.q_proj", "blk.1.attn_q", 6.0, 3.0),
        ("layers.1.mlp.up_proj", "blk.1.ffn_up", 3.0, 3.0),
    ] {
        let (_, values) = adapter.get(&format!("base_model.model.model.{peft}.lora_B.weight"));
        let name = format!("{ours}.weight.lora_b");
        let (_, _, found) = tensors.iter().find(|(other, ..)| *other == name).unwrap();
        for (found, value) in found.iter().zip(values) {
            let (found, expected) = (alpha / rank * f64::from(*found), own_alpha / rank.sqrt() * value);
            // α, the ratio and the product are rounded to f32.
            assert!((found - expected).abs() <= 3.0 * 2f64.powi(-24) * expected.abs(), "{found} {expected}");
        }
    }

    // It can be gone on with, with its own ranks; a start that says otherwise is refused.
    let more = ["-m", "model", "--train-data", "train.jsonl", "--val-data", "none", "--init-adapter", "out"];
    let more = [&more[..], &["-o", "more", "--max-steps", "1", "--device", "cpu"]].concat();
    workspace.train(&[&more[..], &["--rank-pattern", "up_proj=3"]].concat()).refused(2, &["rank_pattern"]);
    workspace
        .train(&[&more[..], &["--layers-to-transform", "0,1"]].concat())
        .refused(2, &["layers_to_transform"]);
    workspace.train(&more).succeeded();
    assert_eq!(workspace.adapter("more").described().0, adapter.described().0);
}

/// The verdict of each check.
fn verdicts(finished: &Finished) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_string();
    let first =
        serde_json::Deserializer::from_str(&finished.stdout).into_iter::<Value>().next().unwrap().unwrap();
    first.as_array().unwrap().iter().map(|check| (text(&check["check"]), text(&check["verdict"]))).collect()
}

#[test]
fn verify_says_what_holds_and_what_does_not() {
    let workspace = trained(&[]);
    let verify = |arguments: &[&str]| workspace.run(&[&["verify", "--json", "out"], arguments].concat());
    let all = ["readable", "keys and shapes", "same base", "PEFT", "vLLM", "llama.cpp"];
    let found = verdicts(&verify(&[]).succeeded());
    assert_eq!(found, all.map(|name| (name.to_string(), "yes".to_string())));
    let text = workspace.run(&["verify", "out"]).succeeded().stdout;
    assert!(text.contains("every value finite") && text.contains("SHA-256 of 1 weight files"), "{text}");

    // Another base of the same shape, another shape, none at hand.
    let mut weights = std::fs::read(workspace.path("model/model.safetensors")).unwrap();
    let last = weights.len() - 1;
    weights[last] ^= 1;
    let original = workspace.snapshot("model");
    workspace.write("model/model.safetensors", &weights);
    let other = verify(&[]).refused(4, &["same base: no", "model.safetensors"]);
    assert_eq!(verdicts(&other)[2].1, "no");
    for (path, bytes) in original {
        std::fs::write(path, bytes).unwrap();
    }
    let qwen3 = fixture("tiny_qwen3");
    verify(&["-m", qwen3.to_str().unwrap()]).refused(4, &["keys and shapes: no"]);
    let absent = verify(&["-m", "no/where"]).succeeded();
    assert_eq!(
        verdicts(&absent)[1..3].iter().map(|check| check.1.as_str()).collect::<Vec<_>>(),
        ["unknown"; 2]
    );

    let mut config: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("out/adapter_config.json")).unwrap()).unwrap();
    config["something_new"] = json!(null);
    workspace.write("out/adapter_config.json", config.to_string());
    let warned = verify(&[]).succeeded();
    assert!(warned.stdout.contains("does not know: something_new"), "{}", warned.stdout);
    config["r"] = json!(9);
    workspace.write("out/adapter_config.json", config.to_string());
    let broken = verify(&[]).refused(4, &["readable: no", "r = 9"]);
    assert_eq!(verdicts(&broken), [("readable".to_string(), "no".to_string())]);
}

#[test]
fn init_writes_a_configuration_that_trains() {
    let workspace = Workspace::with_data();
    let model = workspace.text_model("model");
    let init = ["init", "-m", &model, "--train-data", "train.jsonl", "--val-data", "val.jsonl"];
    workspace.run(&init).succeeded();
    let text = std::fs::read_to_string(workspace.path("training_config.json")).unwrap();
    // The records have 5 to 40 tokens.
    for part in [
        "// Here: the longest of 46 samples has ",
        "\"max_length\": 64,",
        "// \"adam_beta1\": 0.9,",
        "// One of constant, linear, cosine.",
    ] {
        assert!(text.contains(part), "expected `{part}` in: {text}");
    }
    let dry = workspace.train(&["training_config.json", "--dry-run", "--json"]).succeeded().json();
    assert_eq!(dry["config"]["output_dir"], "outputs/training_config");
    assert_eq!(dry["config"]["model_name"], model);
    workspace.run(&init).refused(2, &["training_config.json", "--overwrite"]);
    workspace.run(&[&init[..], &["--overwrite"]].concat()).succeeded();
    workspace
        .run(&["init", "-m", &model, "--train-data", "nothing.json"])
        .refused(2, &["training_config.json"]);
    workspace
        .run(&["init", "new.json", "-m", &model, "--train-data", "nothing.json"])
        .refused(3, &["nothing.json"]);
    assert!(!workspace.path("new.json").exists());

    let schema = workspace.run(&["schema"]).succeeded().json();
    assert_eq!(schema["properties"]["max_length"]["default"], 512);
}

#[test]
fn completions_and_pages_know_every_verb() {
    let workspace = Workspace::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = workspace.run(&["completions", shell]).succeeded().stdout;
        assert!(script.contains("lora-target-modules") && script.contains("inspect"), "{shell}");
    }
    assert!(workspace.run(&["man"]).succeeded().stdout.contains(".TH fastlora 1"));
    workspace.run(&["man", "pages"]).succeeded();
    for page in ["fastlora.1", "fastlora-train.1", "fastlora-merge.1"] {
        assert!(workspace.path("pages").join(page).exists(), "{page}");
    }
}
