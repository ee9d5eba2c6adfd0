//! Factors that were taken out of the targets' weights, as PiSSA does it (Meng et al. 2024): `W = W_res + s·B₀·A₀`. The model
//! computes with `W_res` and trains A and B from there.
//!
//! What is saved belongs to the base as it is: `W_res + s·B·A = W + s·[B, −B₀]·[A; A₀]`, a plain adapter of twice the rank, as
//! PEFT's `path_initial_model_for_weight_conversion` makes it. Its second halves tell a resumed run where it began.

use std::collections::HashMap;

use rayon::prelude::*;

use super::lora::LoraConfig;
use crate::checkpoint::base::BaseModel;
use crate::error::{Error, Result};
use crate::tensor::{NamedTensor, WeightTensor};

const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// `A₀` and `B₀` of every target.
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// Named as A and B are in an adapter's file.
    tensors: HashMap<String, NamedTensor>,
}

impl Factors {
    /// Of `A₀ [r, in]` and `B₀ [out, r]`, named as in an adapter's file.
    pub fn new(tensors: impl IntoIterator<Item = NamedTensor>) -> Self {
        Self { tensors: tensors.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect() }
    }

    /// The factor with this name.
    pub fn get(&self, name: &str) -> Option<&NamedTensor> {
        self.tensors.get(name)
    }

    /// What of the targets' weights is left, `W − s·B₀·A₀` in f32, by the weights' names.
    ///
    /// # Errors
    /// Targets without factors, or a base of another shape.
    pub fn residuals(&self, base: &BaseModel, lora: &LoraConfig) -> Result<HashMap<String, WeightTensor>> {
        let mut residuals = HashMap::new();
        for (module, adapter) in lora.linears(base.config())? {
            let Some(adapter) = adapter else { continue };
            let factor = |end: &str| {
                self.get(&format!("base_model.model.{}{end}", module.name)).ok_or_else(|| {
                    Error::model("there are no factors of this target").at(module.name.clone())
                })
            };
            let (a, b) = (factor(A)?, factor(B)?);
            let name = format!("{}.weight", module.name);
            let weight = base.tensor(&name)?;
            let (width, rank) = (module.in_features, adapter.rank);
            let is_right = a.shape == [rank, width] && b.shape == [module.out_features, rank];
            if !is_right {
                let message = format!("factors of shapes {:?} and {:?} for rank {rank}", a.shape, b.shape);
                return Err(Error::model(message).at(module.name));
            }
            let mut left = weight.to_f32();
            left.par_chunks_mut(width).zip(b.values.par_chunks(rank)).for_each(|(row, b)| {
                for (b, a) in b.iter().zip(a.values.chunks(width)) {
                    let factor = adapter.scale * b;
                    row.iter_mut().zip(a).for_each(|(value, a)| *value -= factor * a);
                }
            });
            residuals.insert(name.clone(), WeightTensor::from_f32(&name, weight.shape().to_vec(), &left));
        }
        Ok(residuals)
    }

    /// A and B as they are saved: `[A; A₀]` and `[B, −B₀]`. Other tensors stay as they are.
    pub fn join(&self, tensors: Vec<NamedTensor>) -> Vec<NamedTensor> {
        let joined = |mut tensor: NamedTensor| {
            let Some(factor) = self.get(&tensor.name) else { return tensor };
            if tensor.name.ends_with(A) {
                tensor.values.extend(&factor.values);
                tensor.shape[0] *= 2;
            } else {
                let rank = tensor.shape[1];
                let rows = tensor.values.chunks(rank).zip(factor.values.chunks(rank));
                tensor.values =
                    rows.flat_map(|(b, b0)| b.iter().copied().chain(b0.iter().map(|b| -b))).collect();
                tensor.shape[1] *= 2;
            }
            tensor
        };
        tensors.into_iter().map(joined).collect()
    }

    /// The opposite: the trained tensors, and the factors.
    ///
    /// # Errors
    /// An A or B of an odd rank.
    pub fn split(saved: &[NamedTensor]) -> Result<(Vec<NamedTensor>, Self)> {
        let (mut own, mut factors) = (Vec::with_capacity(saved.len()), Vec::new());
        for tensor in saved {
            let is_a = tensor.name.ends_with(A);
            if !is_a && !tensor.name.ends_with(B) {
                own.push(tensor.clone());
                continue;
            }
            let axis = if is_a { 0 } else { 1 };
            if tensor.shape.len() != 2 || !tensor.shape[axis].is_multiple_of(2) {
                return Err(Error::model(format!("shape {:?}, expected twice a rank", tensor.shape))
                    .at(tensor.name.clone()));
            }
            let mut shape = tensor.shape.clone();
            shape[axis] /= 2;
            let (first, second): (Vec<f32>, Vec<f32>) = if is_a {
                let (first, second) = tensor.values.split_at(tensor.values.len() / 2);
                (first.to_vec(), second.to_vec())
            } else {
                let rank = shape[1];
                let half = |start: usize| {
                    tensor.values.chunks(2 * rank).flat_map(move |row| &row[start..start + rank])
                };
                (half(0).copied().collect(), half(rank).map(|value| -value).collect())
            };
            let name = || tensor.name.clone();
            own.push(NamedTensor { name: name(), shape: shape.clone(), values: first });
            factors.push(NamedTensor { name: name(), shape, values: second });
        }
        Ok((own, Self::new(factors)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_joined_is_split_again() {
        let tensor = |end: &str, shape: [usize; 2], from: f32| NamedTensor {
            name: format!("base_model.model.q_proj{end}"),
            shape: shape.to_vec(),
            values: (0..shape[0] * shape[1]).map(|number| from + number as f32).collect(),
        };
        let factors = Factors::new([tensor(A, [2, 3], 100.0), tensor(B, [2, 2], 200.0)]);
        let whole =
            NamedTensor { name: "base_model.model.model.norm.weight".into(), ..tensor("", [1, 3], 5.0) };
        let own = vec![tensor(A, [2, 3], 1.0), tensor(B, [2, 2], 11.0), whole];
        let joined = factors.join(own.clone());
        assert_eq!(joined[0].shape, [4, 3]);
        assert_eq!(joined[0].values[4..8], [5.0, 6.0, 100.0, 101.0]);
        assert_eq!(joined[1].shape, [2, 4]);
        assert_eq!(joined[1].values, [11.0, 12.0, -200.0, -201.0, 13.0, 14.0, -202.0, -203.0]);
        assert_eq!(joined[2], own[2]);
        assert_eq!(Factors::split(&joined).unwrap(), (own, factors));
        assert!(Factors::split(&[tensor(A, [3, 3], 0.0)]).is_err());
    }
}
