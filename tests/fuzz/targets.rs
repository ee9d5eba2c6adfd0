//! What reads the damaged files.

use std::fs;
use std::path::Path;

use fastlora::checkpoint::adapter::read_adapter;
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::{DataSource, OnBadRecord, Options, TrainingConfig};
use fastlora::data::{ChatTemplate, Conversation, LoadOptions, Message, load};
use fastlora::error::Result;
use fastlora::import::{ImportOptions, import_gguf};
use fastlora::tokens::Tokenizer;
use serde_json::{Value, json};

use crate::fixtures;

/// One kind of file and what reads it.
pub struct Target {
    pub name: &'static str,
    /// Whole files.
    pub seeds: Vec<Vec<u8>>,
    /// What may turn up in them.
    pub words: &'static [&'static str],
    /// Bytes from the beginning that are damaged.
    pub within: usize,
    /// Reads one, with a folder to itself.
    pub read: fn(&[u8], &Path) -> Result<()>,
}

const JSON_WORDS: &[&str] = &[
    "null", "true", "[]", "{}", "\"\"", ",", ":", "\"", "}", "[[[[[[[[", "{\"a\":", "\\u0000", "\\ud800",
    "\u{feff}", "NaN", "\n", "é", "\"x\":1,", "1.5",
];
const TEMPLATE_WORDS: &[&str] = &[
    "{%",
    "%}",
    "{{",
    "}}",
    "{#",
    "{% endfor %}",
    "{% endif %}",
    "{% for m in messages %}",
    "{% generation %}",
    "{%- endgeneration %}",
    "{{ range(999999999) }}",
    "{{ 'a' * 1000000000 }}",
    "{{ messages[99999999999999999999] }}",
    "| tojson",
    "| trim",
    "loop.index0",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set x = namespace(a=1) %}",
    "{{ x.a }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Q') }}",
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "[::0]",
    "[-1]",
    ".split('')",
    "{{ ''.join(messages) }}",
];

fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap()
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    fs::write(folder.join(name), bytes).unwrap();
}

fn link(folder: &Path, name: &str, fixture: &str) {
    fs::copy(fixtures().join(fixture), folder.join(name)).unwrap();
}

/// Opens a model and reads some of its weights.
fn open_model(folder: &Path) -> Result<()> {
    let base = BaseModel::open(folder)?;
    base.embedding()?.to_f32();
    base.head()?.to_f32();
    base.tensor("model.layers.0.self_attn.q_proj.weight")?.to_f32();
    base.fingerprint().map(|_| ())
}

pub fn weights() -> Target {
    Target {
        name: "weights",
        seeds: vec![fixture("tiny_qwen2/model.safetensors")],
        words: JSON_WORDS,
        within: 3000,
        read: |bytes, folder| {
            link(folder, "config.json", "tiny_qwen2/config.json");
            write(folder, "model.safetensors", bytes);
            open_model(folder)
        },
    }
}

pub fn shard_index() -> Target {
    let names = safetensors_names(&fixture("tiny_qwen2/model.safetensors"));
    let weight_map: serde_json::Map<String, Value> =
        names.into_iter().map(|name| (name, json!("model-00001-of-00001.safetensors"))).collect();
    let index = json!({"metadata": {"total_size": 427_776}, "weight_map": weight_map});
    Target {
        name: "shard_index",
        seeds: vec![serde_json::to_vec_pretty(&index).unwrap()],
        words: &[
            "../",
            "/etc/passwd",
            "model.safetensors",
            "\"weight_map\"",
            "null",
            "{}",
            "[]",
            "\"",
            ",",
            "\\u0000",
        ],
        within: usize::MAX,
        read: |bytes, folder| {
            link(folder, "config.json", "tiny_qwen2/config.json");
            link(folder, "model-00001-of-00001.safetensors", "tiny_qwen2/model.safetensors");
            write(folder, "model.safetensors.index.json", bytes);
            open_model(folder)
        },
    }
}

fn safetensors_names(bytes: &[u8]) -> Vec<String> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header.keys().filter(|name| *name != "__metadata__").cloned().collect()
}

pub fn model_config() -> Target {
    Target {
        name: "model_config",
        seeds: vec![fixture("tiny_qwen2/config.json"), fixture("tiny_qwen2/config_v4.json")],
        words: JSON_WORDS,
        within: usize::MAX,
        read: |bytes, folder| {
            write(folder, "config.json", bytes);
            link(folder, "model.safetensors", "tiny_qwen2/model.safetensors");
            open_model(folder)
        },
    }
}

pub fn gguf() -> Target {
    Target {
        name: "gguf",
        seeds: vec![fixture("gguf/tiny_llama.gguf"), fixture("gguf/tiny_qwen2.gguf")],
        words: &[],
        within: 4000,
        read: |bytes, folder| {
            write(folder, "model.gguf", bytes);
            import_gguf(&folder.join("model.gguf"), &folder.join("model"), ImportOptions::default(), &|_| {})
                .map(|_| ())
        },
    }
}

