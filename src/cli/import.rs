//! `fastlora import`: a GGUF file becomes a Hugging Face model folder.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use super::Cli;
use super::output::print_line;
use crate::dtype::DType;
use crate::error::Result;
use crate::import::{ImportOptions, import_gguf};

/// Arguments of `fastlora import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The GGUF file.
    #[arg(value_name = "FILE.gguf")]
    source: PathBuf,
    /// The folder to write.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Element type of the weights.
    #[arg(long, value_enum, default_value_t = WeightType::F16)]
    dtype: WeightType,
    /// Replace a folder that an earlier import wrote.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WeightType {
    F16,
    Bf16,
    F32,
}

impl From<WeightType> for DType {
    fn from(weight_type: WeightType) -> Self {
        match weight_type {
            WeightType::F16 => DType::F16,
            WeightType::Bf16 => DType::Bf16,
            WeightType::F32 => DType::F32,
        }
    }
}

pub(super) fn run(args: &ImportArgs, cli: &Cli) -> Result<()> {
    let start = Instant::now();
    tracing::info!("importing {} …", args.source.display());
    let options = ImportOptions { dtype: args.dtype.into(), overwrite: args.overwrite };
    // Draws on a terminal only.
    let bar = if cli.quiet { ProgressBar::hidden() } else { ProgressBar::no_length() };
    if let Ok(style) =
        ProgressStyle::with_template("{bar:30} {percent:>3}% {human_pos}/{human_len} weights, {eta} left")
    {
        bar.set_style(style);
    }
    let report = import_gguf(&args.source, &args.output, options, &|progress| {
        bar.set_length(progress.total_elements as u64);
        bar.inc(progress.elements as u64);
        tracing::debug!("{}: {} weights", progress.tensor, progress.elements);
    });
    bar.finish_and_clear();
    let report = report?;
    let seconds = start.elapsed().as_secs_f64();
    if cli.json {
        let result = serde_json::json!({
            "folder": args.output,
            "architecture": report.architecture,
            "tensors": report.tensors,
            "parameters": report.parameters,
            "dtype": options.dtype.to_string(),
            "seconds": seconds,
        });
        print_line(&result.to_string())
    } else {
        print_line(&format!(
            "{}: {} model, {} tensors, {} parameters in {}, imported in {seconds:.1} s",
            args.output.display(),
            report.architecture,
            report.tensors,
            report.parameters,
            options.dtype,
        ))
    }
}
