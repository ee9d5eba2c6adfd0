//! The CUDA driver's error paths, against a made-up libcuda (`tests/fixtures/fake_cuda.c`): each test starts this program
//! again with that library first on the search path.
#![cfg(target_os = "linux")]

#[path = "support/fake_cuda.rs"]
mod fake_cuda;

use std::process::Command;

use fake_cuda::build_library;
use fastlora::device::driver::{self, Driver};
use fastlora::device::{Argument, Device, Launch, Memory};
use fastlora::error::{Error, Result};

const INNER: &str = "FASTLORA_TEST_INNER";

/// What `work` prints in a process whose driver has this fault.
fn in_fake(test: &str, fault: &str, work: fn() -> Result<String>) -> Option<String> {
    if !driver::is_compiled_in() {
        println!("skipped: built without nvcc");
        return None;
    }
    if std::env::var_os(INNER).is_some() {
        match work() {
            Ok(text) => println!("[{text}]"),
            Err(error) => println!("[{error}]"),
        }
        // Once, also where the test asks under several faults.
        std::process::exit(0);
    }
    let folder = tempfile::tempdir().unwrap();
    build_library(folder.path(), fault == "stub");
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INNER, "1")
        .env("FAKE_CUDA", fault)
        .env("LD_LIBRARY_PATH", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let (begin, end) = (text.find('[').expect("a result") + 1, text.rfind(']').expect("a result"));
    Some(text[begin..end].to_owned())
}

fn open() -> Result<String> {
    Driver::new(0).map(|driver| driver.description())
}

#[test]
fn a_gpu_is_described() {
    if let Some(text) = in_fake("a_gpu_is_described", "", open) {
        assert_eq!(text, "Fake GPU (compute capability 8.0, 40 GiB)");
    }
}

#[test]
fn fault_58_an_old_driver_is_told_the_version_wanted() {
    if let Some(text) = in_fake("fault_58_an_old_driver_is_told_the_version_wanted", "old", open) {
        assert!(text.contains("supports CUDA 11.4, and this build needs 1"), "{text}");
        assert!(text.contains("install a newer driver"), "{text}");
    }
}

#[test]
fn fault_58_a_stub_library_is_recognised() {
    if let Some(text) = in_fake("fault_58_a_stub_library_is_recognised", "stub", open) {
        assert!(text.contains("no `cuStreamCreate`"), "{text}");
    }
}

#[test]
fn fault_58_no_device_and_no_such_device() {
    if let Some(text) = in_fake("fault_58_no_device_and_no_such_device", "no device", open) {
        assert!(text.contains("cannot start CUDA") && text.contains("CUDA_VISIBLE_DEVICES"), "{text}");
    }
}

#[test]
fn fault_58_a_gpu_number_beyond_those_there_are() {
    let work = || Driver::new(3).map(|driver| driver.description());
    if let Some(text) = in_fake("fault_58_a_gpu_number_beyond_those_there_are", "", work) {
        assert!(text.contains("there is no GPU 3: CUDA shows 1"), "{text}");
    }
}

#[test]
fn fault_58_a_gpu_older_than_ampere_is_refused() {
    if let Some(text) = in_fake("fault_58_a_gpu_older_than_ampere_is_refused", "old GPU", open) {
        assert!(text.contains("compute capability 7.0; 8.0 (Ampere) is needed"), "{text}");
    }
}

#[test]
fn a_module_that_does_not_load_is_named() {
    if let Some(text) = in_fake("a_module_that_does_not_load_is_named", "bad image", open) {
        assert!(text.contains("adamw: cannot load compiled kernels"), "{text}");
    }
}

#[test]
fn fault_59_out_of_memory_names_the_bytes() {
    let work = || Driver::new(0)?.allocate(12345).map(|memory| format!("{memory:?}"));
    if let Some(text) = in_fake("fault_59_out_of_memory_names_the_bytes", "out of memory", work) {
        assert!(text.contains("cannot allocate 12345 bytes of GPU memory"), "{text}");
    }
}

fn launch_fill(driver: &Driver, kernel: &str, threads: u32) -> Result<()> {
    launch_clusters(driver, kernel, 1, threads)
}

/// Two blocks.
fn launch_clusters(driver: &Driver, kernel: &str, cluster_blocks: u32, threads: u32) -> Result<()> {
    let memory = driver.allocate(64)?;
    let arguments = &[Argument::of(&memory), Argument::F32(1.0), Argument::I64(16)];
    let grid = [2, 1, 1];
    let launch = Launch { kernel, grid, cluster_blocks, threads, dynamic_shared_bytes: 0, arguments };
    // SAFETY: the made-up driver runs nothing.
    unsafe { driver.launch(&launch) }
}

