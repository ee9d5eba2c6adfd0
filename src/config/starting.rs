//! A configuration to start from: what was chosen, and every other key as a comment with its default.

use clap::CommandFactory;
use serde_json::{Map, Value, json};

use super::options::Keys;
use super::{Options, TrainingConfig};
use crate::error::Result;

/// A value that was chosen for a key, and why.
pub struct Choice {
    /// The key.
    pub key: &'static str,
    /// Its value.
    pub value: Value,
    /// Why, in words; nothing where it needs none.
    pub reason: String,
}

impl Choice {
    /// A value with its reason.
    pub fn new(key: &'static str, value: Value, reason: impl Into<String>) -> Self {
        Self { key, value, reason: reason.into() }
    }
}

/// The text of a configuration file with these choices. The parser takes its comments; strict JSON readers do not.
///
/// # Errors
/// A choice that is no valid configuration.
pub fn starting_configuration(choices: &[Choice]) -> Result<String> {
    let chosen: Map<String, Value> =
        choices.iter().map(|choice| (choice.key.to_string(), choice.value.clone())).collect();
    let defaults = json!(TrainingConfig::resolve(&Options::default())?);
    let mut text = String::from(
        "// fastlora training configuration; run it with `fastlora train FILE`.\n\
         // Keys behind // have their defaults. `fastlora schema` prints what editors need to complete and check.\n{\n",
    );
    for argument in Keys::command().get_arguments() {
        let key = argument.get_id().as_str();
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        text += &format!("  // {}\n", help.replace('\n', " "));
        let possible = argument.get_possible_values();
        if possible.len() > 1 {
            let names: Vec<&str> = possible.iter().map(|value| value.get_name()).collect();
            text += &format!("  // One of {}.\n", names.join(", "));
        }
        match chosen.get(key) {
            Some(value) => {
                let reason = choices.iter().find(|choice| choice.key == key).map(|choice| &*choice.reason);
                if let Some(reason) = reason.filter(|reason| !reason.is_empty()) {
                    text += &format!("  // Here: {reason}.\n");
                }
                text += &format!("  {}: {value},\n\n", json!(key));
            }
            None => text += &format!("  // {}: {},\n\n", json!(key), defaults[key]),
        }
    }
    Ok(text.trim_end().to_string() + "\n}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_starting_configuration_is_read_back_as_it_was_chosen() {
        let choices = [
            Choice::new("model_name", json!("models/\"mine\" // here"), ""),
            Choice::new("max_length", json!(192), "the longest of 7 samples has 180 tokens"),
            Choice::new("val_data", Value::Null, "none was given"),
        ];
        let text = starting_configuration(&choices).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &text).unwrap();
        let read = TrainingConfig::resolve(&Options::from_file(file.path()).unwrap()).unwrap();
        let expected = TrainingConfig {
            model_name: "models/\"mine\" // here".into(),
            max_length: 192,
            val_data: None,
            ..TrainingConfig::resolve(&Options::default()).unwrap()
        };
        assert_eq!(read, expected);
        assert!(
            text.contains("  // Here: the longest of 7 samples has 180 tokens.\n  \"max_length\": 192,"),
            "{text}"
        );

        // With every // in front of a key taken away it says the same: the comments tell the defaults.
        let opened: String = text.lines().map(|line| line.replacen("  // \"", "  \"", 1) + "\n").collect();
        std::fs::write(file.path(), opened).unwrap();
        let read = TrainingConfig::resolve(&Options::from_file(file.path()).unwrap()).unwrap();
        assert_eq!(read, expected);
    }
}
