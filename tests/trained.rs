//! What goes beyond plain LoRA, trained as transformers + PEFT do in float64 (`tests/interop/make_trained.py`).

mod support;

use std::sync::Arc;

use fastlora::backend::PassSettings;
use fastlora::backend::cpu::CpuBackend;
use fastlora::checkpoint::adapter::{Adapter, AdapterConfig};
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::{InitLoraWeights, TargetModules};
use fastlora::export::merge;
use fastlora::model::{Factors, LoraConfig, Transformer};
use fastlora::pissa;
use fastlora::tensor::NamedTensor;
use serde_json::Value;
use support::golden::{BeyondLora as Golden, Trained, batch_of, train_on};
use support::{Tensors, fixture, largest_difference};

impl Golden {
    fn train_on_cpu(&self, learning_rate: f64, ratio: f64) -> Trained<CpuBackend> {
        self.train(Arc::new(CpuBackend::new(None).unwrap()), learning_rate, ratio)
    }

    /// PEFT's configuration of the PiSSA run.
    fn pissa(&self) -> LoraConfig {
        let names = ["q_proj", "v_proj", "o_proj", "down_proj"].map(str::to_string);
        LoraConfig {
            rank_pattern: "v_proj=3".parse().unwrap(),
            alpha_pattern: "o_proj=6".parse().unwrap(),
            ..LoraConfig::new(4, 8.0, TargetModules::Names(names.to_vec()))
        }
    }

    /// The factors that PEFT found.
    fn factors(&self) -> Factors {
        let file = Tensors::open(self.folder.join("factors.safetensors"));
        Factors::new(file.names().into_iter().map(|name| {
            let (shape, values) = file.get(&name);
            NamedTensor { name, shape, values: values.into_iter().map(|value| value as f32).collect() }
        }))
    }

    fn check_numbers(&self, what: &str, found: &[f64], expected: &Value, tolerance: f64) {
        let expected = expected.as_array().unwrap();
        assert_eq!(found.len(), expected.len(), "{what}");
        for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
            let expected = expected.as_f64().unwrap();
            let relative = (found / expected - 1.0).abs();
            assert!(relative <= tolerance, "{} {what} {step}: {found} against {expected}", self.name);
        }
    }
}

/// Losses, norms, gradients and the trained adapter; tolerances as in `golden.rs`.
fn check(name: &'static str) {
    let golden = Golden::new(name);
    let rate = golden.values["lr"].as_f64().unwrap();
    check_trained(&golden, &golden.train_on_cpu(rate, 1.0), rate);
    let plus = &golden.values["loraplus"];
    let number = |key: &str| plus[key].as_f64().unwrap();
    let trained = golden.train_on_cpu(number("lr"), number("loraplus_lr_ratio"));
    golden.check_numbers("LoRA+ loss", &trained.losses, &plus["losses_f64"], 1e-5);
}

fn check_trained(golden: &Golden, trained: &Trained<CpuBackend>, rate: f64) {
    let name = golden.name;
    let in_f64 = &golden.values["f64"];
    golden.check_numbers("loss", &trained.losses[..10], &in_f64["losses"], 1e-5);
    golden.check_numbers(
        "last loss",
        &trained.losses[10..],
        &serde_json::json!([in_f64["loss_after_10"]]),
        1e-5,
    );
    golden.check_numbers("norm", &trained.norms, &in_f64["grad_norms"], 1e-4);

    let gradients = Tensors::open(golden.folder.join("grads_step0_f64.safetensors"));
    let finals = Tensors::open(golden.folder.join("adapter_final_f64.safetensors"));
    let drift = golden.values["final_max_abs_diff_f32_f64"].as_f64().unwrap();
    let bound = (5.0 * drift).max(0.01 * rate * 10.0);
    let names: Vec<String> =
        trained.model.layout().tensors().iter().map(|tensor| tensor.name.clone()).collect();
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    assert_eq!(sorted(names), sorted(finals.names()), "{name}: what is trained");
    for (tensor, last) in trained.model.layout().tensors().iter().zip(trained.model.adapters().unwrap()) {
        let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|&value| value.into()).collect() };
        let (shape, expected) = gradients.get(&tensor.name);
        assert_eq!(shape, tensor.shape, "{}", tensor.name);
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        assert!(largest > 0.0, "{}: a gradient that says nothing", tensor.name);
        let (difference, place) =
            largest_difference(&wide(&trained.first_gradients[tensor.range()]), &expected);
        assert!(
            difference <= 1e-4 * largest,
            "{name}: gradient of {} [{place}] is off by {difference:e}, the largest is {largest:e}",
            tensor.name
        );
        let (difference, place) = largest_difference(&wide(&last.values), &finals.get(&tensor.name).1);
        assert!(difference <= bound, "{name}: {} [{place}] is off by {difference:e}", tensor.name);
    }
}

