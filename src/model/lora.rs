//! Which linears get an adapter, where its parameters stand in the flat buffer, and how they start.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::{GROUP_COUNT, LinearModule, ModelConfig};
use crate::backend::LoraSlot;
use crate::config::{CompiledPatterns, PatternMap, TargetModules};
use crate::error::{Error, Result};
use crate::tensor::NamedTensor;

/// Places, shapes and scales of the adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Inner width r.
    pub rank: usize,
    /// α; the adapter's output is scaled by α/r.
    pub alpha: f64,
    /// Scale by α/√r instead (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Which linears.
    pub target_modules: TargetModules,
    /// r of modules that differ.
    pub rank_pattern: PatternMap<usize>,
    /// α of modules that differ.
    pub alpha_pattern: PatternMap<f64>,
    /// The layers of the targets; empty: all. A target that is named in full is one in any layer, as in PEFT.
    pub layers_to_transform: Vec<usize>,
}

/// Inner width and scale of one linear's adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModuleLora {
    /// r.
    pub rank: usize,
    /// The factor on `x·Aᵀ·Bᵀ`: α/r, with rsLoRA α/√r.
    pub scale: f32,
}

/// A linear, and its adapter if it is a target.
pub type AdaptedLinear = (LinearModule, Option<ModuleLora>);

/// Rank and scale by module, ready to be asked.
pub struct ModuleScales {
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    ranks: CompiledPatterns<usize>,
    alphas: CompiledPatterns<f64>,
}

impl ModuleScales {
    /// Those of the module with this full name (`model.layers.0.self_attn.q_proj`), were it a target.
    ///
    /// # Errors
    /// A pattern that takes too long.
    pub fn of(&self, module: &str) -> Result<ModuleLora> {
        let (rank, alpha) = self.rank_and_alpha(module)?;
        let width = rank as f64;
        Ok(ModuleLora { rank, scale: (alpha / if self.use_rslora { width.sqrt() } else { width }) as f32 })
    }

    /// The α with which a module's scale is α/r, with rsLoRA too.
    ///
    /// # Errors
    /// A pattern that takes too long.
    pub fn plain_alpha(&self, module: &str) -> Result<f64> {
        let (rank, alpha) = self.rank_and_alpha(module)?;
        Ok(if self.use_rslora { alpha * (rank as f64).sqrt() } else { alpha })
    }

    fn rank_and_alpha(&self, module: &str) -> Result<(usize, f64)> {
        let rank = self.ranks.value(module)?.unwrap_or(self.rank);
        Ok((rank, self.alphas.value(module)?.unwrap_or(self.alpha)))
    }
}

impl LoraConfig {
    /// The same rank and α, scaled by α/r, for all `target_modules` of all layers.
    pub fn new(rank: usize, alpha: f64, target_modules: TargetModules) -> Self {
        Self {
            rank,
            alpha,
            use_rslora: false,
            target_modules,
            rank_pattern: PatternMap::default(),
            alpha_pattern: PatternMap::default(),
            layers_to_transform: Vec::new(),
        }
    }

    /// The same with one rank and one α for all modules.
    pub fn without_patterns(self) -> Self {
        Self { rank_pattern: PatternMap::default(), alpha_pattern: PatternMap::default(), ..self }
    }

    /// Rank and scale of every module.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
    pub fn scales(&self) -> Result<ModuleScales> {
        Ok(ModuleScales {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            ranks: self.rank_pattern.compile().map_err(|error| error.at("rank_pattern"))?,
            alphas: self.alpha_pattern.compile().map_err(|error| error.at("alpha_pattern"))?,
        })
    }

    /// The linears of a model in the order of the forward pass, with the adapters of the targets.
    ///
    /// # Errors
    /// Targets that match no module, or none in the layers asked for (fault 45); a broken pattern.
    pub fn linears(&self, model: &ModelConfig) -> Result<Vec<AdaptedLinear>> {
        let modules: Vec<LinearModule> = model.linear_modules().collect();
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        let targets = self.target_modules.select(&names)?;
        let scales = self.scales()?;
        let linears = modules
            .into_iter()
            .zip(targets)
            .map(|(module, is_target)| {
                let is_target = is_target && self.is_in_layers(&module.name);
                let lora = is_target.then(|| scales.of(&module.name)).transpose()?;
                Ok((module, lora))
            })
            .collect::<Result<Vec<_>>>()?;
        if linears.iter().all(|(_, lora)| lora.is_none()) {
            let layers = &self.layers_to_transform;
            return Err(Error::config(format!("no target is in the layers {layers:?}"))
                .at("layers_to_transform")
                .hint(layers_there_are(model)));
        }
        Ok(linears)
    }

