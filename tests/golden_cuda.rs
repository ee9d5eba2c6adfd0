//! Whole training runs through the CUDA backend on the emulator, in f16 and bf16, against transformers + PEFT in float64;
//! on the GPU that `FASTLORA_TEST_DEVICE` names too, with `--include-ignored`.
#![cfg(feature = "emulator")]

mod support;

use std::sync::Arc;

use fastlora::backend::cuda::{ComputeType, CudaBackend};
use fastlora::checkpoint::base::BaseModel;
use fastlora::device::Device;
use fastlora::device::driver::Driver;
use fastlora::device::emulator::{Emulator, Flavour};
use support::golden::{Golden, expected_losses, train};
use support::{Tensors, largest_difference};

/// Times that a value is rounded to the compute type on its way through a block: norm, qkv, rotation, attention weights and
/// output, residual; norm, gate and up, activation, residual.
const ROUNDINGS_PER_BLOCK: f64 = 10.0;
/// And outside the blocks: embedding, packed rows, final norm, logits.
const ROUNDINGS_OUTSIDE: f64 = 4.0;

fn unit_roundoff(compute: ComputeType) -> f64 {
    match compute {
        ComputeType::F16 => 2f64.powi(-11),
        ComputeType::Bf16 => 2f64.powi(-8),
    }
}

/// Independent roundings of relative size `u` walk at random: after `n` of them a logit is off by about `u·√n` of the
/// largest, and a gradient, which passed them all twice, by `u·√2n` of itself. A loss is the mean over the labelled tokens of
/// their logits' errors, taken at three deviations. A step goes as far downhill as its gradient is right: what was won so
/// far is off by a gradient's error.
fn tolerance(golden: &Golden, layers: usize, compute: ComputeType, first_loss: f64, loss: f64) -> f64 {
    let roundings = ROUNDINGS_PER_BLOCK * layers as f64 + ROUNDINGS_OUTSIDE;
    let largest_logit = golden.values["logits_abs_max"].as_f64().unwrap();
    let labelled = golden.batch().labelled_count() as f64;
    let unit = unit_roundoff(compute);
    3.0 * unit * (roundings / labelled).sqrt() * largest_logit
        + unit * (2.0 * roundings).sqrt() * (first_loss - loss)
}

fn check<D: Device>(device: &D, name: &str, variant: &'static str, compute: ComputeType) {
    let golden = Golden::new(name, variant);
    let base = BaseModel::open(&golden.folder).unwrap();
    let backend = Arc::new(CudaBackend::new(device.clone(), compute));
    let trained = train(&golden, backend, &base);
    let expected = expected_losses(&golden, "f64");
    let mut worst = 0f64;
    for (step, (found, expected_loss)) in trained.losses.iter().zip(&expected).enumerate() {
        let allowed = tolerance(&golden, base.config().layer_count, compute, expected[0], *expected_loss);
        let difference = (found - expected_loss).abs();
        worst = worst.max(difference / allowed);
        assert!(
            difference <= allowed,
            "{name} {variant} {compute} step {step}: {found} against {expected_loss}, allowed {allowed}"
        );
    }
    println!("{name} {variant} {compute}: losses within {worst:.2} of what rounding allows");
    check_gradients(
        &golden,
        &trained.first_gradients,
        trained.model.layout().tensors(),
        base.config().layer_count,
        compute,
    );
}

/// The first gradients, before anything could drift: within three deviations of a gradient's error, of the largest in
/// their tensor.
fn check_gradients(
    golden: &Golden,
    found: &[f32],
    tensors: &[fastlora::model::AdapterTensor],
    layers: usize,
    compute: ComputeType,
) {
    let file = Tensors::open(golden.folder.join(format!("grads_step0_{}_f64.safetensors", golden.variant)));
    let roundings = 2.0 * (ROUNDINGS_PER_BLOCK * layers as f64 + ROUNDINGS_OUTSIDE);
    let allowed = 3.0 * unit_roundoff(compute) * roundings.sqrt();
    let mut worst = 0f64;
    for tensor in tensors {
        let (_, expected) = file.get(&tensor.name);
        let found: Vec<f64> = found[tensor.range()].iter().map(|&value| value.into()).collect();
        let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let (difference, place) = largest_difference(&found, &expected);
        if largest > 0.0 {
            worst = worst.max(difference / largest / allowed);
        }
        assert!(
            difference <= allowed * largest,
            "{} [{place}]: {} against {}, largest {largest}, allowed {allowed} of it",
            tensor.name,
            found[place],
            expected[place]
        );
    }
    println!("gradients within {worst:.2} of what rounding allows");
}

const MODELS: [&str; 3] = ["tiny_qwen2", "tiny_qwen3", "tiny_llama3rope"];

#[test]
fn the_tiny_models_train_on_the_emulator_as_in_float64() {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    for name in MODELS {
        for variant in ["b0", "brand"] {
            for compute in [ComputeType::F16, ComputeType::Bf16] {
                check(&device, name, variant, compute);
            }
        }
        check(&device.as_hopper(), name, "brand", ComputeType::Bf16);
    }
}

const FAMILIES: [&str; 5] = ["tiny_gemma", "tiny_gemma2", "tiny_gemma3", "tiny_phi3", "tiny_phi3_longrope"];

#[test]
fn gemma_and_phi3_train_on_the_emulator_as_in_float64() {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    for name in FAMILIES {
        for compute in [ComputeType::F16, ComputeType::Bf16] {
            check(&device, name, "brand", compute);
        }
    }
}

/// Heads of 64 and samples beyond a tile of 128: attention, rotation and activation run on Hopper's own kernels.
#[test]
fn long_samples_train_on_hoppers_kernels_as_in_float64() {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    for compute in [ComputeType::F16, ComputeType::Bf16] {
        check(&device.as_hopper(), "tiny_llama_long", "brand", compute);
    }
    check(&device, "tiny_llama_long", "brand", ComputeType::Bf16);
}

#[test]
fn a_whole_run_is_clean_in_the_checker() {
    let device = Emulator::new(Flavour::Checked, 3).unwrap();
    check(&device, "tiny_qwen3", "brand", ComputeType::Bf16);
    check(&device, "tiny_gemma2", "brand", ComputeType::Bf16);
    check(&device.as_hopper(), "tiny_qwen3", "brand", ComputeType::F16);
}

#[test]
#[ignore = "needs a GPU: FASTLORA_TEST_DEVICE=cuda:N, and --include-ignored"]
fn the_tiny_models_train_on_a_gpu_as_in_float64() {
    let name = std::env::var("FASTLORA_TEST_DEVICE").expect("FASTLORA_TEST_DEVICE=cuda:N");
    let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok()).expect("cuda:N");
    let device = Driver::new(index).unwrap();
    for name in MODELS.into_iter().chain(FAMILIES).chain(["tiny_llama_long"]) {
        for compute in [ComputeType::F16, ComputeType::Bf16] {
            check(&device, name, "brand", compute);
        }
    }
}
