//! Faults of weight files: each is one model error that names the file and the tensor, found when the model is opened.

use std::fs;
use std::path::{Path, PathBuf};

use fastlora::checkpoint::base::BaseModel;
use fastlora::checkpoint::safetensors::SafetensorsFile;
use fastlora::dtype::DType;
use fastlora::error::{Error, ErrorKind};
use serde_json::{Value, json};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A file of the given header text and data.
fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn open_bytes(bytes: &[u8]) -> Result<SafetensorsFile, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(WEIGHTS);
    fs::write(&path, bytes).unwrap();
    SafetensorsFile::open(&path)
}

/// Opens bytes that must be refused; the error names the file.
fn refused(bytes: &[u8]) -> String {
    let error = open_bytes(bytes).err().expect("the file was accepted");
    assert_eq!(error.kind(), ErrorKind::Model, "{error}");
    assert!(error.location().unwrap().contains(WEIGHTS), "{error}");
    assert!(error.to_string().len() < 1000, "{error}");
    error.to_string()
}

fn refused_header(header: &str, data: &[u8]) -> String {
    refused(&file_of(header, data))
}

fn assert_mentions(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not mention {part:?}");
    }
}

/// A copy of a tiny model's folder.
fn model_folder(model: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", WEIGHTS] {
        fs::copy(format!("tests/fixtures/{model}/{file}"), folder.path().join(file)).unwrap();
    }
    folder
}

fn model_error(folder: &Path) -> String {
    let error = BaseModel::open(folder).err().expect("the model was accepted");
    assert_eq!(error.kind(), ErrorKind::Model, "{error}");
    error.to_string()
}

/// A tensor as the tests rewrite it: name, element type, shape, bytes.
type Tensor = (String, String, Vec<usize>, Vec<u8>);

fn tensors_of(path: &Path) -> Vec<Tensor> {
    let bytes = fs::read(path).unwrap();
    let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).unwrap();
    let entries = header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    let number = |value: &Value| value.as_u64().unwrap() as usize;
    let read = |(name, entry): (&String, &Value)| {
        let range = number(&entry["data_offsets"][0])..number(&entry["data_offsets"][1]);
        let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
        (name.clone(), entry["dtype"].as_str().unwrap().to_owned(), shape, data[range].to_vec())
    };
    entries.map(read).collect()
}

fn write_tensors(path: &Path, tensors: &[Tensor]) {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": offsets }));
        data.extend_from_slice(bytes);
    }
    fs::write(path, file_of(&Value::Object(header).to_string(), &data)).unwrap();
}

/// Changes the tensors of a tiny model's only file.
fn rewrite(folder: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
    let path = folder.join(WEIGHTS);
    let mut tensors = tensors_of(&path);
    change(&mut tensors);
    write_tensors(&path, &tensors);
}

fn find<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|(found, ..)| found == name).unwrap()
}

/// Splits a tiny model into two shards and an index; returns the index.
fn shard(folder: &Path) -> Value {
    let tensors = tensors_of(&folder.join(WEIGHTS));
    fs::remove_file(folder.join(WEIGHTS)).unwrap();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let mut weight_map = serde_json::Map::new();
    for (file, part) in
        [("model-00001-of-00002.safetensors", first), ("model-00002-of-00002.safetensors", second)]
    {
        write_tensors(&folder.join(file), part);
        weight_map.extend(part.iter().map(|(name, ..)| (name.clone(), json!(file))));
    }
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map });
    fs::write(folder.join(INDEX), index.to_string()).unwrap();
    index
}

/// Changes the shard of one tensor in the index.
fn point_to(folder: &Path, index: &Value, file: &str) {
    let mut index = index.clone();
    index["weight_map"]["model.norm.weight"] = json!(file);
    fs::write(folder.join(INDEX), index.to_string()).unwrap();
}

