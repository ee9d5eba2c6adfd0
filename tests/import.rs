//! `fastlora import` through the binary.

use std::path::{Path, PathBuf};

use assert_cmd::Command;

fn import(source: &Path, folder: &Path, more: &[&str]) -> std::process::Output {
    let mut command = Command::cargo_bin("fastlora").unwrap();
    command.arg("import").arg(source).arg("-o").arg(folder).args(more).output().unwrap()
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf/tiny_llama.gguf")
}

#[test]
fn a_model_is_imported_and_described() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("model");
    let output = import(&fixture(), &folder, &["--json", "--dtype", "bf16"]);
    assert!(output.status.success(), "{output:?}");
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["architecture"], "llama");
    assert_eq!(result["dtype"], "bf16");
    assert_eq!(result["tensors"], 21);
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");
}

#[test]
fn fault_46_a_folder_in_use_is_not_replaced_unasked() {
    let parent = tempfile::tempdir().unwrap();
    std::fs::write(parent.path().join("config.json"), "mine").unwrap();
    let output = import(&fixture(), parent.path(), &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--overwrite"));
    assert_eq!(std::fs::read_to_string(parent.path().join("config.json")).unwrap(), "mine");
}

#[test]
fn fault_12_a_file_cut_short_is_a_model_error_that_names_the_place() {
    let parent = tempfile::tempdir().unwrap();
    let (source, folder) = (parent.path().join("cut.gguf"), parent.path().join("model"));
    let bytes = std::fs::read(fixture()).unwrap();
    std::fs::write(&source, &bytes[..bytes.len() - 1]).unwrap();
    let output = import(&source, &folder, &["--json"]);
    assert_eq!(output.status.code(), Some(4));
    let error: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let place = error["error"]["where"].as_str().unwrap();
    assert!(place.contains("cut.gguf: tensor "), "{place}");
    assert!(!folder.exists());
}
