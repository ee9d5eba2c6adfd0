//! Stored types against the format's reference implementation, whole models against those they were made from, and files
//! that are broken in every place.

mod writer;

use std::io::Cursor;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value as Json, json};

use super::architecture::{Plan, PlannedTensor};
use super::dequantize::BlockType;
use super::folder::convert;
use super::gguf::{Gguf, TensorInfo};
use super::*;
use crate::error::{Error, ErrorKind};
use writer::{
    Stored, f32_value, file, pair, small_file, small_metadata, small_tensors, string, strings_value,
    text_value, u32_value,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn read_json(path: impl AsRef<Path>) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn parse(bytes: &[u8]) -> Result<Gguf<Cursor<Vec<u8>>>> {
    Gguf::parse(Cursor::new(bytes.to_vec()), bytes.len() as u64, "test.gguf".into())
}

/// Everything that import does except writing the folder.
fn convert_all(bytes: &[u8]) -> Result<usize> {
    let gguf = parse(bytes)?;
    let plan = Plan::new(&gguf, DType::F16)?;
    tokenizer::convert(&gguf, plan.vocabulary, plan.context)?;
    plan.tensors.iter().map(|tensor| Ok(convert(&gguf, tensor, DType::F16)?.len())).sum()
}

fn refusal(bytes: &[u8]) -> Error {
    let error = convert_all(bytes).expect_err("this file must be refused");
    assert_eq!(error.kind(), ErrorKind::Model, "{error}");
    assert!(error.location().is_some_and(|place| place.starts_with("test.gguf")), "{error}");
    error
}

/// The small model with one metadata pair replaced or added.
fn with_metadata(key: &str, value: Vec<u8>) -> Vec<u8> {
    let mut metadata = small_metadata("llama");
    let start = string(key);
    metadata.retain(|pair| !pair.starts_with(&start));
    metadata.push(pair(key, value));
    file(&metadata, &small_tensors())
}

// ---- numbers ----

#[test]
fn every_stored_type_equals_the_reference_bit_for_bit() {
    let blocks = read_json(fixture("gguf/blocks.json"));
    let codes = [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30].map(|code| BlockType::from_code(code).unwrap());
    assert_eq!(blocks.as_object().unwrap().len(), codes.len());
    for block_type in codes {
        let case = &blocks[block_type.to_string()];
        let hex = case["bytes"].as_str().unwrap();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        let expected = case["f32_bits"].as_array().unwrap();
        let mut values = vec![0.0; expected.len()];
        block_type.dequantize(&bytes, &mut values);
        for (i, (value, expected)) in values.iter().zip(expected).enumerate() {
            let expected = f32::from_bits(u32::from_str_radix(expected.as_str().unwrap(), 16).unwrap());
            // -0 and 0 are the same weight.
            assert!(
                value.to_bits() == expected.to_bits() || (*value == 0.0 && expected == 0.0),
                "{block_type} element {i}: {value:e}, the reference has {expected:e}"
            );
        }
    }
}

#[test]
fn tiny_models_come_back_as_they_were() {
    for (file, original, matrices) in
        [("tiny_llama", "tiny_llama3rope", 16), ("tiny_qwen2", "tiny_qwen2", 15)]
    {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("imported");
        let options = ImportOptions { dtype: DType::F32, overwrite: false };
        import_gguf(&fixture(&format!("gguf/{file}.gguf")), &folder, options, &|_| ()).unwrap();

        let imported = std::fs::read(folder.join("model.safetensors")).unwrap();
        let imported = SafeTensors::deserialize(&imported).unwrap();
        let expected = std::fs::read(fixture(&format!("{original}/model.safetensors"))).unwrap();
        let expected = SafeTensors::deserialize(&expected).unwrap();
        assert_eq!(imported.len(), expected.len());
        let mut matrices_seen = 0;
        for (name, expected) in expected.tensors() {
            let found = imported.tensor(&name).unwrap();
            assert_eq!(found.shape(), expected.shape(), "{name}");
            let is_matrix = expected.shape().len() == 2;
            matrices_seen += usize::from(is_matrix);
            for (i, (found, expected)) in found.data().chunks(4).zip(expected.data().chunks(4)).enumerate() {
                let found = f32::from_le_bytes(found.try_into().unwrap());
                let mut expected = f32::from_le_bytes(expected.try_into().unwrap());
                if is_matrix {
                    expected = half::f16::from_f32(expected).to_f32();
                }
                assert_eq!(found, expected, "{file}: {name} element {i}");
            }
        }
        assert_eq!(matrices_seen, matrices);

        let (found, expected) = (
            read_json(folder.join("config.json")),
            read_json(fixture(&format!("{original}/config_v4.json"))),
        );
        for key in [
            "architectures",
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "tie_word_embeddings",
            "vocab_size",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        ] {
            assert_eq!(found[key], expected[key], "{file}: {key}");
        }
        for key in
            ["rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
        {
            assert_eq!(found["rope_scaling"][key], expected["rope_scaling"][key], "{file}: {key}");
        }
        assert_eq!(
            read_json(folder.join("tokenizer_config.json"))["chat_template"],
            "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        );
    }
}

#[test]
fn tiny_tokenizers_split_as_their_models_do() {
    let encode = |file: &str, text: &str| {
        let gguf = Gguf::open(&fixture(&format!("gguf/{file}.gguf"))).unwrap();
        let files = tokenizer::convert(&gguf, 512, 256).unwrap();
        let tokenizer =
            tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&files.tokenizer).unwrap()).unwrap();
        let encoding = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text.replace("<|end|>", ""));
        encoding.get_tokens().to_vec()
    };
    // qwen2 keeps digits apart and adds nothing; Llama 3 keeps up to three together and starts with its first token.
    assert_eq!(encode("tiny_qwen2", "Hello world12<|end|>"), ["Hello", "Ġworld", "1", "2", "<|end|>"]);
    assert_eq!(
        encode("tiny_llama", "Hello world12<|end|>"),
        ["<|begin|>", "Hello", "Ġworld", "12", "<|end|>"]
    );
    assert_eq!(encode("tiny_qwen2", "<tool>é and"), ["<tool>", "Ã©", "Ġand"]);
}

