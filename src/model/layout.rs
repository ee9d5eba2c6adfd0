//! Where trained parameters stand in the flat buffer, and how they start.

use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::lora::{AdaptedLinear, ModuleLora};
use super::whole::WholeModule;
use crate::backend::LoraSlot;
use crate::checkpoint::base::BaseModel;
use crate::error::{Error, Result};
use crate::tensor::NamedTensor;

/// What a trained tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// `A [rank, in]` of an adapter, which starts random.
    A,
    /// `B [out, rank]` of an adapter, which starts at zero.
    B,
    /// The magnitudes `m [out]` of an adapter (DoRA), which start as the norms of the base's rows.
    Magnitude,
    /// The weight of a module that is trained whole, which starts as the base's.
    Whole,
}

/// One trained tensor inside the flat parameter buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterTensor {
    /// Name as PEFT saves it.
    pub name: String,
    /// Axis lengths, outermost first.
    pub shape: Vec<usize>,
    /// First element in the flat buffer.
    pub offset: usize,
    /// What it is.
    pub kind: TensorKind,
}

/// In front of every name in an adapter's file.
const PREFIX: &str = "base_model.model.";
/// At the end of the names of magnitudes.
const MAGNITUDE: &str = "lora_magnitude_vector";

impl AdapterTensor {
    /// The elements' place in the flat buffer.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.shape.iter().product::<usize>()
    }

    /// Whether LoRA+ gives it the rate of the `B`s: these, and as in PEFT all vectors.
    fn has_b_rate(&self) -> bool {
        self.kind == TensorKind::B || self.shape.len() == 1
    }
}

/// Places of all trained tensors in one flat buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdapterLayout {
    tensors: Vec<AdapterTensor>,
    parameter_count: usize,
}

impl AdapterLayout {
    /// Appends the adapters of linears that share their input: every A, then every B, as
    /// [`LinearGroup`](crate::backend::LinearGroup) wants them; then their magnitudes, if any.
    pub fn push_group(&mut self, linears: &[AdaptedLinear]) -> Vec<Option<LoraSlot>> {
        let targets = linears.iter().filter_map(|(linear, lora)| lora.map(|lora| (linear, lora)));
        let a_offsets: Vec<usize> = targets
            .clone()
            .map(|(linear, lora)| {
                self.push(&linear.name, "lora_A.weight", &[lora.rank, linear.in_features], TensorKind::A)
            })
            .collect();
        let b_offsets: Vec<usize> = targets
            .clone()
            .map(|(linear, lora)| {
                self.push(&linear.name, "lora_B.weight", &[linear.out_features, lora.rank], TensorKind::B)
            })
            .collect();
        let magnitude_offsets: Vec<Option<usize>> = targets
            .map(|(linear, lora)| {
                let shape = &[linear.out_features];
                let push = || self.push(&linear.name, MAGNITUDE, shape, TensorKind::Magnitude);
                lora.has_magnitude.then(push)
            })
            .collect();
        let mut places = a_offsets.into_iter().zip(b_offsets).zip(magnitude_offsets);
        let slot = |(_, lora): &AdaptedLinear| {
            let ModuleLora { rank, scale, .. } = (*lora)?;
            let ((a_offset, b_offset), magnitude_offset) = places.next()?;
            Some(LoraSlot { rank, scale, a_offset, b_offset, magnitude_offset })
        };
        linears.iter().map(slot).collect()
    }

    /// Appends the weight of a module that is trained whole; returns its first element.
    pub fn push_whole(&mut self, module: &WholeModule) -> usize {
        self.push(&module.name, "weight", &module.shape, TensorKind::Whole)
    }

    fn push(&mut self, module: &str, end: &str, shape: &[usize], kind: TensorKind) -> usize {
        let offset = self.parameter_count;
        let name = format!("{PREFIX}{module}.{end}");
        self.tensors.push(AdapterTensor { name, shape: shape.to_vec(), offset, kind });
        self.parameter_count += shape.iter().product::<usize>();
        offset
    }

    /// Every trained tensor in the order of its place.
    pub fn tensors(&self) -> &[AdapterTensor] {
        &self.tensors
    }

    /// Ends of the runs of what has the rate of the `A`s and of what has that of the `B`s, which take turns, the first of
    /// `A`s.
    pub fn runs(&self) -> Vec<usize> {
        let runs = self.tensors.chunk_by(|one, next| one.has_b_rate() == next.has_b_rate());
        runs.filter_map(|run| run.last()).map(|tensor| tensor.range().end).collect()
    }

