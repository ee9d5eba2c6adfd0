//! The files of a model together: shards, links, names, shapes and values.

use super::*;

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
