//! Losses, gradients and trained adapters against transformers + PEFT in float64 (`tests/fixtures/README.md`).

mod support;

use std::sync::Arc;

use fastlora::backend::cpu::CpuBackend;
use fastlora::batch::Batch;
use fastlora::checkpoint::adapter::read_adapter;
use fastlora::checkpoint::base::BaseModel;
use fastlora::model::{LoraConfig, Transformer};
use fastlora::optim::{AdamW, AdamWSettings};
use serde_json::Value;
use support::{Tensors, fixture, largest_difference};

/// One set of golden values: a model, where it lies, and the tolerances that its README derives.
struct Golden {
    folder: std::path::PathBuf,
    values: Value,
    variant: &'static str,
}

impl Golden {
    fn new(name: &str, variant: &'static str) -> Self {
        let folder = fixture(name);
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        Self { folder, values: serde_json::from_str(&text).unwrap(), variant }
    }

    fn run(&self, dtype: &str) -> &Value {
        &self.values["runs"][format!("{}_{dtype}", self.variant)]
    }

    fn numbers(&self, dtype: &str, key: &str) -> Vec<f64> {
        self.run(dtype)[key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    }

    fn learning_rate(&self) -> f64 {
        self.values["optim"]["lr"].as_f64().unwrap()
    }

    fn model(&self, base: &BaseModel) -> Transformer<CpuBackend> {
        let adapter = read_adapter(&self.folder.join(format!("adapter_init_{}", self.variant))).unwrap();
        let lora = LoraConfig {
            rank: adapter.config.rank,
            alpha: adapter.config.alpha,
            use_rslora: adapter.config.use_rslora,
            target_modules: adapter.config.target_modules.clone(),
        };
        let backend = Arc::new(CpuBackend::new(None).unwrap());
        let mut model = Transformer::load(backend, base, Some(&lora)).unwrap();
        let named = adapter.match_to(&model.layout().expected()).unwrap();
        let parameters = model.layout().to_flat(&named).unwrap();
        model.set_parameters(&parameters).unwrap();
        model
    }

    /// The right-padded rows of `forward.safetensors` without their padding.
    fn batch(&self) -> Batch {
        let forward = Tensors::open(self.folder.join("forward.safetensors"));
        let (shape, ids) = forward.get("input_ids");
        let (_, mask) = forward.get("attention_mask");
        let (_, labels) = forward.get("labels");
        let mut batch = Batch::default();
        for row in 0..shape[0] {
            let range = row * shape[1]..(row + 1) * shape[1];
            let length = mask[range.clone()].iter().filter(|&&kept| kept == 1.0).count();
            let range = range.start..range.start + length;
            let ids: Vec<u32> = ids[range.clone()].iter().map(|&id| id as u32).collect();
            let labels: Vec<i32> = labels[range].iter().map(|&label| label as i32).collect();
            batch.push(row, &ids, &labels);
        }
        batch
    }
}

/// Ten steps; returns the losses before each and after the last, the norms, and the first gradients.
struct Trained {
    losses: Vec<f64>,
    norms: Vec<f64>,
    first_gradients: Vec<f32>,
    model: Transformer<CpuBackend>,
}

fn train(golden: &Golden, base: &BaseModel) -> Trained {
    let mut model = golden.model(base);
    let batch = golden.batch();
    let settings =
        AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, max_grad_norm: 1.0 };
    let parameter_count = model.layout().parameter_count();
    let backend = Arc::clone(model.backend());
    let mut optimizer = AdamW::new(&*backend, parameter_count, settings).unwrap();
    let scale = 1.0 / batch.labelled_count() as f64;
    let (mut losses, mut norms, mut first_gradients) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..10 {
        model.zero_gradients().unwrap();
        losses.push(model.accumulate_gradients(&batch, scale as f32, None).unwrap().loss_sum() * scale);
        if step == 0 {
            first_gradients = model.gradients().unwrap();
        }
        let (backend, parameters, gradients) = model.trainable();
        norms.push(optimizer.update(backend, parameters, gradients, golden.learning_rate()).unwrap());
    }
    losses.push(model.evaluate(&batch).unwrap().loss_sum() * scale);
    Trained { losses, norms, first_gradients, model }
}

fn expected_losses(golden: &Golden, dtype: &str) -> Vec<f64> {
    let mut losses = golden.numbers(dtype, "losses");
    losses.push(golden.run(dtype)["loss_after_10"].as_f64().unwrap());
    losses
}

