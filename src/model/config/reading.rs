//! `config.json`, field by field.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use super::family::WindowPattern;
use super::{Family, ModelConfig, limits};
use crate::backend::Activation;
use crate::dtype::DType;
use crate::error::{Error, Result, shorten};
use crate::model::fields::Fields;
use crate::model::rope::Ropes;

/// Characters of a value from the file in a message.
const SHOWN_CHARACTERS: usize = 60;

/// The text of a file, or none where there is no such file.
pub(super) fn read_optional(path: &Path) -> Result<Option<String>> {
    const LARGEST_CONFIG_BYTES: u64 = 16 << 20;
    let read = || -> std::io::Result<Option<Vec<u8>>> {
        if std::fs::metadata(path)?.len() > LARGEST_CONFIG_BYTES {
            return Ok(None);
        }
        std::fs::read(path).map(Some)
    };
    let place = path.display().to_string();
    match read() {
        Ok(Some(bytes)) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                Err(Error::model(format!("not UTF-8 at byte {at}, expected JSON")).at(place))
            }
        },
        Ok(None) => {
            Err(Error::model(format!("larger than {LARGEST_CONFIG_BYTES} bytes, expected a short file"))
                .at(place))
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(Error::file("read", path, error)),
    }
}

pub(super) fn parse(text: &str, place: &str) -> Result<Value> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    serde_json::from_str(text).map_err(|error| Error::model("not valid JSON").at(place).caused_by(error))
}

/// The whole configuration, sizes checked one by one.
pub(super) fn config(fields: Fields<'_>) -> Result<ModelConfig> {
    let family = family(fields)?;
    refuse_unsupported(fields, family)?;

    let hidden_size = fields.required_count("hidden_size", limits::WIDTH)?;
    let layer_count = fields.required_count("num_hidden_layers", limits::LAYERS)?;
    let query_heads = fields.required_count("num_attention_heads", limits::HEADS)?;
    let key_value_heads = match fields.count("num_key_value_heads", limits::HEADS)? {
        Some(heads) => heads,
        // Llama before grouped heads had no such field, and Phi-3 may leave it out; the others always write it.
        None if matches!(family, Family::Llama | Family::Phi3) || fields.mentions("num_key_value_heads") => {
            query_heads
        }
        None => return Err(fields.missing("num_key_value_heads")),
    };
    if !query_heads.is_multiple_of(key_value_heads) {
        return Err(fields.error(format!(
            "`num_attention_heads` is {query_heads}, expected a multiple of `num_key_value_heads`, {key_value_heads}"
        )));
    }
    let head_dim = head_dim(fields, family, hidden_size, query_heads)?;
    let max_positions = fields.required_count("max_position_embeddings", limits::POSITIONS)?;
    let attention_bias = fields.flag("attention_bias")?.unwrap_or(false);
    let ropes = Ropes::from_fields(fields, family, head_dim, max_positions)?;
    let has_output_bias = family.is_gemma() || matches!(family, Family::Llama | Family::Qwen3);
    let [attention_soft_cap, logit_soft_cap] = soft_caps(fields, family)?;
    Ok(ModelConfig {
        family,
        hidden_size,
        intermediate_size: fields.required_count("intermediate_size", limits::WIDTH)?,
        layer_count,
        query_heads,
        key_value_heads,
        head_dim,
        vocabulary: fields.required_count("vocab_size", limits::VOCABULARY)?,
        rms_norm_epsilon: fields.positive("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        max_positions,
        // transformers leaves out what its base class has by default.
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(family.is_gemma()),
        fused_linears: family == Family::Phi3,
        qkv_bias: family == Family::Qwen2 || has_output_bias && attention_bias,
        output_bias: has_output_bias && attention_bias,
        mlp_bias: family == Family::Llama && fields.flag("mlp_bias")?.unwrap_or(false),
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        activation: if family.is_gemma() { Activation::GeluTanh } else { Activation::Silu },
        embedding_scale: if family.is_gemma() { (hidden_size as f64).sqrt() as f32 } else { 1.0 },
        norm_weight_offset: if family.is_gemma() { 1.0 } else { 0.0 },
        post_norms: family.is_gemma_2_or_3(),
        softmax_scale: softmax_scale(fields, family, head_dim)?,
        attention_soft_cap,
        logit_soft_cap,
        windows: windows(fields, family, layer_count)?,
        rope: ropes.rope,
        local_rope: ropes.local,
        rotary_width: ropes.width,
        eos_token_ids: fields.token_ids("eos_token_id")?,
        bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
        pad_token_id: fields.token_ids("pad_token_id")?.first().copied(),
        stored_dtype: stored_dtype(fields)?,
    })
}

fn family(fields: Fields<'_>) -> Result<Family> {
    let model_type = fields.text("model_type")?.ok_or_else(|| fields.missing("model_type"))?;
    Family::ALL.into_iter().find(|family| family.model_type() == model_type).ok_or_else(|| {
        let hint = if model_type == "gemma3" {
            "models of images and text are not; of Gemma 3 those of text alone are (270M, 1B)".to_owned()
        } else {
            format!("supported are {}", Family::ALL.map(Family::model_type).join(", "))
        };
        fields
            .error(format!("`model_type` \"{}\" is not supported", shorten(model_type, SHOWN_CHARACTERS)))
            .hint(hint)
    })
}

/// Refuses settings under which a model of these families computes something else than this program does.
fn refuse_unsupported(fields: Fields<'_>, family: Family) -> Result<()> {
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
        let method = shorten(method, SHOWN_CHARACTERS);
        return Err(fields
            .error(format!("weights quantized with `{method}` (`quantization_config`) are not supported"))
            .hint("use the model's f32, f16 or bf16 weights"));
    }
    refuse_activation(fields, family)?;
    for experts in ["num_experts", "num_local_experts", "n_routed_experts"] {
        if fields.get(experts).is_some_and(|count| count.as_u64() != Some(0)) {
            return Err(fields.error(format!("mixtures of experts (`{experts}`) are not supported")));
        }
    }
    for (key, what) in
        [("use_mrope", "multimodal RoPE"), ("use_bidirectional_attention", "attention to later tokens")]
    {
        if fields.flag(key)? == Some(true) {
            return Err(fields.error(format!("{what} (`{key}`) is not supported")));
        }
    }
    for key in ["attention_dropout", "resid_pdrop", "embd_pdrop"] {
        if let Some(probability) = fields.number(key)?.filter(|probability| *probability != 0.0) {
            tracing::warn!("{}: `{key}` {probability} is not applied in training", fields.place());
        }
    }
    Ok(())
}