    /// Number of trainable parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameter_count
    }

    /// Names and shapes, as an adapter file must have them.
    pub fn expected(&self) -> Vec<(String, Vec<usize>)> {
        self.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect()
    }

    /// PEFT's start: A uniform in ±1/√in (Kaiming with a = √5), B zero, the rest as `base` has it. Each A has its own stream
    /// of (seed, place), so that it does not depend on the others.
    ///
    /// # Errors
    /// A base of another shape.
    pub fn start(&self, base: &BaseModel, seed: u64) -> Result<Vec<f32>> {
        let mut parameters = self.adapters_start(seed);
        let of_base = |tensor: &AdapterTensor| {
            let name = tensor.name.strip_prefix(PREFIX).unwrap_or(&tensor.name);
            match name.strip_suffix(MAGNITUDE) {
                Some(module) => base.tensor(&format!("{module}weight")),
                None => base.tensor(name),
            }
        };
        for tensor in &self.tensors {
            let into = &mut parameters[tensor.range()];
            match tensor.kind {
                TensorKind::A | TensorKind::B => {}
                TensorKind::Whole => into.copy_from_slice(&of_base(tensor)?.to_f32()),
                TensorKind::Magnitude => {
                    let weight = of_base(tensor)?;
                    let width = weight.shape()[1];
                    let norm =
                        |row: &[f32]| row.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>().sqrt();
                    let norms = weight.to_f32();
                    into.iter_mut().zip(norms.chunks(width)).for_each(|(into, row)| *into = norm(row) as f32);
                }
            }
        }
        Ok(parameters)
    }

    fn adapters_start(&self, seed: u64) -> Vec<f32> {
        let mut parameters = vec![0.0; self.parameter_count];
        let matrices =
            self.tensors.iter().filter(|tensor| matches!(tensor.kind, TensorKind::A | TensorKind::B));
        for (place, tensor) in matrices.enumerate().filter(|(_, tensor)| tensor.kind == TensorKind::A) {
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
            shape: tensor.shape.clone(),
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
    use super::super::config::LinearModule;
    use super::super::whole::WholePlace;
    use super::*;

    #[test]
    fn a_group_keeps_its_a_matrices_together() {
        let mut layout = AdapterLayout::default();
        let linear = |name: &str, out_features| LinearModule {
            name: name.into(),
            in_features: 3,
            out_features,
            bias: false,
        };
        let lora = |rank| Some(ModuleLora { rank, scale: 4.0, has_magnitude: false });
        let linears = [(linear("q", 5), lora(2)), (linear("k", 4), None), (linear("v", 4), lora(1))];
        let slots = layout.push_group(&linears);
        let slot = |rank, a_offset, b_offset| {
            Some(LoraSlot { rank, scale: 4.0, a_offset, b_offset, magnitude_offset: None })
        };
        assert_eq!(slots, [slot(2, 0, 9), None, slot(1, 6, 19)]);
        assert_eq!(layout.parameter_count(), 23);
        assert_eq!(layout.runs(), [9, 23]);
        let mut with_magnitudes = AdapterLayout::default();
        let linears = linears
            .map(|(linear, lora)| (linear, lora.map(|lora| ModuleLora { has_magnitude: true, ..lora })));
        let offsets = with_magnitudes.push_group(&linears);
        let offsets: Vec<Option<usize>> =
            offsets.iter().map(|slot| slot.and_then(|slot| slot.magnitude_offset)).collect();
        assert_eq!(offsets, [Some(23), None, Some(28)]);
        assert_eq!(with_magnitudes.runs(), [9, 32]);
        assert_eq!(with_magnitudes.tensors()[5].name, "base_model.model.v.lora_magnitude_vector");
        assert_eq!(
            with_magnitudes.adapters_start(1)[..23],
            layout.adapters_start(1),
            "A does not depend on them"
        );
        let whole = |name: &str, shape: &[usize]| WholeModule {
            name: name.into(),
            shape: shape.to_vec(),
            place: WholePlace::FinalNorm,
        };
        let mut with_whole = layout.clone();
        assert_eq!(with_whole.push_whole(&whole("model.norm", &[3])), 23);
        assert_eq!(with_whole.push_whole(&whole("lm_head", &[2, 3])), 26);
        assert_eq!(with_whole.runs(), [9, 26, 32], "a vector has the rate of the Bs");
        assert_eq!(with_whole.tensors()[5].name, "base_model.model.lm_head.weight");
        assert_eq!(with_whole.adapters_start(1)[..23], layout.adapters_start(1));
        let parameters = layout.adapters_start(1);
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
}
