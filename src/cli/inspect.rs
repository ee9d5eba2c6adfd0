//! `fastlora inspect`: what a model folder, an adapter, a checkpoint or a data file holds.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};

use super::Cli;
use super::describe::{human_bytes, lengths_json, lengths_text, samples_json, samples_text};
use super::model::resolve_model;
use super::output::{for_terminal, print_line};
use super::tokenizer::{ChatArgs, tokenizer_for};
use crate::checkpoint::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter};
use crate::checkpoint::base::BaseModel;
use crate::checkpoint::run::{CHECKSUMS, STATE, verify_checkpoint};
use crate::config::{DataSource, OnBadRecord};
use crate::data::{Dataset, LoadOptions, Outcome, RecordContent, TemplateChoice, load, read_optional_json};
use crate::error::{Error, Result, escape_control};
use crate::model::LoraConfig;
use crate::tokens::{SampleOptions, Tokenizer, tokenise};

/// Arguments of `fastlora inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A model folder or hub id, an adapter or checkpoint folder, or a data file.
    path: PathBuf,
    /// The model whose tokenizer counts a data file's tokens; without it, characters are counted.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// Longest sample in tokens; longer ones are counted.
    #[arg(long, value_name = "TOKENS", default_value_t = 512, requires = "model")]
    max_length: usize,
    /// Samples of a data file that are shown with what is learned of them.
    #[arg(long, value_name = "N", default_value_t = 3, requires = "model")]
    show: usize,
    #[command(flatten)]
    chat: ChatArgs,
}

pub(super) fn run(args: &InspectArgs, cli: &Cli) -> Result<()> {
    let path = &args.path;
    let is_folder = path.is_dir();
    if is_folder && (path.join(ADAPTER_CONFIG).exists() || path.join(ADAPTER_WEIGHTS).exists()) {
        return print(cli, &describe_adapter(path)?);
    }
    if !is_folder && path.is_file() && path.extension().is_none_or(|end| end != "gguf") {
        return describe_data(args, cli);
    }
    let name = path.to_str().ok_or_else(|| {
        Error::config("the path is not UTF-8").at(path.display().to_string()).hint("rename it")
    })?;
    let resolved = resolve_model(name, cli)?;
    let mut object = describe_model(&BaseModel::open(&resolved.folder)?)?;
    object["revision"] = json!(resolved.revision);
    print(cli, &object)
}

/// An object as it is with `--json`, else one line a key.
fn print(cli: &Cli, object: &Value) -> Result<()> {
    if cli.json {
        return print_line(&format!("{object:#}"));
    }
    let mut text = String::new();
    for (key, value) in object.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let value = match value {
            Value::String(value) => value.clone(),
            Value::Number(bytes) if key.ends_with("_bytes") => {
                format!("{bytes} ({})", human_bytes(bytes.as_u64().unwrap_or(0)))
            }
            Value::Array(items) => {
                let item = |item: &Value| item.as_str().map_or_else(|| item.to_string(), str::to_string);
                items.iter().map(item).collect::<Vec<_>>().join(", ")
            }
            other => other.to_string(),
        };
        text += &format!("{:<24}{}\n", key.replace('_', " "), escape_control(&value));
    }
    print_line(text.trim_end())
}

