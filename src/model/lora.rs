//! Which linears get an adapter, and what else is trained.

use super::config::{GROUP_COUNT, LinearModule, ModelConfig};
use super::layout::AdapterLayout;
use super::whole::{WholeModule, whole_modules};
use crate::config::{CompiledPatterns, PatternMap, TargetModules};
use crate::error::{Error, Result};

/// Places, shapes and scales of the adapters.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Inner width r.
    pub rank: usize,
    /// α; the adapter's output is scaled by α/r.
    pub alpha: f64,
    /// Scale by α/√r instead (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Whether every target has magnitudes (DoRA, Liu et al. 2024).
    pub use_dora: bool,
    /// Which linears.
    pub target_modules: TargetModules,
    /// r of modules that differ.
    pub rank_pattern: PatternMap<usize>,
    /// α of modules that differ.
    pub alpha_pattern: PatternMap<f64>,
    /// The layers of the targets; empty: all. A target that is named in full is one in any layer, as in PEFT.
    pub layers_to_transform: Vec<usize>,
    /// Ends of the names of modules that are trained whole.
    pub modules_to_save: Vec<String>,
    /// Whether the targets' weights are in f32 what [`Factors`](super::Factors) leave of them (PiSSA).
    pub has_residuals: bool,
}

/// Inner width and scale of one linear's adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModuleLora {
    /// r.
    pub rank: usize,
    /// The factor on `x·Aᵀ·Bᵀ`: α/r, with rsLoRA α/√r.
    pub scale: f32,
    /// Whether it has magnitudes (DoRA).
    pub has_magnitude: bool,
}

/// A linear, and its adapter if it is a target.
pub type AdaptedLinear = (LinearModule, Option<ModuleLora>);

/// Rank and scale by module, ready to be asked.
pub struct ModuleScales {
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    use_dora: bool,
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
        let scale = (alpha / if self.use_rslora { width.sqrt() } else { width }) as f32;
        Ok(ModuleLora { rank, scale, has_magnitude: self.use_dora })
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
            use_dora: false,
            target_modules,
            rank_pattern: PatternMap::default(),
            alpha_pattern: PatternMap::default(),
            layers_to_transform: Vec::new(),
            modules_to_save: Vec::new(),
            has_residuals: false,
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
            use_dora: self.use_dora,
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

    /// The modules of `model` that are trained whole.
    ///
    /// # Errors
    /// As [`whole_modules`].
    pub fn whole_modules(&self, model: &ModelConfig) -> Result<Vec<WholeModule>> {
        whole_modules(&self.modules_to_save, model)
    }

    /// Names and shapes of the trained tensors of a model, which needs no weights.
    ///
    /// # Errors
    /// As [`linears`](Self::linears) and [`whole_modules`](Self::whole_modules).
    pub fn expected_tensors(&self, model: &ModelConfig) -> Result<Vec<(String, Vec<usize>)>> {
        let mut layout = AdapterLayout::default();
        layout.push_group(&self.linears(model)?);
        for module in self.whole_modules(model)? {
            layout.push_whole(&module);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::base::BaseModel;

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
        let module = |rank, scale| ModuleLora { rank, scale, has_magnitude: false };
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
