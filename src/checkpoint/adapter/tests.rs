//! Tests of the adapter folder against what PEFT writes, and against faults.

use std::path::PathBuf;

use serde_json::json;

use super::*;
use crate::config::TargetModules;
use crate::error::ErrorKind;

pub(super) fn config() -> AdapterConfig {
    AdapterConfig {
        rank: 2,
        alpha: 4.0,
        dropout: 0.05,
        target_modules: TargetModules::Names(vec!["q_proj".into()]),
        use_rslora: false,
        use_dora: false,
        rank_pattern: Default::default(),
        alpha_pattern: Default::default(),
        layers_to_transform: vec![],
        modules_to_save: vec![],
        base_model: Some("tiny".into()),
        revision: None,
    }
}

/// One module's `lora_A [2, 3]` and `lora_B [4, 2]`.
pub(super) fn pair() -> Vec<NamedTensor> {
    let tensor = |half: &str, shape: [usize; 2]| NamedTensor {
        name: format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"),
        shape: shape.to_vec(),
        values: (0..shape[0] * shape[1]).map(|element| element as f32 / 7.0).collect(),
    };
    vec![tensor("A", [2, 3]), tensor("B", [4, 2])]
}

fn save(folder: &Path, tensors: &[NamedTensor], base_folder: Option<&Path>) -> Result<()> {
    let companions = Companions {
        provenance: &json!({"step": 3}),
        model_card: "# card\n",
        base_folder,
        chat_template: None,
    };
    write_adapter(folder, &config(), tensors, &companions)
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The weights' file with one f32 tensor per (name, shape, values).
fn safetensors_of(dtype: &str, tensors: &[(&str, &[usize], &[u8])]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.to_string(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend_from_slice(bytes);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(&header);
    file.extend_from_slice(&data);
    file
}

#[test]
fn an_adapter_saved_by_peft_loads() {
    let adapter = read_adapter(&fixture("tiny_qwen2/adapter_final_brand")).unwrap();
    assert_eq!((adapter.config.rank, adapter.config.alpha), (4, 8.0));
    // Two layers, seven linears, two halves.
    assert_eq!(adapter.tensors.len(), 28);
    let first = &adapter.tensors[0];
    assert_eq!(first.name, "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight");
    assert_eq!(first.shape, [4, 128]);
}

#[test]
fn what_is_written_reads_back_bit_by_bit() {
    let (folder, base) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(base.path().join("tokenizer.json"), "{}").unwrap();
    fs::write(base.path().join("model.safetensors"), "not copied").unwrap();
    let output = folder.path().join("new/outputs");
    save(&output, &pair(), Some(base.path())).unwrap();
    assert_eq!(read_adapter(&output).unwrap(), Adapter { config: config(), tensors: pair() });

    let mut names: Vec<_> = fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let expected =
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "fastlora.json", "tokenizer.json"];
    assert_eq!(names, expected);
    assert_eq!(fs::read_to_string(output.join("fastlora.json")).unwrap(), "{\n  \"step\": 3\n}\n");
    let weights = fs::read(output.join(ADAPTER_WEIGHTS)).unwrap();
    assert!(weights[8..].starts_with(br#"{"__metadata__":{"format":"pt"}"#));
}

#[test]
fn the_best_folder_is_replaced_whole() {
    let parent = tempfile::tempdir().unwrap();
    let best = parent.path().join("best");
    let companions =
        Companions { provenance: &json!({}), model_card: "", base_folder: None, chat_template: None };
    let mut tensors = pair();
    for round in 0..2 {
        tensors[0].values[0] = round as f32;
        replace_adapter_folder(&best, &config(), &tensors, &companions).unwrap();
        assert_eq!(read_adapter(&best).unwrap().tensors, tensors);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1, "no leftovers");
    }
}

#[test]
fn half_precision_weights_are_widened() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(ADAPTER_CONFIG), config().to_json().to_string()).unwrap();
    let names: Vec<String> = pair().into_iter().map(|tensor| tensor.name).collect();
    for dtype in ["F16", "BF16"] {
        let bits = |value: f32| match dtype {
            "F16" => half::f16::from_f32(value).to_le_bytes(),
            _ => half::bf16::from_f32(value).to_le_bytes(),
        };
        let a: Vec<u8> = [1.5f32, -2.0, 0.25, 0.0, 8.0, 1.0].into_iter().flat_map(bits).collect();
        let b: Vec<u8> = [0.5f32; 8].into_iter().flat_map(bits).collect();
        let file = safetensors_of(dtype, &[(&names[0], &[2, 3], &a), (&names[1], &[4, 2], &b)]);
        fs::write(folder.path().join(ADAPTER_WEIGHTS), file).unwrap();
        let adapter = read_adapter(folder.path()).unwrap();
        assert_eq!(adapter.tensors[0].values, [1.5, -2.0, 0.25, 0.0, 8.0, 1.0], "{dtype}");
    }
}

