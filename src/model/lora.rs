//! Which linears get an adapter, where its parameters stand in the flat buffer, and how they start.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::{LinearModule, ModelConfig};
use crate::backend::LoraSlot;
use crate::config::TargetModules;
use crate::error::{Error, Result};
use crate::tensor::NamedTensor;

/// Shape and start of the adapters.
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
}

impl LoraConfig {
    /// The factor on `x·Aᵀ·Bᵀ`: α/r, with rsLoRA α/√r.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.use_rslora { rank.sqrt() } else { rank }) as f32
    }

    /// Which linears of a model are targets, in the order of the forward pass.
    ///
    /// # Errors
    /// Targets that match no module (fault 45).
    pub fn linears(&self, model: &ModelConfig) -> Result<Vec<(LinearModule, bool)>> {
        let modules: Vec<LinearModule> = model.linear_modules().collect();
        let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
        let targets = self.target_modules.select(&names)?;
        Ok(modules.into_iter().zip(targets).collect())
    }

    /// Names and shapes of the adapter matrices of a model, which needs no weights.
    ///
    /// # Errors
    /// Targets that match no module (fault 45).
    pub fn expected_tensors(&self, model: &ModelConfig) -> Result<Vec<(String, Vec<usize>)>> {
        let mut layout = AdapterLayout::default();
        layout.push_group(self, &self.linears(model)?);
        Ok(layout.expected())
    }
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
    /// Appends the adapters of linears that share their input, each with whether it is a target: every A, then every
    /// B, as [`LinearGroup`](crate::backend::LinearGroup) wants them.
    pub fn push_group(
        &mut self,
        config: &LoraConfig,
        linears: &[(LinearModule, bool)],
    ) -> Vec<Option<LoraSlot>> {
        let (rank, scale) = (config.rank, config.scale());
        let targets = linears.iter().filter(|(_, is_target)| *is_target).map(|(linear, _)| linear);
        let a_offsets: Vec<usize> =
            targets.clone().map(|linear| self.push(&linear.name, [rank, linear.in_features], true)).collect();
        let b_offsets: Vec<usize> =
            targets.map(|linear| self.push(&linear.name, [linear.out_features, rank], false)).collect();
        let mut slots = a_offsets.into_iter().zip(b_offsets).map(|(a_offset, b_offset)| LoraSlot {
            rank,
            scale,
            a_offset,
            b_offset,
        });
        linears.iter().map(|(_, is_target)| if *is_target { slots.next() } else { None }).collect()
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

    #[test]
    fn a_group_keeps_its_a_matrices_together() {
        let config = LoraConfig {
            rank: 2,
            alpha: 8.0,
            use_rslora: false,
            target_modules: TargetModules::Names(vec!["q".into()]),
        };
        let mut layout = AdapterLayout::default();
        let linear = |name: &str, out_features| LinearModule {
            name: name.into(),
            in_features: 3,
            out_features,
            bias: false,
        };
        let linears = [(linear("q", 5), true), (linear("k", 4), false), (linear("v", 4), true)];
        let slots = layout.push_group(&config, &linears);
        let slot = |a_offset, b_offset| Some(LoraSlot { rank: 2, scale: 4.0, a_offset, b_offset });
        assert_eq!(slots, [slot(0, 12), None, slot(6, 22)]);
        assert_eq!(layout.parameter_count(), 30);
        let parameters = layout.initial_parameters(1);
        assert!(parameters[..12].iter().all(|value| value.abs() <= 1.0 / 3f32.sqrt() && *value != 0.0));
        assert!(parameters[12..].iter().all(|value| *value == 0.0));
        let mut named = layout.to_named(&parameters);
        named.reverse();
        assert_eq!(layout.to_flat(&named).unwrap(), parameters, "whatever the order");
        named[1].shape.reverse();
        assert!(layout.to_flat(&named).unwrap_err().to_string().contains("expected"));
        named[1].name = "other".into();
        assert!(layout.to_flat(&named).unwrap_err().to_string().contains("has not"));
    }

    #[test]
    fn rslora_divides_by_the_root() {
        let config = LoraConfig {
            rank: 16,
            alpha: 8.0,
            use_rslora: true,
            target_modules: TargetModules::Names(vec!["q".into()]),
        };
        assert_eq!(config.scale(), 2.0);
        assert_eq!(LoraConfig { use_rslora: false, ..config }.scale(), 0.5);
    }
}
