//! What an adapter knows of hashes, from the `fastlora.json` beside it: so that a prompt reads as training's texts do.

use std::collections::BTreeSet;
use std::path::Path;

use clap::Args;
use tracing::warn;

use crate::config::HashTemplate;
use crate::data::{UNKNOWN_HASH, read_optional_json};
use crate::error::{Error, Result, escape_control};

/// Hashes that a warning lists.
const LISTED: usize = 20;

/// Argument that chooses how a hash is written.
#[derive(Clone, Debug, Args)]
pub(super) struct HashArgs {
    /// Text that carries the hash in a prompt, `[hash: {hash}] ` for one; without it, what the adapter has learned.
    #[arg(long, value_name = "TEXT")]
    pub hash_template: Option<HashTemplate>,
}

/// How an adapter was conditioned.
#[derive(Clone, Debug, Default)]
pub(super) struct Conditioning {
    /// What carries the hash in a text.
    pub template: HashTemplate,
    /// The hashes that stood in the training's texts; none where nobody knows.
    pub hashes: Option<BTreeSet<String>>,
    /// Whether texts without a hash were learned too.
    pub learned_without: bool,
}

impl Conditioning {
    /// Of an adapter folder; the default without one, or where it is another program's.
    ///
    /// # Errors
    /// A `fastlora.json` that cannot be read or is broken.
    pub(super) fn of(adapter: Option<&Path>) -> Result<Self> {
        let Some(folder) = adapter else { return Ok(Self::default()) };
        let path = folder.join("fastlora.json");
        let provenance = read_optional_json(&path)?.unwrap_or_default();
        let config = &provenance["config"];
        let template = match config["hash_template"].as_str() {
            Some(text) => text.parse().map_err(|error: Error| error.at(path.display().to_string()))?,
            None => HashTemplate::default(),
        };
        let names = provenance["hashes"].as_array();
        let hashes =
            names.map(|names| names.iter().filter_map(|name| name.as_str().map(Into::into)).collect());
        let learned_without = config["hash_dropout"].as_f64().is_some_and(|probability| probability > 0.0);
        Ok(Self { template, hashes, learned_without })
    }

    /// The same with the template of the command line, where one is given; a warning says where an adapter has learned
    /// another.
    pub(super) fn with(self, args: &HashArgs) -> Self {
        let Some(template) = &args.hash_template else { return self };
        if self.hashes.is_some() && *template != self.template {
            let [given, learned] = [template, &self.template].map(|text| escape_control(&text.to_string()));
            warn!("--hash-template is `{given}`, but the adapter has learned `{learned}`");
        }
        Self { template: template.clone(), ..self }
    }

    /// The text that carries a hash; empty for none.
    pub(super) fn prefix(&self, hash: Option<&str>) -> String {
        hash.map(|hash| self.template.prefix(hash)).unwrap_or_default()
    }

    /// The hash in the prompt of an instruction without one: that of records without one, unless those were never
    /// learned and texts without any hash were.
    pub(super) fn hash_of_prompt<'h>(&self, hash: Option<&'h str>) -> Option<&'h str> {
        let knows_unknown = self.hashes.as_ref().is_none_or(|hashes| hashes.contains(UNKNOWN_HASH));
        hash.or((knows_unknown || !self.learned_without).then_some(UNKNOWN_HASH))
    }

    /// Warns about each hash that the adapter was never trained on.
    pub(super) fn warn_about<'h>(&self, hashes: impl IntoIterator<Item = &'h str>) {
        let Some(trained) = &self.hashes else { return };
        let asked: BTreeSet<&str> = hashes.into_iter().collect();
        for hash in asked.into_iter().filter(|hash| !trained.contains(*hash)) {
            let mut names: Vec<String> =
                trained.iter().take(LISTED).map(|name| format!("`{}`", escape_control(name))).collect();
            if trained.len() > LISTED {
                names.push(format!("and {} more", trained.len() - LISTED));
            }
            let known = if names.is_empty() { "none".into() } else { names.join(", ") };
            warn!("the adapter was never trained on the hash `{}`; it was on {known}", escape_control(hash));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_without_a_hash_is_one_that_was_learned() {
        let conditioning = |hashes: Option<&[&str]>, learned_without| Conditioning {
            hashes: hashes.map(|names| names.iter().map(|name| name.to_string()).collect()),
            learned_without,
            ..Conditioning::default()
        };
        for (hashes, learned_without, expected) in [
            (None, false, Some("unknown")),
            (None, true, Some("unknown")),
            (Some(&["faq"][..]), false, Some("unknown")),
            (Some(&["faq", "unknown"]), true, Some("unknown")),
            (Some(&["faq"]), true, None),
        ] {
            let conditioning = conditioning(hashes, learned_without);
            assert_eq!(conditioning.hash_of_prompt(None), expected, "{conditioning:?}");
            assert_eq!(conditioning.hash_of_prompt(Some("x")), Some("x"));
        }
    }
}
