//! Faults of configuration, adapters, models and devices: the exit code, what to do, and the outputs as they were.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::fixture;
use crate::workspace::Workspace;

/// Refused with `code`: into a new folder, which does not appear, and over an earlier run, which stays as it is.
#[track_caller]
fn refused(workspace: &Workspace, arguments: &[&str], code: i32, parts: &[&str]) {
    if !workspace.path("earlier").exists() {
        workspace.train_into("earlier", &["--max-steps", "1", "--val-data", "val.jsonl"]).succeeded();
    }
    let before = workspace.snapshot("earlier");
    workspace.train_into("new", arguments).refused(code, parts);
    assert!(!workspace.path("new").exists());
    workspace.train_into("earlier", &[arguments, &["--overwrite"]].concat()).refused(code, parts);
    assert!(workspace.snapshot("earlier") == before, "the earlier run has changed");
}

#[test]
fn fault_43_unknown_keys_and_flags() {
    let workspace = Workspace::with_data();
    refused(&workspace, &["--set", "lora_rank=4"], 2, &["`lora_rank`", "did you mean `lora_r`"]);
    workspace.write("config.json", r#"{"seed": 1, "batchsize": 2}"#);
    refused(&workspace, &["config.json"], 2, &["config.json", "`batchsize`", "did you mean `batch_size`"]);
    workspace.write("config.json", r#"{"val_data": {"path": "val.jsonl", "wieght": 1}}"#);
    refused(&workspace, &["config.json"], 2, &["config.json:1", "`wieght`"]);
    workspace.write("config.json", "{\"seed\": 1,\n]");
    refused(&workspace, &["config.json"], 2, &["config.json:2:1"]);
    refused(&workspace, &["missing.json"], 2, &["missing.json", "fastlora train CONFIG"]);
    refused(&workspace, &["--set", "seed"], 2, &["`seed` has no `=`"]);
    let finished = workspace.train_into("new", &["--lora-rank", "4"]);
    assert_eq!(finished.code, 2);
    assert!(
        finished.stderr.contains("--lora-rank") && finished.stderr.contains("--lora-r"),
        "{}",
        finished.stderr
    );
}

#[test]
fn fault_44_values_out_of_range_name_the_range() {
    let workspace = Workspace::with_data();
    for (pair, range) in [
        ("lora_r=0", "1 to 4096"),
        ("learning_rate=-1e-4", "above 0"),
        ("batch_size=0", "1 to 1048576"),
        ("gradient_accumulation_steps=0", "1 to 1048576"),
        ("lora_dropout=1.0", "below 1"),
        ("max_length=1", "2 to 16777216"),
        ("threads=0", "1 to 1024"),
        ("max_grad_norm=0", "above 0"),
    ] {
        let key = pair.split('=').next().unwrap();
        refused(&workspace, &["--set", pair], 2, &[key, range]);
    }
    refused(&workspace, &["--learning-rate", "NaN"], 2, &["learning_rate", "NaN", "above 0"]);
    refused(&workspace, &["--lora-alpha", "inf"], 2, &["lora_alpha", "above 0"]);
    refused(&workspace, &["--set", "lora_r=-3"], 2, &["lora_r"]);
    refused(&workspace, &["--set", "loss_on=some"], 2, &["loss_on", "completion"]);
}

#[test]
fn fault_45_modules_that_match_nothing_are_listed() {
    let workspace = Workspace::with_data();
    let listed = ["lora_target_modules", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"];
    refused(&workspace, &["--lora-target-modules", "q_proj,q_prj"], 2, &[&["`q_prj`"], &listed[..]].concat());
    refused(&workspace, &["--lora-target-modules", r".*\.lm_head"], 2, &listed);
    refused(&workspace, &["--lora-target-modules", "(q"], 2, &["lora_target_modules", "regular expression"]);
    refused(&workspace, &["--set", "lora_target_modules=[]"], 2, &["lora_target_modules", "empty"]);
}

#[test]
fn fault_46_a_folder_in_use_needs_overwrite_which_takes_only_the_runs_own_files() {
    let workspace = Workspace::with_data();
    workspace.train_into("out", &["--max-steps", "2", "--val-data", "val.jsonl"]).succeeded();
    workspace.write("out/notes.txt", "mine");
    workspace.write("out/plots/loss.svg", "<svg/>");
    let before = workspace.snapshot("out");
    workspace.train_into("out", &["--max-steps", "1"]).refused(2, &["out", "not empty", "--overwrite"]);
    assert!(workspace.snapshot("out") == before);

    workspace.train_into("out", &["--max-steps", "1", "--overwrite"]).succeeded();
    let after = workspace.snapshot("out");
    for name in ["out/notes.txt", "out/plots/loss.svg"] {
        assert_eq!(after.get(&workspace.path(name)), before.get(&workspace.path(name)), "{name}");
    }
    assert_eq!(workspace.metrics("out").len(), 1);
    // The run had no validation, so the best adapter of before would be a lie.
    assert!(!workspace.path("out/best").exists());
    let names = |files: &std::collections::BTreeMap<std::path::PathBuf, Vec<u8>>| {
        files.keys().filter(|path| !path.to_string_lossy().contains("best")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(names(&after), names(&before), "no leftovers, nothing missing");
    // A file that stands where the folder should be.
    workspace.write("file", "");
    let finished = workspace.train_into("file", &["--max-steps", "1", "--overwrite"]);
    assert!(matches!(finished.code, 2 | 6), "{}", finished.stderr);
}

#[test]
fn missing_data_models_and_devices_have_their_codes() {
    let workspace = Workspace::with_data();
    refused(&workspace, &["--val-data", "none.jsonl"], 3, &["none.jsonl"]);
    // No kernels in this build, no driver, or no such GPU: each names the device and the way out.
    refused(&workspace, &["--device", "cuda:99"], 5, &["cuda:99"]);
    refused(&workspace, &["--device", "cpu", "--dtype", "bf16"], 5, &["dtype", "f32"]);
    let train = |model: &str, parts: &[&str]| {
        let usual = ["-m", model, "--train-data", "train.jsonl", "--val-data", "none", "-o", "new"];
        workspace.train(&usual).refused(4, parts);
        assert!(!workspace.path("new").exists());
    };
    train("./no-such-folder", &["no-such-folder"]);
    // A hub id that is in no cache, without a network.
    train("nobody/nothing", &["nobody/nothing"]);
    workspace.write("empty/notes.txt", "");
    train("./empty", &["empty", "config.json"]);
    let folder = workspace.path("pickled");
    std::fs::create_dir(&folder).unwrap();
    std::fs::copy(fixture("tiny_qwen2/config.json"), folder.join("config.json")).unwrap();
    std::fs::write(folder.join("pytorch_model.bin"), "pickle").unwrap();
    train("./pickled", &["pytorch_model.bin", "safe_serialization"]);
    // Text without a tokenizer.
    workspace.write("text.jsonl", r#"{"instruction": "1", "output": "2"}"#);
    let model = fixture("tiny_qwen2");
    let usual =
        ["-m", model.to_str().unwrap(), "--train-data", "text.jsonl", "--val-data", "none", "-o", "new"];
    workspace.train(&usual).refused(4, &["tokenizer"]);
}

/// A copy of a PEFT adapter whose configuration is changed.
fn adapter(workspace: &Workspace, name: &str, change: impl Fn(&mut Value)) -> String {
    let source = fixture("tiny_qwen2/adapter_init_brand");
    let read = |file: &str| std::fs::read(source.join(file)).unwrap();
    let mut config: Value = serde_json::from_slice(&read("adapter_config.json")).unwrap();
    change(&mut config);
    workspace.write(&format!("{name}/adapter_config.json"), config.to_string());
    workspace.write(&format!("{name}/adapter_model.safetensors"), read("adapter_model.safetensors"));
    name.to_string()
}

#[test]
fn fault_61_an_adapter_of_another_base_is_refused() {
    let workspace = Workspace::with_data();
    let other = fixture("tiny_qwen3/adapter_init_brand");
    let parts = [other.to_str().unwrap(), "belongs to another base", "another shape"];
    refused(&workspace, &["--init-adapter", other.to_str().unwrap()], 4, &parts);
    let renamed = adapter(&workspace, "renamed", |config| config["target_modules"] = json!(["query"]));
    refused(&workspace, &["--init-adapter", &renamed], 4, &["renamed", "`query`"]);
    let fewer = adapter(&workspace, "fewer", |config| config["target_modules"] = json!(["q_proj"]));
    refused(&workspace, &["--init-adapter", &fewer], 4, &["fewer", "not in the model"]);
}

#[test]
fn fault_62_an_empty_or_missing_adapter_is_refused() {
    let workspace = Workspace::with_data();
    let empty = adapter(&workspace, "empty", |_| {});
    let header = b"{}      ";
    workspace.write(
        "empty/adapter_model.safetensors",
        [&(header.len() as u64).to_le_bytes()[..], header].concat(),
    );
    refused(&workspace, &["--init-adapter", &empty], 4, &["empty", "no tensors"]);
    refused(&workspace, &["--init-adapter", "nowhere"], 4, &["nowhere", "adapter_config.json"]);
    std::fs::remove_file(workspace.path("empty/adapter_model.safetensors")).unwrap();
    refused(&workspace, &["--init-adapter", &empty], 4, &["empty", "adapter_model.safetensors"]);
}

#[test]
fn an_adapter_brings_its_own_rank_and_contradictions_are_refused() {
    let workspace = Workspace::with_data();
    let start = adapter(&workspace, "start", |_| {});
    for (flag, value, key) in [
        ("--lora-r", "8", "lora_r"),
        ("--lora-alpha", "16", "lora_alpha"),
        ("--lora-target-modules", "q_proj", "lora_target_modules"),
        ("--use-rslora", "true", "use_rslora"),
    ] {
        refused(
            &workspace,
            &["--init-adapter", &start, flag, value],
            2,
            &[key, "init_adapter", "remove the key"],
        );
    }
    // The same value said twice is no contradiction.
    let same = ["--init-adapter", &start, "--lora-r", "4", "--max-steps", "1"];
    workspace.train_into("out", &same).succeeded();
    let config: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("out/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(8)));
    assert_eq!(config["target_modules"].as_array().unwrap().len(), 7);
    let provenance: Value =
        serde_json::from_slice(&std::fs::read(workspace.path("out/fastlora.json")).unwrap()).unwrap();
    assert_eq!(provenance["init_adapter"], "start");
}

#[test]
fn an_output_folder_that_cannot_be_made_is_an_io_error() {
    let workspace = Workspace::with_data();
    workspace.write("file", "mine");
    let output = Path::new("file").join("out");
    let finished = workspace.train_into(output.to_str().unwrap(), &["--max-steps", "1"]);
    finished.refused(6, &["file/out"]);
    assert_eq!(std::fs::read(workspace.path("file")).unwrap(), b"mine");
}
