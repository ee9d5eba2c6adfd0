//! Which linear layers get an adapter.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which linear layers carry an adapter, as PEFT's `target_modules` says it.
///
/// Two lists of the same names are equal in any order: PEFT saves its set as it comes.
#[derive(Clone, Debug, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TargetModules {
    /// A module is a target when its full name equals an entry or ends with `.entry`.
    Names(Vec<String>),
    /// A regular expression that must match the module's full name; `all-linear` is every linear but the head.
    Pattern(String),
}

impl TargetModules {
    /// PEFT's word for every linear layer but the head.
    pub const ALL_LINEAR: &str = "all-linear";

    /// Refuses an empty list and a broken regular expression, before any model is known.
    ///
    /// # Errors
    /// A config error.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Names(entries) if entries.is_empty() => Err(Error::config("the list of modules is empty")
                .hint("name linears, for example [\"q_proj\", \"v_proj\"], or \"all-linear\"")),
            Self::Names(_) => Ok(()),
            Self::Pattern(pattern) if pattern == Self::ALL_LINEAR => Ok(()),
            Self::Pattern(pattern) => full_match(pattern).map(drop),
        }
    }

    /// For each of `modules` (full names of the linear layers but the head, `model.layers.0.self_attn.q_proj`),
    /// whether it is a target.
    ///
    /// # Errors
    /// An entry or expression that matches nothing, with the modules there are; a broken expression.
    ///
    /// ```
    /// use fastlora::config::TargetModules;
    ///
    /// let modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"];
    /// let targets = TargetModules::Names(vec!["q_proj".into()]);
    /// assert_eq!(targets.select(&modules)?, [true, false]);
    /// let targets = TargetModules::Pattern(r".*\.(q|up)_proj".into());
    /// assert_eq!(targets.select(&modules)?, [true, true]);
    /// # Ok::<(), fastlora::error::Error>(())
    /// ```
    pub fn select<Name: AsRef<str>>(&self, modules: &[Name]) -> Result<Vec<bool>> {
        let is_target: Vec<bool> = match self {
            Self::Names(entries) => {
                for entry in entries {
                    if !modules.iter().any(|module| names_module(entry, module.as_ref())) {
                        return Err(no_match(&format!("entry `{entry}`"), modules));
                    }
                }
                let named = |module: &Name| entries.iter().any(|entry| names_module(entry, module.as_ref()));
                modules.iter().map(named).collect()
            }
            Self::Pattern(pattern) if pattern == Self::ALL_LINEAR => vec![true; modules.len()],
            Self::Pattern(pattern) => {
                let expression = full_match(pattern)?;
                modules
                    .iter()
                    .map(|module| {
                        expression.is_match(module.as_ref()).map_err(|error| unusable(pattern, error))
                    })
                    .collect::<Result<_>>()?
            }
        };
        if !is_target.contains(&true) {
            return Err(no_match(&self.to_string(), modules));
        }
        Ok(is_target)
    }
}

impl PartialEq for TargetModules {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Names(names), Self::Names(others)) => {
                names.iter().collect::<BTreeSet<_>>() == others.iter().collect::<BTreeSet<_>>()
            }
            (Self::Pattern(pattern), Self::Pattern(other)) => pattern == other,
            _ => false,
        }
    }
}

impl std::fmt::Display for TargetModules {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Names(entries) => write!(formatter, "{entries:?}"),
            Self::Pattern(pattern) => write!(formatter, "`{pattern}`"),
        }
    }
}

/// The expression that matches whole names only.
fn full_match(pattern: &str) -> Result<fancy_regex::Regex> {
    fancy_regex::Regex::new(&format!(r"\A(?:{pattern})\z")).map_err(|error| unusable(pattern, error))
}

fn unusable(pattern: &str, source: fancy_regex::Error) -> Error {
    Error::config(format!("`target_modules`: `{pattern}` is not a usable regular expression"))
        .caused_by(source)
}

fn names_module(entry: &str, module: &str) -> bool {
    match module.strip_suffix(entry) {
        Some(prefix) => !entry.is_empty() && (prefix.is_empty() || prefix.ends_with('.')),
        None => false,
    }
}

fn no_match<Name: AsRef<str>>(what: &str, modules: &[Name]) -> Error {
    let kinds: BTreeSet<&str> =
        modules.iter().map(|module| module.as_ref().rsplit('.').next().unwrap_or_default()).collect();
    let kinds: Vec<&str> = kinds.into_iter().collect();
    Error::config(format!("`target_modules`: {what} matches no linear layer; there are {}", kinds.join(", ")))
        .hint("name some of these, give a regular expression for the whole name, or \"all-linear\"")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn fault_45_a_target_that_matches_nothing_lists_the_modules() {
        let modules = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.0.mlp.up_proj",
        ];
        for targets in [
            TargetModules::Names(vec!["up_proj".into(), "q_prj".into()]),
            TargetModules::Names(vec!["proj".into()]),
            TargetModules::Names(vec!["".into()]),
            TargetModules::Names(vec![]),
            TargetModules::Pattern("q_proj".into()),
        ] {
            let error = targets.select(&modules).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.message().contains("there are q_proj, up_proj"), "{error}");
        }
        let broken = TargetModules::Pattern("(".into()).select(&modules).unwrap_err();
        assert!(broken.message().contains("regular expression"), "{broken}");
        for unusable in [TargetModules::Pattern("(".into()), TargetModules::Names(vec![])] {
            assert_eq!(unusable.validate().unwrap_err().kind(), ErrorKind::Config, "{unusable}");
        }
    }

    #[test]
    fn lists_are_equal_in_any_order() {
        let names =
            |names: &[&str]| TargetModules::Names(names.iter().map(|name| name.to_string()).collect());
        assert_eq!(names(&["v_proj", "q_proj"]), names(&["q_proj", "v_proj"]));
        assert_ne!(names(&["q_proj"]), names(&["q_proj", "v_proj"]));
        assert_ne!(names(&["q_proj"]), TargetModules::Pattern("q_proj".into()));
    }

    #[test]
    fn targets_are_chosen_as_peft_chooses_them() {
        let modules = [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.0.mlp.up_proj",
        ];
        for (targets, expected) in [
            (TargetModules::Names(vec!["self_attn.q_proj".into()]), [true, true, false]),
            (TargetModules::Names(vec![modules[1].into()]), [false, true, false]),
            (TargetModules::Pattern(r".*layers\.1\..*|.*up_proj".into()), [false, true, true]),
            (TargetModules::Pattern("all-linear".into()), [true, true, true]),
        ] {
            assert_eq!(targets.select(&modules).unwrap(), expected, "{targets}");
        }
    }
}
