//! Modules that are trained whole beside the adapters: PEFT's `modules_to_save`.

use std::collections::BTreeSet;

use super::config::ModelConfig;
use crate::error::{Error, Result};

/// A norm over the residual stream, or what is added to it, within a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockNorm {
    /// Before attention.
    Input,
    /// Behind attention, where there is one.
    Attention,
    /// Before the MLP.
    Middle,
    /// Behind the MLP, where there is one.
    Mlp,
}

impl BlockNorm {
    /// Its name within the layer; what is behind attention has that of another where something else is too.
    pub fn name(self, model: &ModelConfig) -> &'static str {
        match self {
            Self::Input => "input_layernorm",
            Self::Attention => "post_attention_layernorm",
            Self::Middle if model.post_norms => "pre_feedforward_layernorm",
            Self::Middle => "post_attention_layernorm",
            Self::Mlp => "post_feedforward_layernorm",
        }
    }

    /// Those of every layer of a model.
    pub fn of(model: &ModelConfig) -> &'static [Self] {
        match model.post_norms {
            true => &[Self::Input, Self::Attention, Self::Middle, Self::Mlp],
            false => &[Self::Input, Self::Middle],
        }
    }
}

/// What of a model can be trained whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WholePlace {
    /// A norm of this layer.
    Norm(usize, BlockNorm),
    /// The norm behind the last layer.
    FinalNorm,
    /// The output head, where it is not the embedding.
    Head,
}

/// A module whose weight is trained whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeModule {
    /// Full name: `model.norm`.
    pub name: String,
    /// Shape of its weight.
    pub shape: Vec<usize>,
    /// Which it is.
    pub place: WholePlace,
}

/// What stands for the choices in messages.
fn choices(model: &ModelConfig) -> Vec<&'static str> {
    let norms = BlockNorm::of(model).iter().map(|norm| norm.name(model));
    ["lm_head", "model.norm"].into_iter().chain(norms).collect()
}

const HEAD: &str = "lm_head";

/// The modules that `entries` mean, in the order of the model. As in PEFT, an entry means every module whose full name ends
/// with it: `norm` is more than `model.norm`.
///
/// # Errors
/// An entry that means no module, or one that cannot be trained whole.
pub fn whole_modules(entries: &[String], model: &ModelConfig) -> Result<Vec<WholeModule>> {
    let at = |error: Error| error.at("modules_to_save");
    let weights: Vec<(String, Vec<usize>)> = model
        .expected_tensors()
        .filter_map(|(name, shape)| Some((name.strip_suffix(".weight")?.to_string(), shape)))
        .collect();
    let mut names: BTreeSet<&str> = BTreeSet::from([HEAD]);
    for (mut name, _) in weights.iter().map(|(name, shape)| (&name[..], shape)) {
        names.insert(name);
        while let Some((parent, _)) = name.rsplit_once('.') {
            names.insert(parent);
            name = parent;
        }
    }
    for entry in entries {
        let mut meant = names.iter().filter(|name| name.ends_with(entry.as_str())).peekable();
        if entry.is_empty() || meant.peek().is_none() {
            return Err(at(no_match(entry, model)));
        }
        if let Some(name) = meant.find(|name| place(name, model).is_none()) {
            return Err(at(unsupported(entry, name, model)));
        }
    }
    let is_meant = |name: &str| entries.iter().any(|entry| name.ends_with(entry.as_str()));
    let module = |(name, shape): (String, Vec<usize>)| {
        let place = place(&name, model).filter(|_| is_meant(&name))?;
        Some(WholeModule { name, shape, place })
    };
    Ok(weights.into_iter().filter_map(module).collect())
}

fn place(name: &str, model: &ModelConfig) -> Option<WholePlace> {
    match name {
        HEAD => (!model.tied_embeddings).then_some(WholePlace::Head),
        "model.norm" => Some(WholePlace::FinalNorm),
        _ => {
            let (layer, module) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let layer = layer.parse().ok()?;
            let norm = BlockNorm::of(model).iter().find(|norm| norm.name(model) == module)?;
            Some(WholePlace::Norm(layer, *norm))
        }
    }
}

fn no_match(entry: &str, model: &ModelConfig) -> Error {
    let choices = choices(model);
    let similarity = |choice: &str| strsim::jaro_winkler(choice, entry);
    let nearest = choices.iter().max_by(|one, other| similarity(one).total_cmp(&similarity(other)));
    let error = Error::config(format!("`{entry}` matches no module"));
    match nearest.filter(|choice| similarity(choice) > 0.7) {
        Some(choice) => error.hint(format!("did you mean `{choice}`?")),
        None => error.hint(format!("there are {}", choices.join(", "))),
    }
}

fn unsupported(entry: &str, name: &str, model: &ModelConfig) -> Error {
    if name == HEAD {
        return Error::config("the head is the embedding (tie_word_embeddings): training it whole would untie them")
            .hint("leave `lm_head` out, or untie the model first: save it with tie_word_embeddings false and a head of its own");
    }
    let error = Error::config(match entry == name {
        true => format!("`{name}` cannot be trained whole"),
        false => format!("`{entry}` also means {name}, as PEFT reads it, which cannot be trained whole"),
    });
    if model.linear_modules().any(|module| module.name == name) {
        return error.hint("a linear gets an adapter instead: lora_target_modules");
    }
    error.hint(format!("these can: {}", choices(model).join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str) -> ModelConfig {
        ModelConfig::from_folder(format!("tests/fixtures/{name}")).unwrap()
    }

    fn found(entries: &[&str], model: &ModelConfig) -> Result<Vec<String>> {
        let entries: Vec<String> = entries.iter().map(|entry| entry.to_string()).collect();
        Ok(whole_modules(&entries, model)?.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn an_entry_means_every_module_whose_name_ends_with_it() {
        let llama = model("tiny_llama3rope");
        let norms = [
            "model.layers.0.input_layernorm",
            "model.layers.0.post_attention_layernorm",
            "model.layers.1.input_layernorm",
            "model.layers.1.post_attention_layernorm",
            "model.norm",
        ];
        assert_eq!(found(&["norm"], &llama).unwrap(), norms);
        assert_eq!(found(&["model.norm", "lm_head"], &llama).unwrap(), ["model.norm", "lm_head"]);
        assert_eq!(found(&["1.input_layernorm"], &llama).unwrap(), norms[2..3]);
        assert_eq!(found(&[], &llama).unwrap(), [""; 0]);
    }

    #[test]
    fn fault_45_what_means_nothing_or_cannot_be_trained_whole_is_refused() {
        let (llama, qwen3, tied) = (model("tiny_llama3rope"), model("tiny_qwen3"), model("tiny_qwen2"));
        for (entries, model, message, hint) in [
            (&["lm_haed"][..], &llama, "`lm_haed` matches no module", "`lm_head`?"),
            (&["model.norm", "xyz"], &llama, "`xyz` matches no module", "input_layernorm"),
            (&[""], &llama, "matches no module", "lm_head"),
            (&["norm"], &qwen3, "self_attn.k_norm", "model.norm"),
            (&["q_proj"], &llama, "q_proj", "lora_target_modules"),
            (&["mlp"], &llama, "model.layers.0.mlp", "these can"),
            (&["embed_tokens"], &llama, "embed_tokens", "these can"),
            (&["lm_head"], &tied, "the head is the embedding", "untie"),
        ] {
            let error = found(entries, model).unwrap_err();
            assert_eq!(error.location(), Some("modules_to_save"));
            assert!(error.message().contains(message), "{error}");
            assert!(error.hint_text().is_some_and(|text| text.contains(hint)), "{error:?}");
        }
    }
}
