//! The processes that train one adapter, seen from the loop. A run of one process exchanges nothing.
//!
//! A step is the same whatever their number: its micro-batches are dealt to them in turn, and what they found is added up
//! before anything is decided.

use crate::backend::Backend;
use crate::distributed::Group;
use crate::error::{Error, Result};
use crate::evaluation::{Evaluation, Figures};
use crate::model::Transformer;

/// This process among those of the run.
#[derive(Default)]
pub(super) struct Peers<'a> {
    group: Option<&'a mut Group>,
    /// The gradients on their way between model and group.
    gradients: Vec<f32>,
}

impl<'a> Peers<'a> {
    pub(super) fn of(group: &'a mut Group) -> Self {
        Self { group: Some(group), gradients: Vec::new() }
    }

    /// Number of processes.
    pub(super) fn count(&self) -> usize {
        self.group.as_ref().map_or(1, |group| group.world_size())
    }

    /// This process's number.
    pub(super) fn rank(&self) -> usize {
        self.group.as_ref().map_or(0, |group| group.rank())
    }

    /// Of micro-batches that are dealt in turn, this process's.
    pub(super) fn share<T>(&self, micro_batches: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
        micro_batches.skip(self.rank()).step_by(self.count())
    }

    /// Whether it is so in any process.
    pub(super) fn any(&mut self, is_so: bool) -> Result<bool> {
        let Some(group) = &mut self.group else { return Ok(is_so) };
        Ok(group.gather(&[u8::from(is_so)])?.iter().any(|answer| answer[..] == [1]))
    }

    /// The sum over all processes, in the order of their ranks.
    pub(super) fn sum(&mut self, value: f64) -> Result<f64> {
        let Some(group) = &mut self.group else { return Ok(value) };
        let values = group.gather(&value.to_ne_bytes())?;
        values.iter().try_fold(0.0, |sum, bytes| {
            Ok(sum + bytemuck::try_pod_read_unaligned::<f64>(bytes).map_err(odd)?)
        })
    }

    /// Adds up the gradients of all processes.
    pub(super) fn sum_gradients<B: Backend>(&mut self, model: &mut Transformer<B>) -> Result<()> {
        let Some(group) = &mut self.group else { return Ok(()) };
        self.gradients.resize(model.layout().parameter_count(), 0.0);
        model.read_gradients(&mut self.gradients)?;
        group.sum(&mut self.gradients)?;
        model.set_gradients(&self.gradients)
    }

    /// Begins with the parameters of the first process.
    pub(super) fn begin_alike<B: Backend>(&mut self, model: &mut Transformer<B>) -> Result<()> {
        let Some(group) = &mut self.group else { return Ok(()) };
        let mut parameters = model.parameters()?;
        group.broadcast(&mut parameters)?;
        model.set_parameters(&parameters)
    }

    /// The figures of all processes together.
    pub(super) fn merge(&mut self, own: Evaluation) -> Result<Evaluation> {
        let Some(group) = &mut self.group else { return Ok(own) };
        let by_hash: Vec<(&String, &Figures)> = own.by_hash().iter().collect();
        let bytes = serde_json::to_vec(&by_hash).map_err(odd)?;
        let mut merged = Evaluation::default();
        for bytes in group.gather(&bytes)? {
            let by_hash: Vec<(String, Figures)> = serde_json::from_slice(&bytes).map_err(odd)?;
            for (hash, figures) in by_hash {
                merged.add_figures(hash, figures);
            }
        }
        Ok(merged)
    }

    /// What the first process that found anything has found.
    pub(super) fn first_found(&mut self, found: Option<String>) -> Result<Option<String>> {
        let Some(group) = &mut self.group else { return Ok(found) };
        let all = group.gather(found.unwrap_or_default().as_bytes())?;
        let first = all.into_iter().find(|text| !text.is_empty());
        Ok(first.map(|text| String::from_utf8_lossy(&text).into_owned()))
    }
}

fn odd(error: impl std::fmt::Display) -> Error {
    Error::internal(format!("another process sent what cannot be read: {error}"))
}
