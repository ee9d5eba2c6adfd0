//! What goes beyond plain LoRA, through the binary: trained, saved, told, read by every verb, resumed.

use serde_json::{Value, json};

use crate::faulty_files::Fault;
use crate::resume::Bits;
use crate::support::fixture;
use crate::workspace::{Finished, Workspace};

/// Trains the tiny Llama, which has a head of its own, with dropout and two micro-batches a step.
fn train(workspace: &Workspace, output: &str, more: &[&str]) -> Finished {
    workspace.train(&arguments(output, more).iter().map(String::as_str).collect::<Vec<_>>())
}

fn arguments(output: &str, more: &[&str]) -> Vec<String> {
    let model = fixture("tiny_llama3rope");
    let usual =
        ["-m", model.to_str().unwrap(), "--train-data", "train.jsonl", "-o", output, "--device", "cpu"];
    let run = ["--val-data", "none", "--gradient-accumulation-steps", "2"];
    let unless_given = [["--max-steps", "3"], ["--learning-rate", "0.01"]];
    let rest = unless_given.iter().filter(|pair| !more.contains(&pair[0])).flatten();
    let rest: Vec<&str> = rest.copied().collect();
    [&usual[..], &run, &rest, more].concat().into_iter().map(str::to_string).collect()
}

fn config_of(workspace: &Workspace, output: &str) -> Value {
    let text = std::fs::read_to_string(workspace.path(output).join("adapter_config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Loss of `train.jsonl`.
fn evaluated(workspace: &Workspace, arguments: &[&str]) -> f64 {
    let evaluate = ["evaluate", "--json", "--device", "cpu", "train.jsonl"];
    workspace.run(&[&evaluate, arguments].concat()).succeeded().json()["overall"]["loss"].as_f64().unwrap()
}

/// The pair, what it is merged to, and a run that begins with it all compute the same; the base does not.
fn every_verb_reads(workspace: &Workspace, changed: u64) {
    let merge = ["merge", "--adapter", "out", "-o", "merged", "--json", "--device", "cpu"];
    let report = workspace.run(&merge).succeeded().json();
    assert_eq!(report["changed"], changed, "{report}");
    // f32 sums of about 64 products each, rounded in another order: a few units of the last place of logits below 16.
    assert!(report["largest_logit_difference"].as_f64().unwrap() < 1e-4, "{report}");
    let base = fixture("tiny_llama3rope");
    let [pair, alone, base] = [&["--adapter", "out"][..], &["-m", "merged"], &["-m", base.to_str().unwrap()]]
        .map(|arguments| evaluated(workspace, arguments));
    assert!((pair - alone).abs() < 1e-5, "{pair} {alone}");
    assert!((pair - base).abs() > 1e-3, "{pair} {base}");

    let init =
        ["--init-adapter", "out", "--max-steps", "1", "--learning-rate", "1e-30", "--lora-dropout", "0"];
    train(workspace, "more", &init).succeeded();
    let more = evaluated(workspace, &["--adapter", "more"]);
    assert!((more - pair).abs() < 1e-6, "a run begins where the adapter ends: {more} {pair}");

    let verified = workspace.run(&["verify", "out", "--json"]).succeeded().json();
    let verdict = |check: &str| {
        let checks = verified.as_array().unwrap();
        checks.iter().find(|found| found["check"] == check).unwrap()["verdict"].clone()
    };
    for (check, expected) in
        [("readable", "yes"), ("keys and shapes", "yes"), ("same base", "yes"), ("PEFT", "yes")]
    {
        assert_eq!(verdict(check), expected, "{check}: {verified}");
    }
    // Neither takes more than plain LoRA: told, and no failure.
    assert_eq!((verdict("vLLM"), verdict("llama.cpp")), (json!("no"), json!("no")));
    workspace.run(&["export", "out", "-o", "out.gguf", "--gguf"]).refused(4, &["llama.cpp"]);
}

/// A run cut twice, once with a checkpoint and once without, has the bits of the uncut one.
fn goes_on_with_its_bits(workspace: &Workspace, variant: &[&str]) {
    let more = [&["--max-steps", "6", "--save-every", "2", "--lora-dropout", "0.2"], variant].concat();
    train(workspace, "whole", &more).succeeded();
    let expected = Bits::of(workspace, "whole", 6);
    for (output, at, kind) in [("stopped", 3, "term"), ("killed", 5, "kill")] {
        let fault = Fault { call: Some("write"), name: Some("metrics.jsonl"), at, kind };
        let arguments = arguments(output, &more);
        let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        assert_ne!(workspace.train_with(fault, &arguments).code, 0);
        arguments.push("--resume");
        workspace.train(&arguments).succeeded();
        Bits::of(workspace, output, 6).assert_eq(&expected, kind);
    }
}

#[test]
fn modules_are_trained_whole_saved_told_and_read() {
    let workspace = Workspace::with_data();
    let run = train(&workspace, "out", &["--modules-to-save", "lm_head,norm"]).succeeded();
    // q and v of r = 8 in two layers, five norms and the head.
    let trainable = 2 * 8 * (64 + 64 + 64 + 32) + 5 * 64 + 512 * 64;
    assert!(run.stderr.contains(&format!("trainable parameters: {trainable} of ")), "{}", run.stderr);
    assert_eq!(config_of(&workspace, "out")["modules_to_save"], json!(["lm_head", "norm"]));
    let adapter = workspace.adapter("out");
    let (shape, head) = adapter.get("base_model.model.lm_head.weight");
    assert_eq!(shape, [512, 64]);
    let base = crate::support::Tensors::open(fixture("tiny_llama3rope").join("model.safetensors"));
    let (_, frozen) = base.get("lm_head.weight");
    assert!(head != frozen && head.iter().zip(&frozen).all(|(one, other)| (one - other).abs() < 0.1));
    assert!(adapter.names().contains(&"base_model.model.model.layers.1.input_layernorm.weight".to_string()));
    let card = std::fs::read_to_string(workspace.path("out/README.md")).unwrap();
    assert!(card.contains(r#"all of ["lm_head", "norm"]"#), "{card}");

    let told = workspace.run(&["inspect", "out", "--json"]).succeeded().json();
    assert_eq!(
        (&told["modules_to_save"], &told["parameters"]),
        (&json!(["lm_head", "norm"]), &json!(trainable))
    );
    let planned = train(&workspace, "other", &["--modules-to-save", "lm_head,norm", "--dry-run", "--json"]);
    assert_eq!(planned.succeeded().json()["trainable_parameters"], trainable);
    every_verb_reads(&workspace, 4 + 5 + 1);

    let more = ["--init-adapter", "out", "--modules-to-save", "lm_head"];
    train(&workspace, "third", &more).refused(2, &["modules_to_save", "the adapter brings its own"]);
}

#[test]
fn adapters_with_magnitudes_are_trained_saved_told_and_read() {
    let workspace = Workspace::with_data();
    let more = ["--use-dora", "true", "--lora-r", "4", "--set", "lora_target_modules=all-linear"];
    let run = train(&workspace, "out", &more).succeeded();
    // A and B, then a magnitude an output.
    let outputs = 64 + 32 + 32 + 64 + 128 + 128 + 64;
    let trainable = 2 * (4 * (128 + 96 + 96 + 128 + 192 + 192 + 192) + outputs);
    assert!(run.stderr.contains(&format!("trainable parameters: {trainable} of ")), "{}", run.stderr);
    assert_eq!(config_of(&workspace, "out")["use_dora"], true);
    let adapter = workspace.adapter("out");
    let (shape, magnitudes) =
        adapter.get("base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector");
    assert_eq!(shape, [64]);
    let base = crate::support::Tensors::open(fixture("tiny_llama3rope").join("model.safetensors"));
    let (_, weight) = base.get("model.layers.1.mlp.down_proj.weight");
    for (magnitude, row) in magnitudes.iter().zip(weight.chunks(128)) {
        let norm = row.iter().map(|value| value * value).sum::<f64>().sqrt();
        // Three steps at a rate of 0.01, from the norm of the row.
        assert!((magnitude - norm).abs() < 0.04 && (magnitude - norm).abs() > 0.0, "{magnitude} {norm}");
    }
    let card = std::fs::read_to_string(workspace.path("out/README.md")).unwrap();
    assert!(card.contains("with magnitudes (DoRA)"), "{card}");
    let told = workspace.run(&["inspect", "out", "--json"]).succeeded().json();
    assert_eq!((&told["use_dora"], &told["parameters"]), (&json!(true), &json!(trainable)));
    every_verb_reads(&workspace, 14);
    let other = ["--init-adapter", "out", "--use-dora", "false"];
    train(&workspace, "third", &other).refused(2, &["use_dora", "the adapter brings its own"]);
}

#[test]
fn a_run_from_singular_values_is_saved_for_the_base_as_it_is() {
    let workspace = Workspace::with_data();
    let more = ["--init-lora-weights", "pissa", "--lora-r", "4", "--use-rslora", "true"];
    let run =
        train(&workspace, "out", &[&more[..], &["--modules-to-save", "model.norm"]].concat()).succeeded();
    let trainable = 2 * 4 * (64 + 64 + 64 + 32) + 64;
    assert!(run.stderr.contains(&format!("trainable parameters: {trainable} of ")), "{}", run.stderr);
    let config = config_of(&workspace, "out");
    assert_eq!((&config["r"], &config["init_lora_weights"]), (&json!(8), &json!(true)));
    // The default α of 16 over √4 is 8, and so is 16·√2 over √8.
    assert!((config["lora_alpha"].as_f64().unwrap() / 8f64.sqrt() - 8.0).abs() < 1e-12, "{config}");
    let (shape, _) =
        workspace.adapter("out").get("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight");
    assert_eq!(shape, [64, 8]);
    let card = std::fs::read_to_string(workspace.path("out/README.md")).unwrap();
    assert!(card.contains("begun with pissa and saved as a plain adapter of twice the rank"), "{card}");

    // The default of dropout is no good one here.
    let warns = |run: &Finished| run.stderr.contains("which takes from the largest part of every weight too");
    let whole = [&more[..], &["--lora-dropout", "0", "--max-steps", "1"]].concat();
    let whole = train(&workspace, "whole", &whole).succeeded();
    assert_eq!([warns(&run), warns(&whole)], [true, false], "{}{}", run.stderr, whole.stderr);

    // Before the first step it computes what the base computes.
    let still = ["--learning-rate", "1e-30", "--weight-decay", "0", "--max-steps", "1"];
    train(&workspace, "still", &[&more[..], &still].concat()).succeeded();
    let base = fixture("tiny_llama3rope");
    let before = evaluated(&workspace, &["-m", base.to_str().unwrap()]);
    let after = evaluated(&workspace, &["--adapter", "still"]);
    assert!((before - after).abs() < 1e-5, "{before} {after}");
    // And merged it is what the pair is.
    let merge = ["merge", "--adapter", "out", "-o", "merged", "--json", "--device", "cpu"];
    workspace.run(&merge).succeeded();
    let [pair, alone] =
        [["--adapter", "out"], ["-m", "merged"]].map(|arguments| evaluated(&workspace, &arguments));
    assert!((pair - alone).abs() < 1e-5 && (pair - before).abs() > 1e-3, "{pair} {alone} {before}");

    for (more, parts) in [
        (&["--init-lora-weights", "pissa", "--use-dora", "true"][..], &["init_lora_weights", "use_dora"][..]),
        (
            &["--init-lora-weights", "pissa", "--init-adapter", "still"],
            &["init_lora_weights", "init_adapter"],
        ),
        (&["--init-lora-weights", "pissa", "--lora-r", "33"], &["init_lora_weights", "32 singular values"]),
    ] {
        train(&workspace, "refused", more).refused(2, parts);
    }
    let usage = train(&workspace, "refused", &["--init-lora-weights", "olora"]);
    assert_eq!(usage.code, 2, "{}", usage.stderr);
    assert!(!workspace.path("refused").exists(), "nothing was written");
}

#[test]
fn a_run_from_singular_values_goes_on_with_its_bits() {
    goes_on_with_its_bits(&Workspace::with_data(), &["--init-lora-weights", "pissa_niter_4"]);
}

#[test]
fn a_run_with_magnitudes_goes_on_with_its_bits() {
    goes_on_with_its_bits(&Workspace::with_data(), &["--use-dora", "true", "--modules-to-save", "norm"]);
}

#[test]
fn a_run_with_modules_trained_whole_goes_on_with_its_bits() {
    goes_on_with_its_bits(
        &Workspace::with_data(),
        &["--modules-to-save", "lm_head,model.norm,input_layernorm"],
    );
}

#[test]
fn fault_45_modules_to_save_that_mean_nothing_or_cannot_be_trained_are_refused() {
    let workspace = Workspace::with_data();
    for (modules, parts) in [
        ("lm_haed", &["modules_to_save", "`lm_haed` matches no module", "did you mean `lm_head`?"][..]),
        ("embed_tokens", &["modules_to_save", "embed_tokens", "cannot be trained whole"]),
        ("q_proj", &["q_proj", "lora_target_modules"]),
        ("", &["modules_to_save"]),
    ] {
        train(&workspace, "out", &["--modules-to-save", modules]).refused(2, parts);
    }
    let tied = workspace.train_into("out", &["--modules-to-save", "lm_head"]);
    tied.refused(2, &["modules_to_save", "the head is the embedding", "untie"]);
    assert!(!workspace.path("out").exists(), "nothing was written");
}
