//! PiSSA's start (Meng et al. 2024): A and B from the largest singular values of every target's weight.

use std::time::Instant;

use rayon::prelude::*;
use tracing::info;

use crate::backend::cpu::CpuMatrix;
use crate::backend::cpu::principal::{Principal, principal};
use crate::checkpoint::adapter::AdapterConfig;
use crate::checkpoint::base::BaseModel;
use crate::config::{InitLoraWeights, PatternMap};
use crate::error::{Error, Result};
use crate::model::config::LinearModule;
use crate::model::{Factors, LoraConfig, ModuleLora};
use crate::tensor::NamedTensor;

/// `A₀ = √(Σ/s)·Vᵀ` and `B₀ = U·√(Σ/s)` of the `r` largest singular values of every target of `lora`, s being its scale.
/// Computed in f32 on the CPU; `seed` chooses the subspaces that the search begins with.
///
/// # Errors
/// A rank that is larger than a target allows.
pub fn factors(base: &BaseModel, lora: &LoraConfig, init: InitLoraWeights, seed: u64) -> Result<Factors> {
    let started = Instant::now();
    let iterations = match init {
        InitLoraWeights::PissaIterations(count) => Some(count),
        _ => None,
    };
    let targets: Vec<(LinearModule, ModuleLora)> = lora
        .linears(base.config())?
        .into_iter()
        .filter_map(|(module, adapter)| Some((module, adapter?)))
        .collect();
    if let Some((module, adapter)) =
        targets.iter().find(|(module, adapter)| adapter.rank > module.in_features.min(module.out_features))
    {
        let (rank, most) = (adapter.rank, module.in_features.min(module.out_features));
        return Err(Error::config(format!("rank {rank}, but {} has {most} singular values", module.name))
            .at("init_lora_weights")
            .hint("lower lora_r, or leave PiSSA out"));
    }
    let count = targets.len();
    info!("PiSSA: searching the largest singular values of {count} linears");
    let tensors: Vec<[NamedTensor; 2]> = targets
        .into_par_iter()
        .enumerate()
        .map(|(number, (module, adapter))| {
            let weight = CpuMatrix::new(&[base.tensor(&format!("{}.weight", module.name))?])?;
            let found = principal(weight.weight(), adapter.rank, iterations, seed, number as u64);
            Ok(pair(&module, adapter, &found))
        })
        .collect::<Result<_>>()?;
    info!("PiSSA: {count} linears took {:.1} s", started.elapsed().as_secs_f64());
    Ok(Factors::new(tensors.into_iter().flatten()))
}

fn pair(module: &LinearModule, adapter: ModuleLora, found: &Principal) -> [NamedTensor; 2] {
    let ModuleLora { rank, scale, .. } = adapter;
    let roots: Vec<f32> = found.values.iter().map(|value| (value / f64::from(scale)).sqrt() as f32).collect();
    let rows = found.right.chunks(module.in_features).zip(&roots);
    let a = rows.flat_map(|(v, root)| v.iter().map(move |value| root * value)).collect();
    let mut b = vec![0.0; module.out_features * rank];
    for (r, (u, root)) in found.left.chunks(module.out_features).zip(&roots).enumerate() {
        b[r..].iter_mut().step_by(rank).zip(u).for_each(|(b, value)| *b = root * value);
    }
    let name = |letter: char| format!("base_model.model.{}.lora_{letter}.weight", module.name);
    [
        NamedTensor { name: name('A'), shape: vec![rank, module.in_features], values: a },
        NamedTensor { name: name('B'), shape: vec![module.out_features, rank], values: b },
    ]
}

/// The hyper-parameters of what is saved ([`Factors::join`]): twice the rank at the same scale.
pub fn saved_config(config: &AdapterConfig) -> AdapterConfig {
    let factor = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    let alpha_pattern: PatternMap<f64> = config.alpha_pattern.map(|alpha| factor * alpha);
    AdapterConfig {
        rank: 2 * config.rank,
        alpha: factor * config.alpha,
        rank_pattern: config.rank_pattern.map(|rank| 2 * rank),
        alpha_pattern,
        ..config.clone()
    }
}