    fn is_in_layers(&self, module: &str) -> bool {
        let is_named_in_full = matches!(&self.target_modules, TargetModules::Names(names) if names.iter().any(|name| name == module));
        let layer = || module.strip_prefix("model.layers.")?.split('.').next()?.parse().ok();
        self.layers_to_transform.is_empty()
            || is_named_in_full
            || layer().is_some_and(|layer| self.layers_to_transform.contains(&layer))
    }

    /// Refuses patterns and layers of which this model has none: PEFT passes over them, where a slip of the pen would train
    /// something else than was meant.
    ///
    /// # Errors
    /// The first that matches no target (fault 45), and what [`linears`](Self::linears) refuses.
    pub fn check_matches(&self, model: &ModelConfig) -> Result<()> {
        let linears = self.linears(model)?;
        let targets: Vec<&str> =
            linears.iter().filter(|(_, lora)| lora.is_some()).map(|(module, _)| &*module.name).collect();
        let ModuleScales { ranks, alphas, .. } = self.scales()?;
        let unmatched = [
            ("rank_pattern", ranks.first_unmatched(&targets)?),
            ("alpha_pattern", alphas.first_unmatched(&targets)?),
        ];
        if let Some((key, pattern)) = unmatched.into_iter().find_map(|(key, pattern)| Some((key, pattern?))) {
            let example = targets[0];
            return Err(Error::config(format!("`{pattern}` matches no target")).at(key).hint(format!(
                "a pattern is a regular expression for a module's name, or its end: {example}"
            )));
        }
        match self.layers_to_transform.iter().find(|layer| **layer >= model.layer_count) {
            Some(layer) => Err(Error::config(format!("there is no layer {layer}"))
                .at("layers_to_transform")
                .hint(layers_there_are(model))),
            None => Ok(()),
        }
    }

    /// Names and shapes of the adapter matrices of a model, which needs no weights.
    ///
    /// # Errors
    /// As [`linears`](Self::linears).
    pub fn expected_tensors(&self, model: &ModelConfig) -> Result<Vec<(String, Vec<usize>)>> {
        let mut layout = AdapterLayout::default();
        layout.push_group(&self.linears(model)?);
        Ok(layout.expected())
    }
}

/// The linears of a model with the adapters of `lora`, or without any.
pub(super) fn adapted_linears(model: &ModelConfig, lora: Option<&LoraConfig>) -> Result<Vec<AdaptedLinear>> {
    match lora {
        Some(lora) => lora.linears(model),
        None => Ok(model.linear_modules().map(|module| (module, None)).collect()),
    }
}

/// The linears of each layer by what they read: q, k, v; o; gate, up; down.
pub(super) fn layer_groups<'a>(
    model: &ModelConfig,
    linears: &'a [AdaptedLinear],
) -> impl Iterator<Item = [&'a [AdaptedLinear]; GROUP_COUNT]> {
    let sizes = model.group_sizes();
    linears.chunks_exact(sizes.iter().sum()).map(move |layer| {
        let mut rest = layer;
        sizes.map(|size| {
            let (group, others) = rest.split_at(size);
            rest = others;
            group
        })
    })
}

fn layers_there_are(model: &ModelConfig) -> String {
    format!("the model's layers are 0 to {}", model.layer_count - 1)
}

/// One adapter matrix inside the flat parameter buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterTensor {
    /// Name as PEFT saves it.
    pub name: String,
    /// `[rank, in]` for A, `[out, rank]` for B.
    pub shape: [usize; 2],
    /// First element in the flat buffer.
    pub offset: usize,
    /// Whether it is an A, which starts random, or a B, which starts at zero.
    pub is_a: bool,
}

impl AdapterTensor {
    /// The elements' place in the flat buffer.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.shape[0] * self.shape[1]
    }
}

/// Places of all adapter matrices in one flat buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterLayout {
    tensors: Vec<AdapterTensor>,
    parameter_count: usize,
}

