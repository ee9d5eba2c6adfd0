//! The header of a safetensors file.

use super::*;

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
