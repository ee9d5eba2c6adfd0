//! What is wrong with samples as a whole, without being an error.

use std::collections::{HashMap, HashSet};

use super::sample_set::{SampleSet, SampleView};
use crate::error::escape_control;

/// Warns where the samples would teach a model never to stop, or begin with two BOS (fault 28).
pub fn warn_about_ends(set: &SampleSet, eos_ids: &[u32], bos_id: Option<u32>) {
    if let Some(sample) = eos_never_learned(set, eos_ids) {
        tracing::warn!(
            "EOS is in no sample's labels: the model will not learn to stop; for example {}",
            escape_control(&sample.origin().to_string())
        );
    }
    if let Some(sample) = doubled_bos(set, bos_id) {
        tracing::warn!("a sample begins with BOS twice: {}", escape_control(&sample.origin().to_string()));
    }
}

/// The first sample, if there is an EOS and none has it in its labels.
fn eos_never_learned<'a>(set: &'a SampleSet, eos_ids: &[u32]) -> Option<SampleView<'a>> {
    let is_eos = |label: &i32| u32::try_from(*label).is_ok_and(|label| eos_ids.contains(&label));
    let learned = set.walk().any(|sample| sample.labels.iter().skip(1).any(is_eos));
    if learned || eos_ids.is_empty() { None } else { set.iter().next() }
}

/// The first sample that begins with two BOS.
fn doubled_bos(set: &SampleSet, bos_id: Option<u32>) -> Option<SampleView<'_>> {
    let bos = bos_id?;
    let doubled = set.entries().enumerate().filter(|(_, entry)| entry.begins_twice != 0);
    doubled.map(|(index, _)| set.get(index)).find(|sample| sample.token_ids.first() == Some(&bos))
}

/// Counts the validation samples that are also training samples, token for token, and warns where there are any.
pub fn warn_about_overlap(training: &SampleSet, validation: &SampleSet) -> usize {
    let mut alike: HashMap<u64, Vec<usize>> = HashMap::new();
    for (index, entry) in validation.entries().enumerate() {
        alike.entry(entry.digest).or_default().push(index);
    }
    let mut shared = HashSet::new();
    for (index, entry) in training.entries().enumerate() {
        let candidates = alike.get(&entry.digest).into_iter().flatten();
        let is_same = |other: &&usize| validation.get(**other).token_ids == training.get(index).token_ids;
        shared.extend(candidates.filter(is_same).copied());
    }
    if let Some(first) = shared.iter().min() {
        tracing::warn!(
            "{} of {} validation samples are training samples too, so the validation loss flatters; the first is {}",
            shared.len(),
            validation.len(),
            escape_control(&validation.get(*first).origin().to_string())
        );
    }
    shared.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;
    use crate::tokens::{NO_LOSS, Sample};

    fn set(samples: &[Sample]) -> SampleSet {
        SampleSet::new(samples.iter().cloned(), vec!["faq".into()])
    }

    fn sample(token_ids: &[u32], labels: &[i32]) -> Sample {
        let origin = Origin { file: "a.json".into(), line: 1 };
        Sample::new(token_ids.to_vec(), labels.to_vec(), origin)
    }

    #[test]
    fn fault_28_eos_that_is_never_learned_is_found() {
        let learned = sample(&[5, 2], &[NO_LOSS, 2]);
        // In the first label, in the ids alone, not at all.
        let others =
            [sample(&[2, 5], &[2, 5]), sample(&[5, 2, 6], &[5, NO_LOSS, 6]), sample(&[5, 6], &[5, 6])];
        let found = set(&others);
        let found = eos_never_learned(&found, &[3, 2]).map(|sample| sample.to_sample());
        assert_eq!(found.as_ref(), Some(&others[0]));
        assert!(eos_never_learned(&set(&others), &[]).is_none());
        assert!(eos_never_learned(&set(&[others[0].clone(), learned]), &[3, 2]).is_none());
    }

    #[test]
    fn fault_28_doubled_bos_is_found() {
        let samples = [sample(&[1, 5, 1, 1], &[0; 4]), sample(&[1, 1, 5], &[0; 3])];
        let found = doubled_bos(&set(&samples), Some(1)).map(|sample| sample.to_sample());
        assert_eq!(found.as_ref(), Some(&samples[1]));
        assert!(doubled_bos(&set(&samples[..1]), Some(1)).is_none());
        assert!(doubled_bos(&set(&samples), None).is_none());
    }

    #[test]
    fn fault_41_each_shared_sample_counts_once() {
        let training = [sample(&[5, 6], &[5, 6]), sample(&[7], &[7]), sample(&[5, 6], &[5, 6])];
        let validation = [sample(&[6, 5], &[6, 5]), sample(&[5, 6], &[0; 2]), sample(&[5, 6], &[5, 6])];
        assert_eq!(warn_about_overlap(&set(&training), &set(&validation)), 2);
        assert_eq!(warn_about_overlap(&set(&training), &set(&validation[..1])), 0);
    }
}
