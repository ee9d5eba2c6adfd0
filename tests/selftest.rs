//! `fastlora selftest` through the binary, and what its checks catch.

use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;
use fastlora::backend::cpu::CpuBackend;
use fastlora::selftest::{Outcome, Precision, Scale, cases};
use serde_json::Value;

fn selftest(arguments: &[&str]) -> Output {
    Command::new(cargo_bin("fastlora")).arg("selftest").args(arguments).output().unwrap()
}

fn report(arguments: &[&str]) -> Value {
    let output = selftest(&[arguments, &["--quick", "--json", "-q"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn operations(section: &Value) -> &Vec<Value> {
    section["operations"].as_array().unwrap()
}

#[test]
fn every_operation_is_right_and_timed_on_the_cpu() {
    let report = report(&["--device", "cpu"]);
    let section = &report["sections"][0];
    assert!(section["device"].as_str().unwrap().starts_with("cpu, "));
    assert!(section["best_rates"]["flops_per_second"].as_f64().unwrap() > 1e8);
    assert!(section["best_rates"]["bytes_per_second"].as_f64().unwrap() > 1e8);
    for row in operations(section) {
        assert_eq!(row["passes"], true, "{row:#}");
        assert_eq!(row["dtype"], "f32");
        assert!(row["timing"]["seconds"].as_f64().unwrap() > 0.0, "{row:#}");
        for output in row["outputs"].as_array().unwrap() {
            assert!(output["compared"].as_u64().unwrap() > 0, "{row:#}");
        }
    }
    for name in [
        "rms_norm",
        "rms_norm backward",
        "gated_silu",
        "gated_silu backward",
        "gated_gelu",
        "gated_gelu backward",
        "embedding",
        "gather_labelled",
        "scatter_labelled",
        "linear",
        "linear backward",
        "mlp",
        "mlp backward",
        "attention",
        "attention backward",
        "attention over a cache",
        "head loss",
        "head loss with gradient",
        "adamw",
    ] {
        assert!(operations(section).iter().any(|row| row["operation"] == name), "no {name}");
    }
}

/// Outputs begin as NaN, or as what a run adds to or replaces.
#[test]
fn what_was_never_computed_is_found_wrong() {
    let backend = CpuBackend::new(Some(1)).unwrap();
    for case in cases(Scale::Quick) {
        for operation in case.operations(Precision::F32) {
            let outcomes = operation.prepare(&backend).unwrap().check(&backend).unwrap();
            assert!(!outcomes.iter().all(Outcome::passes), "{} {}", operation.name(), operation.shape());
        }
    }
}

#[cfg(feature = "emulator")]
#[test]
fn every_operation_is_right_on_the_emulator_and_not_timed() {
    let report = report(&["--device", "emulator"]);
    let sections = report["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 2);
    for (section, dtype) in sections.iter().zip(["bf16", "f16"]) {
        assert!(section["best_rates"].is_null());
        for row in operations(section) {
            assert_eq!((&row["passes"], &row["dtype"]), (&true.into(), &dtype.into()), "{row:#}");
            assert!(row["timing"].is_null());
        }
    }
}

#[test]
#[ignore = "needs a GPU: FASTLORA_TEST_DEVICE=cuda:N, and --include-ignored"]
fn every_operation_is_right_on_a_gpu() {
    let name = std::env::var("FASTLORA_TEST_DEVICE").expect("FASTLORA_TEST_DEVICE=cuda:N");
    for section in report(&["--device", &name])["sections"].as_array().unwrap() {
        for row in operations(section) {
            assert_eq!(row["passes"], true, "{row:#}");
            assert!(row["timing"]["seconds"].as_f64().unwrap() > 0.0, "{row:#}");
        }
    }
}

#[test]
fn a_device_that_is_not_there_or_misspelt_is_refused() {
    let output = selftest(&["--device", "gpu"]);
    assert_eq!(output.status.code(), Some(2));
    if fastlora::device::driver::Driver::new(0).is_err() {
        let output = selftest(&["--device", "cuda:0"]);
        assert_eq!(output.status.code(), Some(5));
        assert!(String::from_utf8_lossy(&output.stderr).contains("--device cpu"));
    }
}
