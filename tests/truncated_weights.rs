//! Fault 15 in a process of its own: the state of damaged maps is shared by the whole process.

use std::fs;

use fastlora::checkpoint::base::BaseModel;
use fastlora::checkpoint::mapped::{self, MappedFile};
use fastlora::error::ErrorKind;

#[test]
fn fault_15_file_truncated_while_mapped_is_an_error_and_no_signal() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(format!("tests/fixtures/tiny_qwen2/{file}"), folder.path().join(file)).unwrap();
    }
    let path = folder.path().join("model.safetensors");
    let base = BaseModel::open(folder.path()).unwrap();
    let intact = MappedFile::open("tests/fixtures/tiny_qwen2/model.safetensors".as_ref()).unwrap();
    mapped::check_intact().unwrap();

    const KEPT_BYTES: usize = 8192;
    fs::File::options().write(true).open(&path).unwrap().set_len(KEPT_BYTES as u64).unwrap();
    let tensor = base.tensor("model.norm.weight").unwrap();
    let lost: u32 = tensor.bytes().iter().map(|&byte| u32::from(byte)).sum();
    let embedding = base.embedding().unwrap();
    let lost_in_threads: u32 = std::thread::scope(|scope| {
        let threads = embedding
            .bytes()
            .chunks(4096)
            .map(|bytes| scope.spawn(|| bytes.iter().rev().map(|&byte| u32::from(byte)).sum::<u32>()));
        threads.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(lost == 0 || lost_in_threads == 0, "one of the two lies past the cut");

    for error in [mapped::check_intact().unwrap_err(), base.fingerprint().unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::Model);
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert!(error.to_string().contains("truncated"), "{error}");
    }
    intact.check_intact().unwrap();
    drop((tensor, embedding, base));
    mapped::check_intact().unwrap();
    // The slot is free again, and unmarked.
    let reopened = MappedFile::open(&path).unwrap();
    assert_eq!(reopened.bytes().len(), KEPT_BYTES);
    reopened.check_intact().unwrap();
    assert!(intact.bytes().iter().any(|&byte| byte != 0));
}

#[test]
fn other_bus_errors_still_end_the_process() {
    const CHILD: &str = "FASTLORA_TEST_BUS_ERROR";
    if std::env::var_os(CHILD).is_some() {
        let _ours = MappedFile::open("tests/fixtures/tiny_qwen2/model.safetensors".as_ref()).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        // SAFETY: read-only; that the read below faults is what is tested.
        let foreign = unsafe { memmap2::Mmap::map(&file) }.unwrap();
        file.set_len(0).unwrap();
        println!("{}", foreign[0]);
        return;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "other_bus_errors_still_end_the_process", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.status), Some(libc::SIGBUS), "{child:?}");
}