fn describe_model(base: &BaseModel) -> Result<Value> {
    let config = base.config();
    let tokenizer = Tokenizer::from_folder(base.folder()).ok();
    let eos = |id: &u32| {
        let text = tokenizer.as_ref().and_then(|tokenizer| tokenizer.decode_all(&[*id]).ok());
        text.map_or(id.to_string(), |text| format!("{id} {text}"))
    };
    let chat_template = match TemplateChoice::default().open(&[base.folder()]) {
        Ok(template) if template.marks_turns() => "yes, with {% generation %}".to_string(),
        Ok(_) => "yes".to_string(),
        Err(error) => error.message().to_string(),
    };
    let names: Vec<String> = config.linear_modules().map(|module| module.name).collect();
    let mut modules: Vec<&str> = names.iter().filter_map(|name| name.rsplit('.').next()).collect();
    modules.sort_unstable();
    modules.dedup();
    let windows = config.windows.iter().flatten().collect::<std::collections::BTreeSet<_>>();
    Ok(json!({
        "kind": "model",
        "folder": base.folder(),
        "family": config.family.model_type(),
        "parameters": base.parameter_count(),
        "dtype": base.dtype()?.to_string(),
        "stored_bytes": base.stored_bytes(),
        "layers": config.layer_count,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "query_heads": config.query_heads,
        "key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocabulary,
        "tied_embeddings": config.tied_embeddings,
        "max_positions": config.max_positions,
        "sliding_windows": if windows.is_empty() { Value::Null } else { json!(windows) },
        "modules": modules,
        "tokenizer_ids": tokenizer.as_ref().map(Tokenizer::id_count),
        "eos": config.eos_token_ids.iter().map(eos).collect::<Vec<_>>(),
        "chat_template": chat_template,
        "weights": "every tensor is there, of the right shape and finite",
    }))
}

fn describe_adapter(folder: &Path) -> Result<Value> {
    let is_checkpoint = [STATE, CHECKSUMS].iter().any(|name| folder.join(name).exists());
    if is_checkpoint {
        verify_checkpoint(folder)?;
    }
    let adapter = read_adapter(folder)?;
    let config = &adapter.config;
    let parameters: usize = adapter.tensors.iter().map(|tensor| tensor.values.len()).sum();
    let mut modules: Vec<&str> = adapter
        .tensors
        .iter()
        .filter_map(|tensor| tensor.name.strip_suffix(".lora_A.weight")?.rsplit('.').next())
        .collect();
    let adapted = modules.len();
    modules.sort_unstable();
    modules.dedup();
    let provenance = read_optional_json(&folder.join("fastlora.json"))?.unwrap_or_default();
    let of_run = |key: &str| provenance[key].clone();
    Ok(json!({
        "kind": if is_checkpoint { "checkpoint" } else { "adapter" },
        "folder": folder,
        "base_model": config.base_model,
        "revision": config.revision,
        "rank": config.rank,
        "alpha": config.alpha,
        // Of modules that no pattern matches.
        "scale": LoraConfig::from(config).without_patterns().scales()?.of("")?.scale,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora.then_some(true),
        "rank_pattern": (!config.rank_pattern.is_empty()).then_some(&config.rank_pattern),
        "alpha_pattern": (!config.alpha_pattern.is_empty()).then_some(&config.alpha_pattern),
        "layers_to_transform": (!config.layers_to_transform.is_empty()).then_some(&config.layers_to_transform),
        "modules_to_save": (!config.modules_to_save.is_empty()).then_some(&config.modules_to_save),
        "dropout": config.dropout,
        "modules": modules,
        "adapted_linears": adapted,
        "parameters": parameters,
        "f32_bytes": parameters * size_of::<f32>(),
        "hash_template": provenance["config"]["hash_template"],
        "hashes": of_run("hashes"),
        "step": of_run("step"),
        "losses": of_run("losses"),
        "fastlora_version": of_run("fastlora_version"),
        "base_sha256": of_run("base_sha256"),
        "data_sha256": of_run("data_sha256"),
        "tensors": "every tensor is of the configured rank and finite",
        "checksums": is_checkpoint.then_some("every file has the SHA-256 that SHA256SUMS says"),
    }))
}

