//! Whether the processes of a run are about to do the same: configuration, base, data, start, program and kind of device.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::resume::{FREE_KEYS, Start, device_kind};
use crate::distributed::Group;
use crate::error::{Error, Result, shorten};

/// Characters of a value that are shown.
const SHOWN: usize = 60;
/// What says where the run goes on.
const STEPS: &str = "steps done";

/// What must be the same in every process, by name.
type Facts = BTreeMap<String, Value>;

/// Compares this process with the others.
///
/// # Errors
/// All differences from rank 0, with their ranks (config); in every process the same.
pub(super) fn agree(group: &mut Group, provenance: &Value, start: &Start, device: &str) -> Result<()> {
    let own = serde_json::to_vec(&facts(provenance, start, device))
        .map_err(|source| Error::internal("cannot write the configuration").caused_by(source))?;
    let all: Vec<Facts> =
        group.gather(&own)?.iter().map(|bytes| serde_json::from_slice(bytes).unwrap_or_default()).collect();
    compare(&all)
}

fn facts(provenance: &Value, start: &Start, device: &str) -> Facts {
    let config = provenance["config"].as_object().into_iter().flatten();
    let mut facts: Facts = config
        .filter(|(key, _)| !FREE_KEYS.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let mut add = |name: &str, value: Value| facts.insert(name.into(), value);
    add("fastlora", provenance["fastlora_version"].clone());
    add("base's SHA-256", provenance["base_sha256"].clone());
    add("tokenizer's SHA-256", provenance["tokenizer_sha256"].clone());
    add("data's SHA-256", provenance["data_sha256"].clone());
    add("weights of the data", provenance["weights"].clone());
    add("kind of device", json!(device_kind(device)));
    add(STEPS, json!(start.steps()));
    if let Some(state) = start.state() {
        let mut hasher = Sha256::new();
        for tensor in state.adapter.iter().chain(state.moments.iter().flatten()) {
            hasher.update(bytemuck::cast_slice(&tensor.values));
        }
        add("checkpoint's SHA-256", json!(format!("{:x}", hasher.finalize())));
    }
    facts
}

fn compare(all: &[Facts]) -> Result<()> {
    let Some((first, others)) = all.split_first() else { return Ok(()) };
    let shown = |value: Option<&Value>| shorten(&json!(value).to_string(), SHOWN).into_owned();
    let mut differences = Vec::new();
    for (index, other) in others.iter().enumerate() {
        for name in first.keys().chain(other.keys().filter(|name| !first.contains_key(*name))) {
            if first.get(name) != other.get(name) {
                let (theirs, ours) = (shown(other.get(name)), shown(first.get(name)));
                differences.push(format!("{name} is {theirs} at rank {}, {ours} at rank 0", index + 1));
            }
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    let hint = match differences.iter().any(|difference| difference.starts_with(STEPS)) {
        true => {
            "all processes must see the same output_dir, on a shared file system, to go on from its checkpoint"
        }
        false => "give all processes the same configuration, model, data and program",
    };
    Err(Error::config(format!("the processes would not do the same: {}", differences.join("; "))).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fault_66_every_difference_is_listed_with_its_rank() {
        let provenance = json!({
            "fastlora_version": "1",
            "base_sha256": { "model.safetensors": "ab" },
            "data_sha256": { "train": "cd" },
            "config": { "lora_r": 8, "seed": 1, "threads": 4, "output_dir": "a" },
        });
        let facts_of = |provenance: &Value, device| facts(provenance, &Start::Fresh, device);
        let first = facts_of(&provenance, "cpu, 4 threads, avx2");
        let mut moved = provenance.clone();
        moved["config"]["threads"] = json!(1);
        moved["config"]["output_dir"] = json!("b");
        compare(&[first.clone(), facts_of(&moved, "cpu, 1 thread, avx2")]).unwrap();
        let mut other = provenance.clone();
        other["config"]["lora_r"] = json!(4);
        other["data_sha256"]["train"] = json!("ef");
        let mut later = first.clone();
        later.insert(STEPS.into(), json!(3));
        let all = [first.clone(), first.clone(), facts_of(&other, "cpu, 4 threads, avx512")];
        let error = compare(&all).unwrap_err();
        assert_eq!(error.kind().exit_code(), 2);
        for part in [
            "lora_r is 4 at rank 2, 8 at rank 0",
            "data's SHA-256 is {\"train\":\"ef\"} at rank 2",
            "kind of device is \"cpu, avx512\" at rank 2, \"cpu, avx2\" at rank 0",
        ] {
            assert!(error.to_string().contains(part), "{error}");
        }
        assert!(!error.to_string().contains("rank 1") && !error.to_string().contains("seed"), "{error}");
        let error = compare(&[first, later]).unwrap_err().to_string();
        assert!(error.contains("steps done is 3 at rank 1, 0 at rank 0"), "{error}");
        assert!(error.contains("on a shared file system"), "{error}");
    }
}
