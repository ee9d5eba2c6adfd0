//! Tokenisation: equal to transformers' and to plain BPE; hostile `tokenizer.json` files are refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use fastlora::config::{HashTemplate, LossOn, OnBadRecord, Overlong};
use fastlora::data::{Dataset, Origin, Record, RecordContent};
use fastlora::error::ErrorKind;
use fastlora::tokens::{SampleOptions, Tokenizer, tokenise};
use serde_json::{Value, json};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn tiny_folder() -> PathBuf {
    repository().join("tests/fixtures/tiny_tokenizer")
}

fn tiny_file() -> Value {
    serde_json::from_slice(&std::fs::read(tiny_folder().join("tokenizer.json")).unwrap()).unwrap()
}

/// The folder of SmolLM2-135M-Instruct, where `scripts/test` has put it.
fn smollm2() -> Option<Tokenizer> {
    let folder = repository().join("models/smollm2-135m-instruct");
    if folder.join("tokenizer.json").exists() {
        return Some(Tokenizer::from_folder(folder).unwrap());
    }
    println!("skipped: {} is missing, scripts/test makes it", folder.display());
    None
}

#[test]
fn smollm2_ids_equal_those_of_transformers() {
    let Some(tokenizer) = smollm2() else { return };
    let cases: HashMap<String, Vec<u32>> = serde_json::from_slice(
        &std::fs::read(repository().join("tests/fixtures/tokenizer_cases.json")).unwrap(),
    )
    .unwrap();
    assert!(cases.len() >= 13);
    for (text, ids) in cases {
        assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text:?}");
        let shown = text.replace("<|im_start|>", "").replace("<|im_end|>", "");
        assert_eq!(tokenizer.decode(&ids).unwrap(), shown);
    }
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.id_count()), (Some(1), Some(2), 49152));
}

/// GPT-2's bytes as characters.
fn byte_alphabet() -> Vec<String> {
    let shown = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let hidden: Vec<u32> = (0..256).filter(|&byte| !shown(byte)).collect();
    let character = |byte: u32| match hidden.iter().position(|&other| other == byte) {
        Some(number) => 256 + number as u32,
        None => byte,
    };
    (0..256).map(|byte| char::from_u32(character(byte)).unwrap().to_string()).collect()
}