#[test]
fn sentence_piece_ids_equal_those_of_sentence_piece() {
    let gguf = Gguf::open(&fixture("gguf/sentence_piece.gguf")).unwrap();
    let files = tokenizer::convert(&gguf, 700, 256).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&files.tokenizer).unwrap()).unwrap();
    let cases = read_json(fixture("gguf/sentence_piece.json"));
    assert!(cases.as_array().unwrap().len() > 40);
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let encoding = tokenizer.encode(text, true).unwrap();
        assert_eq!(json!(encoding.get_ids()), case["ids"], "{text:?}: {:?}", encoding.get_tokens());
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text);
    }
}

#[test]
fn unused_rows_at_the_end_are_no_tokens() {
    let gguf = Gguf::open(&fixture("gguf/tiny_qwen2.gguf")).unwrap();
    let files = tokenizer::convert(&gguf, 512, 256).unwrap();
    let vocabulary = files.tokenizer["model"]["vocab"].as_object().unwrap();
    assert!(
        vocabulary.len() < 512 && vocabulary.keys().all(|token| !token.starts_with("[PAD")),
        "{}",
        vocabulary.len()
    );
    assert!(vocabulary.values().enumerate().all(|(id, value)| *value == json!(id)), "ids without gaps");
}

#[test]
fn generation_ends_at_every_end_token() {
    let gguf = parse(&with_metadata("tokenizer.ggml.eot_token_id", u32_value(3))).unwrap();
    let files = tokenizer::convert(&gguf, 4, 16).unwrap();
    assert_eq!(files.ids["eos_token_id"], 0);
    assert_eq!(files.generation_ids["eos_token_id"], json!([0, 3]));
}