#[test]
fn sharded_or_not_and_with_or_without_prefix_is_the_same_model() {
    let original = BaseModel::open("tests/fixtures/tiny_qwen2").unwrap();
    let sharded = model_folder("tiny_qwen2");
    shard(sharded.path());
    let bare = model_folder("tiny_qwen2");
    rewrite(bare.path(), |tensors| {
        tensors.iter_mut().for_each(|(name, ..)| *name = name.strip_prefix("model.").unwrap().to_owned());
    });
    for folder in [&sharded, &bare] {
        let other = BaseModel::open(folder.path()).unwrap();
        let mut tensor_count = 0;
        for (name, shape) in original.config().expected_tensors() {
            let (left, right) = (original.tensor(&name).unwrap(), other.tensor(&name).unwrap());
            assert_eq!(
                (left.shape(), left.dtype(), left.bytes()),
                (right.shape(), right.dtype(), right.bytes())
            );
            assert_eq!(left.shape(), shape);
            tensor_count += 1;
        }
        assert_eq!(tensor_count, 2 + 2 * 12);
    }
    assert_eq!(original.dtype().unwrap(), DType::F32);
    assert_eq!(original.head().unwrap().name(), "model.embed_tokens.weight");
    assert_eq!(
        BaseModel::open("tests/fixtures/tiny_qwen3").unwrap().head().unwrap().name(),
        "lm_head.weight"
    );
    assert_eq!(original.tensor("lm_head.weight").unwrap_err().kind(), ErrorKind::Model);
    let fingerprint = original.fingerprint().unwrap();
    assert_eq!(fingerprint.len(), 1);
    assert_eq!(fingerprint[0].file, WEIGHTS);
    // sha256sum of the fixture.
    assert_eq!(fingerprint[0].sha256, "b32e85a48b170a657e8ac467088d507898c37ce93649bf23ffcfd958e7a5f243");
    let files: Vec<_> = BaseModel::open(sharded.path()).unwrap().fingerprint().unwrap();
    assert_eq!(
        files.iter().map(|print| &print.file[..11]).collect::<Vec<_>>(),
        ["model-00001", "model-00002"]
    );
}

#[test]
fn entries_agree_with_the_safetensors_crate() {
    for file in ["model.safetensors", "forward.safetensors", "grads_step0_b0_f64.safetensors"] {
        let path = PathBuf::from("tests/fixtures/tiny_llama3rope").join(file);
        let ours = SafetensorsFile::open(&path).unwrap();
        let bytes = fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(ours.entries().count(), theirs.len());
        for (name, view) in theirs.iter() {
            let entry = ours.entry(name).unwrap();
            assert_eq!((entry.dtype, entry.shape.as_slice()), (view.dtype(), view.shape()), "{name}");
            assert_eq!(ours.bytes(name).unwrap(), view.data(), "{name}");
        }
    }
}

#[test]
fn fault_01_file_below_eight_bytes_is_refused() {
    for length in 0..8 {
        refused(&vec![1; length]);
    }
    assert_mentions(&refused(&[1; 7]), &["7 bytes"]);
    assert_mentions(&refused(&[]), &["empty"]);
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    assert_mentions(&refused(pointer.as_bytes()), &["Git LFS pointer", "git lfs pull"]);
}

#[test]
fn fault_02_absurd_header_length_is_refused() {
    for length in [u64::MAX, u64::MAX - 7, 1 << 63, 100_000_001] {
        let bytes = [length.to_le_bytes().as_slice(), b"{}"].concat();
        assert_mentions(&refused(&bytes), &[&length.to_string(), "100000000"]);
    }
}

#[test]
fn fault_03_header_past_the_end_is_refused() {
    let bytes = [3_u64.to_le_bytes().as_slice(), b"{}"].concat();
    assert_mentions(&refused(&bytes), &["a header of 3 bytes", "10 bytes"]);
    assert_mentions(&refused(&99_999_999_u64.to_le_bytes()), &["99999999"]);
}

#[test]
fn fault_04_header_that_is_not_utf_8_is_refused() {
    let bytes = [5_u64.to_le_bytes().as_slice(), b"{\"\xff\"}"].concat();
    assert_mentions(&refused(&bytes), &["UTF-8 at byte 10"]);
}

#[test]
fn fault_05_deep_or_broken_json_is_refused() {
    let deep = format!("{{\"a\": {}", "[".repeat(1_000_000));
    for header in ["", "{", "[]", "{}x", "null", "{\"a\": }", "{\"a\": {}}", "{\"a\": [1]}", &deep] {
        assert_mentions(&refused_header(header, &[]), &["header is not a valid safetensors header"]);
    }
    let nested = format!("{{\"__metadata__\": {{\"a\": {}", "{\"b\":".repeat(1_000_000));
    refused_header(&nested, &[]);
    let no_shape = r#"{"w": {"dtype": "F32", "data_offsets": [0, 4]}}"#;
    assert_mentions(&refused_header(no_shape, &[0; 4]), &["tensor `w`", "`shape`"]);
    let negative = r#"{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#;
    assert_mentions(&refused_header(negative, &[0; 4]), &["tensor `w`", "-1"]);
}