#[test]
fn values_that_are_not_finite_are_neither_read_nor_written() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), &pair(), None).unwrap();
    let before = fs::read(folder.path().join(ADAPTER_WEIGHTS)).unwrap();
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut tensors = pair();
        tensors[1].values[5] = value;
        let error = save(folder.path(), &tensors, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Numerical);
        assert_eq!(error.location(), Some(tensors[1].name.as_str()));
        assert_eq!(fs::read(folder.path().join(ADAPTER_WEIGHTS)).unwrap(), before, "the old one stays");

        let mut bytes = before.clone();
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&value.to_le_bytes());
        let other = tempfile::tempdir().unwrap();
        fs::copy(folder.path().join(ADAPTER_CONFIG), other.path().join(ADAPTER_CONFIG)).unwrap();
        fs::write(other.path().join(ADAPTER_WEIGHTS), bytes).unwrap();
        let error = read_adapter(other.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains("lora_B.weight: element 7 is"), "{error}");
    }
}

#[test]
fn fault_61_keys_of_another_base_are_an_error() {
    let adapter = Adapter { config: config(), tensors: pair() };
    let mut expected: Vec<(String, Vec<usize>)> =
        pair().into_iter().rev().map(|tensor| (tensor.name, tensor.shape)).collect();
    let matched = adapter.match_to(&expected).unwrap();
    assert_eq!(matched[0].name, expected[0].0, "in the order asked for");

    expected[0].1 = vec![8, 2];
    expected[1].0 = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight".into();
    let error = adapter.match_to(&expected).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    for part in [
        "1 not in the model: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "1 missing in the adapter: base_model.model.model.layers.9",
        "lora_B.weight [4, 2] for [8, 2]",
        "trained on tiny",
    ] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn fault_62_an_empty_adapter_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(ADAPTER_CONFIG), config().to_json().to_string()).unwrap();
    fs::write(folder.path().join(ADAPTER_WEIGHTS), safetensors_of("F32", &[])).unwrap();
    let error = read_adapter(folder.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
    assert!(error.message().contains("no tensors"), "{error}");
    assert!(save(&folder.path().join("other"), &[], None).is_err());
}

#[test]
fn fault_20_a_pickled_adapter_says_how_to_convert() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(ADAPTER_CONFIG), config().to_json().to_string()).unwrap();
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    let error = read_adapter(folder.path()).unwrap_err();
    assert!(error.to_string().contains("safe_serialization=True"), "{error}");
    let error = read_adapter(&folder.path().join("nowhere")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Model);
}

#[test]
fn tensors_that_are_not_plain_lora_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(ADAPTER_CONFIG), config().to_json().to_string()).unwrap();
    let zeros = [0u8; 24];
    for (dtype, name, shape, part) in [
        ("F32", "q_proj.lora_magnitude_vector", &[6][..], "expected a matrix"),
        ("F32", "lm_head.weight", &[2, 3], "not a tensor of a plain LoRA adapter"),
        ("F32", "q_proj.lora_A.weight", &[3, 2], "rank 3, but adapter_config.json says r = 2"),
        ("F64", "q_proj.lora_A.weight", &[1, 3], "element type F64 is not supported"),
        ("F32", "q_proj.lora_A.weight", &[2, 4], "needs 32 bytes, found 24"),
    ] {
        fs::write(folder.path().join(ADAPTER_WEIGHTS), safetensors_of(dtype, &[(name, shape, &zeros)]))
            .unwrap();
        let error = read_adapter(folder.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn a_place_that_cannot_be_written_is_an_io_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let companions =
        Companions { provenance: &json!({}), model_card: "", base_folder: None, chat_template: None };
    for error in [
        save(&file.join("outputs"), &pair(), None).unwrap_err(),
        replace_adapter_folder(&file.join("best"), &config(), &pair(), &companions).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        assert!(error.location().is_some(), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

    // A folder stands where the model card belongs: what was saved before stays as it is.
    save(folder.path(), &pair(), None).unwrap();
    fs::remove_file(folder.path().join("README.md")).unwrap();
    fs::create_dir_all(folder.path().join("README.md/inside")).unwrap();
    let mut tensors = pair();
    tensors[0].values[0] = 5.0;
    assert_eq!(save(folder.path(), &tensors, None).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(read_adapter(folder.path()).unwrap().tensors, pair());
}
