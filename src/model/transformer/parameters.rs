//! What is trained: its values, gradients, and form in files.

use super::Transformer;
use crate::backend::Backend;
use crate::checkpoint::base::BaseModel;
use crate::error::{Error, Result};
use crate::model::factors::Factors;
use crate::tensor::NamedTensor;

impl<B: Backend> Transformer<B> {
    /// Sets all trained parameters to a run's start: see [`AdapterLayout::start`].
    ///
    /// # Errors
    /// A base of another shape, or a device error.
    pub fn start(&mut self, base: &BaseModel, seed: u64) -> Result<()> {
        let mut parameters = self.layout.start(base, seed)?;
        for tensor in self.layout.tensors() {
            if let Some(factor) = self.factors.as_ref().and_then(|factors| factors.get(&tensor.name)) {
                parameters[tensor.range()].copy_from_slice(&factor.values);
            }
        }
        self.set_parameters(&parameters)
    }

    /// Replaces all trained parameters (flat, in the order of [`layout`](Self::layout)).
    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        if parameters.len() != self.layout.parameter_count() {
            let (found, expected) = (parameters.len(), self.layout.parameter_count());
            return Err(Error::model(format!("{found} adapter parameters, the model expects {expected}")));
        }
        self.is_renewed = false;
        self.backend.write_floats(&mut self.parameters, parameters)
    }

    /// All trained parameters, flat.
    pub fn parameters(&self) -> Result<Vec<f32>> {
        self.read_all(&self.parameters)
    }

    /// The summed gradients, flat.
    pub fn gradients(&self) -> Result<Vec<f32>> {
        self.read_all(&self.gradients)
    }

    /// The summed gradients, into as many values as there are parameters.
    pub fn read_gradients(&self, into: &mut [f32]) -> Result<()> {
        self.backend.read_floats(&self.gradients, into)
    }

    /// Replaces the gradients, for an optimizer to go on with.
    pub fn set_gradients(&mut self, gradients: &[f32]) -> Result<()> {
        self.backend.write_floats(&mut self.gradients, gradients)
    }

    /// The adapters as PEFT names and saves them, for the base as it is: with [`Factors`] of twice the rank.
    pub fn adapters(&self) -> Result<Vec<NamedTensor>> {
        let own = self.layout.to_named(&self.parameters()?);
        Ok(match &self.factors {
            Some(factors) => factors.join(own),
            None => own,
        })
    }

    /// Goes on with what [`adapters`](Self::adapters) gave.
    ///
    /// # Errors
    /// Tensors that are not this model's, or that began with other factors.
    pub fn set_adapters(&mut self, saved: &[NamedTensor]) -> Result<()> {
        let parameters = match &self.factors {
            None => self.layout.to_flat(saved)?,
            Some(factors) => {
                let (own, began_with) = Factors::split(saved)?;
                if began_with != *factors {
                    return Err(Error::model("the adapter began with other factors"));
                }
                self.layout.to_flat(&own)?
            }
        };
        self.set_parameters(&parameters)
    }

    fn read_all(&self, floats: &B::Floats) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.layout.parameter_count()];
        self.backend.read_floats(floats, &mut values)?;
        Ok(values)
    }

    /// Backend, parameters and gradients, for an optimizer.
    pub fn trainable(&mut self) -> (&B, &mut B::Floats, &B::Floats) {
        self.is_renewed = false;
        (&self.backend, &mut self.parameters, &self.gradients)
    }

    /// Sets all gradients to zero.
    pub fn zero_gradients(&mut self) -> Result<()> {
        self.backend.zero_floats(&mut self.gradients)
    }
}
