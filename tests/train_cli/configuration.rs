//! File, `--set` and flags; the resolved configuration; what is printed where.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::fixture;
use crate::workspace::Workspace;

fn resolved(workspace: &Workspace, output: &str) -> Value {
    serde_json::from_slice(&std::fs::read(workspace.path(output).join("training_config.json")).unwrap())
        .unwrap()
}

#[test]
fn the_resolved_configuration_gives_the_same_bits_again() {
    let workspace = Workspace::with_data();
    let options = [
        "--val-data",
        "val.jsonl",
        "--seed",
        "5",
        "--lora-target-modules",
        r".*\.(q|up)_proj",
        "--use-rslora",
        "true",
        "--lora-dropout",
        "0.2",
        "--lr-scheduler",
        "cosine",
        "--warmup-steps",
        "2",
        "--set",
        "weight_decay=0.1",
        "--batch-size",
        "3",
    ];
    workspace.train_into("out", &options).succeeded();
    workspace.train(&["out/training_config.json", "-o", "again"]).succeeded();
    assert!(workspace.adapter_bytes("again") == workspace.adapter_bytes("out"));
    assert!(workspace.adapter_bytes("again/best") == workspace.adapter_bytes("out/best"));
    assert_eq!(workspace.of_steps("again", "loss"), workspace.of_steps("out", "loss"));
    let (mut first, mut second) = (resolved(&workspace, "out"), resolved(&workspace, "again"));
    for (config, output) in [(&mut first, "out"), (&mut second, "again")] {
        assert_eq!(config["output_dir"], output);
        config.as_object_mut().unwrap().remove("output_dir");
    }
    assert_eq!(first, second);
}

#[test]
fn a_flag_wins_over_set_and_set_over_the_file() {
    let workspace = Workspace::with_data();
    let file = json!({
        "model_name": fixture("tiny_qwen2"), "train_data": ["train.jsonl"], "val_data": "val.jsonl", "output_dir": "out",
        "seed": 1, "batch_size": 8, "lora_r": 2, "max_steps": 3,
    });
    // The default configuration file is read where no other is named.
    workspace.write("configs/training_config.json", file.to_string());
    let log = workspace.train(&["--set", "seed=2", "--set", "lora_r=3", "--seed", "3"]).succeeded().stderr;
    let config = resolved(&workspace, "out");
    let found = ["seed", "lora_r", "batch_size", "max_steps"].map(|key| config[key].as_u64().unwrap());
    assert_eq!(found, [3, 3, 8, 3]);
    // Every key of the documentation is there with its value, and printed.
    assert_eq!((&config["learning_rate"], &config["lr_scheduler"]), (&json!(2e-4), &json!("constant")));
    for key in config.as_object().unwrap().keys() {
        assert!(log.contains(&format!("\"{key}\":")), "{key} is not printed");
    }
    assert_eq!(config.as_object().unwrap().len(), fastlora::config::Options::keys().len());
    // `null` takes a value of the file back.
    let back = ["--set", "max_steps=null", "--set", "val_data=null", "--num-epochs", "1", "-o", "back"];
    workspace.train(&back).succeeded();
    assert_eq!(workspace.metrics("back").len(), 5, "40 samples in batches of 8, no validation");
}

#[test]
fn json_is_one_object_on_standard_output() {
    let workspace = Workspace::with_data();
    let finished =
        workspace.train_into("out", &["--json", "--val-data", "val.jsonl", "--max-steps", "3"]).succeeded();
    let result = finished.json();
    let (steps, validations) = (workspace.steps("out"), workspace.validations("out"));
    assert_eq!((&result["steps"], &result["output_dir"]), (&json!(3), &json!("out")));
    assert_eq!((&result["first_loss"], &result["last_loss"]), (&steps[0]["loss"], &steps[2]["loss"]));
    assert_eq!(result["validation_loss"], validations[0]["loss"]);
    assert_eq!(result["best"], json!({ "step": 3, "loss": validations[0]["loss"], "folder": "out/best" }));

    let finished = workspace.train_into("new", &["--json", "--set", "lora_r=0"]).refused(2, &["lora_r"]);
    let error = &finished.json()["error"];
    assert_eq!(
        (&error["kind"], &error["exit_code"], &error["where"]),
        (&json!("config"), &json!(2), &json!("lora_r"))
    );
    assert!(error["hint"].as_str().unwrap().contains("1 to 4096"), "{error}");
}