#[test]
fn f16_has_limits_and_says_so() {
    let mut tensors = small_tensors();
    tensors[6] = Stored::f32("blk.0.ffn_down.weight", &[8, 4], 65519.0);
    assert!(convert_all(&file(&small_metadata("llama"), &tensors)).is_ok());
    tensors[6].data[4 * 9..][..4].copy_from_slice(&65520_f32.to_le_bytes());
    let error = refusal(&file(&small_metadata("llama"), &tensors));
    assert!(error.to_string().contains("ffn_down.weight: element [1, 1] is 65520"), "{error}");
    assert!(error.hint_text().unwrap().contains("bf16"), "{error}");
}

#[test]
fn fault_19_a_weight_that_is_no_number_is_named() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut tensors = small_tensors();
        tensors[1].data[8..12].copy_from_slice(&value.to_le_bytes());
        let error = refusal(&file(&small_metadata("llama"), &tensors));
        assert!(error.to_string().contains("output_norm.weight: element [0, 2]"), "{error}");
    }
}

// ---- refusals by name ----

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let expectations: [(&str, Vec<u8>, &str); 14] = [
        ("general.architecture", text_value("gemma3"), "`gemma3`"),
        ("llama.attention.sliding_window", u32_value(8), "`attention.sliding_window`"),
        ("llama.expert_count", u32_value(8), "mixture-of-experts"),
        ("llama.rope.dimension_count", u32_value(2), "partial rotation"),
        ("llama.rope.scaling.type", text_value("longrope"), "`longrope`"),
        ("split.count", u32_value(2), "one part"),
        ("tokenizer.ggml.model", text_value("llama"), "type unknown"),
        ("tokenizer.ggml.model", text_value("bert"), "`bert`"),
        ("tokenizer.ggml.pre", text_value("tekken"), "`tekken`"),
        ("tokenizer.ggml.eos_token_id", u32_value(4), "id 4"),
        ("tokenizer.ggml.merges", strings_value(&["a b", "b a"]), "merge 1"),
        ("tokenizer.ggml.tokens", strings_value(&["a", "a", "b", "ab"]), "tokens 0 and 1"),
        ("llama.block_count", u32_value(1_000_000_000), "1000000000 layers"),
        ("llama.attention.head_count", u32_value(0), "at least 1"),
    ];
    for (key, value, expected) in expectations {
        let error = refusal(&with_metadata(key, value));
        assert!(error.to_string().contains(expected), "{key}: {error}");
    }
}

#[test]
fn scaling_of_rope_is_kept() {
    let mut metadata = small_metadata("llama");
    metadata.push(pair("llama.rope.scaling.type", text_value("yarn")));
    metadata.push(pair("llama.rope.scaling.factor", f32_value(4.0)));
    metadata.push(pair("llama.rope.scaling.original_context_length", u32_value(4)));
    let gguf = parse(&file(&metadata, &small_tensors())).unwrap();
    assert_eq!(
        Plan::new(&gguf, DType::F16).unwrap().config["rope_scaling"],
        json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4 })
    );
}

#[test]
fn tensors_must_be_those_of_the_model() {
    let metadata = small_metadata("llama");
    let mut tensors = small_tensors();
    tensors.push(Stored::f32("blk.0.attn_q_norm.weight", &[4], 1.0));
    assert!(refusal(&file(&metadata, &tensors)).to_string().contains("`blk.0.attn_q_norm.weight`"));
    tensors.truncate(9);
    let error = refusal(&file(&metadata, &tensors)).to_string();
    assert!(
        error.contains("`blk.0.attn_v.weight` is missing; `blk.0.attn_output.weight` is missing"),
        "{error}"
    );
    let mut tensors = small_tensors();
    tensors[4] = Stored::f32("blk.0.ffn_gate.weight", &[4, 4], 0.5);
    let error = refusal(&file(&metadata, &tensors)).to_string();
    assert!(error.contains("`blk.0.ffn_gate.weight` has shape [4, 4], expected [8, 4]"), "{error}");
    let mut tensors = small_tensors();
    tensors[4].type_code = 10;
    assert!(refusal(&file(&metadata, &tensors)).to_string().contains("stored as Q2_K"));
}

