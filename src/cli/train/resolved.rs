//! What a run is to do: the configuration of file, `--set` and flags, of the run that goes on, and of the adapter to start from.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::json;
use tracing::warn;

use super::TrainArgs;
use super::resume::Resume;
use crate::checkpoint::adapter::{Adapter, read_adapter};
use crate::cli::conditioning::Conditioning;
use crate::config::{DEFAULT_CONFIG_PATH, Options, TrainingConfig};
use crate::error::{Error, Result, escape_control};
use crate::report::RESOLVED_CONFIG;

/// What the command line says.
pub(super) struct Resolved {
    pub config: TrainingConfig,
    /// The adapter that the run starts from.
    pub init_adapter: Option<Adapter>,
    pub resume: Option<Resume>,
}

/// The configuration of file, `--set` and flags, and what it names.
pub(super) fn resolve_config(args: &TrainArgs) -> Result<Resolved> {
    let (resume, output_dir) = match args.resume.as_deref().map(Resume::parse).transpose()? {
        Some((resume, output_dir)) => (Some(resume), output_dir),
        None => (None, None),
    };
    let default = Path::new(DEFAULT_CONFIG_PATH);
    let of_run = output_dir.as_ref().map(|folder| folder.join(RESOLVED_CONFIG)).filter(|path| path.exists());
    let file = match args.config.as_ref().or(of_run.as_ref()) {
        Some(path) => Options::from_file(path)?,
        None if default.exists() => Options::from_file(default)?,
        None => Options::default(),
    };
    let mut options = args.options.or(&file.with_pairs(&args.pairs)?);
    if let Some(output_dir) = output_dir {
        let same = |named: &PathBuf| {
            named.canonicalize().is_ok_and(|named| output_dir.canonicalize().is_ok_and(|own| own == named))
        };
        if args.options.output_dir.as_ref().is_some_and(|named| !same(named)) {
            return Err(Error::config(format!("--resume names the run in {}", output_dir.display()))
                .at("output_dir")
                .hint("leave --output-dir out: a run goes on in its own folder"));
        }
        options.output_dir = Some(output_dir);
    }
    let init_adapter = options.init_adapter.as_deref().map(read_adapter).transpose()?;
    if let Some(Adapter { config, .. }) = &init_adapter {
        adopt(&mut options.lora_r, config.rank, "lora_r")?;
        adopt(&mut options.lora_alpha, config.alpha, "lora_alpha")?;
        adopt(&mut options.lora_target_modules, config.target_modules.clone(), "lora_target_modules")?;
        adopt(&mut options.use_rslora, config.use_rslora, "use_rslora")?;
        adopt(&mut options.use_dora, config.use_dora, "use_dora")?;
        adopt(&mut options.rank_pattern, config.rank_pattern.clone(), "rank_pattern")?;
        adopt(&mut options.alpha_pattern, config.alpha_pattern.clone(), "alpha_pattern")?;
        adopt(&mut options.layers_to_transform, config.layers_to_transform.clone(), "layers_to_transform")?;
        adopt(&mut options.modules_to_save, config.modules_to_save.clone(), "modules_to_save")?;
        // Only a warning, for another template can be meant.
        let learned = Conditioning::of(options.init_adapter.as_deref())?.template;
        let template = options.hash_template.get_or_insert_with(|| learned.clone());
        if *template != learned {
            let [template, learned] = [&*template, &learned].map(|text| escape_control(&text.to_string()));
            warn!("hash_template is `{template}`, but the adapter of init_adapter has learned `{learned}`");
        }
    }
    Ok(Resolved { config: TrainingConfig::resolve(&options)?, init_adapter, resume })
}

/// Takes the adapter's value where the configuration is silent; where it says otherwise, that is an error.
fn adopt<T: PartialEq + Serialize>(option: &mut Option<T>, value: T, key: &str) -> Result<()> {
    if let Some(set) = option.as_ref().filter(|set| **set != value) {
        return Err(Error::config(format!(
            "{}, but the adapter of init_adapter has {}",
            json!(set),
            json!(value)
        ))
        .at(key)
        .hint("remove the key: the adapter brings its own"));
    }
    *option = Some(value);
    Ok(())
}
