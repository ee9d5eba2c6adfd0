//! Every verb on tiny models of the families with embeddings, norms, caps, windows, rotations or linears of their own.

use serde_json::{Value, json};

use crate::adapter_out::gguf;
use crate::support::fixture;
use crate::workspace::Workspace;

struct Family {
    model: &'static str,
    /// Of llama.cpp, with its name of the linear that reads first.
    gguf: [&'static str; 2],
    /// In the style of `tests/fixtures/chat/cases.json`, with the tokens that it writes.
    template: &'static str,
    turn_tokens: [&'static str; 3],
    /// Ids of EOS and BOS.
    ends: [u32; 2],
    linears: u64,
}

const GEMMA: Family = Family {
    model: "tiny_gemma",
    gguf: ["gemma", "attn_q"],
    template: "gemma2",
    turn_tokens: ["<start_of_turn>", "<end_of_turn>", "model"],
    ends: [1, 2],
    linears: 14,
};
const PHI: Family = Family {
    model: "tiny_phi3",
    gguf: ["phi3", "attn_qkv"],
    template: "phi4",
    turn_tokens: ["<|user|>", "<|end|>", "<|assistant|>"],
    ends: [2, 1],
    linears: 8,
};
const FAMILIES: [Family; 5] = [
    GEMMA,
    Family { model: "tiny_gemma2", gguf: ["gemma2", "attn_q"], ..GEMMA },
    Family { model: "tiny_gemma3", gguf: ["gemma3", "attn_q"], template: "gemma3", ..GEMMA },
    PHI,
    Family { model: "tiny_phi3_longrope", linears: 4, ..PHI },
];

/// A folder with the family's model under the name `model`: 64 ids, most of them single characters.
fn workspace(family: &Family) -> Workspace {
    let workspace = Workspace::new();
    for file in ["config.json", "model.safetensors"] {
        let bytes = std::fs::read(fixture(family.model).join(file)).unwrap();
        workspace.write(&format!("model/{file}"), bytes);
    }
    let mut tokens = vec!["<pad>".to_string(); 3];
    let [eos, bos] = family.ends;
    (tokens[eos as usize], tokens[bos as usize]) = ("<eos>".into(), "<bos>".into());
    tokens.extend(family.turn_tokens.map(String::from));
    let special: Vec<Value> = tokens.iter().zip(0..).map(|(token, id)| {
        json!({ "id": id, "content": token, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false })
    }).collect();
    tokens.extend(('a'..='z').chain("\n []:?.UATINY".chars()).map(String::from));
    let vocabulary: serde_json::Map<String, Value> =
        tokens.into_iter().zip(0u32..).map(|(token, id)| (token, id.into())).collect();
    let tokenizer = json!({ "version": "1.0", "added_tokens": special, "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []} });
    workspace.write("model/tokenizer.json", tokenizer.to_string());
    workspace.write("model/tokenizer_config.json", r#"{"eos_token": "<eos>", "bos_token": "<bos>"}"#);
    // The second token of a turn ends it.
    let generation = json!({ "eos_token_id": [eos, 4] });
    workspace.write("model/generation_config.json", generation.to_string());
    let cases: Value = serde_json::from_slice(&std::fs::read(fixture("chat/cases.json")).unwrap()).unwrap();
    workspace.write("model/chat_template.jinja", cases["templates"][family.template].as_str().unwrap());
    let talk = |question: &str, answer: &str| json!({ "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] });
    let records = [talk("The sun?", "It is out."), talk("Now?", "Yes"), talk("I am?", "A sun.")];
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    workspace.write("train.jsonl", lines.join("\n"));
    workspace
}

const TRAIN: [&str; 16] = [
    "train",
    "-m",
    "model",
    "--train-data",
    "train.jsonl",
    "--val-data",
    "none",
    "--max-length",
    "64",
    "--learning-rate",
    "0.02",
    "--lora-dropout",
    "0",
    "--max-steps",
    "3",
    "-o",
];

#[test]
fn every_verb_knows_gemma_and_phi() {
    for family in &FAMILIES {
        let name = family.model;
        let workspace = workspace(family);
        let run = |arguments: &[&str]| workspace.run(arguments).succeeded();
        run(&[&TRAIN[..], &["out", "--device", "cpu", "--set", "lora_target_modules=all-linear"]].concat());
        let inspected = run(&["inspect", "model"]).stdout;
        assert!(inspected.contains(family.gguf[0].trim_end_matches(char::is_numeric)), "{name}: {inspected}");

        let evaluate = ["evaluate", "--json", "--device", "cpu", "train.jsonl"];
        let loss = |arguments: &[&str]| {
            run(&[&evaluate, arguments].concat()).json()["overall"]["loss"].as_f64().unwrap()
        };
        let merged = run(&["merge", "--adapter", "out", "-o", "merged", "--json", "--device", "cpu"]).json();
        assert_eq!(merged["changed"], family.linears, "{name}");
        let [base, pair, alone] = [&["-m", "model"][..], &["--adapter", "out"], &["-m", "merged"]].map(loss);
        assert!((pair - alone).abs() < 1e-5 && pair < base - 0.05, "{name}: {base} {pair} {alone}");

        let answer = |model: &[&str]| {
            let generate = ["generate", "--json", "--device", "cpu", "--chat", "--max-new-tokens", "20"];
            let found = run(&[&generate, model, &["--prompt", "The sun?"]].concat()).json();
            found["cases"][0]["answer"]["text"].as_str().unwrap().to_string()
        };
        assert_eq!(answer(&["--adapter", "out"]), answer(&["-m", "merged"]), "{name}");

        run(&["verify", "out"]);
        run(&["export", "out", "-o", "out.gguf", "--gguf"]);
        let (metadata, tensors) = gguf(&std::fs::read(workspace.path("out.gguf")).unwrap());
        assert_eq!(metadata[0].1, family.gguf[0]);
        assert_eq!(tensors.len() as u64, 2 * family.linears, "{name}");
        let first = format!("blk.0.{}.weight.lora_a", family.gguf[1]);
        assert!(tensors.iter().any(|(found, ..)| *found == first), "{name}: no {first}");
    }
}

/// In bf16 on the emulator the losses of the CPU's f32: some 30 roundings of 2⁻⁹ between a token and its loss walk √30·2⁻⁹, one
/// percent, at random; three deviations of that.
#[cfg(feature = "emulator")]
#[test]
fn the_emulator_trains_gemma_and_phi_through_the_binary() {
    for family in &FAMILIES {
        let workspace = workspace(family);
        let train = |output: &'static str, device: &str| {
            let more = [output, "--device", device, "--set", "lora_target_modules=all-linear"];
            workspace.run(&[&TRAIN[..], &more].concat()).succeeded();
            workspace.of_steps(output, "loss")
        };
        for (exact, found) in train("cpu", "cpu").into_iter().zip(train("emulator", "emulator")) {
            assert!((found - exact).abs() < 0.03 * exact, "{}: {found}, on the CPU {exact}", family.model);
        }
    }
}

/// What is kept of a forward changes no bit, with norms behind attention and MLP too.
#[test]
fn activations_that_are_computed_again_change_nothing() {
    for family in &FAMILIES[1..4] {
        let workspace = workspace(family);
        let devices: &[&str] = if cfg!(feature = "emulator") { &["cpu", "emulator"] } else { &["cpu"] };
        for device in devices {
            let [fast, balanced, small] = ["fast", "balanced", "small"].map(|memory| {
                let output = format!("{device}-{memory}");
                let more = ["--device", device, "--activation-memory", memory, "--set"];
                let targets = ["lora_target_modules=all-linear"];
                workspace.run(&[&TRAIN[..], &[&output], &more, &targets].concat()).succeeded();
                workspace.adapter_bytes(&output)
            });
            assert!(fast == balanced && fast == small, "{} on {device}", family.model);
        }
    }
}

#[test]
fn the_default_targets_name_what_phi_has_instead() {
    let workspace = workspace(&PHI);
    let parts = ["`q_proj`", "down_proj, gate_up_proj, o_proj, qkv_proj", "all-linear"];
    workspace.run(&[&TRAIN[..], &["out", "--device", "cpu"]].concat()).refused(2, &parts);
}