/// Byte pair encoding as its definition says: merge the pair of lowest rank until none is left.
fn plain_bpe(file: &Value, word: &str) -> Vec<u32> {
    let alphabet = byte_alphabet();
    let ranks: HashMap<(String, String), usize> = file["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .enumerate()
        .map(|(rank, pair)| ((pair[0].as_str().unwrap().into(), pair[1].as_str().unwrap().into()), rank))
        .collect();
    let mut parts: Vec<String> = word.bytes().map(|byte| alphabet[byte as usize].clone()).collect();
    let rank = |parts: &[String], at: usize| ranks.get(&(parts[at].clone(), parts[at + 1].clone())).copied();
    while let Some((_, at)) =
        (0..parts.len().saturating_sub(1)).filter_map(|at| rank(&parts, at).map(|rank| (rank, at))).min()
    {
        let right = parts.remove(at + 1);
        parts[at] += &right;
    }
    parts.iter().map(|part| file["model"]["vocab"][part].as_u64().unwrap() as u32).collect()
}

#[test]
fn tiny_ids_equal_plain_byte_pair_encoding() {
    let (tokenizer, file) = (Tokenizer::from_folder(tiny_folder()).unwrap(), tiny_file());
    for words in [
        &["[", "hash", ":", " general", "]", " User", ":", " What", " is", " the", " weather", "?"][..],
        &["The", " apples", " in", " the", " basket", " ", "1", "2", "3", "4", "."],
        &["Assistant", ":", " naïve", " 日本語", " 🦀"],
        &["there", "'s", " they", "'ll", "\n\n", "Visit"],
        &["   ", " mixture", "   "],
    ] {
        let text = words.concat();
        let expected: Vec<u32> = words.iter().flat_map(|word| plain_bpe(&file, word)).collect();
        let ids = tokenizer.encode(&text).unwrap();
        assert_eq!(ids, expected, "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("<|im_start|>User<|im_end|>").unwrap()[0], 1);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.id_count()), (Some(1), Some(2), 512));
}

/// A copy of the tiny tokenizer in which `change` was made.
fn changed(change: impl FnOnce(&mut Value)) -> fastlora::error::Result<Tokenizer> {
    let mut file = tiny_file();
    change(&mut file);
    Tokenizer::from_bytes(&serde_json::to_vec(&file).unwrap(), "tokenizer.json")
}

#[test]
fn fault_22_ids_and_merges_out_of_range_are_refused() {
    changed(|_| ()).unwrap();
    let set_id = |token: &'static str, id: Value| move |file: &mut Value| file["model"]["vocab"][token] = id;
    let added = |content: &'static str, id: Value| {
        move |file: &mut Value| {
            let token = json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": true});
            file["added_tokens"].as_array_mut().unwrap().push(token);
        }
    };
    type Change = Box<dyn FnOnce(&mut Value)>;
    let cases: Vec<(&str, Change, &str)> = vec![
        ("gap", Box::new(set_id("the", json!(700))), "out of range"),
        ("largest u32", Box::new(set_id("the", json!(u32::MAX))), "out of range"),
        ("beyond u64", Box::new(set_id("the", json!(1e300))), "out of range"),
        ("negative", Box::new(set_id("the", json!(-1))), "out of range"),
        ("shared", Box::new(set_id("the", json!(5))), "share the id 5"),
        ("not a number", Box::new(set_id("the", json!("5"))), "not a tokenizer file"),
        ("added gap", Box::new(added("<new>", json!(600))), "out of range"),
        ("added largest", Box::new(added("<new>", json!(u32::MAX))), "out of range"),
        ("added negative", Box::new(added("<new>", json!(-3))), "out of range"),
        ("added twice", Box::new(added("<|im_end|>", json!(512))), "two ids"),
        (
            "merge of an unknown token",
            Box::new(|file| file["model"]["merges"].as_array_mut().unwrap().push(json!(["zz", "a"]))),
            "zz",
        ),
        (
            "merge to an unknown token",
            Box::new(|file| file["model"]["merges"].as_array_mut().unwrap().push(json!(["~", "~"]))),
            "~~",
        ),
        (
            "prefix longer than the merged token",
            Box::new(|file| file["model"]["continuing_subword_prefix"] = json!("######")),
            "continuing_subword_prefix",
        ),
        ("dropout", Box::new(|file| file["model"]["dropout"] = json!(0.1)), "dropout"),
        ("empty vocabulary", Box::new(|file| file["model"]["vocab"] = json!({})), ""),
        ("no model", Box::new(|file| file["model"] = Value::Null), "not a tokenizer file"),
        ("unknown kind", Box::new(|file| file["model"]["type"] = json!("Morse")), "not a tokenizer"),
        ("unknown version", Box::new(|file| file["version"] = json!("9")), "not a tokenizer"),
    ];
    for (name, change, message) in cases {
        let error = changed(change).expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Model, "{name}");
        assert!(error.to_string().contains(message), "{name}: {error}");
        assert!(error.to_string().starts_with("tokenizer.json: "), "{name}: {error}");
    }
}

#[test]
fn fault_22_added_tokens_out_of_order_are_refused() {
    // The library numbers added tokens by their order, whatever the file says.
    let error = changed(|file| {
        for (content, id) in [("<b>", 513), ("<a>", 512)] {
            let token = json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": true});
            file["added_tokens"].as_array_mut().unwrap().push(token);
        }
    })
    .unwrap_err();
    assert!(error.to_string().contains("\"<b>\" has the id 513"), "{error}");
}

#[test]
fn fault_22_broken_and_deep_files_are_refused() {
    let whole = std::fs::read(tiny_folder().join("tokenizer.json")).unwrap();
    let deep = format!("{{\"model\":{}", "[".repeat(1_000_000));
    for bytes in [&whole[..whole.len() / 2], b"", b"[]", b"\xff\xfe", deep.as_bytes()] {
        let error = Tokenizer::from_bytes(bytes, "tokenizer.json").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
    }
}

#[test]
fn end_of_text_is_found_where_transformers_finds_it() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: Value| {
        std::fs::write(folder.path().join(name), content.to_string()).unwrap();
    };
    let eos = || Tokenizer::from_folder(folder.path()).map(|tokenizer| tokenizer.eos_id());
    assert_eq!(eos().unwrap_err().kind(), ErrorKind::Model, "no tokenizer.json");
    write("tokenizer.json", tiny_file());
    assert_eq!(eos().unwrap(), None);
    write("config.json", json!({ "eos_token_id": 7 }));
    assert_eq!(eos().unwrap(), Some(7));
    write("generation_config.json", json!({ "eos_token_id": [8, 9] }));
    assert_eq!(eos().unwrap(), Some(8));
    write("special_tokens_map.json", json!({ "eos_token": { "content": "<|endoftext|>" } }));
    assert_eq!(eos().unwrap(), Some(0));
    write("tokenizer_config.json", json!({ "eos_token": "<|im_end|>" }));
    assert_eq!(eos().unwrap(), Some(2));
    write("tokenizer_config.json", json!({ "eos_token": "<nowhere>" }));
    assert!(eos().unwrap_err().to_string().contains("<nowhere>"));
    write("tokenizer_config.json", json!({}));
    write("special_tokens_map.json", json!({}));
    write("generation_config.json", json!({ "eos_token_id": 512 }));
    assert!(eos().unwrap_err().to_string().contains("512"));
}

