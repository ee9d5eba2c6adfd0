//! Finds nvcc: for the build script, and for `fastlora doctor`, which tells what a build would find now.

use std::path::{Path, PathBuf};
use std::process::Command;

/// nvcc by the first of: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, the active Python's wheels, `/usr/local/cuda`.
///
/// # Errors
/// `NVCC` names something that does not run.
pub fn find_nvcc() -> Result<Option<PathBuf>, String> {
    if let Some(named) = std::env::var_os("NVCC").filter(|value| !value.is_empty()) {
        let path = PathBuf::from(named);
        return match works(&path) {
            true => Ok(Some(path)),
            false => Err(format!("NVCC is {}, which does not run", path.display())),
        };
    }
    let toolkit = |root: PathBuf| root.join("bin/nvcc");
    let homes =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(|home| toolkit(home.into()));
    let on_path = std::iter::once(PathBuf::from("nvcc"));
    let wheels = std::iter::once_with(python_wheels).flatten().map(toolkit);
    let usual = std::iter::once(toolkit("/usr/local/cuda".into()));
    Ok(homes.chain(on_path).chain(wheels).chain(usual).find(|candidate| works(candidate)))
}

fn works(nvcc: &Path) -> bool {
    Command::new(nvcc).arg("--version").output().is_ok_and(|result| result.status.success())
}

fn python_wheels() -> Option<PathBuf> {
    let code = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let result = Command::new("python3").args(["-c", code]).output().ok()?;
    let folder = String::from_utf8(result.stdout).ok()?;
    Some(Path::new(folder.trim()).join("nvidia/cu13"))
}

/// What nvcc calls its release, as the driver counts: "release 13.0" → 13000.
pub fn cuda_version(nvcc: &Path) -> Option<i32> {
    let result = Command::new(nvcc).arg("--version").output().ok()?;
    let text = String::from_utf8(result.stdout).ok()?;
    let (_, rest) = text.split_once("release ")?;
    let (major, rest) = rest.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some(major.parse::<i32>().ok()? * 1000 + minor.parse::<i32>().ok()? * 10)
}