/// Refuses an activation that is not the family's own.
fn refuse_activation(fields: Fields<'_>, family: Family) -> Result<()> {
    let refuse = |key: &str, expected: &[&str]| match fields.text(key)? {
        Some(found) if !expected.contains(&found) => Err(fields.error(format!(
            "`{key}` \"{}\" is not supported, expected \"{}\"",
            shorten(found, SHOWN_CHARACTERS),
            expected[0]
        ))),
        _ => Ok(()),
    };
    match family {
        // The first releases say "gelu" and mean its approximation; `hidden_act` is a relict where the other is read.
        Family::Gemma => {
            refuse("hidden_act", &["gelu_pytorch_tanh", "gelu"])?;
            refuse("hidden_activation", &["gelu_pytorch_tanh", "gelu"])
        }
        Family::Gemma2 | Family::Gemma3 => refuse("hidden_activation", &["gelu_pytorch_tanh"]),
        _ => refuse("hidden_act", &["silu", "swish"]),
    }
}

fn head_dim(fields: Fields<'_>, family: Family, hidden_size: usize, query_heads: usize) -> Result<usize> {
    let head_dim = match (fields.count("head_dim", limits::HEAD_DIM)?, family.default_head_dim()) {
        (Some(head_dim), _) => head_dim,
        (None, Some(default)) if !fields.mentions("head_dim") => default,
        _ if !hidden_size.is_multiple_of(query_heads) => {
            return Err(fields.error(format!(
                "`hidden_size` is {hidden_size}, expected a multiple of `num_attention_heads`, {query_heads}, as there is no \
                 `head_dim`"
            )));
        }
        _ => hidden_size / query_heads,
    };
    if !head_dim.is_multiple_of(2) || head_dim as u64 > limits::HEAD_DIM {
        return Err(fields.error(format!(
            "the head width (`head_dim`, else hidden_size / num_attention_heads) is {head_dim}, expected an even number up to \
             {}: RoPE turns pairs",
            limits::HEAD_DIM
        )));
    }
    Ok(head_dim)
}

