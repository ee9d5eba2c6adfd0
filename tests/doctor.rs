//! `fastlora doctor` through the binary: without a driver, and with made-up ones.
#![cfg(target_os = "linux")]

#[path = "support/fake_cuda.rs"]
mod fake_cuda;

use std::process::{Command, Output};

use assert_cmd::cargo::cargo_bin;
use fastlora::device::driver;
use serde_json::Value;

fn doctor(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(cargo_bin("fastlora"));
    command.arg("doctor").args(arguments).envs(variables.iter().copied()).output().unwrap()
}

fn report(variables: &[(&str, &str)]) -> Value {
    let output = doctor(&["--json"], variables);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The report beside a driver with this fault.
fn report_beside(fault: &str) -> Value {
    let folder = tempfile::tempdir().unwrap();
    fake_cuda::build_library(folder.path(), fault == "stub");
    report(&[("FAKE_CUDA", fault), ("LD_LIBRARY_PATH", folder.path().to_str().unwrap())])
}

fn names(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

/// What is wrong, with what to do, one a line.
fn findings(report: &Value) -> Vec<String> {
    let findings = report["findings"].as_array().unwrap().iter();
    findings
        .map(|finding| {
            format!("{}: {} -> {}", finding["weight"], finding["what"], finding["remedy"]).replace('"', "")
        })
        .collect()
}

fn has_finding(report: &Value, parts: &[&str]) -> bool {
    findings(report).iter().any(|finding| parts.iter().all(|part| finding.contains(part)))
}

#[test]
fn the_cpu_always_trains_and_the_machine_is_described() {
    let report = report(&[]);
    assert!(names(&report["trains_on"]).contains(&"cpu"), "{report:#}");
    assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
    assert!(report["machine"]["cores"].as_u64().unwrap() >= 1);
    assert!(report["machine"]["memory_available_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(["portable", "avx2", "avx512"].contains(&report["machine"]["simd"].as_str().unwrap()));
    assert_eq!(report["build"]["kernels"].is_null(), !driver::is_compiled_in());
    // Tests are debug builds.
    assert_eq!(cfg!(debug_assertions), has_finding(&report, &["advice", "debug build", "--release"]));
}

#[test]
fn people_get_the_same_as_text() {
    let output = doctor(&[], &[("HF_HUB_OFFLINE", "1")]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for name in ["fastlora", "kernels", "system", "cpu", "memory", "driver", "nvcc", "hub cache", "trains on"]
    {
        assert!(text.lines().any(|line| line.starts_with(name)), "no line {name} in\n{text}");
    }
    assert!(text.contains(", offline"), "{text}");
}

#[test]
fn a_gpu_is_usable_where_the_build_has_kernels() {
    let report = report_beside("");
    let gpu = &report["gpus"][0];
    assert_eq!((&gpu["name"], &gpu["compute_capability"]), (&"Fake GPU".into(), &"8.0".into()));
    assert_eq!(gpu["memory_total_bytes"], 40u64 << 30);
    assert_eq!(report["driver"]["cuda_version"], "13.0");
    if driver::is_compiled_in() {
        assert_eq!(names(&report["trains_on"]), ["cuda:0", "cpu"]);
        assert_eq!(gpu["memory_free_bytes"], 1 << 20);
        assert!(names(&report["build"]["kernels"]["targets"]).contains(&"sm_80"));
    } else {
        assert_eq!(names(&report["trains_on"]), ["cpu"]);
        assert!(has_finding(&report, &["problem", "no kernels", "build again with nvcc"]), "{report:#}");
    }
}

#[test]
fn fault_58_the_doctor_names_what_is_wrong_with_the_driver() {
    if !driver::is_compiled_in() {
        println!("skipped: built without nvcc");
        return;
    }
    for (fault, parts) in [
        ("old", &["supports CUDA 11.4, and this build needs 1", "install a newer driver", "release 5"][..]),
        ("stub", &["no `cuStreamCreate`", "keep stubs off LD_LIBRARY_PATH"]),
        ("no device", &["cannot start CUDA", "CUDA_VISIBLE_DEVICES"]),
        ("old GPU", &["cuda:0: ", "compute capability 7.0; 8.0 (Ampere) is needed"]),
        ("bad image", &["cuda:0: adamw: cannot load compiled kernels"]),
    ] {
        let report = report_beside(fault);
        assert!(has_finding(&report, parts), "{fault}: {:#?}", findings(&report));
        assert_eq!(names(&report["trains_on"]), ["cpu"], "{fault}");
    }
}

/// On a made-up Hopper, whose every run takes 1.5 ms.
#[test]
fn the_doctor_tells_whether_a_gpu_is_tuned() {
    if !driver::is_compiled_in() {
        println!("skipped: built without nvcc");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fake_cuda::build_library(folder.path(), false);
    let path = folder.path().to_str().unwrap();
    let variables = [
        ("FAKE_CUDA", "Hopper"),
        ("LD_LIBRARY_PATH", path),
        ("XDG_CACHE_HOME", path),
        ("FASTLORA_TILES", ""),
    ];
    let tiles = || report(&variables)["gpus"][0]["tiles"].clone();
    let file = folder.path().join("fastlora/tiles/fake-gpu-132.json");
    assert_eq!((&tiles()["file"], &tiles()["tuned_at"]), (&file.to_str().unwrap().into(), &Value::Null));

    let tune = ["tune", "--shapes", "64x128", "--rows", "64,1048576", "--device", "cuda:0", "--json"];
    let output = Command::new(cargo_bin("fastlora")).args(tune).envs(variables).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let measured: Value = serde_json::from_slice(&output.stdout).unwrap();
    // The million rows do not fit.
    assert_eq!(measured["products"].as_array().unwrap().len(), 2, "{measured:#}");
    assert_eq!(measured["is_real"], true);
    assert!(String::from_utf8_lossy(&output.stderr).contains("is left out"));
    assert_eq!(tiles()["products"], 2);
    let text = doctor(&[], &variables).stdout;
    assert!(String::from_utf8_lossy(&text).contains("tiles tuned 2"));

    std::fs::write(&file, "{").unwrap();
    let report = report(&variables);
    assert!(
        has_finding(&report, &["advice", "fake-gpu-132.json: no table of tiles", "tune` again"]),
        "{report:#}"
    );
    assert!(report["gpus"][0]["tiles"]["tuned_at"].is_null());
}

#[test]
fn a_cache_that_cannot_be_written_is_a_problem_and_no_failure() {
    let report = report(&[("HF_HOME", "/dev/null/cache"), ("HF_HUB_CACHE", "")]);
    assert_eq!(report["hub_cache"]["is_writable"], false);
    assert!(has_finding(&report, &["problem", "/dev/null", "set HF_HOME"]), "{report:#}");
}

#[test]
fn an_nvcc_that_does_not_run_is_named() {
    let report = report(&[("NVCC", "/bin/false")]);
    assert!(report["nvcc"].is_null());
    assert!(has_finding(&report, &["problem", "NVCC is /bin/false, which does not run"]), "{report:#}");
}