impl AdapterLayout {
    /// Appends the adapters of linears that share their input: every A, then every B, as
    /// [`LinearGroup`](crate::backend::LinearGroup) wants them.
    pub fn push_group(&mut self, linears: &[AdaptedLinear]) -> Vec<Option<LoraSlot>> {
        let targets = linears.iter().filter_map(|(linear, lora)| lora.map(|lora| (linear, lora)));
        let a_offsets: Vec<usize> = targets
            .clone()
            .map(|(linear, lora)| self.push(&linear.name, [lora.rank, linear.in_features], true))
            .collect();
        let b_offsets: Vec<usize> = targets
            .map(|(linear, lora)| self.push(&linear.name, [linear.out_features, lora.rank], false))
            .collect();
        let mut places = a_offsets.into_iter().zip(b_offsets);
        let slot = |(_, lora): &AdaptedLinear| {
            let ModuleLora { rank, scale } = (*lora)?;
            let (a_offset, b_offset) = places.next()?;
            Some(LoraSlot { rank, scale, a_offset, b_offset })
        };
        linears.iter().map(slot).collect()
    }

    fn push(&mut self, module: &str, shape: [usize; 2], is_a: bool) -> usize {
        let offset = self.parameter_count;
        let letter = if is_a { 'A' } else { 'B' };
        let name = format!("base_model.model.{module}.lora_{letter}.weight");
        self.tensors.push(AdapterTensor { name, shape, offset, is_a });
        self.parameter_count += shape[0] * shape[1];
        offset
    }

    /// Every adapter matrix in the order of its place.
    pub fn tensors(&self) -> &[AdapterTensor] {
        &self.tensors
    }

    /// Ends of the runs of `A`s and of `B`s, which take turns, the first of `A`s.
    pub fn runs(&self) -> Vec<usize> {
        let runs = self.tensors.chunk_by(|one, next| one.is_a == next.is_a);
        runs.filter_map(|run| run.last()).map(|tensor| tensor.range().end).collect()
    }

