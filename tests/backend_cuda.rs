//! The CUDA backend through the suite that every backend passes: on the emulator under several schedules and in the
//! checker, and with `--include-ignored` on the GPU that `FASTLORA_TEST_DEVICE` names.
#![cfg(feature = "emulator")]

mod backend_suite;

use std::sync::Arc;

use backend_suite::{Precision, batch_of, run};
use fastlora::backend::cuda::{ComputeType, CudaBackend};
use fastlora::backend::{Backend, Dropout, EmbeddingNoise, Footprint, PassSettings};
use fastlora::batch::BatchRows;
use fastlora::checkpoint::base::BaseModel;
use fastlora::config::{ActivationMemory, TargetModules};
use fastlora::device::Device;
use fastlora::device::driver::Driver;
use fastlora::device::emulator::{Emulator, Flavour};
use fastlora::error::Error;
use fastlora::model::{Limits, LoraConfig, MemoryPlan, Recompute, Transformer};
use fastlora::optim::{AdamW, AdamWSettings};

const COMPUTE_TYPES: [ComputeType; 2] = [ComputeType::F16, ComputeType::Bf16];

fn outputs<D: Device>(device: D, compute: ComputeType) -> Vec<(String, Vec<f32>)> {
    run(&CudaBackend::new(device, compute), Precision::half(compute.dtype())).outputs
}

fn assert_same_bits(what: &str, one: &[(String, Vec<f32>)], other: &[(String, Vec<f32>)]) {
    assert_eq!(one.len(), other.len());
    for ((case, a), (_, b)) in one.iter().zip(other) {
        assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{case}: {what} differs");
    }
}

#[test]
fn every_operation_matches_float64_under_every_schedule_and_in_the_checker() {
    for is_hopper in [false, true] {
        let fast = Emulator::of(is_hopper, false).unwrap();
        let checked = Emulator::of(is_hopper, true).unwrap();
        for compute in COMPUTE_TYPES {
            let in_order = outputs(fast.clone(), compute);
            assert_same_bits("another schedule", &in_order, &outputs(fast.with_seed(1), compute));
            assert_same_bits("the checker", &in_order, &outputs(checked.with_seed(2), compute));
        }
    }
}

#[test]
#[ignore = "needs a GPU: FASTLORA_TEST_DEVICE=cuda:N, and --include-ignored"]
fn every_operation_matches_float64_on_a_gpu() {
    let name = std::env::var("FASTLORA_TEST_DEVICE").expect("FASTLORA_TEST_DEVICE=cuda:N");
    let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok()).expect("cuda:N");
    let gpu = Driver::new(index).unwrap();
    for compute in COMPUTE_TYPES {
        assert_same_bits("another run", &outputs(gpu.clone(), compute), &outputs(gpu.clone(), compute));
    }
}

/// A model with adapters on a device of a made-up size.
fn model_on(total: u64) -> Transformer<CudaBackend<Emulator>> {
    let device = Emulator::new(Flavour::Fast, 0).unwrap().with_memory(total);
    let backend = Arc::new(CudaBackend::new(device, ComputeType::Bf16));
    let base = BaseModel::open("tests/fixtures/tiny_qwen2").unwrap();
    let target_modules = TargetModules::Pattern(TargetModules::ALL_LINEAR.into());
    let lora = LoraConfig::new(8, 16.0, target_modules);
    Transformer::load(backend, &base, Some(&lora)).unwrap()
}

/// What is chosen for it.
fn plan(total: u64, choice: ActivationMemory) -> Result<MemoryPlan, Error> {
    let mut model = model_on(total);
    model.reserve_training(LIMITS, choice, true)?;
    Ok(model.memory_plan().unwrap())
}

const LIMITS: Limits = Limits { tokens: 20_000, labelled_rows: 9_000, positions: 500 };

#[test]
fn fault_59_what_does_not_fit_is_refused_at_the_start_with_what_would() {
    use ActivationMemory::{Auto, Balanced, Fast, Small};
    let roomy = 1 << 40;
    let [fast, balanced, small] = [Fast, Balanced, Small].map(|choice| plan(roomy, choice).unwrap());
    assert!(small.activations < balanced.activations && balanced.activations < fast.activations);
    assert_eq!((fast.recompute, small.recompute), (Recompute::Nothing, Recompute::Blocks));
    // Norms alone are kept of what could be computed again: the backward of the MLP needs no activation.
    let (model, rows) = (model_on(roomy), BatchRows { tokens: 20_000, labelled: 9_000 });
    let (backend, config) = (model.backend(), model.config());
    let of_a_norm = backend.buffer_bytes(backend.padded(rows).tokens * config.hidden_size);
    let norms = 2 * (config.layer_count as u64 - 1) * of_a_norm;
    assert_eq!(fast.activations - balanced.activations, norms);
    // What is left for the batches decides: the first that fits.
    let rest = roomy - free_before_batches();
    let just_enough = |plan: &MemoryPlan| rest + plan.of_batches() + (128 << 20);
    for expected in [fast, balanced, small] {
        assert_eq!(plan(just_enough(&expected), Auto).unwrap(), expected);
    }
    let error = plan(just_enough(&small) - 1, Auto).unwrap_err();
    assert_eq!(error.kind().exit_code(), 5);
    assert!(error.message().contains("activations of the longest batch"), "{error}");
    assert!(error.hint_text().unwrap().contains("batches of up to 19456 tokens fit"), "{error}");
    let error = plan(just_enough(&small), Fast).unwrap_err();
    assert!(error.hint_text().unwrap().contains("set activation_memory to small"), "{error}");
}

