//! The CUDA backend through the suite that every backend passes: on the emulator under several schedules and in the
//! checker, and on a GPU where `FASTLORA_TEST_DEVICE` names one.
#![cfg(feature = "emulator")]

mod backend_suite;

use backend_suite::{Precision, run};
use fastlora::backend::Backend;
use fastlora::backend::cuda::{ComputeType, CudaBackend};
use fastlora::device::Device;
use fastlora::device::driver::Driver;
use fastlora::device::emulator::{Emulator, Flavour};

const COMPUTE_TYPES: [ComputeType; 2] = [ComputeType::F16, ComputeType::Bf16];

fn precision(compute: ComputeType) -> Precision {
    // The norm: a square, at most 2 additions in a thread, 10 over the block, each within 2⁻²⁴; halved by the root.
    Precision { compute: compute.dtype(), width_multiple: 8, norm_tolerance: 9.0 * 2f64.powi(-24) }
}

fn outputs<D: Device>(device: D, compute: ComputeType) -> Vec<(String, Vec<f32>)> {
    run(&CudaBackend::new(device, compute), precision(compute)).outputs
}

fn assert_same_bits(what: &str, one: &[(String, Vec<f32>)], other: &[(String, Vec<f32>)]) {
    assert_eq!(one.len(), other.len());
    for ((case, a), (_, b)) in one.iter().zip(other) {
        assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{case}: {what} differs");
    }
}

#[test]
fn every_operation_matches_float64_under_every_schedule_and_in_the_checker() {
    let fast = Emulator::new(Flavour::Fast, 0).unwrap();
    for compute in COMPUTE_TYPES {
        let in_order = outputs(fast.clone(), compute);
        assert_same_bits("another schedule", &in_order, &outputs(fast.with_seed(1), compute));
        let checked = outputs(Emulator::new(Flavour::Checked, 2).unwrap(), compute);
        assert_same_bits("the checker", &in_order, &checked);
    }
}

#[test]
fn every_operation_matches_float64_on_a_gpu() {
    let Ok(name) = std::env::var("FASTLORA_TEST_DEVICE") else {
        eprintln!("skipped: FASTLORA_TEST_DEVICE names no GPU");
        return;
    };
    let index = name.strip_prefix("cuda:").and_then(|index| index.parse().ok()).expect("cuda:N");
    let gpu = Driver::new(index).unwrap();
    for compute in COMPUTE_TYPES {
        assert_same_bits("another run", &outputs(gpu.clone(), compute), &outputs(gpu.clone(), compute));
    }
}

#[test]
fn what_the_kernels_cannot_read_is_refused() {
    let backend = CudaBackend::new(Emulator::new(Flavour::Fast, 0).unwrap(), ComputeType::Bf16);
    let error = backend.check_head_dim(48).unwrap_err();
    assert!(error.message().contains("width 48"), "{error}");
    let odd = fastlora::tensor::WeightTensor::from_f32("w", vec![2, 12], &[0.0; 24]);
    let error = backend.matrix(&[odd]).err().unwrap();
    assert!(error.message().contains("multiple of 8"), "{error}");
    assert_eq!(error.location(), Some("w"));
}