// ---- broken files ----

#[test]
fn the_small_file_is_whole() {
    assert_eq!(convert_all(&small_file()).unwrap(), 2 * (16 + 3 * 4 + 3 * 32 + 4 * 16));
}

#[test]
fn fault_12_a_file_cut_anywhere_is_refused() {
    let bytes = small_file();
    for length in 0..bytes.len() {
        refusal(&bytes[..length]);
    }
}

#[test]
fn headers_of_other_kinds_are_named() {
    let mut bytes = small_file();
    bytes[4] = 1;
    assert!(refusal(&bytes).to_string().contains("GGUF version 1"));
    bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
    assert!(refusal(&bytes).to_string().contains("big-endian"));
    bytes[..4].copy_from_slice(b"ggml");
    assert!(refusal(&bytes).to_string().contains("not a GGUF file"));
}

#[test]
fn counts_and_lengths_beyond_the_file_allocate_nothing() {
    // 2^64-1 tensors, pairs, bytes of the first key, and elements of an array.
    for start in [8, 16, 24] {
        let mut bytes = small_file();
        bytes[start..start + 8].fill(0xff);
        assert!(refusal(&bytes).to_string().contains("18446744073709551615"));
    }
    for element_type in [0_u32, 8, 12] {
        let array = [&9_u32.to_le_bytes()[..], &element_type.to_le_bytes(), &u64::MAX.to_le_bytes()].concat();
        refusal(&with_metadata("anything", array));
    }
    let nested = [&9_u32.to_le_bytes()[..], &9_u32.to_le_bytes(), &1_u64.to_le_bytes()].concat();
    assert!(refusal(&with_metadata("anything", nested)).to_string().contains("array of arrays"));
}

#[test]
fn fault_09_shapes_that_overflow_are_refused() {
    for axes in [[1 << 40, 1 << 40], [u64::MAX, 2], [1 << 62, 1], [0, u64::MAX]] {
        let mut tensors = small_tensors();
        tensors[0].axes = axes.to_vec();
        refusal(&file(&small_metadata("llama"), &tensors));
    }
}

#[test]
fn fault_07_overlapping_data_is_refused() {
    let bytes = small_file();
    // The second tensor's offset becomes the first one's.
    let name = bytes.windows(18).position(|window| window == b"output_norm.weight").unwrap();
    let mut overlapping = bytes.clone();
    overlapping[name + 18 + 4 + 8 + 4..][..8].fill(0);
    assert!(refusal(&overlapping).to_string().contains("overlaps that of `token_embd.weight`"));
    let mut crooked = bytes;
    crooked[name + 18 + 4 + 8 + 4] = 1;
    assert!(refusal(&crooked).to_string().contains("multiple of 32"));
}

