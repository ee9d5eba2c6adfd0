//! One entry of `train_data` or `val_data`: a path, or an object with a file's own settings.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// A data file and the settings that hold for it alone; what is absent comes from the configuration.
///
/// ```
/// use fastlora::config::DataSource;
///
/// let plain: DataSource = serde_json::from_str(r#""data/train.json""#)?;
/// let chosen: DataSource = serde_json::from_str(r#"{"path": "faq.jsonl", "output_key": "reply", "hash": "faq"}"#)?;
/// assert_eq!(plain, DataSource::new("data/train.json"));
/// assert_eq!(chosen.hash.as_deref(), Some("faq"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataSource {
    /// A `.json`, `.jsonl` or `.ndjson` file, or one of these as `.gz` or `.zst`.
    pub path: PathBuf,
    /// Field that holds the instruction, instead of the search.
    pub instruction_key: Option<String>,
    /// Field that holds the output, instead of the search.
    pub output_key: Option<String>,
    /// Field that holds the hash, instead of the search.
    pub hash_key: Option<String>,
    /// The hash of every record of this file, whatever its fields say.
    pub hash: Option<String>,
    /// How often each record of this file is seen in an epoch, in the mean; without it, once.
    pub weight: Option<f64>,
}

impl DataSource {
    /// A file without settings of its own.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }

    /// Refuses a `weight` that is not above 0 and at most 1000.
    pub fn validate(&self) -> Result<()> {
        match self.weight {
            Some(weight) if !(weight > 0.0 && weight <= 1000.0) => {
                Err(Error::config(format!("`weight` is {weight}"))
                    .at(self.path.display().to_string())
                    .hint("it must be above 0 and at most 1000: how often each record is seen in an epoch"))
            }
            _ => Ok(()),
        }
    }

    fn is_plain(&self) -> bool {
        *self == Self::new(&self.path)
    }
}

impl FromStr for DataSource {
    type Err = std::convert::Infallible;

    fn from_str(path: &str) -> Result<Self, Self::Err> {
        Ok(Self::new(path))
    }
}

/// The object form, with the same fields.
#[derive(Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "DataFile")]
#[serde(deny_unknown_fields)]
struct Settings {
    path: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    instruction_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    output_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weight: Option<f64>,
}

impl From<Settings> for DataSource {
    fn from(settings: Settings) -> Self {
        let Settings { path, instruction_key, output_key, hash_key, hash, weight } = settings;
        Self { path, instruction_key, output_key, hash_key, hash, weight }
    }
}

impl From<DataSource> for Settings {
    fn from(source: DataSource) -> Self {
        let DataSource { path, instruction_key, output_key, hash_key, hash, weight } = source;
        Self { path, instruction_key, output_key, hash_key, hash, weight }
    }
}

impl JsonSchema for DataSource {
    fn schema_name() -> Cow<'static, str> {
        "DataSource".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let settings = generator.subschema_for::<Settings>();
        json_schema!({ "anyOf": [{ "type": "string", "description": "A data file." }, settings] })
    }
}

impl<'de> Deserialize<'de> for DataSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DataSourceVisitor)
    }
}

/// Not an untagged enum: its errors would not name the unknown key.
struct DataSourceVisitor;

impl<'de> Visitor<'de> for DataSourceVisitor {
    type Value = DataSource;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a data path, or an object with `path`")
    }

    fn visit_str<E>(self, path: &str) -> Result<DataSource, E> {
        Ok(DataSource::new(path))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DataSource, A::Error> {
        Settings::deserialize(MapAccessDeserializer::new(map)).map(DataSource::from)
    }
}

impl Serialize for DataSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.is_plain() {
            self.path.serialize(serializer)
        } else {
            Settings::from(self.clone()).serialize(serializer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn both_forms_are_read_and_written_back() {
        for text in [r#""a.json""#, r#"{"path":"a.json","instruction_key":"q","hash":"faq","weight":1.0}"#] {
            let source: DataSource = serde_json::from_str(text).unwrap();
            source.validate().unwrap();
            assert_eq!(serde_json::to_string(&source).unwrap(), text);
        }
    }

    #[test]
    fn fault_43_an_unknown_key_of_a_data_source_is_named() {
        let error = serde_json::from_str::<DataSource>(r#"{"path": "a.json", "wieght": 2}"#).unwrap_err();
        assert!(error.to_string().contains("wieght"), "{error}");
        assert!(serde_json::from_str::<DataSource>("3").is_err());
        assert!(serde_json::from_str::<DataSource>(r#"{"hash": "x"}"#).is_err());
    }

    #[test]
    fn fault_44_a_weight_that_is_none_is_refused() {
        let weighted = |weight| DataSource { weight: Some(weight), ..DataSource::new("a.json") };
        for weight in [2.0, 0.5, 1000.0] {
            weighted(weight).validate().unwrap();
        }
        for weight in [0.0, -1.0, 1e6, f64::NAN, f64::INFINITY] {
            let source = DataSource { weight: Some(weight), ..DataSource::new("a.json") };
            let error = source.validate().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("weight"), "{error}");
        }
    }
}