/// Every gradient within `1e-4` of the largest in its tensor.
fn check_gradients(golden: &Golden, trained: &Trained) {
    let file = Tensors::open(golden.folder.join(format!("grads_step0_{}_f64.safetensors", golden.variant)));
    let mut checked = 0;
    for tensor in trained.model.layout().tensors() {
        if !file.names().contains(&tensor.name) {
            continue; // SmolLM2's file holds two of its layers.
        }
        let (_, expected) = file.get(&tensor.name);
        let found: Vec<f64> =
            trained.first_gradients[tensor.range()].iter().map(|&value| value.into()).collect();
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let (difference, place) = largest_difference(&found, &expected);
        assert!(
            difference <= 1e-4 * largest,
            "{} [{place}]: {} against {}, largest {largest}",
            tensor.name,
            found[place],
            expected[place]
        );
        checked += 1;
    }
    assert_eq!(checked, file.names().len());
}

fn check_tiny(name: &str, variant: &'static str) {
    let golden = Golden::new(name, variant);
    let base = BaseModel::open(&golden.folder).unwrap();
    let trained = train(&golden, &base);
    for (step, (found, expected)) in trained.losses.iter().zip(expected_losses(&golden, "f64")).enumerate() {
        assert!(
            (found / expected - 1.0).abs() <= 1e-5,
            "{name} {variant} step {step}: {found} against {expected}"
        );
    }
    for (step, (found, expected)) in trained.norms.iter().zip(golden.numbers("f64", "grad_norms")).enumerate()
    {
        assert!(
            (found / expected - 1.0).abs() <= 1e-4,
            "{name} {variant} norm {step}: {found} against {expected}"
        );
    }
    check_gradients(&golden, &trained);
    // Adam amplifies rounding where a gradient is tiny, so the bound is the peers' own drift, or 1 % of the way.
    let drift =
        golden.values["runs"][format!("{variant}_final_adapter_max_abs_diff_f32_f64")].as_f64().unwrap();
    let bound = (5.0 * drift).max(0.01 * golden.learning_rate() * 10.0);
    let file =
        Tensors::open(golden.folder.join(format!("adapter_final_{variant}/adapter_model_f64.safetensors")));
    for tensor in trained.model.adapters().unwrap() {
        let (shape, expected) = file.get(&tensor.name);
        assert_eq!(shape, tensor.shape);
        let found: Vec<f64> = tensor.values.iter().map(|&value| value.into()).collect();
        let (difference, place) = largest_difference(&found, &expected);
        assert!(
            difference <= bound,
            "{} [{place}]: {} against {}",
            tensor.name,
            found[place],
            expected[place]
        );
    }
}

#[test]
fn tiny_qwen2_trains_as_in_float64() {
    check_tiny("tiny_qwen2", "b0");
    check_tiny("tiny_qwen2", "brand");
}

#[test]
fn tiny_qwen3_trains_as_in_float64() {
    check_tiny("tiny_qwen3", "b0");
    check_tiny("tiny_qwen3", "brand");
}

#[test]
fn tiny_llama3_with_scaled_rope_trains_as_in_float64() {
    check_tiny("tiny_llama3rope", "b0");
    check_tiny("tiny_llama3rope", "brand");
}

/// The golden adapter of SmolLM2 is too large to keep here: `FASTLORA_GOLDEN` names the folder that has
/// `smollm2/adapter_init_brand` and `models/smollm2-135m-instruct` is the model (`scripts/test` gets it).
#[test]
fn smollm2_trains_as_in_float64() {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m-instruct");
    let Some(folder) = std::env::var_os("FASTLORA_GOLDEN").filter(|_| model.join("config.json").exists())
    else {
        eprintln!("skipped: needs FASTLORA_GOLDEN and a model at {}", model.display());
        return;
    };
    let golden =
        Golden { folder: std::path::Path::new(&folder).join("smollm2"), ..Golden::new("smollm2", "brand") };
    let base = BaseModel::open(&model).unwrap();
    let trained = train(&golden, &base);
    let in_f32 = expected_losses(&golden, "f32");
    let in_f64 = expected_losses(&golden, "f64");
    let drift = in_f32.iter().zip(&in_f64).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
    for (step, (found, expected)) in trained.losses.iter().zip(&in_f64).enumerate() {
        let difference = (found / expected - 1.0).abs();
        assert!(difference <= 3.0 * drift, "step {step}: {found} against {expected}, peers' drift {drift:e}");
    }
    check_gradients(&golden, &trained);
}
