//! `fastlora verify`: whether an adapter is whole, belongs to its base, and what takes it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Value, json};

use super::Cli;
use super::model::ModelArgs;
use super::output::print_line;
use crate::checkpoint::adapter::{ADAPTER_CONFIG, Adapter, read_adapter};
use crate::checkpoint::base::BaseModel;
use crate::data::read_optional_json;
use crate::error::{Error, Result, escape_control};
use crate::model::LoraConfig;

/// Columns of the table in a file or a pipe.
const WIDTH_WITHOUT_TERMINAL: u16 = 120;

/// Ranks that vLLM's `--max-lora-rank` may have.
const VLLM_RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
/// vLLM's `--max-lora-rank` where none is given.
const VLLM_DEFAULT_RANK: usize = 16;

/// Keys of `adapter_config.json` that PEFT 0.21.2 knows (the fields of its `LoraConfig`); it warns about others.
const PEFT_KEYS: [&str; 42] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "monteclora_config",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
];

/// Programs that take an adapter or not: what they do not is no fault of the adapter.
const TAKERS: [&str; 3] = ["PEFT", "vLLM", "llama.cpp"];

/// Arguments of `fastlora verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The adapter's folder.
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// Base model; without it, the one that the adapter names.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Yes,
    No,
    /// What would tell is not at hand.
    Unknown,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Verdict::Yes => "yes",
            Verdict::No => "no",
            Verdict::Unknown => "unknown",
        }
    }
}

struct Check {
    name: &'static str,
    verdict: Verdict,
    detail: String,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, detail: impl Into<String>) -> Self {
        Self { name, verdict, detail: detail.into() }
    }
}

pub(super) fn run(args: &VerifyArgs, cli: &Cli) -> Result<()> {
    let checks = match read_adapter(&args.adapter) {
        // Nothing else can be told of what cannot be read.
        Err(error) => vec![Check::new("readable", Verdict::No, error.to_string())],
        Ok(adapter) => checks(args, &adapter, cli)?,
    };
    if cli.json {
        let object = |check: &Check| json!({ "check": check.name, "verdict": check.verdict.name(), "detail": check.detail });
        print_line(&format!("{:#}", Value::Array(checks.iter().map(object).collect())))?;
    } else {
        let mut table = Table::new();
        table
            .load_preset(presets::UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(["", "", "detail"]);
        if table.width().is_none() {
            table.set_width(WIDTH_WITHOUT_TERMINAL);
        }
        for check in &checks {
            table.add_row([check.name, check.verdict.name(), &escape_control(&check.detail)]);
        }
        print_line(&table.to_string())?;
    }
    let is_fault = |check: &&Check| check.verdict == Verdict::No && !TAKERS.contains(&check.name);
    match checks.iter().find(is_fault) {
        None => Ok(()),
        Some(failed) => Err(Error::model(format!("{}: no: {}", failed.name, failed.detail))
            .at(args.adapter.display().to_string())),
    }
}

fn checks(args: &VerifyArgs, adapter: &Adapter, cli: &Cli) -> Result<Vec<Check>> {
    let mut checks = vec![Check::new(
        "readable",
        Verdict::Yes,
        format!("{} tensors of rank {}, every value finite", adapter.tensors.len(), numbers(&ranks(adapter))),
    )];
    let model = ModelArgs { model: args.model.clone(), adapter: Some(args.adapter.clone()) };
    match model.open(cli) {
        Ok(files) => {
            checks.push(match adapter.check_base(files.base.config()) {
                Ok(()) => Check::new("keys and shapes", Verdict::Yes, format!("those of {}", files.name)),
                Err(error) => Check::new("keys and shapes", Verdict::No, error.to_string()),
            });
            checks.push(fingerprint(&args.adapter, &files.base)?);
        }
        Err(error) => {
            let detail = format!("the base is not at hand: {error}");
            checks.push(Check::new("keys and shapes", Verdict::Unknown, detail.clone()));
            checks.push(Check::new("same base", Verdict::Unknown, detail));
        }
    }
    checks.push(peft(&args.adapter)?);
    let has_one_scale = has_one_scale(adapter)?;
    checks.push(vllm(adapter, has_one_scale));
    checks.push(llama_cpp(adapter, has_one_scale));
    Ok(checks)
}

/// Whether the base's files are those of the training.
fn fingerprint(folder: &Path, base: &BaseModel) -> Result<Check> {
    let name = "same base";
    let provenance = read_optional_json(&folder.join("fastlora.json"))?.unwrap_or_default();
    let Some(recorded) = provenance["base_sha256"].as_object() else {
        let detail = "the adapter does not say what its base's files were (fastlora.json)";
        return Ok(Check::new(name, Verdict::Unknown, detail));
    };
    let now = base.fingerprint()?;
    let differing: Vec<&str> = now
        .iter()
        .filter(|shard| recorded.get(&shard.file).and_then(Value::as_str) != Some(&shard.sha256))
        .map(|shard| shard.file.as_str())
        .collect();
    if differing.is_empty() && now.len() == recorded.len() {
        return Ok(Check::new(name, Verdict::Yes, format!("SHA-256 of {} weight files", now.len())));
    }
    let detail = match differing.is_empty() {
        true => format!("{} weight files, at the training {}", now.len(), recorded.len()),
        false => format!("other weights than at the training: {}", differing.join(", ")),
    };
    Ok(Check::new(name, Verdict::No, detail))
}

fn peft(folder: &Path) -> Result<Check> {
    let config = read_optional_json(&folder.join(ADAPTER_CONFIG))?.unwrap_or_default();
    let unknown: Vec<&str> = config
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key.as_str())
        .filter(|key| !PEFT_KEYS.contains(key))
        .collect();
    Ok(match unknown.is_empty() {
        true => Check::new(
            "PEFT",
            Verdict::Yes,
            "an adapter of its LoRA; every key of its configuration is known to 0.21",
        ),
        false => Check::new(
            "PEFT",
            Verdict::Yes,
            format!("but it warns about keys that 0.21 does not know: {}", unknown.join(", ")),
        ),
    })
}

