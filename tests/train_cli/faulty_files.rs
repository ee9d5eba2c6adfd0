//! Runs of the binary over a layer that makes one of its file calls go wrong (`tests/fixtures/faulty_files.c`).

use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use tempfile::TempDir;

use crate::support::fixture;
use crate::workspace::{Finished, Workspace};

/// The layer, compiled once; the folder goes with the process.
static LIBRARY: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let library = folder.path().join("faulty_files.so");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-w", "-o"]).arg(&library);
    assert!(compiler.arg(fixture("faulty_files.c")).status().unwrap().success());
    (folder, library)
});

/// One call that goes wrong; the fields are the layer's variables.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fault<'a> {
    /// Only calls of this name count.
    pub call: Option<&'a str>,
    /// Only calls on paths that contain this count.
    pub name: Option<&'a str>,
    /// Which of them.
    pub at: usize,
    /// What goes wrong.
    pub kind: &'a str,
}

impl Workspace {
    /// A run with `fault` among its calls in the workspace.
    pub fn train_with(&self, fault: Fault<'_>, arguments: &[&str]) -> Finished {
        let Fault { call, name, at, kind } = fault;
        let mut command = self.command(&[&["train"], arguments].concat());
        command.env("LD_PRELOAD", &LIBRARY.1);
        // The working folder as the kernel names it.
        command.env("FAULT_FOLDER", self.path("").canonicalize().unwrap());
        command.env("FAULT_AT", at.to_string()).env("FAULT_KIND", kind);
        if let Some(call) = call {
            command.env("FAULT_CALL", call);
        }
        if let Some(name) = name {
            command.env("FAULT_NAME", name);
        }
        Finished::of(command.output().unwrap())
    }

    /// The calls of a run on paths that contain `name`, each as `call path`, the paths from the workspace on.
    pub fn calls(&self, name: &str, arguments: &[&str]) -> Vec<String> {
        let log = tempfile::NamedTempFile::new().unwrap();
        let folder = self.path("").canonicalize().unwrap();
        let mut command = self.command(&[&["train"], arguments].concat());
        command.env("LD_PRELOAD", &LIBRARY.1).env("FAULT_FOLDER", &folder);
        command.env("FAULT_NAME", name).env("FAULT_LOG", log.path());
        Finished::of(command.output().unwrap()).succeeded();
        let prefix = format!("{}/", folder.display());
        let text = std::fs::read_to_string(log.path()).unwrap();
        text.lines().map(|line| line.replace(&prefix, "")).collect()
    }
}