#[test]
fn quiet_is_silent_and_the_log_goes_to_standard_error() {
    let workspace = Workspace::with_data();
    let finished = workspace.train_into("out", &["-q", "--max-steps", "1"]).succeeded();
    assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("", ""));
    let finished = workspace.train_into("loud", &["--max-steps", "2"]).succeeded();
    assert_eq!(finished.stdout, "");
    for part in ["trainable parameters: ", "%)", "step 1/2 loss ", "norm ", "tokens/s ETA ", "adapter: loud"]
    {
        assert!(finished.stderr.contains(part), "expected `{part}` in {}", finished.stderr);
    }
    // The counts are PEFT's: q and v of two layers with r = 8, 64 → 64 and 64 → 32.
    assert!(finished.stderr.contains(&format!("trainable parameters: {} of ", 2 * 8 * (64 + 64 + 64 + 32))));
    // Errors are not silenced.
    workspace.train_into("out", &["-q"]).refused(2, &["not empty"]);
}

#[test]
fn help_names_every_key() {
    let help = Workspace::new().train(&["--help"]).succeeded().stdout;
    for key in fastlora::config::Options::keys() {
        assert!(help.contains(&format!("--{}", key.replace('_', "-"))), "{key}");
    }
    for flag in ["--set", "--init-adapter", "--overwrite", "--json", "--quiet"] {
        assert!(help.contains(flag), "{flag}");
    }
}

/// What a run with a terminal as its standard error shows there.
fn on_terminal(workspace: &Workspace, output: &str, no_colour: bool) -> String {
    let (mut leader, mut follower) = (-1, -1);
    let size = libc::winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: both numbers outlive the call; name and settings may be null; the size is read only.
    let opened =
        unsafe { libc::openpty(&mut leader, &mut follower, std::ptr::null_mut(), std::ptr::null(), &size) };
    assert_eq!(opened, 0);
    // SAFETY: openpty gave both, and nobody else owns them.
    let (leader, follower) = unsafe { (OwnedFd::from_raw_fd(leader), OwnedFd::from_raw_fd(follower)) };
    let mut command = Command::new(assert_cmd::cargo::cargo_bin("fastlora"));
    command.arg("train").arg("-m").arg(fixture("tiny_qwen2"));
    command.args([
        "--train-data",
        "train.jsonl",
        "--val-data",
        "val.jsonl",
        "--num-epochs",
        "1",
        "-o",
        output,
    ]);
    command.current_dir(workspace.path("")).env("TERM", "xterm-256color").env_remove("NO_COLOR");
    if no_colour {
        command.env("NO_COLOR", "1");
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(follower).spawn().unwrap();
    // The command still holds the terminal; its end is seen when the last holder is gone.
    drop(command);
    let reader = std::thread::spawn(move || {
        let (mut terminal, mut shown, mut buffer) = (File::from(leader), Vec::new(), [0; 4096]);
        // A terminal that nobody holds any more is an error here, not an end.
        while let Ok(count @ 1..) = terminal.read(&mut buffer) {
            shown.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8_lossy(&shown).into_owned()
    });
    assert!(child.wait().unwrap().success());
    reader.join().unwrap()
}

/// Whether the text has a sequence that selects a colour or weight (`ESC [ … m`).
fn has_colour(text: &str) -> bool {
    text.split("\u{1b}[").skip(1).any(|rest| {
        let digits = |character: char| character.is_ascii_digit() || character == ';';
        rest.trim_start_matches(digits).starts_with('m')
    })
}

#[test]
fn a_terminal_gets_a_bar_and_no_color_takes_its_colours() {
    let workspace = Workspace::with_data();
    let coloured = on_terminal(&workspace, "coloured", false);
    assert!(has_colour(&coloured), "{coloured:?}");
    for part in ["10/10", "loss ", "rate ", "norm ", "tokens/s", "ETA", "validation at step 10"] {
        assert!(coloured.contains(part), "expected `{part}` in {coloured:?}");
    }
    let plain = on_terminal(&workspace, "plain", true);
    assert!(plain.contains("10/10"), "{plain:?}");
    assert!(!has_colour(&plain), "{plain:?}");
}

#[test]
fn likely_mistakes_are_told_with_what_to_do() {
    let workspace = Workspace::with_data();
    workspace.text_model("model");
    workspace.write("list.json", r#"[{"instruction": "a", "output": "b"}]"#);
    for data in ["train.jsonl", "list.json"] {
        let advice = format!("this looks like data: fastlora train --train-data {data}");
        workspace.train(&[data]).refused(2, &[data, &advice]);
    }
    workspace.train(&["model"]).refused(2, &["a folder is no configuration: -m FOLDER names a model"]);
    workspace.train(&["missing.json"]).refused(2, &["missing.json", "name an existing file"]);
    // Files that nobody named are the defaults.
    let model = ["-m", "model"];
    let parts = ["data/train_data.json", "name another file with --train-data"];
    workspace.train(&model).refused(3, &parts);
    let parts = ["data/val_data.json", "`--val-data none` for no validation"];
    workspace.train(&[&model[..], &["--train-data", "train.jsonl"]].concat()).refused(3, &parts);
}