/// The adapter's ranks, each once.
fn ranks(adapter: &Adapter) -> BTreeSet<usize> {
    let halves = adapter.tensors.iter().filter(|tensor| tensor.name.ends_with(".lora_A.weight"));
    halves.filter_map(|tensor| tensor.shape.first().copied()).collect()
}

fn numbers(set: &BTreeSet<usize>) -> String {
    set.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// Whether all modules have the scale that r and α of the configuration give.
fn has_one_scale(adapter: &Adapter) -> Result<bool> {
    let config = LoraConfig::from(&adapter.config);
    let expected = config.clone().without_patterns().scales()?.of("")?.scale;
    let scales = config.scales()?;
    for module in adapter.tensors.iter().filter_map(|tensor| Adapter::module_of(&tensor.name)) {
        if scales.of(module)?.scale != expected {
            return Ok(false);
        }
    }
    Ok(true)
}

fn vllm(adapter: &Adapter, has_one_scale: bool) -> Check {
    if let Some((key, what)) = adapter.config.beyond_lora() {
        let detail = format!("it takes no {what}, {key}: fastlora merge makes a model of it");
        return Check::new("vLLM", Verdict::No, detail);
    }
    let rank = ranks(adapter).last().copied().unwrap_or(adapter.config.rank);
    let Some(most) = VLLM_RANKS.into_iter().find(|&most| most >= rank) else {
        let detail = format!("rank {rank}: it takes up to {}", VLLM_RANKS[VLLM_RANKS.len() - 1]);
        return Check::new("vLLM", Verdict::No, detail);
    };
    let mut detail = "with --enable-lora".to_string();
    if most > VLLM_DEFAULT_RANK {
        detail += &format!(" --max-lora-rank {most}");
    }
    if !has_one_scale {
        detail += ", after fastlora export --bake-alpha: it scales all modules by one α/r";
    }
    Check::new("vLLM", Verdict::Yes, detail)
}

fn llama_cpp(adapter: &Adapter, has_one_scale: bool) -> Check {
    if let Some((key, what)) = adapter.config.beyond_lora() {
        let detail = format!("its adapters hold no {what}, {key}: fastlora merge makes a model of it");
        return Check::new("llama.cpp", Verdict::No, detail);
    }
    let mut detail = "as GGUF: fastlora export --gguf".to_string();
    if adapter.config.use_rslora || !has_one_scale {
        let what = if has_one_scale { "rsLoRA's scale" } else { "every module's scale" };
        detail += &format!(", which keeps {what}; its own converter needs --bake-alpha first");
    }
    Check::new("llama.cpp", Verdict::Yes, detail)
}
