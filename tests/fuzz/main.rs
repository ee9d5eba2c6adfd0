//! Broken input of every kind: valid files with random damage are read, and whatever comes of it must be a value or an error
//! that says something, never a panic, an abort or an endless loop.
//!
//! Each target begins with the inputs that once failed (`tests/fixtures/fuzz/TARGET-*`), then takes `FASTLORA_FUZZ_CASES` random
//! ones (400 without it, the same ones each time; `FASTLORA_FUZZ_SEED` chooses others). A failure leaves its input in the
//! system's folder for temporary files and says where: copy it to the fixtures with its repair.
//!
//!     FASTLORA_FUZZ_CASES=100000 FASTLORA_FUZZ_SEED=7 cargo test --release --test fuzz

mod damage;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use fastlora::error::Result;

use damage::{Damage, Random};
use targets::Target;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// What once failed, by file name.
fn known_failures(target: &str) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = std::fs::read_dir(fixtures().join("fuzz")) else { return Vec::new() };
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let prefix = format!("{target}-");
    let mut names: Vec<String> = names.filter(|name| name.starts_with(&prefix)).collect();
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let bytes = std::fs::read(fixtures().join("fuzz").join(&name)).unwrap();
            (name, bytes)
        })
        .collect()
}

/// Reads one input; an error must say what is wrong.
fn check(target: &Target, name: &str, input: &[u8]) -> Result<()> {
    let folder = tempfile::tempdir().unwrap();
    match catch_unwind(AssertUnwindSafe(|| (target.read)(input, folder.path()))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            assert!(!error.to_string().trim().is_empty(), "{}: {name}: an error without a word", target.name);
            assert_ne!(error.kind().exit_code(), 1, "{}: {name}: a bug of ours: {error}", target.name);
            Err(error)
        }
        Err(_) => {
            let kept = std::env::temp_dir().join(format!("fuzz-{}-{name}", target.name));
            std::fs::write(&kept, input).unwrap();
            panic!("{}: {name}: a panic; the input is {}", target.name, kept.display());
        }
    }
}

fn run(target: Target) {
    for (name, input) in known_failures(target.name) {
        let _ = check(&target, &name, &input);
    }
    for (number, seed) in target.seeds.iter().enumerate() {
        if let Err(error) = check(&target, &format!("seed-{number}"), seed) {
            panic!("{}: seed {number} is whole and was refused: {error}", target.name);
        }
    }
    let (cases, seed) = (setting("FASTLORA_FUZZ_CASES", 400), setting("FASTLORA_FUZZ_SEED", 1));
    let mut accepted = 0;
    for case in 0..cases {
        let mut random = Random::new(seed, case);
        let source = &target.seeds[random.below(target.seeds.len())];
        let input = Damage { words: target.words, within: target.within }.of(source, &mut random);
        accepted += u64::from(check(&target, &format!("{seed}-{case}"), &input).is_ok());
    }
    println!("{}: {cases} inputs, {accepted} of them accepted", target.name);
    // Damage that is always noticed at once, or never, reaches little of the code.
    assert!(cases < 400 || (accepted > 0 && accepted < cases), "{accepted} of {cases} accepted");
}

macro_rules! fuzz {
    ($($name:ident)*) => { $(#[test] fn $name() { run(targets::$name()); })* };
}

fuzz! { weights shard_index model_config gguf json_records json_lines tokenizer chat_template configuration adapter_config adapter_weights }