fn describe_data(args: &InspectArgs, cli: &Cli) -> Result<()> {
    // Everything is counted, nothing refused: that is what inspecting is for.
    let options = LoadOptions { on_bad_record: OnBadRecord::Skip, ..LoadOptions::default() };
    let dataset = load(&[DataSource::new(&args.path)], &options)?;
    let Some(model) = &args.model else { return describe_records(&dataset, cli) };
    let base = BaseModel::open(resolve_model(model, cli)?.folder)?;
    let tokenizer = tokenizer_for([&dataset.kinds()], &base, None, &args.chat.choice())?;
    let options = SampleOptions::counting(base.config().vocabulary);
    let set = tokenise(&dataset, tokenizer.as_ref(), &options)?;
    set.accounting.log();
    let lengths: Vec<usize> = set.token_counts().collect();
    let overlong = lengths.iter().filter(|&&length| length > args.max_length).count();
    let own = match tokenizer {
        Some(_) => None,
        None => Tokenizer::from_folder(base.folder()).ok(),
    };
    let shown = tokenizer.as_ref().or(own.as_ref());
    if cli.json {
        let hashes: Map<_, _> =
            set.hash_counts().into_iter().map(|(hash, count)| (hash.to_string(), json!(count))).collect();
        let object = json!({
            "kind": "data",
            "file": args.path,
            "records": { "used": set.accounting.used, "skipped": set.accounting.count(Outcome::Skipped) },
            "hashes": hashes,
            "tokens": set.token_count(),
            "learned_tokens": set.labelled_count(),
            "lengths": lengths_json(&lengths),
            "max_length": args.max_length,
            "overlong": overlong,
            "samples": samples_json(&set, shown, args.show)?,
        });
        return print_line(&format!("{object:#}"));
    }
    let hashes: Vec<String> =
        set.hash_counts().iter().map(|(hash, count)| format!("{} {count}", escape_control(hash))).collect();
    print_line(&format!(
        "{samples}\n{accounting}\nhashes: {hashes}\n{lengths}{tokens} tokens, {learned} learned; {overlong} samples are \
         longer than {max_length}",
        samples = samples_text(&set, shown, args.show)?,
        accounting = set.accounting,
        hashes = hashes.join(", "),
        lengths = lengths_text("tokens", &lengths),
        tokens = set.token_count(),
        learned = set.labelled_count(),
        max_length = args.max_length,
    ))
}

/// A data file without a model: kinds, hashes, characters.
fn describe_records(dataset: &Dataset, cli: &Cli) -> Result<()> {
    dataset.accounting.log();
    let (mut kinds, mut hashes, mut lengths) = (Map::new(), Map::new(), Vec::new());
    let mut unit = "characters";
    let count = |counts: &mut Map<String, Value>, key: &str| {
        let so_far = counts.get(key).and_then(Value::as_u64).unwrap_or(0);
        counts.insert(key.to_string(), json!(so_far + 1));
    };
    for record in &dataset.records {
        count(&mut kinds, record.content.kind());
        count(&mut hashes, &record.hash);
        lengths.push(match &record.content {
            RecordContent::Instruction { instruction, output } => {
                instruction.chars().count() + output.chars().count()
            }
            RecordContent::Chat { conversation, .. } => {
                let contents = conversation.messages.iter().filter_map(|message| message.content.as_ref());
                contents.map(|content| content.chars().count()).sum()
            }
            RecordContent::PreTokenised { token_ids, .. } => {
                unit = "tokens";
                token_ids.len()
            }
        });
    }
    let files: Vec<&str> = dataset.files.iter().map(|file| &*file.file).collect();
    if cli.json {
        let object = json!({
            "kind": "data",
            "file": files.first(),
            "records": { "used": dataset.accounting.used, "skipped": dataset.accounting.count(Outcome::Skipped) },
            "kinds": kinds,
            "hashes": hashes,
            "unit": unit,
            "lengths": lengths_json(&lengths),
        });
        return print_line(&format!("{object:#}"));
    }
    let list = |counts: &Map<String, Value>| {
        counts.iter().map(|(key, count)| format!("{key} {count}")).collect::<Vec<_>>().join(", ")
    };
    print_line(&for_terminal(&format!(
        "{}\nkinds: {}\nhashes: {}\n{}-m MODEL counts tokens and shows what is learned",
        dataset.accounting,
        list(&kinds),
        escape_control(&list(&hashes)),
        lengths_text(unit, &lengths),
    )))
}
