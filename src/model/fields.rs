//! Typed access to the fields of a model's JSON files; every error names the file, the field and what was expected.

use serde_json::{Map, Value};

use crate::error::{Error, Result, shorten};

/// One JSON object with the place it came from. A field that is null counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    place: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of `value`, which must be an object.
    pub(crate) fn of(value: &'a Value, place: &'a str) -> Result<Self> {
        match value.as_object() {
            Some(object) => Ok(Self { object, place }),
            None => Err(Error::model(format!("found {}, expected a JSON object", brief(value))).at(place)),
        }
    }

    /// A model error at this object's place.
    pub(crate) fn error(&self, message: impl Into<String>) -> Error {
        Error::model(message).at(self.place)
    }

    /// Where the object came from.
    pub(crate) fn place(&self) -> &'a str {
        self.place
    }

    /// Whether the key is there at all, be it null.
    pub(crate) fn mentions(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The value, unless absent or null.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(key).map(|value| read(value).ok_or_else(|| self.wrong(key, value, expected))).transpose()
    }

    /// The error for a value of the wrong type or range.
    pub(crate) fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        self.error(format!("`{key}` is {}, expected {expected}", brief(value)))
    }

    /// A whole number in `1..=limit`.
    pub(crate) fn count(&self, key: &str, limit: u64) -> Result<Option<usize>> {
        self.typed(key, &format!("a whole number from 1 to {limit}"), |value| {
            value
                .as_u64()
                .filter(|count| (1..=limit).contains(count))
                .and_then(|count| usize::try_from(count).ok())
        })
    }

    /// A whole number in `1..=limit` that must be there.
    pub(crate) fn required_count(&self, key: &str, limit: u64) -> Result<usize> {
        self.count(key, limit)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a finite number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    /// A finite number above zero.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0", |value| {
            value.as_f64().filter(|number| number.is_finite() && *number > 0.0)
        })
    }

    /// A finite number above zero that must be there.
    pub(crate) fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// Token ids: one number or a list. Negative ids are old spellings of "none" and are dropped.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let listed = match value {
            Value::Array(ids) => ids.as_slice(),
            single => std::slice::from_ref(single),
        };
        let mut ids = Vec::with_capacity(listed.len());
        for id in listed {
            let number =
                id.as_i64().ok_or_else(|| self.wrong(key, value, "a token id or a list of token ids"))?;
            if number >= 0 {
                ids.push(u32::try_from(number).map_err(|_| self.wrong(key, value, "token ids below 2^32"))?);
            }
        }
        Ok(ids)
    }

    /// The error for an absent key.
    pub(crate) fn missing(&self, key: &str) -> Error {
        self.error(format!("`{key}` is missing"))
    }
}

/// A value in a message: shortened, so that a hostile file cannot flood the terminal.
fn brief(value: &Value) -> String {
    const SHOWN_CHARACTERS: usize = 60;
    shorten(&value.to_string(), SHOWN_CHARACTERS).into_owned()
}