#[test]
fn fault_06_duplicate_keys_are_refused() {
    let twice = r#"{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                    "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#;
    assert_mentions(&refused_header(twice, &[0; 8]), &["model.safetensors: w", "twice"]);
    let field = r#"{"w": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}"#;
    assert_mentions(&refused_header(field, &[0; 4]), &["tensor `w`", "duplicate field `shape`"]);
    let metadata = r#"{"__metadata__": {}, "__metadata__": {}}"#;
    assert_mentions(&refused_header(metadata, &[]), &["`__metadata__`", "twice"]);

    let folder = model_folder("tiny_qwen2");
    shard(folder.path());
    let index = fs::read_to_string(folder.path().join(INDEX)).unwrap();
    let entry = "\"model.norm.weight\":\"model-00001-of-00002.safetensors\",";
    fs::write(
        folder.path().join(INDEX),
        index.replacen("\"weight_map\":{", &format!("\"weight_map\":{{{entry}"), 1),
    )
    .unwrap();
    assert_mentions(&model_error(folder.path()), &[INDEX, "`model.norm.weight` is there twice"]);
}

/// A header of two one-row f32 tensors `a` and `b` with the given offsets.
fn two(a: [u64; 2], b: [u64; 2]) -> String {
    let entry = |offsets: [u64; 2]| {
        let elements = offsets[1].saturating_sub(offsets[0]) / 4;
        json!({ "dtype": "F32", "shape": [elements], "data_offsets": offsets })
    };
    json!({ "a": entry(a), "b": entry(b) }).to_string()
}

#[test]
fn fault_07_overlapping_and_gapped_offsets_are_refused() {
    open_bytes(&file_of(&two([0, 8], [8, 16]), &[0; 16])).unwrap();
    open_bytes(&file_of(&two([8, 16], [0, 8]), &[0; 16])).unwrap();
    assert_mentions(
        &refused_header(&two([0, 8], [4, 16]), &[0; 16]),
        &["model.safetensors: b", "inside that of a"],
    );
    assert_mentions(
        &refused_header(&two([0, 16], [4, 8]), &[0; 16]),
        &["model.safetensors: b", "inside that of a"],
    );
    assert_mentions(
        &refused_header(&two([0, 8], [0, 8]), &[0; 8]),
        &["model.safetensors: b", "inside that of a"],
    );
    assert_mentions(
        &refused_header(&two([0, 4], [8, 16]), &[0; 16]),
        &["model.safetensors: b", "gap after a"],
    );
    assert_mentions(
        &refused_header(&two([4, 8], [8, 16]), &[0; 16]),
        &["model.safetensors: a", "gap after the header"],
    );
}

#[test]
fn fault_08_reversed_offsets_are_refused() {
    assert_mentions(
        &refused_header(&two([0, 8], [16, 8]), &[0; 16]),
        &["model.safetensors: b", "16..8 are reversed"],
    );
    let huge = r#"{"w": {"dtype": "U8", "shape": [0], "data_offsets": [18446744073709551615, 18446744073709551615]}}"#;
    assert_mentions(&refused_header(huge, &[]), &["model.safetensors: w", "overflow"]);
}

