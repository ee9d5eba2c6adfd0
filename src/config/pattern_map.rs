//! Values by module, as PEFT's `rank_pattern` and `alpha_pattern` give them.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use fancy_regex::Regex;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};
use serde_json::json;

use crate::error::{Error, Result};

/// Values of modules whose full name matches a pattern, in the order in which the patterns are tried: the first that
/// matches counts. A pattern is a regular expression for the whole name, or for its end after a dot, so that `q_proj` and
/// `layers.0.self_attn.q_proj` are patterns as well as `.*\.[01]\..*`.
#[derive(Clone, Debug, PartialEq)]
pub struct PatternMap<T> {
    entries: Vec<(String, T)>,
}

impl<T> Default for PatternMap<T> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<T> PatternMap<T> {
    /// Whether no module has a value of its own.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Patterns with their values, in the order in which they are tried.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &T)> {
        self.entries.iter().map(|(pattern, value)| (pattern.as_str(), value))
    }

    /// The same patterns with other values.
    pub fn map<U>(&self, value: impl Fn(&T) -> U) -> PatternMap<U> {
        PatternMap {
            entries: self.entries().map(|(pattern, old)| (pattern.to_string(), value(old))).collect(),
        }
    }
}

impl<T: Copy> PatternMap<T> {
    /// Makes the patterns ready to be matched.
    ///
    /// # Errors
    /// A config error for a pattern that is no regular expression.
    ///
    /// ```
    /// use fastlora::config::PatternMap;
    ///
    /// let ranks: PatternMap<usize> = "layers.0.self_attn.q_proj=2,q_proj=4".parse()?;
    /// let ranks = ranks.compile()?;
    /// assert_eq!(ranks.value("model.layers.0.self_attn.q_proj")?, Some(2));
    /// assert_eq!(ranks.value("model.layers.1.self_attn.q_proj")?, Some(4));
    /// assert_eq!(ranks.value("model.layers.1.self_attn.v_proj")?, None);
    /// # Ok::<(), fastlora::error::Error>(())
    /// ```
    pub fn compile(&self) -> Result<CompiledPatterns<T>> {
        let compiled = |(pattern, value): (&str, &T)| {
            // PEFT's own expression, so that groups have its numbers.
            let expression =
                Regex::new(&format!(r"\A(.*\.)?({pattern})\z")).map_err(|error| unusable(pattern, error))?;
            Ok((pattern.to_string(), expression, *value))
        };
        Ok(CompiledPatterns { entries: self.entries().map(compiled).collect::<Result<_>>()? })
    }
}

/// A [`PatternMap`] that is ready to be matched.
#[derive(Clone, Debug)]
pub struct CompiledPatterns<T> {
    entries: Vec<(String, Regex, T)>,
}

impl<T: Copy> CompiledPatterns<T> {
    /// The value of the first pattern that `module`'s full name matches.
    ///
    /// # Errors
    /// An expression that takes too long.
    pub fn value(&self, module: &str) -> Result<Option<T>> {
        for (pattern, expression, value) in &self.entries {
            if expression.is_match(module).map_err(|error| unusable(pattern, error))? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// The first pattern that none of `modules` matches.
    ///
    /// # Errors
    /// An expression that takes too long.
    pub fn first_unmatched(&self, modules: &[&str]) -> Result<Option<&str>> {
        for (pattern, expression, _) in &self.entries {
            let mut found = false;
            for module in modules {
                found |= expression.is_match(module).map_err(|error| unusable(pattern, error))?;
            }
            if !found {
                return Ok(Some(pattern));
            }
        }
        Ok(None)
    }
}

fn unusable(pattern: &str, source: fancy_regex::Error) -> Error {
    Error::config(format!("`{pattern}` is not a usable regular expression")).caused_by(source)
}

/// `PATTERN=VALUE`, several with commas between: as flags give it.
impl<T: FromStr> FromStr for PatternMap<T> {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let entry = |part: &str| {
            let parsed = part
                .rsplit_once('=')
                .and_then(|(pattern, value)| Some((pattern.trim().to_string(), value.trim().parse().ok()?)));
            parsed.ok_or_else(|| {
                Error::config(format!("`{part}` is not PATTERN=NUMBER")).hint(
                    "a pattern with a comma goes into the file, or into --set KEY={\"PATTERN\": NUMBER}",
                )
            })
        };
        Ok(Self { entries: text.split(',').map(entry).collect::<Result<_>>()? })
    }
}

impl<T: Serialize> fmt::Display for PatternMap<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", json!(self))
    }
}