/// A template as Llama 3 has it, which also adds EOS as some Llama 2 files do.
fn with_bos(bos: Value) -> Value {
    json!({"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
        {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {
                "<s>": {"id": "<s>", "ids": [bos], "tokens": ["<|im_start|>"]},
                "</s>": {"id": "</s>", "ids": [2], "tokens": ["<|im_end|>"]},
            },
        },
    ]})
}

#[test]
fn a_tokenizer_that_begins_texts_with_bos_begins_samples_with_it() {
    let plain = Tokenizer::from_folder(tiny_folder()).unwrap();
    let tokenizer = changed(|file| file["post_processor"] = with_bos(json!(1))).unwrap().with_eos_id(2);
    let text = "the weather";
    let ids = plain.encode(text).unwrap();
    assert_eq!(plain.encode_start(text).unwrap(), ids);
    assert_eq!(tokenizer.encode(text).unwrap(), ids);
    assert_eq!(tokenizer.encode_start(text).unwrap(), [&[1], &ids[..]].concat());
    // Written out, it is not doubled.
    assert_eq!(tokenizer.encode_start("<|im_start|>the weather").unwrap(), [&[1], &ids[..]].concat());

    let content =
        RecordContent::Instruction { instruction: "the weather ".repeat(30), output: "warm".into() };
    let origin = Origin { file: "train.json".into(), line: 1 };
    let dataset = Dataset {
        records: vec![Record { content, hash: "h".into(), weight: 1.0, origin }],
        ..Dataset::default()
    };
    let tokens = |tokenizer, max_length| {
        let options = SampleOptions {
            max_length,
            overlong: Overlong::Truncate,
            loss_on: LossOn::Completion,
            on_bad_record: OnBadRecord::Error,
            embedding_rows: 512,
            hash_template: HashTemplate::default(),
            also_without_hash: false,
        };
        tokenise(&dataset, Some(tokenizer), &options).unwrap().get(0).token_ids.to_vec()
    };
    let whole = tokens(&plain, 1000);
    assert_eq!(tokens(&tokenizer, 1001), [&[1], &whole[..]].concat());
    // Cut, the sample is that of one token less, after BOS.
    for max_length in [whole.len(), whole.len() / 2] {
        assert_eq!(tokens(&tokenizer, max_length + 1)[..2], [1, whole[0]], "{max_length}");
        assert!(tokens(&tokenizer, max_length + 1).len() <= max_length + 1);
    }
}