#[test]
fn fault_60_a_fault_in_a_kernel_names_the_kernel_and_its_shape() {
    let work = || {
        let driver = Driver::new(0)?;
        launch_fill(&driver, "fill_f32", 256)?;
        driver.synchronize().map(|()| "fine".to_owned())
    };
    let test = "fault_60_a_fault_in_a_kernel_names_the_kernel_and_its_shape";
    if let Some(text) = in_fake(test, "fault in a kernel", work) {
        assert!(
            text.starts_with("after fill_f32<<<(2,1,1), 256, 0>>>(memory, 1.0, 16): cannot finish"),
            "{text}"
        );
    }
}

#[test]
fn a_launch_that_is_refused_names_the_kernel() {
    let work = || {
        let driver = Driver::new(0)?;
        let unknown = launch_fill(&driver, "no_such", 256).unwrap_err();
        let too_many = launch_fill(&driver, "fill_f32", 2048).unwrap_err();
        Ok(format!("{unknown}; {too_many}"))
    };
    if let Some(text) = in_fake("a_launch_that_is_refused_names_the_kernel", "", work) {
        assert!(text.contains("there is no kernel `no_such`; fill_f32<<<(2,1,1), 2048, 0>>>"), "{text}");
    }
}

#[test]
fn the_driver_is_told_of_clusters() {
    let work = || {
        let driver = Driver::new(0)?;
        launch_clusters(&driver, "fill_f32", 2, 256)?;
        Ok(launch_clusters(&driver, "fill_f32", 4, 256).unwrap_err().to_string())
    };
    if let Some(text) = in_fake("the_driver_is_told_of_clusters", "", work) {
        assert!(text.starts_with("fill_f32<<<(2,1,1) by 4, 256, 0>>>"), "{text}");
    }
}

#[test]
fn bytes_go_there_and_back() {
    let work = || {
        let driver = Driver::new(0)?;
        let (a, b) = (driver.allocate(100)?, driver.allocate(100)?);
        let start = driver.record_event()?;
        driver.upload(&(0..100).collect::<Vec<u8>>(), &a, 0)?;
        driver.fill(&b, 0..100, 7)?;
        driver.copy(&a, 10..20, &b, 50)?;
        let mut bytes = [0; 12];
        driver.download(&b, 49, &mut bytes)?;
        let end = driver.record_event()?;
        let expected = [7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 7];
        if bytes != expected || driver.milliseconds_between(&start, &end)? != 1.5 {
            return Err(Error::internal(format!("{bytes:?}")));
        }
        if driver.download(&b, 90, &mut bytes).is_ok() {
            return Err(Error::internal("a copy outside the memory was allowed"));
        }
        Ok("fine".to_owned())
    };
    if let Some(text) = in_fake("bytes_go_there_and_back", "", work) {
        assert_eq!(text, "fine");
    }
}

/// More than the staging memory holds at once.
#[test]
fn a_large_upload_arrives_whole() {
    let work = || {
        let driver = Driver::new(0)?;
        let bytes: Vec<u8> = (0..(40 << 20) + 12_345_u32).map(|i| (i % 251) as u8).collect();
        let memory = driver.allocate(bytes.len() + 3)?;
        driver.upload(&bytes, &memory, 3)?;
        let mut back = vec![0; bytes.len()];
        driver.download(&memory, 3, &mut back)?;
        driver.profile(true)?;
        driver.profile(false)?;
        Ok(if back == bytes { "whole".to_owned() } else { "damaged".to_owned() })
    };
    if let Some(text) = in_fake("a_large_upload_arrives_whole", "", work) {
        assert_eq!(text, "whole");
    }
}

/// Which batches four steps saw: each is loaded while the step before may still run, and read from where all of them lie.
fn steps_over_batches() -> Result<String> {
    let driver = Driver::new(0)?;
    let batch = driver.allocate(64)?;
    let seen: Vec<_> = (0..4).map(|_| driver.allocate(64)).collect::<Result<_>>()?;
    let mut buffer = driver.allocate_upload_buffer(64)?;
    for (number, seen) in (1..).zip(&seen) {
        driver.start_upload(&[number; 64], &mut buffer)?;
        driver.finish_upload(&mut buffer, &batch, 0)?;
        driver.copy(&batch, 0..64, seen, 0)?;
    }
    let mut found = [0; 64];
    let mut saw = Vec::new();
    for seen in &seen {
        driver.download(seen, 0, &mut found)?;
        saw.push(if found == [found[0]; 64] { found[0] } else { 0 });
    }
    Ok(format!("{saw:?}"))
}

