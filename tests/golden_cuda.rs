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
use support::golden::{BeyondLora, Golden, Trained, expected_losses, train};
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

/// What a run must come to.
struct Expected {
    name: String,
    /// Before each step and after the last.
    losses: Vec<f64>,
    /// Of the first step.
    gradients: Tensors,
    /// Times that a value is rounded on its way through the model.
    roundings: f64,
    largest_logit: f64,
    labelled: f64,
}

impl Expected {
    fn of_golden(golden: &Golden, layers: usize, name: String) -> Self {
        Self {
            name,
            losses: expected_losses(golden, "f64"),
            gradients: Tensors::open(
                golden.folder.join(format!("grads_step0_{}_f64.safetensors", golden.variant)),
            ),
            roundings: ROUNDINGS_PER_BLOCK * layers as f64 + ROUNDINGS_OUTSIDE,
            largest_logit: golden.values["logits_abs_max"].as_f64().unwrap(),
            labelled: golden.batch().labelled_count() as f64,
        }
    }

    /// `more`: roundings in each block, and outside.
    fn beyond_lora(golden: &BeyondLora, more: [f64; 2]) -> Self {
        let in_f64 = &golden.values["f64"];
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        let before = in_f64["losses"].as_array().unwrap().iter();
        let layers = golden.base.config().layer_count;
        let base = Golden::new(golden.values["base"].as_str().unwrap(), "");
        Self {
            name: golden.name.to_owned(),
            losses: before.chain([&in_f64["loss_after_10"]]).map(number).collect(),
            gradients: Tensors::open(golden.folder.join("grads_step0_f64.safetensors")),
            roundings: (ROUNDINGS_PER_BLOCK + more[0]) * layers as f64 + ROUNDINGS_OUTSIDE + more[1],
            largest_logit: number(&base.values["logits_abs_max"]),
            labelled: base.batch().labelled_count() as f64,
        }
    }

    /// Independent roundings of relative size `u` walk at random: after `n` of them a logit is off by about `u·√n` of the
    /// largest, and a gradient, which passed them all twice, by `u·√2n` of itself. A loss is the mean over the labelled tokens
    /// of their logits' errors, taken at three deviations. A step goes as far downhill as its gradient is right: what was won
    /// so far is off by a gradient's error.
    fn tolerance(&self, compute: ComputeType, loss: f64) -> f64 {
        let Self { roundings, largest_logit, labelled, .. } = self;
        let unit = unit_roundoff(compute);
        3.0 * unit * (roundings / labelled).sqrt() * largest_logit
            + unit * (2.0 * roundings).sqrt() * (self.losses[0] - loss)
    }

    fn check<D: Device>(&self, trained: &Trained<CudaBackend<D>>, compute: ComputeType) {
        let name = &self.name;
        let mut worst = 0f64;
        assert_eq!(trained.losses.len(), self.losses.len());
        for (step, (found, &expected)) in trained.losses.iter().zip(&self.losses).enumerate() {
            let allowed = self.tolerance(compute, expected);
            let difference = (found - expected).abs();
            worst = worst.max(difference / allowed);
            assert!(
                difference <= allowed,
                "{name} {compute} step {step}: {found} against {expected}, allowed {allowed}"
            );
        }
        println!("{name} {compute}: losses within {worst:.2} of what rounding allows");
        self.check_gradients(&trained.first_gradients, trained.model.layout().tensors(), compute);
    }

    /// The first gradients, before anything could drift: within three deviations of a gradient's error, of the largest in
    /// their tensor.
    fn check_gradients(
        &self,
        found: &[f32],
        tensors: &[fastlora::model::AdapterTensor],
        compute: ComputeType,
    ) {
        let allowed = 3.0 * unit_roundoff(compute) * (2.0 * self.roundings).sqrt();
        let mut worst = 0f64;
        for tensor in tensors {
            let (_, expected) = self.gradients.get(&tensor.name);
            let found: Vec<f64> = found[tensor.range()].iter().map(|&value| value.into()).collect();
            let largest = expected.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
            let (difference, place) = largest_difference(&found, &expected);
            if largest > 0.0 {
                worst = worst.max(difference / largest / allowed);
            }
            assert!(
                difference <= allowed * largest,
                "{} {} [{place}]: {} against {}, largest {largest}, allowed {allowed} of it",
                self.name,
                tensor.name,
                found[place],
                expected[place]
            );
        }
        println!("gradients within {worst:.2} of what rounding allows");
    }
}

fn check<D: Device>(device: &D, name: &str, variant: &'static str, compute: ComputeType) {
    let golden = Golden::new(name, variant);
    let base = BaseModel::open(&golden.folder).unwrap();
    let backend = Arc::new(CudaBackend::new(device.clone(), compute));
    let trained = train(&golden, backend, &base);
    let name = format!("{name} {variant}");
    Expected::of_golden(&golden, base.config().layer_count, name).check(&trained, compute);
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

/// What goes beyond plain LoRA, and how often more a value is rounded for it in each block and outside: the outputs of four
/// groups before their magnitudes multiply them, and as often their gains' errors; the weights of trained norms, the head's.
const BEYOND_LORA: [(&str, [f64; 2]); 5] = [
    ("dora", [8.0, 0.0]),
    ("dora_whole", [10.0, 1.0]),
    ("whole", [2.0, 2.0]),
    ("whole_below", [2.0, 0.0]),
    ("whole_gemma2", [4.0, 1.0]),
];

fn check_beyond_lora<D: Device>(device: &D, (name, more): (&'static str, [f64; 2]), compute: ComputeType) {
    let golden = BeyondLora::new(name);
    let rate = golden.values["lr"].as_f64().unwrap();
    let trained = golden.train(Arc::new(CudaBackend::new(device.clone(), compute)), rate, 1.0);
    Expected::beyond_lora(&golden, more).check(&trained, compute);
}

#[test]
fn magnitudes_norms_and_heads_train_on_the_emulator_as_in_float64() {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    for case in BEYOND_LORA {
        for compute in [ComputeType::F16, ComputeType::Bf16] {
            check_beyond_lora(&device, case, compute);
        }
        check_beyond_lora(&device.as_hopper(), case, ComputeType::Bf16);
    }
}

#[test]
fn a_whole_run_is_clean_in_the_checker() {
    let device = Emulator::new(Flavour::Checked, 3).unwrap();
    check(&device, "tiny_qwen3", "brand", ComputeType::Bf16);
    check(&device, "tiny_gemma2", "brand", ComputeType::Bf16);
    check(&device.as_hopper(), "tiny_qwen3", "brand", ComputeType::F16);
    check_beyond_lora(&device, BEYOND_LORA[1], ComputeType::Bf16);
    check_beyond_lora(&device.as_hopper(), BEYOND_LORA[2], ComputeType::F16);
}

#[test]
#[ignore = "needs a GPU: FASTLORA_TEST_DEVICE=cuda:N, and --include-ignored"]
fn the_tiny_models_train_on_a_gpu_as_in_float64() {
    let name = std::env::var("FASTLORA_TEST_DEVICE").expect("FASTLORA_TEST_DEVICE=cuda:N");
    let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok()).expect("cuda:N");
    let device = Driver::new(index).unwrap();
    for compute in [ComputeType::F16, ComputeType::Bf16] {
        for name in MODELS.into_iter().chain(FAMILIES).chain(["tiny_llama_long"]) {
            check(&device, name, "brand", compute);
        }
        for case in BEYOND_LORA {
            check_beyond_lora(&device, case, compute);
        }
    }
}