#[test]
fn fault_09_shape_product_overflow_is_refused() {
    for shape in ["[4294967296, 4294967296]", "[18446744073709551615, 2]", "[9223372036854775808]"] {
        let header = format!(r#"{{"w": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}}}"#);
        assert_mentions(&refused_header(&header, &[]), &["model.safetensors: w", "overflows"]);
    }
    let wrong = r#"{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}"#;
    assert_mentions(&refused_header(wrong, &[0; 8]), &["model.safetensors: w", "needs 12 bytes, found 8"]);
    // A header may claim more axes than any tensor has.
    let axes = vec!["1"; 100_000].join(",");
    let many = format!(r#"{{"w": {{"dtype": "F32", "shape": [{axes}], "data_offsets": [0, 8]}}}}"#);
    assert_mentions(&refused_header(&many, &[0; 8]), &["100000 axes"]);
    // Nothing of the file's length reaches a message.
    let long = "x".repeat(1_000_000);
    refused_header(
        &format!(r#"{{"{long}": {{"dtype": "{long}", "shape": [], "data_offsets": [0, 0]}}}}"#),
        &[],
    );
    refused_header(
        &format!(r#"{{"{long}": {{"dtype": "F32", "shape": "{long}", "data_offsets": [0, 0]}}}}"#),
        &[],
    );
}

#[test]
fn fault_10_unknown_dtype_is_refused() {
    let header = r#"{"w": {"dtype": "Q4_0", "shape": [1], "data_offsets": [0, 4]}}"#;
    assert_mentions(&refused_header(header, &[0; 4]), &["model.safetensors: w", "\"Q4_0\""]);
    // A known type that weights may not have is refused where a weight has it.
    let folder = model_folder("tiny_qwen2");
    rewrite(folder.path(), |tensors| {
        let (_, dtype, shape, bytes) = find(tensors, "model.norm.weight");
        (*dtype, *bytes) = ("F64".to_owned(), vec![0; shape[0] * 8]);
    });
    assert_mentions(
        &model_error(folder.path()),
        &["model.safetensors: model.norm.weight", "F64", "F32, F16 or BF16"],
    );
}

#[test]
fn fault_11_trailing_bytes_are_refused() {
    assert_mentions(&refused_header(&two([0, 8], [8, 16]), &[0; 17]), &["1 bytes follow"]);
    assert_mentions(&refused_header("{}", &[0; 3]), &["3 bytes follow"]);
}

#[test]
fn fault_12_shard_shorter_than_its_header_says_is_refused() {
    let message = refused_header(&two([0, 8], [8, 16]), &[0; 15]);
    assert_mentions(&message, &["model.safetensors: b", "past the end of the file", "cut short"]);
    let folder = model_folder("tiny_qwen2");
    shard(folder.path());
    let path = folder.path().join("model-00002-of-00002.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    assert_mentions(
        &model_error(folder.path()),
        &["model-00002-of-00002.safetensors: ", "past the end of the file"],
    );
}

#[test]
fn fault_13_zero_size_tensor_is_accepted() {
    let header = json!({
        "empty": { "dtype": "F32", "shape": [0], "data_offsets": [0, 0] },
        "w": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] },
        "between": { "dtype": "BF16", "shape": [3, 0], "data_offsets": [8, 8] },
        "scalar": { "dtype": "F16", "shape": [], "data_offsets": [8, 10] },
        "last": { "dtype": "U8", "shape": [0, 18446744073709551615_u64], "data_offsets": [10, 10] },
    });
    let file = open_bytes(&file_of(&header.to_string(), &[0; 10])).unwrap();
    assert_eq!(file.tensor("between").unwrap().shape(), [3, 0]);
    assert_eq!(file.tensor("empty").unwrap().bytes(), [0_u8; 0]);
    assert_eq!(file.tensor("scalar").unwrap().element_count(), 1);
    open_bytes(&file_of("{}", &[])).unwrap();
}

#[test]
fn fault_14_header_of_100_000_tensors_is_read() {
    const COUNT: usize = 100_000;
    let entries: Vec<String> = (0..COUNT)
        .map(|number| {
            let (start, end) = (number * 4, number * 4 + 4);
            format!(r#""model.layers.{number}.weight":{{"dtype":"F32","shape":[1],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let bytes = file_of(&format!("{{{}}}", entries.join(",")), &vec![0; COUNT * 4]);
    let start = std::time::Instant::now();
    let file = open_bytes(&bytes).unwrap();
    println!("{COUNT} tensors: {:?}", start.elapsed());
    assert_eq!(file.entries().count(), COUNT);
    assert_eq!(file.entry("model.layers.99999.weight").unwrap().shape, [1]);
}

#[test]
fn fault_16_index_that_leaves_the_folder_is_refused() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret.safetensors");
    write_tensors(&secret, &[]);
    let folder = model_folder("tiny_qwen2");
    let index = shard(folder.path());
    let absolute = secret.display().to_string();
    for name in
        ["../secret.safetensors", &absolute, "a/../../b", "..", ".", "", "sub/file", "./x", "..\\x", "x/"]
    {
        point_to(folder.path(), &index, name);
        assert_mentions(&model_error(folder.path()), &[INDEX, &format!("\"{name}\""), "plain file name"]);
    }
    point_to(folder.path(), &index, "link.safetensors");
    std::os::unix::fs::symlink(&secret, folder.path().join("link.safetensors")).unwrap();
    assert_mentions(&model_error(folder.path()), &[INDEX, "\"link.safetensors\"", "link that leaves"]);
}

#[test]
fn fault_16_single_file_that_is_a_link_out_is_refused() {
    let outside = model_folder("tiny_qwen2");
    for file in [WEIGHTS, "config.json"] {
        let folder = model_folder("tiny_qwen2");
        fs::remove_file(folder.path().join(file)).unwrap();
        std::os::unix::fs::symlink(outside.path().join(file), folder.path().join(file)).unwrap();
        assert_mentions(&model_error(folder.path()), &[file, "link that leaves"]);
    }
}

#[test]
fn fault_16_links_inside_the_folder_and_into_the_hub_cache_are_fine() {
    let original = fs::read("tests/fixtures/tiny_qwen2/model.safetensors").unwrap();
    let folder = model_folder("tiny_qwen2");
    fs::rename(folder.path().join(WEIGHTS), folder.path().join("weights")).unwrap();
    std::os::unix::fs::symlink("weights", folder.path().join(WEIGHTS)).unwrap();
    BaseModel::open(folder.path()).unwrap();

    let cache = tempfile::tempdir().unwrap();
    let snapshot = cache.path().join("models--org--name/snapshots/abc");
    let blobs = cache.path().join("models--org--name/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::copy("tests/fixtures/tiny_qwen2/config.json", snapshot.join("config.json")).unwrap();
    fs::write(blobs.join("1234"), original).unwrap();
    std::os::unix::fs::symlink("../../blobs/1234", snapshot.join(WEIGHTS)).unwrap();
    BaseModel::open(&snapshot).unwrap();
    // The whole cache may lie behind a link.
    let link = folder.path().join("cache");
    std::os::unix::fs::symlink(cache.path(), &link).unwrap();
    BaseModel::open(link.join("models--org--name/snapshots/abc")).unwrap();
}

#[test]
fn fault_17_missing_shards_and_tensors_are_listed() {
    let folder = model_folder("tiny_qwen2");
    let index = shard(folder.path());
    fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert_mentions(
        &model_error(folder.path()),
        &[INDEX, "1 of 2 shards are missing: model-00002-of-00002.safetensors"],
    );
    fs::remove_file(folder.path().join(INDEX)).unwrap();
    assert_mentions(&model_error(folder.path()), &["neither model.safetensors nor"]);

    let folder = model_folder("tiny_qwen3");
    rewrite(folder.path(), |tensors| tensors.retain(|(name, ..)| !name.ends_with("q_norm.weight")));
    assert_mentions(
        &model_error(folder.path()),
        &[
            "2 tensors are missing",
            "model.layers.0.self_attn.q_norm.weight, model.layers.1.self_attn.q_norm.weight",
        ],
    );
    rewrite(folder.path(), |tensors| tensors.retain(|(name, ..)| !name.contains("layers.1.")));
    assert_mentions(&model_error(folder.path()), &["12 tensors are missing", "and 7 more"]);
    rewrite(folder.path(), |tensors| tensors.clear());
    assert_mentions(&model_error(folder.path()), &["25 tensors are missing"]);

    // The index promises a tensor that its shard does not hold.
    let folder = model_folder("tiny_qwen2");
    shard(folder.path());
    point_to(folder.path(), &index, "model-00001-of-00002.safetensors");
    assert_mentions(&model_error(folder.path()), &["1 tensor", "missing: model.norm.weight"]);
    fs::write(folder.path().join(INDEX), "{\"metadata\": {}}").unwrap();
    assert_mentions(&model_error(folder.path()), &[INDEX, "`weight_map`"]);
    fs::write(folder.path().join(INDEX), "{\"weight_map\": {}}").unwrap();
    assert_mentions(&model_error(folder.path()), &[INDEX, "`weight_map` is empty"]);
}

#[test]
fn fault_18_shape_against_the_configuration_is_refused() {
    let folder = model_folder("tiny_qwen2");
    rewrite(folder.path(), |tensors| {
        let (_, _, shape, _) = find(tensors, "model.layers.1.mlp.down_proj.weight");
        shape.reverse();
    });
    assert_mentions(
        &model_error(folder.path()),
        &["model.safetensors: model.layers.1.mlp.down_proj.weight", "[128, 64]", "expected [64, 128]"],
    );
    // A tied model's file may hold its head again, but not another one.
    let folder = model_folder("tiny_qwen2");
    rewrite(folder.path(), |tensors| {
        let (_, dtype, shape, bytes) = find(tensors, "model.embed_tokens.weight").clone();
        tensors.push(("lm_head.weight".to_owned(), dtype, shape, bytes));
    });
    BaseModel::open(folder.path()).unwrap();
    rewrite(folder.path(), |tensors| find(tensors, "lm_head.weight").3[0] ^= 1);
    assert_mentions(
        &model_error(folder.path()),
        &["model.safetensors: lm_head.weight", "tie_word_embeddings"],
    );
}

#[test]
fn fault_19_nan_and_infinite_weights_are_named() {
    type Encode = fn(f32) -> Vec<u8>;
    let encode: [(&str, Encode); 3] = [
        ("F32", |value| value.to_le_bytes().to_vec()),
        ("F16", |value| half::f16::from_f32(value).to_le_bytes().to_vec()),
        ("BF16", |value| half::bf16::from_f32(value).to_le_bytes().to_vec()),
    ];
    let name = "model.layers.1.mlp.up_proj.weight";
    for (dtype, encode) in encode {
        // The largest finite values pass.
        let largest = if dtype == "F16" { 65504.0 } else { 3.0e38 };
        let fill = |values: &dyn Fn(usize) -> f32| {
            let folder = model_folder("tiny_qwen2");
            rewrite(folder.path(), |tensors| {
                let tensor = find(tensors, name);
                tensor.1 = dtype.to_owned();
                tensor.3 = (0..128 * 64).flat_map(|element| encode(values(element))).collect();
            });
            folder
        };
        let sign = |element: usize| if element.is_multiple_of(2) { largest } else { -largest };
        BaseModel::open(fill(&sign).path()).unwrap();
        for (bad, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            // The first, the last, and one on both sides of the blocks that the search reads.
            for element in [0, 1023, 1024, 2047, 2048, 128 * 64 - 1] {
                let folder = fill(&|other| if other == element { bad } else { 0.5 });
                let place = format!("{shown} at [{}, {}], 1 of 8192", element / 64, element % 64);
                assert_mentions(&model_error(folder.path()), &[&format!("{WEIGHTS}: {name}"), &place]);
            }
        }
    }
}

#[test]
fn fault_20_pickled_weights_say_how_to_convert() {
    for file in ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"] {
        let folder = model_folder("tiny_qwen2");
        fs::rename(folder.path().join(WEIGHTS), folder.path().join(file)).unwrap();
        assert_mentions(&model_error(folder.path()), &[file, "pickle", "safe_serialization=True"]);
    }
    let folder = model_folder("tiny_qwen2");
    fs::rename(folder.path().join(WEIGHTS), folder.path().join("model.gguf")).unwrap();
    assert_mentions(&model_error(folder.path()), &["model.gguf", "fastlora import"]);
    // Left by the trainer beside the weights, harmless.
    let folder = model_folder("tiny_qwen2");
    fs::write(folder.path().join("training_args.bin"), "").unwrap();
    BaseModel::open(folder.path()).unwrap();
}

#[test]
fn a_missing_folder_or_configuration_is_a_model_error() {
    let folder = tempfile::tempdir().unwrap();
    assert_mentions(&model_error(folder.path()), &["`config.json` is missing"]);
    assert_mentions(&model_error(&folder.path().join("none")), &["no such folder"]);
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    assert_eq!(BaseModel::open(&file).err().unwrap().kind(), ErrorKind::Model);
}

mod hostile {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Any change of a few bytes gives a file that opens or an error, never a panic or a wild read.
        #[test]
        fn changed_bytes_never_panic(changes in prop::collection::vec((0_usize..3000, any::<u8>()), 1..8), cut in 0_usize..3000) {
            let mut bytes = fs::read("tests/fixtures/tiny_qwen2/adapter_init_b0/adapter_model.safetensors").unwrap();
            for (place, value) in changes {
                bytes[place] = value;
            }
            for bytes in [&bytes[..], &bytes[..bytes.len() - cut]] {
                if let Ok(file) = open_bytes(bytes) {
                    for (name, entry) in file.entries() {
                        prop_assert_eq!(file.bytes(name).unwrap().len(), entry.range.len());
                    }
                }
            }
        }
    }
}
