//! `fastlora export`: an adapter for other programs.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Cli;
use super::model::ModelArgs;
use super::output::print_line;
use crate::checkpoint::adapter::{Companions, read_adapter, write_adapter};
use crate::error::{Error, Result};
use crate::export::{bake_scale, write_gguf};

/// Arguments of `fastlora export`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("form").required(true).multiple(true))]
pub struct ExportArgs {
    /// The adapter's folder.
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// What to write: a `.gguf` file with --gguf, else a folder.
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Writes a GGUF file, as llama.cpp's `--lora` reads it.
    #[arg(long, group = "form")]
    gguf: bool,
    /// Puts the scale into B, so that α = r, for tools that ignore rsLoRA's scale.
    #[arg(long, group = "form")]
    bake_alpha: bool,
    /// Base model, whose shape a GGUF file needs; without it, the one that the adapter names.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Replaces what is there.
    #[arg(long)]
    overwrite: bool,
}

pub(super) fn run(args: &ExportArgs, cli: &Cli) -> Result<()> {
    let place = args.output.display().to_string();
    if args.output.exists() && !args.overwrite {
        return Err(Error::config("the output is there already")
            .at(place)
            .hint("name another with -o, or give --overwrite to replace it"));
    }
    if args.gguf {
        let model = ModelArgs { model: args.model.clone(), adapter: Some(args.adapter.clone()) };
        let files = model.open(cli)?;
        let adapter = files.adapter.ok_or_else(|| Error::internal("an adapter was named"))?;
        let adapter = if args.bake_alpha { bake_scale(adapter)? } else { adapter };
        write_gguf(&adapter, files.base.config(), &args.output)?;
        return report(args, cli, adapter.tensors.len());
    }
    let adapter = bake_scale(read_adapter(&args.adapter)?)?;
    let text = |name: &str| std::fs::read_to_string(args.adapter.join(name)).unwrap_or_default();
    let mut provenance: Value = serde_json::from_str(&text("fastlora.json")).unwrap_or_else(|_| json!({}));
    provenance["scale_baked"] = json!(true);
    let card = text("README.md");
    let companions = Companions {
        provenance: &provenance,
        model_card: &card,
        base_folder: Some(&args.adapter),
        chat_template: None,
    };
    write_adapter(&args.output, &adapter.config, &adapter.tensors, &companions)?;
    report(args, cli, adapter.tensors.len())
}

fn report(args: &ExportArgs, cli: &Cli, tensors: usize) -> Result<()> {
    if cli.json {
        let object = json!({ "output": args.output, "tensors": tensors, "gguf": args.gguf, "scale_baked": args.bake_alpha });
        return print_line(&object.to_string());
    }
    print_line(&format!("{}: {tensors} tensors", args.output.display()))
}