/// `1/√D`, or by another number than the head's width.
fn softmax_scale(fields: Fields<'_>, family: Family, head_dim: usize) -> Result<f32> {
    const DEFAULT_SCALAR: f64 = 256.0;
    let scalar = if family.is_gemma_2_or_3() {
        fields.positive("query_pre_attn_scalar")?.unwrap_or(DEFAULT_SCALAR)
    } else {
        head_dim as f64
    };
    Ok((1.0 / scalar.sqrt()) as f32)
}

/// Of attention's scores and of the logits.
fn soft_caps(fields: Fields<'_>, family: Family) -> Result<[Option<f32>; 2]> {
    let mut caps = family.default_soft_caps();
    if family.is_gemma_2_or_3() {
        for (cap, key) in caps.iter_mut().zip(["attn_logit_softcapping", "final_logit_softcapping"]) {
            if fields.mentions(key) {
                *cap = fields.positive(key)?;
            }
        }
    }
    Ok(caps.map(|cap| cap.map(|cap| cap as f32)))
}

/// The window of each layer. `layer_types`, where present, says which layers slide.
fn windows(fields: Fields<'_>, family: Family, layer_count: usize) -> Result<Vec<Option<usize>>> {
    const DEFAULT_FULL_LAYERS: u64 = 28;
    let window = match fields.count("sliding_window", u64::MAX)? {
        None if !fields.mentions("sliding_window") => family.default_window(),
        given => given,
    };
    let pattern = family.window_pattern();
    let window = match pattern {
        WindowPattern::Never => None,
        WindowPattern::FromMaxWindowLayers if !fields.flag("use_sliding_window")?.unwrap_or(false) => None,
        _ => window,
    };
    if let Some(value) = fields.get("layer_types") {
        let expected = format!("a list of {layer_count} layer types");
        let types = value.as_array().filter(|types| types.len() == layer_count);
        let types = types.ok_or_else(|| fields.wrong("layer_types", value, &expected))?;
        return types
            .iter()
            .map(|layer_type| match (layer_type.as_str(), window) {
                (Some("full_attention"), _) => Ok(None),
                (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
                (Some("sliding_attention"), None) => Err(fields.error(
                    "`layer_types` has sliding_attention, but no `sliding_window` is in force for this model type",
                )),
                _ => Err(fields
                    .wrong("layer_types", layer_type, "full_attention or sliding_attention")
                    .hint("other kinds of attention are not supported")),
            })
            .collect();
    }
    let slides: Box<dyn Fn(usize) -> bool> = match pattern {
        WindowPattern::Never | WindowPattern::Always => Box::new(|_| true),
        // 0 is a legal value here: every layer slides.
        WindowPattern::FromMaxWindowLayers => {
            let first = match fields.get("max_window_layers") {
                None => DEFAULT_FULL_LAYERS,
                Some(value) => value
                    .as_u64()
                    .ok_or_else(|| fields.wrong("max_window_layers", value, "a number of layers"))?,
            };
            Box::new(move |layer| layer as u64 >= first)
        }
        WindowPattern::AllBut(default) => {
            let given = match family {
                Family::Gemma3 => fields.count("sliding_window_pattern", limits::LAYERS)?,
                _ => None,
            };
            let every = given.unwrap_or(default);
            Box::new(move |layer| !(layer + 1).is_multiple_of(every))
        }
    };
    Ok((0..layer_count).map(|layer| window.filter(|_| slides(layer))).collect())
}

/// `dtype` (transformers 5) or `torch_dtype` (4), with or without the prefix `torch.`.
fn stored_dtype(fields: Fields<'_>) -> Result<Option<DType>> {
    let name = match fields.text("dtype")? {
        Some(name) => Some(name),
        None => fields.text("torch_dtype")?,
    };
    Ok(name.and_then(|name| match name.trim_start_matches("torch.") {
        "float32" => Some(DType::F32),
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::Bf16),
        // The weights' own headers decide; they are checked when the files are opened.
        _ => None,
    }))
}
