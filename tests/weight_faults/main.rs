//! Faults of weight files: each is one model error that names the file and the tensor, found when the model is opened.

mod header;
mod model;

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
