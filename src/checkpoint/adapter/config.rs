//! `adapter_config.json`: what PEFT says about a LoRA adapter, read strictly and written so that PEFT loads it
//! without a warning.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::{PatternMap, TargetModules};
use crate::error::{Error, ErrorKind, Result};

/// The hyper-parameters of a LoRA adapter (Hu et al. 2021), as `adapter_config.json` holds them.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// `r`: inner width.
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// `lora_dropout`: chance of a zero in an adapter's input while training.
    pub dropout: f64,
    /// `target_modules`.
    pub target_modules: TargetModules,
    /// `use_rslora`: scale by α/√r instead of α/r.
    pub use_rslora: bool,
    /// `use_dora`: every target has magnitudes (Liu et al. 2024).
    pub use_dora: bool,
    /// `rank_pattern`: ranks of modules that differ from `r`.
    pub rank_pattern: PatternMap<usize>,
    /// `alpha_pattern`: scales of modules that differ from `lora_alpha`.
    pub alpha_pattern: PatternMap<f64>,
    /// `layers_to_transform`: layers whose targets are adapted, in order; empty: all.
    pub layers_to_transform: Vec<usize>,
    /// `modules_to_save`: ends of the names of modules whose whole weights the adapter brings.
    pub modules_to_save: Vec<String>,
    /// `base_model_name_or_path`: the model it belongs to.
    pub base_model: Option<String>,
    /// `revision` of the base model on the hub.
    pub revision: Option<String>,
}

/// Keys that a reader may pass over: they tell who wrote the file, or how training began.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
];

/// Values of `init_lora_weights` that leave the base weights as they are.
const INITIALISATIONS: &[&str] = &["gaussian", "eva", "orthogonal"];

impl AdapterConfig {
    /// Reads the text of an `adapter_config.json` as PEFT 0.20 and 0.21 write it.
    ///
    /// # Errors
    /// Broken JSON, absurd values, and whatever changes the adapter's meaning in a way that is not supported, by
    /// name. Keys of a later PEFT are accepted where their value is null, false or empty.
    pub fn from_json(text: &str) -> Result<Self> {
        let mut keys: Map<String, Value> = serde_json::from_str(text)
            .map_err(|source| Error::model("not a JSON object").caused_by(source))?;
        let mut take = |key: &str| keys.shift_remove(key).unwrap_or(Value::Null);

        match take("peft_type") {
            Value::String(kind) if kind == "LORA" => {}
            other => return Err(refused("peft_type", &other, "\"LORA\"")),
        }
        match take("task_type") {
            Value::Null => {}
            Value::String(task) if task == "CAUSAL_LM" => {}
            other => return Err(refused("task_type", &other, "\"CAUSAL_LM\"")),
        }
        match take("bias") {
            Value::Null => {}
            Value::String(bias) if bias == "none" => {}
            other => return Err(refused("bias", &other, "\"none\"")),
        }
        match take("init_lora_weights") {
            Value::Null | Value::Bool(_) => {}
            Value::String(name) if INITIALISATIONS.contains(&name.as_str()) => {}
            other => {
                return Err(refused("init_lora_weights", &other, "one that leaves the base weights as they are")
                    .hint("convert it to a plain LoRA adapter: in PEFT, save_pretrained(…, path_initial_model_for_weight_conversion=…)"));
            }
        }
        let rank = match take("r") {
            Value::Number(rank) if rank.as_u64().is_some_and(|rank| is_rank(rank as usize)) => {
                rank.as_u64().unwrap_or(1) as usize
            }
            other => return Err(refused("r", &other, "a whole number from 1 to 65536")),
        };
        let alpha = match take("lora_alpha") {
            Value::Null => 8.0,
            other => match other.as_f64() {
                Some(alpha) if alpha.is_finite() => alpha,
                _ => return Err(refused("lora_alpha", &other, "a finite number")),
            },
        };
        let dropout = match take("lora_dropout") {
            Value::Null => 0.0,
            other => match other.as_f64() {
                Some(dropout) if (0.0..1.0).contains(&dropout) => dropout,
                _ => return Err(refused("lora_dropout", &other, "a number from 0 to below 1")),
            },
        };
        let target_modules = take("target_modules");
        let target_modules = TargetModules::deserialize(&target_modules).map_err(|_| {
            refused("target_modules", &target_modules, "a list of names or a regular expression")
        })?;
        target_modules.validate().map_err(|error| error.with_kind(ErrorKind::Model).at("target_modules"))?;
        let mut take_flag = |key: &str| match take(key) {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(flag),
            other => Err(refused(key, &other, "true or false")),
        };
        let use_rslora = take_flag("use_rslora")?;
        let use_dora = take_flag("use_dora")?;
        let rank_pattern = patterns("rank_pattern", take("rank_pattern"), "ranks from 1 to 65536", is_rank)?;
        let alpha_pattern =
            patterns("alpha_pattern", take("alpha_pattern"), "finite numbers", |alpha: f64| {
                alpha.is_finite()
            })?;
        let layers_to_transform = layers(take("layers_to_transform"), take("layers_pattern"))?;
        if matches!(target_modules, TargetModules::Pattern(_)) && !layers_to_transform.is_empty() {
            return Err(Error::model(
                "`layers_to_transform` goes with a list of names in `target_modules` only: PEFT refuses it too",
            ));
        }
        let modules_to_save = match take("modules_to_save") {
            Value::Null => Vec::new(),
            found => Vec::deserialize(&found)
                .map_err(|_| refused("modules_to_save", &found, "a list of names, or null"))?,
        };
        let mut take_text = |key: &str| match take(key) {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text)),
            other => Err(refused(key, &other, "a text or null")),
        };
        let base_model = take_text("base_model_name_or_path")?;
        let revision = take_text("revision")?;

        for key in WITHOUT_EFFECT {
            keys.shift_remove(*key);
        }
        // Everything else changes what the adapter computes (trainable_token_indices, lora_bias …) or is
        // unknown.
        for (key, value) in &keys {
            if !is_off(value) {
                return Err(Error::model(format!("`{key}`: {} is not supported", shortened(value)))
                    .hint("LoRA and DoRA adapters are read; retrain without it, or remove the key if nothing depends on it"));
            }
        }
        Ok(Self {
            rank,
            alpha,
            dropout,
            target_modules,
            use_rslora,
            use_dora,
            rank_pattern,
            alpha_pattern,
            layers_to_transform,
            modules_to_save,
            base_model,
            revision,
        })
    }

    /// What makes it more than a plain LoRA adapter, if anything: the key and, in words, what it brings.
    pub fn beyond_lora(&self) -> Option<(&'static str, &'static str)> {
        let whole = (!self.modules_to_save.is_empty()).then_some(("modules_to_save", "whole modules"));
        whole.or_else(|| self.use_dora.then_some(("use_dora", "magnitudes (DoRA)")))
    }

    /// The object that PEFT (0.11 and later) loads without a warning.
    pub fn to_json(&self) -> Value {
        // PEFT's type for `lora_alpha` is a whole number: keep one where it is one.
        let number = |alpha: &f64| match alpha.fract() == 0.0 && alpha.abs() < 1e15 {
            true => json!(*alpha as i64),
            false => json!(alpha),
        };
        let (layers, whole) = (&self.layers_to_transform, &self.modules_to_save);
        json!({
            "alpha_pattern": self.alpha_pattern.map(number),
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_to_transform": if layers.is_empty() { Value::Null } else { json!(layers) },
            "lora_alpha": number(&self.alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": if whole.is_empty() { Value::Null } else { json!(whole) },
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "revision": self.revision,
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        })
    }
}