    /// Number of trainable parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameter_count
    }

    /// Names and shapes, as an adapter file must have them.
    pub fn expected(&self) -> Vec<(String, Vec<usize>)> {
        self.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.to_vec())).collect()
    }

    /// PEFT's start: A uniform in ±1/√in (Kaiming with a = √5), B zero. Each matrix has its own stream of
    /// (seed, place), so that it does not depend on the others.
    pub fn initial_parameters(&self, seed: u64) -> Vec<f32> {
        let mut parameters = vec![0.0; self.parameter_count];
        for (place, tensor) in self.tensors.iter().enumerate().filter(|(_, tensor)| tensor.is_a) {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            generator.set_stream(place as u64);
            let bound = 1.0 / (tensor.shape[1] as f32).sqrt();
            parameters[tensor.range()].fill_with(|| generator.random_range(-bound..=bound));
        }
        parameters
    }

    /// Cuts a flat buffer into named tensors.
    ///
    /// # Panics
    /// When `parameters` has another length than the layout.
    pub fn to_named(&self, parameters: &[f32]) -> Vec<NamedTensor> {
        assert_eq!(parameters.len(), self.parameter_count);
        let named = |tensor: &AdapterTensor| NamedTensor {
            name: tensor.name.clone(),
            shape: tensor.shape.to_vec(),
            values: parameters[tensor.range()].to_vec(),
        };
        self.tensors.iter().map(named).collect()
    }

    /// Joins named tensors, in any order, into a flat buffer.
    ///
    /// # Errors
    /// Names or shapes that are not the layout's.
    pub fn to_flat(&self, named: &[NamedTensor]) -> Result<Vec<f32>> {
        if named.len() != self.tensors.len() {
            let message =
                format!("{} adapter tensors, the model expects {}", named.len(), self.tensors.len());
            return Err(Error::model(message));
        }
        let by_name: HashMap<&str, &NamedTensor> =
            named.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let mut parameters = vec![0.0; self.parameter_count];
        for tensor in &self.tensors {
            let error = |what: String| Error::model(what).at(tensor.name.clone());
            let given = by_name
                .get(tensor.name.as_str())
                .ok_or_else(|| error("the model has this tensor, the adapter has not".into()))?;
            if given.shape != tensor.shape {
                return Err(error(format!("shape {:?}, expected {:?}", given.shape, tensor.shape)));
            }
            parameters[tensor.range()].copy_from_slice(&given.values);
        }
        Ok(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::base::BaseModel;

    #[test]
    fn a_group_keeps_its_a_matrices_together() {
        let mut layout = AdapterLayout::default();
        let linear = |name: &str, out_features| LinearModule {
            name: name.into(),
            in_features: 3,
            out_features,
            bias: false,
        };
        let lora = |rank| Some(ModuleLora { rank, scale: 4.0 });
        let linears = [(linear("q", 5), lora(2)), (linear("k", 4), None), (linear("v", 4), lora(1))];
        let slots = layout.push_group(&linears);
        let slot = |rank, a_offset, b_offset| Some(LoraSlot { rank, scale: 4.0, a_offset, b_offset });
        assert_eq!(slots, [slot(2, 0, 9), None, slot(1, 6, 19)]);
        assert_eq!(layout.parameter_count(), 23);
        assert_eq!(layout.runs(), [9, 23]);
        let parameters = layout.initial_parameters(1);
        assert!(parameters[..9].iter().all(|value| value.abs() <= 1.0 / 3f32.sqrt() && *value != 0.0));
        assert!(parameters[9..].iter().all(|value| *value == 0.0));
        let mut named = layout.to_named(&parameters);
        named.reverse();
        assert_eq!(layout.to_flat(&named).unwrap(), parameters, "whatever the order");
        named[1].shape.reverse();
        assert!(layout.to_flat(&named).unwrap_err().to_string().contains("expected"));
        named[1].name = "other".into();
        assert!(layout.to_flat(&named).unwrap_err().to_string().contains("has not"));
    }

    fn config() -> LoraConfig {
        LoraConfig::new(16, 8.0, TargetModules::Names(vec!["q_proj".into(), "up_proj".into()]))
    }

    fn tiny() -> BaseModel {
        BaseModel::open("tests/fixtures/tiny_qwen2").unwrap()
    }

    #[test]
    fn a_module_has_the_scale_of_its_own_rank_and_alpha() {
        let mut config = config();
        config.rank_pattern = "q_proj=4".parse().unwrap();
        config.alpha_pattern = r"layers\.1\..*=2".parse().unwrap();
        let of = |config: &LoraConfig, module: &str| config.scales().unwrap().of(module).unwrap();
        let module = |rank, scale| ModuleLora { rank, scale };
        assert_eq!(of(&config, "model.layers.0.self_attn.q_proj"), module(4, 2.0));
        assert_eq!(of(&config, "model.layers.1.self_attn.q_proj"), module(4, 0.5));
        assert_eq!(of(&config, "model.layers.0.mlp.up_proj"), module(16, 0.5));
        config.use_rslora = true;
        assert_eq!(of(&config, "model.layers.0.self_attn.q_proj"), module(4, 4.0));
        assert_eq!(of(&config, "model.layers.1.mlp.up_proj"), module(16, 0.5));
    }

    #[test]
    fn layers_choose_among_the_targets_but_for_those_named_in_full() {
        let base = tiny();
        let targets = |config: &LoraConfig| -> Vec<String> {
            let linears = config.linears(base.config()).unwrap();
            linears.into_iter().filter_map(|(module, lora)| lora.map(|_| module.name)).collect()
        };
        let mut config = config();
        config.layers_to_transform = vec![1];
        assert_eq!(targets(&config), ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]);
        config.target_modules =
            TargetModules::Names(vec!["model.layers.0.mlp.down_proj".into(), "v_proj".into()]);
        assert_eq!(targets(&config), ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"]);
    }

    #[test]
    fn fault_45_patterns_and_layers_that_match_nothing_are_refused() {
        let (base, sound) = (tiny(), config());
        sound.check_matches(base.config()).unwrap();
        for (key, config) in [
            // A module that there is, but no target.
            ("rank_pattern", LoraConfig { rank_pattern: "v_proj=4".parse().unwrap(), ..sound.clone() }),
            (
                "alpha_pattern",
                LoraConfig { alpha_pattern: "q_proj=4,q_prj=4".parse().unwrap(), ..sound.clone() },
            ),
            ("layers_to_transform", LoraConfig { layers_to_transform: vec![1, 2], ..sound.clone() }),
            ("layers_to_transform", LoraConfig { layers_to_transform: vec![7], ..sound.clone() }),
        ] {
            let error = config.check_matches(base.config()).unwrap_err();
            assert_eq!(error.location(), Some(key), "{error}");
            assert!(error.hint_text().is_some(), "{error}");
        }
    }
}
