//! What is wrong with samples as a whole, without being an error.

use std::collections::HashSet;

use super::samples::{Sample, SampleSet};

/// Warns where the samples would teach a model never to stop, or begin with two BOS (fault 28).
pub fn warn_about_ends(set: &SampleSet, eos_ids: &[u32], bos_id: Option<u32>) {
    if let Some(sample) = eos_never_learned(&set.samples, eos_ids) {
        tracing::warn!(
            "EOS is in no sample's labels: the model will not learn to stop; for example {}",
            crate::error::escape_control(&sample.origin.to_string())
        );
    }
    if let Some(sample) = doubled_bos(&set.samples, bos_id) {
        tracing::warn!(
            "a sample begins with BOS twice: {}",
            crate::error::escape_control(&sample.origin.to_string())
        );
    }
}

/// The first sample, if there is an EOS and none has it in its labels.
fn eos_never_learned<'a>(samples: &'a [Sample], eos_ids: &[u32]) -> Option<&'a Sample> {
    let is_eos = |label: &i32| u32::try_from(*label).is_ok_and(|label| eos_ids.contains(&label));
    let learned = samples.iter().any(|sample| sample.labels.iter().skip(1).any(is_eos));
    if learned || eos_ids.is_empty() { None } else { samples.first() }
}

/// The first sample that begins with two BOS.
fn doubled_bos(samples: &[Sample], bos_id: Option<u32>) -> Option<&Sample> {
    let bos = bos_id?;
    samples.iter().find(|sample| sample.token_ids.starts_with(&[bos, bos]))
}

/// Counts the validation samples that are also training samples, token for token, and warns where there are any.
pub fn warn_about_overlap(training: &SampleSet, validation: &SampleSet) -> usize {
    let known: HashSet<&[u32]> = training.samples.iter().map(|sample| sample.token_ids.as_slice()).collect();
    let shared: Vec<&Sample> =
        validation.samples.iter().filter(|sample| known.contains(sample.token_ids.as_slice())).collect();
    if let Some(first) = shared.first() {
        tracing::warn!(
            "{} of {} validation samples are training samples too, so the validation loss flatters; the first is {}",
            shared.len(),
            validation.samples.len(),
            crate::error::escape_control(&first.origin.to_string())
        );
    }
    shared.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;
    use crate::tokens::NO_LOSS;

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
        assert_eq!(eos_never_learned(&others, &[3, 2]), Some(&others[0]));
        assert_eq!(eos_never_learned(&others, &[]), None);
        assert_eq!(eos_never_learned(&[others[0].clone(), learned], &[3, 2]), None);
    }

    #[test]
    fn fault_28_doubled_bos_is_found() {
        let samples = [sample(&[1, 5, 1, 1], &[0; 4]), sample(&[1, 1, 5], &[0; 3])];
        assert_eq!(doubled_bos(&samples, Some(1)), Some(&samples[1]));
        assert_eq!(doubled_bos(&samples[..1], Some(1)), None);
        assert_eq!(doubled_bos(&samples, None), None);
    }
}