fn is_rank(rank: usize) -> bool {
    (1..=65_536).contains(&rank)
}

/// `rank_pattern` or `alpha_pattern`.
fn patterns<T: serde::de::DeserializeOwned + Copy>(
    key: &str,
    found: Value,
    expected: &str,
    is_valid: impl Fn(T) -> bool,
) -> Result<PatternMap<T>> {
    if is_off(&found) {
        return Ok(PatternMap::default());
    }
    let map = PatternMap::deserialize(&found)
        .ok()
        .filter(|map: &PatternMap<T>| map.entries().all(|(_, value)| is_valid(*value)))
        .ok_or_else(|| refused(key, &found, &format!("an object of patterns with {expected}")))?;
    map.compile().map_err(|error| error.with_kind(ErrorKind::Model).at(key))?;
    Ok(map)
}

/// The layers of `layers_to_transform`, one or a list. `layers_pattern` says which name stands before their number.
fn layers(found: Value, name: Value) -> Result<Vec<usize>> {
    let numbers = match &found {
        Value::Null => return Ok(Vec::new()),
        Value::Array(numbers) => numbers.iter().map(Value::as_u64).collect(),
        number => number.as_u64().map(|number| vec![number]),
    };
    let numbers: Vec<u64> =
        numbers.ok_or_else(|| refused("layers_to_transform", &found, "the number of a layer, or a list"))?;
    let is_ours = |name: &Value| name == "layers";
    if !(is_off(&name)
        || name == ""
        || is_ours(&name)
        || name.as_array().is_some_and(|names| names.iter().any(is_ours)))
    {
        return Err(refused("layers_pattern", &name, "\"layers\": that is what they are called here"));
    }
    let mut layers: Vec<usize> = numbers.into_iter().map(|number| number as usize).collect();
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

/// Null, false and empty values switch a feature of PEFT off.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

fn refused(key: &str, found: &Value, expected: &str) -> Error {
    Error::model(format!("`{key}` is {}, expected {expected}", shortened(found)))
}

/// A value's JSON, cut to a length fit for a message.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What PEFT 0.21.2 writes for a plain adapter.
    fn written_by_peft() -> Value {
        json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "base_model_name_or_path": "tiny_qwen2", "bias": "none", "corda_config": null,
            "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null, "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "kasa_config": null, "layer_replication": null,
            "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 8,
            "lora_bias": false, "lora_dropout": 0.1, "lora_ga_config": null, "megatron_config": null,
            "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null,
            "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {},
            "revision": null, "target_modules": ["q_proj", "v_proj"], "target_parameters": null,
            "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null, "use_dora": false,
            "use_qalora": false, "use_rslora": false, "velora_config": null
        })
    }

    #[test]
    fn reads_what_peft_writes() {
        let config = AdapterConfig::from_json(&written_by_peft().to_string()).unwrap();
        let expected = AdapterConfig {
            rank: 4,
            alpha: 8.0,
            dropout: 0.1,
            target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
            use_rslora: false,
            use_dora: false,
            rank_pattern: PatternMap::default(),
            alpha_pattern: PatternMap::default(),
            layers_to_transform: vec![],
            modules_to_save: vec![],
            base_model: Some("tiny_qwen2".into()),
            revision: None,
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn layers_are_one_or_a_list() {
        for (layers, name, expected) in [
            (json!(null), json!(null), vec![]),
            (json!([]), json!(null), vec![]),
            (json!(3), json!(null), vec![3]),
            (json!([3, 1, 3]), json!([]), vec![1, 3]),
            (json!([0]), json!("layers"), vec![0]),
            (json!([0]), json!(["h", "layers"]), vec![0]),
        ] {
            let mut config = written_by_peft();
            config["layers_to_transform"] = layers;
            config["layers_pattern"] = name;
            let config = AdapterConfig::from_json(&config.to_string()).unwrap();
            assert_eq!(config.layers_to_transform, expected);
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        for (alpha, target_modules) in [
            (16.0, TargetModules::Names(vec!["gate_proj".into()])),
            (0.5, TargetModules::Pattern(TargetModules::ALL_LINEAR.into())),
        ] {
            let config = AdapterConfig {
                rank: 3,
                alpha,
                dropout: 0.05,
                target_modules,
                use_rslora: true,
                use_dora: alpha == 0.5,
                rank_pattern: "v_proj=2,.*[01].*=4".parse().unwrap(),
                alpha_pattern: "v_proj=2,.*[01].*=0.5".parse().unwrap(),
                layers_to_transform: if alpha == 0.5 { vec![] } else { vec![1, 2] },
                modules_to_save: if alpha == 0.5 { vec![] } else { vec!["lm_head".into(), "norm".into()] },
                base_model: None,
                revision: Some("main".into()),
            };
            assert_eq!(AdapterConfig::from_json(&config.to_json().to_string()).unwrap(), config);
        }
    }

    #[test]
    fn whatever_changes_the_meaning_is_refused_by_name() {
        for (key, value) in [
            ("peft_type", json!("IA3")),
            ("task_type", json!("SEQ_CLS")),
            ("bias", json!("all")),
            ("use_dora", json!("true")),
            ("modules_to_save", json!("lm_head")),
            ("modules_to_save", json!([1])),
            ("rank_pattern", json!({"q_proj": 0})),
            ("rank_pattern", json!({"q_proj": 1.5})),
            ("rank_pattern", json!(["q_proj"])),
            ("alpha_pattern", json!({"q_proj": "8"})),
            ("fan_in_fan_out", json!(true)),
            ("layers_to_transform", json!([-1])),
            ("layers_to_transform", json!("0")),
            ("trainable_token_indices", json!([7])),
            ("target_parameters", json!(["experts.weight"])),
            ("lora_bias", json!(true)),
            ("use_qalora", json!(true)),
            ("exclude_modules", json!("k_proj")),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("r", json!(0)),
            ("r", json!(-3)),
            ("r", json!(1e9)),
            ("lora_alpha", json!("8")),
            ("lora_dropout", json!(1.0)),
            ("target_modules", json!(null)),
            ("target_modules", json!([1])),
            ("target_modules", json!("(")),
            ("a_key_of_the_future", json!(3)),
        ] {
            let mut config = written_by_peft();
            config[key] = value;
            let error = AdapterConfig::from_json(&config.to_string()).expect_err(key);
            assert_eq!(error.kind(), ErrorKind::Model, "{key}");
            assert!(error.message().contains(&format!("`{key}`")), "{error}");
        }
        let mut config = written_by_peft();
        config["alpha_pattern"] = json!({"(": 8});
        let error = AdapterConfig::from_json(&config.to_string()).unwrap_err();
        assert_eq!((error.kind(), error.location()), (ErrorKind::Model, Some("alpha_pattern")));
        let mut config = written_by_peft();
        (config["layers_to_transform"], config["layers_pattern"]) = (json!([0]), json!("h"));
        assert!(
            AdapterConfig::from_json(&config.to_string()).unwrap_err().message().contains("`layers_pattern`")
        );
        config["target_modules"] = json!("all-linear");
        config["layers_pattern"] = json!(null);
        assert!(AdapterConfig::from_json(&config.to_string()).is_err());
        assert!(AdapterConfig::from_json("[1]").is_err());
        assert!(AdapterConfig::from_json("{\"r\": 4").is_err());
    }
}