/// Reads records both strictly and with bad ones left out.
fn load_records(path: &Path) -> Result<()> {
    let skipping = LoadOptions { on_bad_record: OnBadRecord::Skip, ..LoadOptions::default() };
    let lenient = load(&[DataSource::new(path)], &skipping).map(|_| ());
    load(&[DataSource::new(path)], &LoadOptions::default()).map(|_| ()).or(lenient)
}

/// Each kind of record.
const RECORDS: [&str; 4] = [
    r#"[{"instruction": "Hi", "output": "Hello", "hash": "greeting"},
 {"instruction": "Größe?", "output": "Zwei \"Meter\"\n", "hash": "de"}]"#,
    r#"[{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4]}]"#,
    r#"[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "hash": "chat"}]"#,
    r#"[{"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]}]"#,
];

pub fn json_records() -> Target {
    Target {
        name: "json_records",
        seeds: RECORDS.map(Into::into).into(),
        words: JSON_WORDS,
        within: 4000,
        read: |bytes, folder| {
            write(folder, "data.json", bytes);
            load_records(&folder.join("data.json"))
        },
    }
}

pub fn json_lines() -> Target {
    let lines = |records: &str| -> String {
        let records: Vec<Value> = serde_json::from_str(records).unwrap();
        records.iter().map(|record| format!("{record}\n")).collect()
    };
    Target {
        name: "json_lines",
        seeds: RECORDS.map(|records| lines(records).into()).into(),
        words: JSON_WORDS,
        within: usize::MAX,
        read: |bytes, folder| {
            write(folder, "data.jsonl", bytes);
            load_records(&folder.join("data.jsonl"))
        },
    }
}

pub fn tokenizer() -> Target {
    Target {
        name: "tokenizer",
        seeds: vec![fixture("tiny_tokenizer/tokenizer.json")],
        words: JSON_WORDS,
        within: usize::MAX,
        read: |bytes, _| {
            let tokenizer = Tokenizer::from_bytes(bytes, "tokenizer.json")?;
            let ids = tokenizer.encode("[hash: a] User: Grüße, 123\nAssistant: \u{1F642} \0 ok")?;
            tokenizer.decode(&ids)?;
            tokenizer.decode_all(&[0, 1, u32::MAX])?;
            Ok(())
        },
    }
}

pub fn chat_template() -> Target {
    let cases: Value = serde_json::from_slice(&fixture("chat/cases.json")).unwrap();
    let templates = cases["templates"].as_object().unwrap();
    Target {
        name: "chat_template",
        seeds: templates.values().map(|template| template.as_str().unwrap().into()).collect(),
        words: TEMPLATE_WORDS,
        within: usize::MAX,
        read: |bytes, _| {
            let source = String::from_utf8_lossy(bytes);
            let special_tokens =
                ["bos_token", "eos_token"].map(|name| (name.to_string(), json!("<s>"))).into_iter().collect();
            let template = ChatTemplate::new(&source, "chat_template.jinja", special_tokens, None)?;
            let conversation = Conversation {
                messages: vec![
                    Message::new("user", "  one "),
                    Message::new("assistant", "two\n"),
                    Message::new("user", "three"),
                ],
                ..Conversation::question(None, "")
            };
            template.prompt(&conversation).map(|_| ())
        },
    }
}

pub fn configuration() -> Target {
    Target {
        name: "configuration",
        seeds: vec![fixture("../../configs/training_config.json")],
        words: &[
            "null",
            "true",
            "[]",
            "{}",
            "\"\"",
            ",",
            "//",
            "/*",
            "*/",
            "\"lora_r\": 1,",
            "\"seed\":",
            "1e400",
            "\"all-linear\"",
            "\"auto\"",
            "\u{feff}",
            "\\ud800",
        ],
        within: usize::MAX,
        read: |bytes, folder| {
            write(folder, "config.json", bytes);
            TrainingConfig::resolve(&Options::from_file(&folder.join("config.json"))?).map(|_| ())
        },
    }
}

pub fn adapter_config() -> Target {
    Target {
        name: "adapter_config",
        seeds: vec![fixture("tiny_qwen2/adapter_init_b0/adapter_config.json")],
        words: JSON_WORDS,
        within: usize::MAX,
        read: |bytes, folder| {
            write(folder, "adapter_config.json", bytes);
            link(folder, "adapter_model.safetensors", "tiny_qwen2/adapter_init_b0/adapter_model.safetensors");
            read_adapter(folder).map(|_| ())
        },
    }
}

pub fn adapter_weights() -> Target {
    Target {
        name: "adapter_weights",
        seeds: vec![fixture("tiny_qwen2/adapter_init_b0/adapter_model.safetensors")],
        words: JSON_WORDS,
        within: 3000,
        read: |bytes, folder| {
            link(folder, "adapter_config.json", "tiny_qwen2/adapter_init_b0/adapter_config.json");
            write(folder, "adapter_model.safetensors", bytes);
            read_adapter(folder).map(|_| ())
        },
    }
}
