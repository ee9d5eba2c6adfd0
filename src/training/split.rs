//! Samples with their grouping, and where they come from.

use crate::error::Result;
use crate::model::Limits;
use crate::tokens::{BatchOptions, BatchPlan, SampleSet, Visit};

/// Samples and how they are grouped into batches.
pub struct Split<'a> {
    samples: &'a SampleSet,
    plan: BatchPlan<'a>,
}

impl<'a> Split<'a> {
    /// Groups `samples`.
    ///
    /// # Errors
    /// As [`BatchPlan::new`].
    pub fn new(samples: &'a SampleSet, options: BatchOptions) -> Result<Self> {
        Ok(Self { samples, plan: BatchPlan::new(samples, options)? })
    }

    /// Which samples make which step.
    pub fn plan(&self) -> &BatchPlan<'a> {
        &self.plan
    }

    /// The hash of a sample by its id in a batch.
    pub(super) fn hash_of(&self, id: usize) -> &'a str {
        &self.samples.hash_names[self.samples.get(self.plan.sample_of(id)).hash()]
    }

    /// The places of the first few of these visits' records.
    pub(super) fn origins(&self, visits: &[Visit]) -> String {
        const NAMED: usize = 8;
        let origin = |visit: &Visit| self.samples.get(visit.sample as usize).origin().to_string();
        let mut origins: Vec<String> = visits.iter().take(NAMED).map(origin).collect();
        if visits.len() > NAMED {
            origins.push(format!("and {} more", visits.len() - NAMED));
        }
        origins.join(", ")
    }

    /// The largest micro-batch of any epoch.
    pub fn limits(&self) -> Limits {
        Limits {
            tokens: self.plan.max_tokens(),
            labelled_rows: self.plan.max_labelled_rows(),
            positions: self.plan.longest_sample(),
        }
    }
}
