//! The index of a sharded model, `model.safetensors.index.json`: which tensor is in which file.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{Error, Result, shorten};

/// The index's file name.
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Characters of a message that quotes a file.
pub(super) const LONGEST_MESSAGE: usize = 400;

/// `weight_map` of an index file: tensor → shard.
pub(super) fn read_index(path: &Path) -> Result<HashMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap,
    }
    let bytes = std::fs::read(path).map_err(|error| Error::file("read", path, error))?;
    let place = path.display().to_string();
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| {
        let message = format!("not a valid index of shards: {error}");
        Error::model(shorten(&message, LONGEST_MESSAGE)).at(&place)
    })?;
    match index.weight_map.0.is_empty() {
        true => Err(Error::model("`weight_map` is empty").at(place)),
        false => Ok(index.weight_map.0),
    }
}

/// An object of strings in which no key may come twice.
struct UniqueMap(HashMap<String, String>);

impl<'de> Deserialize<'de> for UniqueMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = UniqueMap;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensor names and shard files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = HashMap::new();
                while let Some((name, file)) = map.next_entry::<String, String>()? {
                    if let Some(earlier) = entries.insert(name.clone(), file) {
                        return Err(A::Error::custom(format!("`{name}` is there twice, first in {earlier}")));
                    }
                }
                Ok(UniqueMap(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// The files that the index names, each once, sorted.
pub(super) fn shard_names(weight_map: &HashMap<String, String>) -> Vec<&str> {
    let mut names: Vec<&str> = weight_map.values().map(String::as_str).collect();
    names.sort_unstable();
    names.dedup();
    names
}