/// As in `oracles.rs`: four times the float32 drift of transformers on these models.
const LOGIT_TOLERANCE: f64 = 8e-5;

fn check_merged(name: &'static str) {
    let golden = Golden::new(name);
    let folder = tempfile::tempdir().unwrap();
    let merged = folder.path().join("merged");
    merge(&golden.base, &golden.start(), &merged, u64::MAX, false).unwrap();
    let cpu = || Arc::new(CpuBackend::new(Some(1)).unwrap());
    let logits = |model: &mut Transformer<CpuBackend>| {
        let mut cache = model.new_cache(20).unwrap();
        let (mut all, mut logits) = (Vec::new(), Vec::new());
        for id in 3..20 {
            model.forward_cached(&[id], &mut cache, &mut logits).unwrap();
            all.extend(logits.iter().map(|&logit| f64::from(logit)));
        }
        all
    };
    let with = logits(&mut Transformer::load_with_adapter(cpu(), &golden.base, &golden.start()).unwrap());
    let alone = logits(&mut Transformer::load(cpu(), &BaseModel::open(merged).unwrap(), None).unwrap());
    let without = logits(&mut Transformer::load(cpu(), &golden.base, None).unwrap());
    let (difference, place) = largest_difference(&with, &alone);
    assert!(difference <= LOGIT_TOLERANCE, "{name}, logit {place}: off by {difference:e}");
    assert!(largest_difference(&without, &alone).0 > 1e-2, "{name}: the adapter does something");
}

#[test]
fn pissa_is_as_in_float64() {
    let golden = Golden::new("pissa");
    let rate = golden.values["lr"].as_f64().unwrap();
    let cpu = || Arc::new(CpuBackend::new(None).unwrap());
    let batch = batch_of(golden.base.folder());
    let (lora, peers) = (golden.pissa(), golden.factors());
    let mut model = Transformer::load_residual(cpu(), &golden.base, &lora, peers.clone()).unwrap();
    model.start(&golden.base, 0).unwrap();
    check_trained(&golden, &train_on(model, &batch, rate, 1.0), rate);

    // The factors of our own are the same but for signs, which AdamW does not tell apart: B₀·A₀ is as PEFT's within the
    // rounding of f32 singular vectors (whose gaps are some hundredths of the largest value), and so is the run.
    let own = pissa::factors(&golden.base, &lora, InitLoraWeights::Pissa, 42).unwrap();
    let product = |factors: &Factors, module: &str| -> Vec<f64> {
        let get =
            |letter: char| factors.get(&format!("base_model.model.{module}.lora_{letter}.weight")).unwrap();
        let (a, b) = (get('A'), get('B'));
        let (rank, width) = (a.shape[0], a.shape[1]);
        let mut product = vec![0.0; b.shape[0] * width];
        for (row, b) in product.chunks_mut(width).zip(b.values.chunks(rank)) {
            for (b, a) in b.iter().zip(a.values.chunks(width)) {
                row.iter_mut().zip(a).for_each(|(sum, &a)| *sum += f64::from(*b) * f64::from(a));
            }
        }
        product
    };
    for module in ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"] {
        let (found, expected) = (product(&own, module), product(&peers, module));
        let (difference, place) = largest_difference(&found, &expected);
        assert!(difference <= 1e-4, "{module} [{place}]: {} against {}", found[place], expected[place]);
    }
    let mut model = Transformer::load_residual(cpu(), &golden.base, &lora, own).unwrap();
    model.start(&golden.base, 0).unwrap();
    let trained = train_on(model, &batch, rate, 1.0);
    golden.check_numbers("loss", &trained.losses[..10], &golden.values["f64"]["losses"], 1e-4);

    // What is saved is a plain adapter for the base as it is, with the same losses.
    let saved = trained.model.adapters().unwrap();
    let config = AdapterConfig::from_json(&golden_config().to_string()).unwrap();
    let doubled = pissa::saved_config(&config);
    let expected = &golden.values["saved_config"];
    assert_eq!(
        (serde_json::json!(doubled.rank), doubled.alpha),
        (expected["r"].clone(), expected["lora_alpha"].as_f64().unwrap())
    );
    assert_eq!(serde_json::json!(doubled.rank_pattern), expected["rank_pattern"]);
    assert_eq!(doubled.to_json()["alpha_pattern"], expected["alpha_pattern"]);
    let adapter = Adapter { config: doubled, tensors: saved };
    let mut plain = Transformer::load_with_adapter(cpu(), &golden.base, &adapter).unwrap();
    let scale = 1.0 / batch.labelled_count() as f64;
    let loss = plain.evaluate(&batch).unwrap().loss_sum() * scale;
    assert!((loss / trained.losses[10] - 1.0).abs() <= 1e-5, "{loss} {}", trained.losses[10]);
}

