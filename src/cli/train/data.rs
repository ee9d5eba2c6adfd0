//! The records of a run, and what its adapter says of them.

use super::super::conditioning::Conditioning;
use crate::config::{DataSource, TrainingConfig};
use crate::data::{Dataset, LoadOptions, load};
use crate::error::{Result, escape_control};
use crate::tokens::SampleSet;

/// Reads the files of `sources` as the configuration says.
pub(super) fn load_records(config: &TrainingConfig, sources: &[DataSource]) -> Result<Dataset> {
    let options = LoadOptions {
        instruction_key: config.instruction_key.clone(),
        output_key: config.output_key.clone(),
        hash_key: config.hash_key.clone(),
        on_bad_record: config.on_bad_record,
    };
    load(sources, &options)
}

/// How the adapter is conditioned by the end of the run; of data of tokens nobody knows the hashes.
pub(super) fn conditioning(
    config: &TrainingConfig,
    samples: &SampleSet,
    is_text: bool,
) -> Result<Conditioning> {
    let before = Conditioning::of(config.init_adapter.as_deref())?.hashes.unwrap_or_default();
    let own = samples.hashes_in_text().into_iter().map(str::to_string);
    Ok(Conditioning {
        template: config.hash_template.clone(),
        hashes: is_text.then(|| own.chain(before).collect()),
        learned_without: config.hash_dropout > 0.0,
    })
}

/// Sentences of the model card.
pub(super) fn describe_data(samples: &SampleSet) -> String {
    let hashes: Vec<String> =
        samples.hash_names.iter().map(|hash| format!("`{}`", escape_control(hash))).collect();
    format!(
        "{} training samples with {} tokens, of which {} carry loss; hashes: {}.",
        samples.samples.len(),
        samples.token_count(),
        samples.labelled_count(),
        hashes.join(", ")
    )
}