#[test]
fn fault_22_a_template_that_names_what_is_not_there_is_refused() {
    for (what, template, part) in [
        ("an id out of range", with_bos(json!(512)), "the id 512"),
        (
            "an unknown token",
            json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                   "pair": [], "special_tokens": {}}),
            "\"<s>\"",
        ),
    ] {
        let refused = changed(|file| file["post_processor"] = template);
        let error = refused.err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert_eq!(error.kind(), ErrorKind::Model, "{what}: {error}");
        assert!(error.to_string().contains(part), "{what}: {error}");
    }
    // A second text that a template speaks of, and nobody gives, must not end in a panic.
    let second = json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}],
                        "pair": [], "special_tokens": {}});
    let tokenizer = changed(|file| file["post_processor"] = second).unwrap();
    assert!(!tokenizer.encode("the").unwrap().is_empty());
}

/// The pattern that Llama 3 splits by; Qwen2 has the same but for single digits.
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

#[test]
fn fault_23_a_megabyte_of_one_character_ends() {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let split = json!({"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": false});
    let llama3 = changed(|file| {
        file["normalizer"] = json!({"type": "NFC"});
        file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split, byte_level.clone()]});
    });
    let without_splits = changed(|file| file["pre_tokenizer"] = byte_level.clone());
    let mut tokenizers = vec![
        ("tiny", Tokenizer::from_folder(tiny_folder()).unwrap()),
        ("llama 3's splits", llama3.unwrap()),
        ("no splits: one word of a megabyte", without_splits.unwrap()),
    ];
    tokenizers.extend(smollm2().map(|tokenizer| ("smollm2", tokenizer)));
    for (name, tokenizer) in &tokenizers {
        for (character, last) in [("a", ""), (" ", "a"), ("1", ""), ("日", "\n"), ("\u{301}", "")] {
            let text = character.repeat((1 << 20) / character.len()) + last;
            let ids = tokenizer.encode(&text).unwrap_or_else(|error| panic!("{name} {character:?}: {error}"));
            assert!(tokenizer.decode(&ids).unwrap() == text, "{name} {character:?}");
        }
    }
}

#[test]
fn fault_24_an_id_beyond_the_embedding_is_refused_with_its_record() {
    let tokenizer = Tokenizer::from_folder(tiny_folder()).unwrap();
    let origin = Origin { file: "train.json".into(), line: 8 };
    let text = RecordContent::Instruction { instruction: "the weather".into(), output: "warm".into() };
    let ids = RecordContent::PreTokenised { token_ids: vec![3, 511], labels: vec![3, 5] };
    let labels = RecordContent::PreTokenised { token_ids: vec![3, 4], labels: vec![3, 511] };
    for content in [text, ids, labels] {
        let record = Record { content, hash: "general".into(), weight: 1.0, origin: origin.clone() };
        let dataset = Dataset { records: vec![record], ..Dataset::default() };
        let options = |embedding_rows| SampleOptions {
            max_length: 512,
            overlong: Overlong::Error,
            loss_on: LossOn::All,
            on_bad_record: OnBadRecord::Skip,
            embedding_rows,
            hash_template: HashTemplate::default(),
            also_without_hash: false,
        };
        tokenise(&dataset, Some(&tokenizer), &options(512)).unwrap();
        let error = tokenise(&dataset, Some(&tokenizer), &options(300)).unwrap_err();
        assert_eq!((error.kind(), error.location()), (ErrorKind::Data, Some("train.json:8")));
        assert!(error.to_string().contains("300 rows"), "{error}");
    }
}
