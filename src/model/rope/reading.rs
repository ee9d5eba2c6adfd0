//! Rotary embeddings of a `config.json`: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (version 4).

use serde_json::Value;

use super::{Rope, RopeScaling};
use crate::error::{Result, shorten};
use crate::model::config::Family;
use crate::model::fields::Fields;

/// The rotary embeddings of a model, and how many columns of a head they rotate.
pub(in crate::model) struct Ropes {
    /// That of most layers.
    pub rope: Rope,
    /// Another for layers with a window.
    pub local: Option<Rope>,
    /// `R`.
    pub width: usize,
}

/// What reading one of them depends on.
struct Reader<'a> {
    config: Fields<'a>,
    family: Family,
    width: usize,
    max_positions: usize,
}

impl Ropes {
    /// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (version 4).
    pub(in crate::model) fn from_fields(
        config: Fields<'_>,
        family: Family,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Self> {
        let place = format!("{}: rope_parameters", config.place());
        let fields = |value| Fields::of(value, &place);
        let parameters = config.get("rope_parameters");
        if family == Family::Gemma3 {
            let [global, local] = match parameters.map(fields).transpose()? {
                Some(by_layer) if by_layer.mentions(FULL) || by_layer.mentions(SLIDING) => {
                    [FULL, SLIDING].map(|layer_type| by_layer.get(layer_type))
                }
                Some(flat) => return Err(flat.error(format!("expected `{FULL}` and `{SLIDING}`"))),
                None => [config.get("rope_scaling"), None],
            };
            let (global, local) = (global.map(fields).transpose()?, local.map(fields).transpose()?);
            refuse_partial(config, global)?;
            refuse_partial(config, local)?;
            let reader = Reader { config, family, width: head_dim, max_positions };
            let rope = reader.read(global, "rope_theta", family.default_theta())?;
            let local = reader.read(local, "rope_local_base_freq", LOCAL_THETA)?;
            return Ok(Self { rope, local: Some(local), width: head_dim });
        }
        let rope = parameters.or_else(|| config.get("rope_scaling")).map(fields).transpose()?;
        if let Some(rope) = rope
            && let Some(layer_type) = [FULL, SLIDING].into_iter().find(|layer_type| rope.mentions(layer_type))
        {
            return Err(rope.error(format!("RoPE by layer type (`{layer_type}`) is not supported")));
        }
        let width = if family == Family::Phi3 {
            rotary_width(config, rope, head_dim)?
        } else {
            refuse_partial(config, rope)?;
            head_dim
        };
        let reader = Reader { config, family, width, max_positions };
        Ok(Self { rope: reader.read(rope, "rope_theta", family.default_theta())?, local: None, width })
    }
}

/// Keys of RoPE by layer type.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";
/// θ of Gemma 3's layers with a window, where it is not given.
const LOCAL_THETA: f64 = 10_000.0;
const PARTIAL: &str = "partial_rotary_factor";

/// `R`: part of the head's width, cut to a whole number as transformers does.
fn rotary_width(config: Fields<'_>, rope: Option<Fields<'_>>, head_dim: usize) -> Result<usize> {
    let within = rope.map(|rope| rope.positive(PARTIAL)).transpose()?.flatten();
    let factor = match within {
        Some(factor) => factor,
        None => config.positive(PARTIAL)?.unwrap_or(1.0),
    };
    let width = (head_dim as f64 * factor) as usize;
    if width == 0 || width > head_dim || !width.is_multiple_of(2) {
        return Err(config.error(format!(
            "`{PARTIAL}` {factor} of {head_dim} makes {width} rotated columns, expected an even number up to {head_dim}"
        )));
    }
    Ok(width)
}

fn refuse_partial(config: Fields<'_>, rope: Option<Fields<'_>>) -> Result<()> {
    for fields in [Some(config), rope].into_iter().flatten() {
        if let Some(factor) = fields.number(PARTIAL)?.filter(|factor| *factor != 1.0) {
            return Err(fields
                .error(format!("`{PARTIAL}` {factor} is not supported here: only whole heads are rotated")));
        }
    }
    Ok(())
}

impl Reader<'_> {
    /// One rotary embedding; θ stands in its parameters, or in the configuration under `theta_key`.
    fn read(&self, rope: Option<Fields<'_>>, theta_key: &str, default_theta: f64) -> Result<Rope> {
        let within = rope.map(|rope| rope.positive("rope_theta")).transpose()?.flatten();
        let theta = match within {
            Some(theta) => theta,
            None => self.config.positive(theta_key)?.unwrap_or(default_theta),
        };
        if theta <= 1.0 {
            return Err(self.config.error(format!("`{theta_key}` is {theta}, expected a number above 1")));
        }
        let scaling = rope.map_or(Ok(RopeScaling::Default), |rope| self.scaling(rope))?;
        Ok(Rope { theta, scaling })
    }

