//! Runs compilers in parallel and skips what has not changed.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// One run of a compiler.
pub struct Job {
    /// For messages.
    pub name: String,
    /// The whole command line.
    pub command: Command,
    /// What the command writes.
    pub output: PathBuf,
    /// Files whose contents decide whether to run again.
    pub inputs: Vec<PathBuf>,
}

/// What a compiler printed, kept beside the output so that a skipped job still has it.
fn log_path(output: &Path) -> PathBuf {
    output.with_extension("log")
}

impl Job {
    fn fingerprint(&self) -> String {
        fingerprint(&format!("{:?}", self.command), &self.inputs)
    }

    /// Compiles unless the output is up to date; returns what the compiler printed.
    fn run(&mut self) -> Result<String, String> {
        let stamp_path = self.output.with_extension("stamp");
        let fingerprint = self.fingerprint();
        let up_to_date = self.output.exists()
            && std::fs::read_to_string(&stamp_path).is_ok_and(|stamp| stamp == fingerprint);
        if up_to_date && let Ok(log) = std::fs::read_to_string(log_path(&self.output)) {
            return Ok(log);
        }
        let result = self
            .command
            .output()
            .map_err(|error| format!("{}: cannot start {:?}: {error}", self.name, self.command))?;
        let log = String::from_utf8_lossy(&result.stdout) + String::from_utf8_lossy(&result.stderr);
        if !result.status.success() {
            return Err(format!("{}: {:?} failed:\n{log}", self.name, self.command));
        }
        for (path, text) in [(log_path(&self.output), &*log), (stamp_path, &fingerprint)] {
            std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        Ok(log.into_owned())
    }
}

/// A hash of a command line and of files' names and contents.
pub fn fingerprint(command: &str, files: &[PathBuf]) -> String {
    let mut hasher = DefaultHasher::new();
    command.hash(&mut hasher);
    for file in files {
        file.hash(&mut hasher);
        std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display())).hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

/// Runs the jobs, as many at a time as cargo allows, and returns their logs in order.
///
/// # Panics
/// With the compilers' messages, when one fails: that is how a build script fails.
pub fn run(jobs: Vec<Job>) -> Vec<String> {
    let workers = std::env::var("NUM_JOBS").ok().and_then(|count| count.parse().ok()).unwrap_or(1);
    let job_count = jobs.len();
    let queue = Mutex::new(jobs.into_iter().enumerate());
    let results = Mutex::new(vec![None; job_count]);
    std::thread::scope(|scope| {
        for _ in 0..job_count.min(workers) {
            scope.spawn(|| {
                loop {
                    let Some((index, mut job)) = queue.lock().expect("no panic while held").next() else {
                        break;
                    };
                    let result = job.run();
                    results.lock().expect("no panic while held")[index] = Some(result);
                }
            });
        }
    });
    let results: Vec<_> = results.into_inner().expect("workers are done").into_iter().flatten().collect();
    let failures: Vec<_> = results.iter().filter_map(|result| result.as_ref().err().cloned()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    results.into_iter().flatten().collect()
}

/// The files of a folder with one of these extensions, sorted.
pub fn files_in(folder: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("readable folder").path()).collect();
    files.retain(|file| {
        file.extension().is_some_and(|found| extensions.iter().any(|wanted| found == *wanted))
    });
    files.sort();
    files
}

/// `kernels/NAME.cu` and every header that it may include.
pub fn kernel_inputs(source: &Path) -> Vec<PathBuf> {
    let mut inputs = vec![source.to_owned()];
    for folder in ["kernels/ptx", "kernels/common"] {
        inputs.extend(files_in(folder, &["h"]));
    }
    inputs
}