#[test]
fn what_is_planned_for_batches_is_what_they_take() {
    for choice in [ActivationMemory::Fast, ActivationMemory::Balanced, ActivationMemory::Small] {
        let mut model = model_on(1 << 40);
        model.reserve_training(LIMITS, choice, true).unwrap();
        let taken = free_before_batches() - model.backend().free_bytes().unwrap().unwrap();
        let planned = model.memory_plan().unwrap().of_batches();
        // Seven buffers of scratch are planned in whole lines of 256 bytes, and are allocated as they are.
        assert!((planned - 7 * 255..=planned).contains(&taken), "{choice:?}: {taken} of {planned}");
    }
}

/// Bytes still free on the roomy device when the batches are planned.
fn free_before_batches() -> u64 {
    let model = model_on(1 << 40);
    let backend = model.backend();
    let _rope = backend.floats(&model.config().rope_table(500)).unwrap();
    backend.free_bytes().unwrap().unwrap()
}

#[test]
fn what_the_kernels_cannot_read_is_refused() {
    let backend = CudaBackend::new(Emulator::new(Flavour::Fast, 0).unwrap(), ComputeType::Bf16);
    let error = backend.check_heads(48, 48).unwrap_err();
    assert!(error.message().contains("width 48"), "{error}");
    let odd = fastlora::tensor::WeightTensor::from_f32("w", vec![2, 12], &[0.0; 24]);
    let error = backend.matrix(&[odd]).err().unwrap();
    assert!(error.message().contains("multiple of 8"), "{error}");
    assert_eq!(error.location(), Some("w"));
}

/// A few steps over batches of two shapes, with dropout, noise, validation and a change of the parameters by the host; every
/// figure that comes out, and how much of the work was started from recordings.
fn figures_of_a_run(is_recorded: bool) -> (Vec<f32>, u64) {
    let device = Emulator::new(Flavour::Fast, 0).unwrap();
    let backend = Arc::new(CudaBackend::new(device.clone(), ComputeType::Bf16));
    // In a profiler's window nothing is started from a recording.
    backend.profile(!is_recorded).unwrap();
    let base = BaseModel::open("tests/fixtures/tiny_qwen2").unwrap();
    let target_modules = TargetModules::Pattern(TargetModules::ALL_LINEAR.into());
    let lora = LoraConfig::new(8, 16.0, target_modules);
    let mut model = Transformer::load(Arc::clone(&backend), &base, Some(&lora)).unwrap();
    model.start(&base, 5).unwrap();
    let settings =
        AdamWSettings { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };
    let mut optimizer = AdamW::new(&*backend, model.layout().parameter_count(), settings).unwrap();
    // The first two are filled up to one shape.
    let batches = [&[9, 30, 1][..], &[25, 12], &[70, 3]].map(|lengths| batch_of(lengths, 200));
    let mut figures = Vec::new();
    let mut replays = 0;
    for epoch in 0..4 {
        if epoch == 2 {
            replays = device.replay_count();
        }
        for batch in &batches {
            model.zero_gradients().unwrap();
            let dropout = Some(Dropout { probability: 0.2, seed: 3, epoch });
            let settings = PassSettings {
                gradient_scale: 1.0 / batch.labelled_count() as f32,
                dropout,
                embedding_noise: Some(EmbeddingNoise { alpha: 5.0, seed: 4, epoch }),
            };
            figures.extend(&model.accumulate_gradients(batch, settings).unwrap().losses);
            let (backend, parameters, gradients) = model.trainable();
            figures.push(optimizer.update(backend, parameters, gradients, 1e-3).unwrap() as f32);
            figures.extend(&model.evaluate(batch).unwrap().losses);
        }
    }
    figures.extend(model.parameters().unwrap());
    model.start(&base, 5).unwrap();
    figures.extend(&model.evaluate(&batches[0]).unwrap().losses);
    (figures, device.replay_count() - replays)
}

#[test]
fn recorded_work_has_the_bits_of_work_that_is_enqueued() {
    let (plain, none) = figures_of_a_run(false);
    let (recorded, replays) = figures_of_a_run(true);
    assert_same_bits("a recording", &[("run".into(), plain)], &[("run".into(), recorded)]);
    // For each batch of the last two epochs, when everything was recorded: forward, backward, and after the update the renewal
    // of what depends on the adapters, and the evaluation. And the last evaluation, of other adapters.
    assert_eq!((none, replays), (0, 2 * 3 * 4 + 2));
}
