//! The records of a run, and what its adapter says of them.

use super::super::conditioning::Conditioning;
use super::token_cache::Making;
use crate::config::{DataSource, TrainingConfig};
use crate::data::{Kinds, LoadOptions, Survey, read};
use crate::error::{Error, Result, escape_control};
use crate::tokens::{SampleBuilder, SampleOptions, SampleSet, Tokenizer};

/// Data files that were read through once: they are what they should be, and none of their text is in memory.
pub(super) struct TextData<'a> {
    pub sources: &'a [DataSource],
    pub options: LoadOptions,
    survey: Survey,
}

impl<'a> TextData<'a> {
    /// Reads the files of `sources` as the configuration says; `advice` is for files that cannot be read.
    pub(super) fn read(config: &TrainingConfig, sources: &'a [DataSource], advice: &str) -> Result<Self> {
        let options = LoadOptions {
            instruction_key: config.instruction_key.clone(),
            output_key: config.output_key.clone(),
            hash_key: config.hash_key.clone(),
            on_bad_record: config.on_bad_record,
        };
        let survey = read(sources, &options, |_, _| Ok(())).map_err(|error| match error.hint_text() {
            None => error.hint(advice),
            Some(_) => error,
        })?;
        survey.log();
        Ok(Self { sources, options, survey })
    }

    pub(super) fn kinds(&self) -> &Kinds {
        &self.survey.kinds
    }

    /// What the files gave, and what they are.
    pub(super) fn survey(&self) -> &Survey {
        &self.survey
    }

    /// The samples, from the cache of tokens where they are in it.
    pub(super) fn samples(
        &self,
        config: &TrainingConfig,
        tokenizer: Option<&Tokenizer>,
        options: &SampleOptions,
    ) -> Result<SampleSet> {
        Making { data: self, tokenizer, options }.samples(&config.token_cache)
    }

    /// Reads the files again and gives their records to `builder`.
    ///
    /// # Errors
    /// Files that changed meanwhile, and what the builder refuses.
    pub(super) fn tokenise(&self, builder: &mut SampleBuilder<'_>) -> Result<()> {
        let again = read(self.sources, &self.options, |source, records| builder.add(source, &records))?;
        let changed = self.survey.files.iter().zip(&again.files).find(|(before, now)| before != now);
        match changed {
            None => Ok(()),
            Some((file, _)) => Err(Error::data("the file changed while it was read")
                .at(&*file.file)
                .hint("start again when nothing writes into it")),
        }
    }
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
        samples.len(),
        samples.token_count(),
        samples.labelled_count(),
        hashes.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Options;

    #[test]
    fn fault_40_data_that_change_while_they_are_read_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        std::fs::write(&path, "{\"input_ids\": [5, 6]}\n").unwrap();
        let config = TrainingConfig::resolve(&Options::default()).unwrap();
        let sources = [DataSource::new(&path)];
        let data = TextData::read(&config, &sources, "").unwrap();
        let options = SampleOptions::counting(512);
        let tokenise = || {
            let mut builder = SampleBuilder::new(data.kinds(), None, &options)?.of_sources(&sources);
            data.tokenise(&mut builder)
        };
        tokenise().unwrap();
        std::fs::write(&path, "{\"input_ids\": [5, 7]}\n").unwrap();
        let error = tokenise().unwrap_err();
        assert_eq!(error.kind().exit_code(), 3);
        assert!(error.to_string().contains("train.jsonl: the file changed while it was read"), "{error}");
    }
}