#[test]
fn an_upload_beside_the_work_waits_for_it_and_is_waited_for() {
    let test = "an_upload_beside_the_work_waits_for_it_and_is_waited_for";
    let right = "[1, 2, 3, 4]";
    for fault in [
        "",
        "late copies",
        "late work",
        "late copies, late work",
        // No wait of the host holds up the work.
        "no bytes from the host among the work",
    ] {
        if let Some(text) = in_fake(test, fault, steps_over_batches) {
            assert_eq!(text, right, "{fault}");
        }
    }
    // Each wait is needed: what was not waited for shows.
    for fault in ["late copies, deaf work", "late work, deaf copies", "late copies, late work, deaf host"] {
        if let Some(text) = in_fake(test, fault, steps_over_batches) {
            assert_ne!(text, right, "{fault}");
        }
    }
}

#[test]
fn an_upload_beside_the_work_holds_nothing_up() {
    let work = || {
        let driver = Driver::new(0)?;
        let memory = driver.allocate(4)?;
        let mut buffer = driver.allocate_upload_buffer(4)?;
        for number in 0..2 {
            driver.fill(&memory, 0..4, number)?;
            driver.start_upload(&[7; 4], &mut buffer)?;
            driver.finish_upload(&mut buffer, &memory, 0)?;
        }
        // SAFETY: the made-up driver's memory is the host's; a GPU would not have begun yet.
        let before = unsafe { *(memory.address() as *const [u8; 4]) };
        let mut after = [0; 4];
        driver.download(&memory, 0, &mut after)?;
        Ok(format!("{before:?}, then {after:?}"))
    };
    if let Some(text) = in_fake("an_upload_beside_the_work_holds_nothing_up", "late copies, late work", work)
    {
        assert_eq!(text, "[255, 255, 255, 255], then [7, 7, 7, 7]");
    }
}

#[test]
fn an_upload_buffer_is_not_overfilled_and_not_emptied_twice() {
    let work = || {
        let driver = Driver::new(0)?;
        let memory = driver.allocate(8)?;
        let allocations = driver.allocation_count();
        let mut buffer = driver.allocate_upload_buffer(8)?;
        let counted = driver.allocation_count() - allocations;
        let too_many = driver.start_upload(&[1; 9], &mut buffer).unwrap_err();
        driver.start_upload(&[1; 8], &mut buffer)?;
        let outside = driver.finish_upload(&mut buffer, &memory, 1).unwrap_err();
        let nothing = driver.finish_upload(&mut buffer, &memory, 0).unwrap_err();
        Ok(format!("{counted}; {}; {}; {}", too_many.message(), outside.message(), nothing.message()))
    };
    if let Some(text) = in_fake("an_upload_buffer_is_not_overfilled_and_not_emptied_twice", "", work) {
        assert!(
            text.starts_with("1; 9 bytes for an upload buffer of 8; copy of 8 bytes at byte 1"),
            "{text}"
        );
        assert!(text.ends_with("that was not started"), "{text}");
    }
}

fn record_and_refuse() -> Result<String> {
    let driver = Driver::new(0)?;
    let memory = driver.allocate(64)?;
    let graph = driver.record(|| driver.fill(&memory, 0..64, 1))?;
    // SAFETY: the memory lives.
    unsafe { driver.replay(&graph) }?;
    let mut landing = Default::default();
    let mut buffer = driver.allocate_upload_buffer(1)?;
    let allocations = driver.allocation_count();
    driver.start_upload(&[1], &mut buffer)?;
    let refused = [
        driver.record(|| driver.upload(&[1], &memory, 0)).err(),
        driver.record(|| driver.finish_upload(&mut buffer, &memory, 0)).err(),
        driver.record(|| driver.start_upload(&[1], &mut buffer)).err(),
        driver.record(|| driver.download(&memory, 0, &mut [0])).err(),
        driver.record(|| driver.start_download(&memory, 0, 1, &mut landing)).err(),
        driver.record(|| driver.allocate(1).map(|_| ())).err(),
        driver.record(|| driver.record(|| Ok(())).map(|_| ())).err(),
    ];
    // And afterwards all of it works again.
    driver.upload(&[7; 64], &memory, 0)?;
    driver.start_download(&memory, 8, 3, &mut landing)?;
    let landed = driver.finish_download(&landing)?;
    let refused = refused.iter().flatten().filter(|error| error.message().contains("being recorded")).count();
    Ok(format!("{refused} refused, {} allocations, {landed:?}", driver.allocation_count() - allocations))
}

#[test]
fn recorded_work_holds_nothing_of_the_host() {
    if let Some(text) = in_fake("recorded_work_holds_nothing_of_the_host", "", record_and_refuse) {
        assert_eq!(text, "7 refused, 0 allocations, [7, 7, 7]");
    }
}
