//! The verbs of the command line, one file each.

mod answer;
mod cases;
mod chat;
mod conditioning;
mod describe;
pub mod device;
mod doctor;
mod evaluate;
mod export;
mod generate;
mod import;
mod init;
mod inspect;
mod manual;
mod memory;
mod merge;
mod model;
mod output;
mod runs;
mod schema;
mod selftest;
mod signals;
mod tiles;
mod tokenizer;
mod train;
mod tune;
mod user_cache;
mod verify;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::error::Result;

/// Fine-tune language models with LoRA, fast, from one binary.
#[derive(Debug, Parser)]
#[command(name = "fastlora", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// No progress and no log but errors; results stay on standard output.
    #[arg(short, long, global = true, conflicts_with = "verbose", display_order = 100)]
    pub quiet: bool,
    /// More of what happens; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, display_order = 101)]
    pub verbose: u8,
    /// Results and errors as JSON on standard output; the log as JSON lines on standard error.
    #[arg(long, global = true, display_order = 102)]
    pub json: bool,
    /// Appends the log, with times and as with -v, to this file too.
    #[arg(long, global = true, value_name = "FILE", display_order = 103)]
    pub log_file: Option<PathBuf>,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train an adapter.
    Train(Box<train::TrainArgs>),
    /// Write a configuration to start from, for a model and data.
    Init(init::InitArgs),
    /// Generate text, with or without an adapter.
    Generate(generate::GenerateArgs),
    /// Talk with a model in the terminal.
    Chat(chat::ConverseArgs),
    /// Measure loss, perplexity and token accuracy on data.
    Evaluate(evaluate::EvaluateArgs),
    /// List, show and compare the runs in output folders.
    Runs(runs::RunsArgs),
    /// Show what a model folder, an adapter, a checkpoint or a data file holds.
    Inspect(inspect::InspectArgs),
    /// Tell whether an adapter is whole, belongs to its base, and what takes it.
    Verify(verify::VerifyArgs),
    /// Add an adapter to its base: a model folder that needs no adapter.
    Merge(merge::MergeArgs),
    /// Write an adapter for another program.
    Export(export::ExportArgs),
    /// Turn a GGUF file into a Hugging Face model folder.
    Import(import::ImportArgs),
    /// Tell what training would find on this machine, what is wrong and what to do.
    Doctor(doctor::DoctorArgs),
    /// Compare every operation with float64 on this machine's device, and its speed with the device's limits.
    Selftest(selftest::SelftestArgs),
    /// Measure which tiles of Hopper's products are the fastest on this device, for every later run.
    Tune(tune::TuneArgs),
    /// Print the JSON Schema of the configuration, from which editors complete and check.
    Schema(schema::SchemaArgs),
    /// Print completions for a shell.
    Completions(manual::CompletionsArgs),
    /// Print or write the manual pages.
    Man(manual::ManArgs),
}

impl Cli {
    /// Whether the run takes the times of its operations, for which somebody has to listen.
    pub fn times_operations(&self) -> bool {
        matches!(&self.command, Command::Train(args) if args.profile)
    }

    /// This process's rank, where several train together and it is not the first, which speaks for all.
    pub fn follower_rank(&self) -> Option<usize> {
        match &self.command {
            Command::Train(args) => args.follower_rank(),
            _ => None,
        }
    }

    /// Runs the verb.
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Command::Train(args) => train::run(args, self),
            Command::Init(args) => init::run(args, self),
            Command::Generate(args) => generate::run(args, self),
            Command::Chat(args) => chat::run(args, self),
            Command::Evaluate(args) => evaluate::run(args, self),
            Command::Runs(args) => runs::run(args, self),
            Command::Inspect(args) => inspect::run(args, self),
            Command::Verify(args) => verify::run(args, self),
            Command::Merge(args) => merge::run(args, self),
            Command::Export(args) => export::run(args, self),
            Command::Import(args) => import::run(args, self),
            Command::Doctor(args) => doctor::run(args, self),
            Command::Selftest(args) => selftest::run(args, self),
            Command::Tune(args) => tune::run(args, self),
            Command::Schema(args) => schema::run(args),
            Command::Completions(args) => manual::completions(args),
            Command::Man(args) => manual::man(args),
        }
    }
}
