//! Ranks, scales and layers of their own, and LoRA+, against PEFT in float64 (`tests/interop/make_variants.py`).

mod support;

use std::sync::Arc;

use fastlora::backend::cpu::CpuBackend;
use fastlora::checkpoint::adapter::{AdapterConfig, read_adapter};
use fastlora::checkpoint::base::BaseModel;
use fastlora::export::{bake_scale, merge};
use fastlora::model::Transformer;
use serde_json::Value;
use support::golden::{Golden, train_at};
use support::{Tensors, fixture, largest_difference};

/// As in `oracles.rs`: four times the float32 drift of transformers on these models.
const LOGIT_TOLERANCE: f64 = 8e-5;
const VARIANTS: [&str; 3] = ["patterns", "patterns_rslora", "layers"];

fn base() -> BaseModel {
    BaseModel::open(fixture("tiny_qwen3")).unwrap()
}

fn cpu() -> Arc<CpuBackend> {
    Arc::new(CpuBackend::new(Some(1)).unwrap())
}

/// Logits of the variant's ids, and what PEFT has for them.
fn logits(model: &mut Transformer<CpuBackend>, variant: &str) -> (Vec<f64>, Vec<f64>) {
    let file = Tensors::open(fixture("variants").join(variant).join("expected.safetensors"));
    let (shape, ids) = file.get("input_ids");
    let (_, expected) = file.get("logits_f64");
    let (mut found, mut logits) = (Vec::new(), Vec::new());
    for row in ids.chunks(shape[1]) {
        let mut cache = model.new_cache(row.len()).unwrap();
        for &id in row {
            model.forward_cached(&[id as u32], &mut cache, &mut logits).unwrap();
            found.extend(logits.iter().map(|&logit| f64::from(logit)));
        }
    }
    (found, expected)
}

fn check(model: &mut Transformer<CpuBackend>, variant: &str) {
    let (found, expected) = logits(model, variant);
    let (difference, place) = largest_difference(&found, &expected);
    assert!(
        difference <= LOGIT_TOLERANCE,
        "{variant}, logit {place}: {} against {}",
        found[place],
        expected[place]
    );
}

#[test]
fn adapters_that_peft_saved_compute_what_they_compute_there() {
    for variant in VARIANTS {
        let adapter = read_adapter(&fixture("variants").join(variant)).unwrap();
        check(&mut Transformer::load_with_adapter(cpu(), &base(), &adapter).unwrap(), variant);
        // And they do compute something.
        let (found, expected) = logits(&mut Transformer::load(cpu(), &base(), None).unwrap(), variant);
        assert!(largest_difference(&found, &expected).0 > 1e-2, "{variant}");
    }
}

#[test]
fn merged_or_with_their_scale_baked_in_they_compute_the_same() {
    for variant in VARIANTS {
        let adapter = read_adapter(&fixture("variants").join(variant)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let merged = folder.path().join("merged");
        merge(&base(), &adapter, &merged, u64::MAX, false).unwrap();
        check(&mut Transformer::load(cpu(), &BaseModel::open(merged).unwrap(), None).unwrap(), variant);

        let baked = bake_scale(adapter).unwrap();
        let AdapterConfig { rank, alpha, use_rslora, rank_pattern, alpha_pattern, .. } = &baked.config;
        assert_eq!((*alpha, *use_rslora), (*rank as f64, false));
        assert_eq!(*alpha_pattern, rank_pattern.map(|rank| *rank as f64));
        check(&mut Transformer::load_with_adapter(cpu(), &base(), &baked).unwrap(), variant);
    }
}

#[test]
fn lora_plus_trains_as_in_float64() {
    let text = std::fs::read_to_string(fixture("variants/loraplus.json")).unwrap();
    let peft: Value = serde_json::from_str(&text).unwrap();
    let number = |key: &str| peft[key].as_f64().unwrap();
    let golden = Golden::new("tiny_qwen3", "brand");
    let trained = train_at(&golden, cpu(), &base(), number("lr"), number("loraplus_lr_ratio"));
    let expected = peft["losses_f64"].as_array().unwrap();
    assert_eq!(trained.losses.len(), expected.len());
    for (step, (found, expected)) in trained.losses.iter().zip(expected).enumerate() {
        let expected = expected.as_f64().unwrap();
        // As in `golden.rs`.
        assert!((found / expected - 1.0).abs() <= 1e-5, "step {step}: {found} against {expected}");
    }
}