#[test]
fn fault_06_names_that_appear_twice_are_refused() {
    let mut metadata = small_metadata("llama");
    metadata.push(metadata[0].clone());
    assert!(refusal(&file(&metadata, &small_tensors())).to_string().contains("appears twice"));
    let mut tensors = small_tensors();
    tensors[3].name = tensors[2].name.clone();
    assert!(refusal(&file(&small_metadata("llama"), &tensors)).to_string().contains("appears twice"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever bytes are changed, import ends with a result or with an error of the right kind.
    #[test]
    fn damaged_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = small_file();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        if let Err(error) = convert_all(&bytes) {
            prop_assert_eq!(error.kind(), ErrorKind::Model, "{}", error);
        }
    }

    /// As above in the places that steer: lengths, counts, types and ids are all words.
    #[test]
    fn damaged_words_never_panic(place in any::<prop::sample::Index>(), value in prop_oneof![
        Just(u64::MAX), Just(1 << 63), Just(1 << 32), Just(0), any::<u64>(),
    ]) {
        let mut bytes = small_file();
        let place = place.index(bytes.len() - 8);
        bytes[place..place + 8].copy_from_slice(&value.to_le_bytes());
        if let Err(error) = convert_all(&bytes) {
            prop_assert_eq!(error.kind(), ErrorKind::Model, "{}", error);
        }
    }

    /// Scores, pieces and types of a SentencePiece vocabulary are damaged.
    #[test]
    fn damaged_vocabularies_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let mut bytes = std::fs::read(fixture("gguf/sentence_piece.gguf")).unwrap();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        let converted = parse(&bytes).and_then(|gguf| tokenizer::convert(&gguf, 700, 256).map(drop));
        if let Err(error) = converted {
            prop_assert_eq!(error.kind(), ErrorKind::Model, "{}", error);
        }
    }

    /// Rows of a head go back to where the model's authors had them: undone by the converter's own permutation.
    #[test]
    fn interleaved_rows_return(heads in 1_usize..5, half in 1_usize..5, columns in 1_usize..4) {
        let rows = heads * half * 2;
        // As llama.cpp interleaves: row (head, part, i) of the original is stored at (head, i, part).
        let mut stored = vec![0.0; rows * columns];
        for row in 0..rows {
            let (head, part, i) = (row / (2 * half), row / half % 2, row % half);
            let target = head * 2 * half + i * 2 + part;
            for column in 0..columns {
                stored[target * columns + column] = (row * columns + column) as f32;
            }
        }
        let tensor = Stored {
            name: "q".into(),
            axes: vec![columns as u64, rows as u64],
            type_code: 0,
            data: stored.iter().flat_map(|value: &f32| value.to_le_bytes()).collect(),
        };
        let gguf = parse(&file(&[], &[tensor])).unwrap();
        let source: &TensorInfo = &gguf.tensors[0];
        let planned = PlannedTensor { name: "q".into(), source, interleaved_heads: Some(heads) };
        let bytes = convert(&gguf, &planned, DType::F32).unwrap();
        for (i, value) in bytes.chunks(4).enumerate() {
            prop_assert_eq!(f32::from_le_bytes(value.try_into().unwrap()), i as f32);
        }
    }
}

// ---- the folder ----

#[test]
fn a_folder_appears_whole_or_not_at_all() {
    let parent = tempfile::tempdir().unwrap();
    let (source, folder) = (parent.path().join("model.gguf"), parent.path().join("made/here"));
    let entries = |path: &Path| std::fs::read_dir(path).unwrap().count();
    let import =
        |overwrite| import_gguf(&source, &folder, ImportOptions { dtype: DType::F16, overwrite }, &|_| ());

    // The last weights are not finite: everything else was written by then.
    let mut tensors = small_tensors();
    tensors[6].data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&source, file(&small_metadata("llama"), &tensors)).unwrap();
    assert_eq!(import(false).unwrap_err().kind(), ErrorKind::Model);
    assert_eq!(entries(folder.parent().unwrap()), 0, "nothing may be left");

    std::fs::write(&source, small_file()).unwrap();
    let report = import(false).unwrap();
    assert_eq!(report, ImportReport { architecture: "llama", tensors: 11, parameters: 188 });
    assert_eq!((entries(&folder), entries(folder.parent().unwrap())), (6, 1));

    let error = import(false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("not empty"), "{error}");
    import(true).unwrap();
    assert_eq!((entries(&folder), entries(folder.parent().unwrap())), (6, 1));

    std::fs::write(folder.join("notes.txt"), "mine").unwrap();
    assert!(import(true).unwrap_err().to_string().contains("`notes.txt`"));
    assert_eq!(std::fs::read_to_string(folder.join("notes.txt")).unwrap(), "mine");
}