    fn scaling(&self, rope: Fields<'_>) -> Result<RopeScaling> {
        let rope_type = match rope.text("rope_type")? {
            Some(name) => name,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let is_phi = self.family == Family::Phi3;
        match rope_type {
            "default" => Ok(RopeScaling::Default),
            // What the first Phi-3 called it.
            "su" | "yarn" if is_phi => self.longrope(rope),
            "longrope" => self.longrope(rope),
            "linear" if !is_phi => Ok(RopeScaling::Linear { factor: rope.required_positive("factor")? }),
            "llama3" if !is_phi => llama3(rope),
            "yarn" => yarn(rope, self.max_positions),
            other => {
                let supported = if is_phi {
                    "default and longrope"
                } else {
                    "default, linear, llama3, longrope and yarn"
                };
                Err(rope
                    .error(format!("RoPE type `{}` is not supported", shorten(other, 60)))
                    .hint(format!("supported are {supported}")))
            }
        }
    }

    fn longrope(&self, rope: Fields<'_>) -> Result<RopeScaling> {
        const PHI_ORIGINAL: usize = 4096;
        let key = "original_max_position_embeddings";
        let original = match (self.config.count(key, u64::MAX)?, rope.count(key, u64::MAX)?) {
            (Some(original), _) => original,
            // Phi's configuration has this one whether it is written or not.
            (None, _) if self.family == Family::Phi3 => PHI_ORIGINAL,
            (None, Some(original)) => original,
            (None, None) => self.max_positions,
        };
        let factor = match rope.positive("factor")? {
            Some(factor) => factor,
            None => self.max_positions as f64 / original as f64,
        };
        let attention_factor = match rope.positive("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        if !attention_factor.is_finite() {
            return Err(rope.error(format!("`{key}` is {original}, expected more than 1")));
        }
        Ok(RopeScaling::LongRope {
            short_factors: self.factors(rope, "short_factor")?,
            long_factors: self.factors(rope, "long_factor")?,
            original_max_positions: original,
            attention_factor,
        })
    }

    /// A number above 0 for each pair.
    fn factors(&self, rope: Fields<'_>, key: &str) -> Result<Vec<f64>> {
        let value = rope.get(key).ok_or_else(|| rope.missing(key))?;
        let above_zero = |value: &Value| value.as_f64().filter(|factor| factor.is_finite() && *factor > 0.0);
        let factors =
            value.as_array().and_then(|list| list.iter().map(above_zero).collect::<Option<Vec<_>>>());
        let pairs = self.width / 2;
        factors
            .filter(|factors| factors.len() == pairs)
            .ok_or_else(|| rope.wrong(key, value, &format!("a list of {pairs} numbers above 0")))
    }
}

fn llama3(rope: Fields<'_>) -> Result<RopeScaling> {
    let low_frequency_factor = rope.required_positive("low_freq_factor")?;
    let high_frequency_factor = rope.required_positive("high_freq_factor")?;
    if high_frequency_factor <= low_frequency_factor {
        return Err(rope.error(format!(
            "`high_freq_factor` is {high_frequency_factor}, expected more than `low_freq_factor`, {low_frequency_factor}"
        )));
    }
    Ok(RopeScaling::Llama3 {
        factor: rope.required_positive("factor")?,
        low_frequency_factor,
        high_frequency_factor,
        original_max_positions: rope.required_positive("original_max_position_embeddings")?,
    })
}

fn yarn(rope: Fields<'_>, max_positions: usize) -> Result<RopeScaling> {
    let max_positions = max_positions as f64;
    let original = rope.positive("original_max_position_embeddings")?;
    let factor = match (rope.positive("factor")?, original) {
        (Some(factor), _) => factor,
        (None, Some(original)) => max_positions / original,
        (None, None) => return Err(rope.missing("factor")),
    };
    let beta_fast = rope.positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = rope.positive("beta_slow")?.unwrap_or(1.0);
    let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
    let attention_factor =
        match (rope.positive("attention_factor")?, rope.number("mscale")?, rope.number("mscale_all_dim")?) {
            (Some(given), _, _) => given,
            (None, Some(scale), Some(scale_all)) if scale != 0.0 && scale_all != 0.0 => {
                magnitude(scale) / magnitude(scale_all)
            }
            _ => magnitude(1.0),
        };
    if !(attention_factor.is_finite() && attention_factor > 0.0) {
        return Err(rope
            .error(format!("`mscale` leads to the attention factor {attention_factor}, expected above 0")));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        original_max_positions: original.unwrap_or(max_positions),
        truncate: rope.flag("truncate")?.unwrap_or(true),
        attention_factor,
    })
}