fn golden_config() -> Value {
    serde_json::json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"o_proj": 6},
    })
}

#[test]
fn dora_is_as_in_float64() {
    check("dora");
    check("dora_whole");
    check_merged("dora");
    check_merged("dora_whole");
}

#[test]
fn modules_trained_whole_are_as_in_float64() {
    check("whole");
    check("whole_below");
    check("whole_gemma2");
    check_merged("whole_gemma2");
    check_merged("whole");
    check_merged("whole_below");
}

/// Gemma's norms, also those behind attention and MLP, have weights that count from 1, and its logits a cap: their gradients
/// against differences of the loss. A loss near 4 is off by 1e-6, its differences over 0.02 by 1e-4.
#[test]
fn every_norm_of_gemma_is_trained_whole() {
    let base = BaseModel::open(fixture("tiny_gemma2")).unwrap();
    let targets = TargetModules::Names(vec!["q_proj".into()]);
    let lora = LoraConfig { modules_to_save: vec!["norm".into()], ..LoraConfig::new(2, 4.0, targets) };
    let mut model = Transformer::load(Arc::new(CpuBackend::new(None).unwrap()), &base, Some(&lora)).unwrap();
    model.start(&base, 3).unwrap();
    let batch = batch_of(base.folder());
    let scale = 1.0 / batch.labelled_count() as f64;
    let settings = PassSettings { gradient_scale: scale as f32, ..PassSettings::default() };
    model.zero_gradients().unwrap();
    model.accumulate_gradients(&batch, settings).unwrap();
    let (gradients, start) = (model.gradients().unwrap(), model.parameters().unwrap());
    let norms: Vec<_> =
        model.layout().tensors().iter().filter(|tensor| tensor.shape.len() == 1).cloned().collect();
    assert_eq!(norms.len(), 2 * 4 + 1, "four norms in each layer, and the last");
    const STEP: f32 = 0.01;
    for norm in norms {
        let largest = gradients[norm.range()].iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        assert!(largest > 1e-3, "{} has no gradient", norm.name);
        for place in norm.range().step_by(5) {
            let [above, below] = [STEP, -STEP].map(|step| {
                let mut moved = start.clone();
                moved[place] += step;
                model.set_parameters(&moved).unwrap();
                model.evaluate(&batch).unwrap().loss_sum() * scale
            });
            let (found, expected) = (f64::from(gradients[place]), (above - below) / (2.0 * f64::from(STEP)));
            assert!(
                (found - expected).abs() <= 1e-4 + 0.01 * f64::from(largest),
                "{} [{}]: {found}, by differences {expected}",
                norm.name,
                place - norm.offset
            );
        }
    }
}
