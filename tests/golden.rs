//! Losses, gradients and trained adapters against transformers + PEFT in float64 (`tests/fixtures/README.md`).

mod support;

use std::sync::Arc;

use fastlora::backend::cpu::CpuBackend;
use fastlora::checkpoint::base::BaseModel;
use support::golden::{Golden, Trained, expected_losses, train};
use support::{Tensors, largest_difference};

/// Every gradient within `1e-4` of the largest in its tensor.
fn check_gradients(golden: &Golden, trained: &Trained<CpuBackend>) {
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

fn cpu() -> Arc<CpuBackend> {
    Arc::new(CpuBackend::new(None).unwrap())
}

fn check_tiny(name: &str, variant: &'static str) {
    let golden = Golden::new(name, variant);
    let base = BaseModel::open(&golden.folder).unwrap();
    let trained = train(&golden, cpu(), &base);
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

#[test]
fn gemma_trains_as_in_float64() {
    check_tiny("tiny_gemma", "brand");
    check_tiny("tiny_gemma2", "brand");
    check_tiny("tiny_gemma3", "brand");
}

#[test]
fn long_samples_train_as_in_float64() {
    check_tiny("tiny_llama_long", "brand");
}

/// In the second, texts of more than 12 tokens are rotated by factors of their own: one of three.
#[test]
fn phi3_trains_as_in_float64() {
    check_tiny("tiny_phi3", "brand");
    check_tiny("tiny_phi3_longrope", "brand");
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
    let trained = train(&golden, cpu(), &base);
    let in_f32 = expected_losses(&golden, "f32");
    let in_f64 = expected_losses(&golden, "f64");
    let drift = in_f32.iter().zip(&in_f64).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
    for (step, (found, expected)) in trained.losses.iter().zip(&in_f64).enumerate() {
        let difference = (found / expected - 1.0).abs();
        assert!(difference <= 3.0 * drift, "step {step}: {found} against {expected}, peers' drift {drift:e}");
    }
    check_gradients(&golden, &trained);
}