impl<T: Serialize> Serialize for PatternMap<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.entries())
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for PatternMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = PatternMap<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of patterns with a number each")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries: Vec<(String, T)> = Vec::new();
                while let Some((pattern, value)) = map.next_entry::<String, T>()? {
                    if entries.iter().any(|(known, _)| *known == pattern) {
                        return Err(M::Error::custom(format!("the pattern `{pattern}` stands twice")));
                    }
                    entries.push((pattern, value));
                }
                Ok(PatternMap { entries })
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for PatternMap<T> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        BTreeMap::<String, T>::schema_name()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        BTreeMap::<String, T>::json_schema(generator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(map: &str, module: &str) -> Option<usize> {
        serde_json::from_str::<PatternMap<usize>>(map).unwrap().compile().unwrap().value(module).unwrap()
    }

    /// What PEFT 0.21.2's `get_pattern_key` answers, asked for each of these.
    #[test]
    fn patterns_match_as_pefts_do() {
        let module = "model.layers.1.self_attn.q_proj";
        for (map, expected) in [
            (r#"{"q_proj": 1}"#, Some(1)),
            (r#"{"proj": 1}"#, None),
            (r#"{"self_attn": 1}"#, None),
            (r#"{"layers.1.self_attn.q_proj": 1}"#, Some(1)),
            (r#"{"^model.layers.1.self_attn.q_proj": 1}"#, Some(1)),
            (r#"{"^layers.1.self_attn.q_proj": 1}"#, None),
            (r#"{"ayers.1.self_attn.q_proj": 1}"#, None),
            (r#"{"model.layers.0.self_attn.q_proj": 1, "q_proj": 2}"#, Some(2)),
            (r#"{".*": 1, "q_proj": 2}"#, Some(1)),
            (r#"{"k_proj|q_proj": 1}"#, Some(1)),
            (r#"{"layers\\.[01]\\..*": 1}"#, Some(1)),
            (r#"{"self_attn.q_proj": 1}"#, Some(1)),
            (r#"{"self_attnXq_proj": 1}"#, None),
            (r#"{"": 1}"#, None),
            (r#"{"(?:q|v)_proj": 3}"#, Some(3)),
            ("{}", None),
        ] {
            assert_eq!(value(map, module), expected, "{map}");
        }
    }

    #[test]
    fn the_order_of_the_patterns_is_kept() {
        let text = r#"{"z":3,"a":1,"m":2}"#;
        let map: PatternMap<usize> = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&map).unwrap(), text);
        assert_eq!("z=3,a=1, m=2".parse::<PatternMap<usize>>().unwrap(), map);
        assert_ne!("a=1,z=3,m=2".parse::<PatternMap<usize>>().unwrap(), map);
    }

    #[test]
    fn broken_maps_are_refused() {
        for text in [r#"{"q": 1, "q": 2}"#, r#"{"q": "1"}"#, r#"{"q": -1}"#, "[]", "3"] {
            assert!(serde_json::from_str::<PatternMap<usize>>(text).is_err(), "{text}");
        }
        for text in ["q", "q=", "q=x", "", "q=1,"] {
            assert!(text.parse::<PatternMap<usize>>().is_err(), "{text}");
        }
        let broken: PatternMap<usize> = "q_proj=1,(=2".parse().unwrap();
        assert!(broken.compile().unwrap_err().message().contains("`(`"));
    }
}
