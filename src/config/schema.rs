//! The configuration's JSON Schema, from which editors complete and check.

use schemars::{Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::{DataSource, Options, TrainingConfig};
use crate::error::Result;

/// The schema of a configuration file: every key with its type, its description and its default.
///
/// ```
/// let schema = fastlora::config::schema()?;
/// assert_eq!(schema["properties"]["lora_r"]["default"], 8);
/// assert_eq!(schema["additionalProperties"], false);
/// # Ok::<(), fastlora::error::Error>(())
/// ```
///
/// # Errors
/// None: the defaults are a valid configuration.
pub fn schema() -> Result<Value> {
    let mut schema = schemars::schema_for!(Options).to_value();
    schema["title"] = json!("fastlora training configuration");
    // Every key has a default.
    schema["required"] = json!([]);
    let defaults = json!(TrainingConfig::resolve(&Options::default())?);
    let properties = schema["properties"].as_object_mut().into_iter().flatten();
    for (key, property) in properties {
        if let Some(object) = property.as_object_mut() {
            object.shift_remove("default");
            if let Some(default) = defaults.get(key) {
                object.insert("default".into(), default.clone());
            }
        }
    }
    Ok(schema)
}

/// One data source, or a list of them; null for none.
pub(super) fn sources(generator: &mut SchemaGenerator) -> Schema {
    let source = generator.subschema_for::<DataSource>();
    json_schema!({ "anyOf": [source, { "type": "array", "items": source }, { "type": "null" }] })
}

/// A text that holds `{hash}` once, and not at its end.
pub(super) fn hash_template(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": ["string", "null"], "pattern": "\\{hash\\}[\\s\\S]" })
}

/// Steps, minutes or hours, or never.
pub(super) fn save_every(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [
        { "type": "integer", "minimum": 1 },
        { "type": "string", "pattern": "^([1-9][0-9]*[mh]?|never)$" },
        { "type": "null" }
    ] })
}

/// PEFT's start, or PiSSA's.
pub(super) fn init_lora_weights(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "anyOf": [
        { "const": true },
        { "type": "string", "pattern": "^(true|pissa|pissa_niter_[0-9]+)$" },
        { "type": "null" }
    ] })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `value` obeys the keywords that the schema uses.
    fn obeys(value: &Value, schema: &Value, root: &Value) -> bool {
        if let Some(reference) = schema["$ref"].as_str() {
            return obeys(value, root.pointer(reference.trim_start_matches('#')).unwrap(), root);
        }
        let is_type = |name: &str| match name {
            "string" => value.is_string(),
            "integer" => value.is_u64(),
            "number" => value.is_number(),
            "boolean" => value.is_boolean(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            "null" => value.is_null(),
            other => panic!("{other}"),
        };
        let type_holds = match &schema["type"] {
            Value::Null => true,
            Value::String(name) => is_type(name),
            names => names.as_array().unwrap().iter().any(|name| is_type(name.as_str().unwrap())),
        };
        let any = |key: &str| {
            schema[key].as_array().is_none_or(|options| options.iter().any(|one| obeys(value, one, root)))
        };
        let named = schema["enum"].as_array().is_none_or(|names| names.contains(value));
        let is_constant = schema.get("const").is_none_or(|constant| constant == value);
        let items = value.as_array().into_iter().flatten().all(|item| match &schema["items"] {
            Value::Null => true,
            items => obeys(item, items, root),
        });
        let keys =
            value.as_object().into_iter().flatten().all(|(key, value)| match &schema["properties"][key] {
                Value::Null => schema["additionalProperties"] != json!(false),
                property => obeys(value, property, root),
            });
        let required = schema["required"].as_array().into_iter().flatten();
        let has_all = value
            .as_object()
            .is_none_or(|object| required.into_iter().all(|key| object.contains_key(key.as_str().unwrap())));
        type_holds && any("anyOf") && any("oneOf") && named && is_constant && items && keys && has_all
    }

    #[test]
    fn the_schema_knows_every_key_with_its_words_and_default() {
        let schema = schema().unwrap();
        let properties = schema["properties"].as_object().unwrap();
        let defaults = json!(TrainingConfig::resolve(&Options::default()).unwrap());
        for key in Options::keys() {
            let property = &properties[&key];
            assert!(property["description"].as_str().is_some_and(|text| text.len() > 5), "{key}: {property}");
            assert_eq!(property["default"], defaults[&key], "{key}");
        }
        assert_eq!(properties.len(), Options::keys().len() + 1, "every key and $schema");
    }

    #[test]
    fn the_schema_takes_what_the_parser_takes() {
        let schema = schema().unwrap();
        let defaults = json!(TrainingConfig::resolve(&Options::default()).unwrap());
        assert!(obeys(&defaults, &schema, &schema));
        for (text, is_right) in [
            (
                r#"{"$schema": "x", "lora_r": 16, "lora_target_modules": "all-linear", "val_data": null}"#,
                true,
            ),
            (
                r#"{"train_data": ["a.json", {"path": "b.json", "hash": "faq"}], "lora_target_modules": ["q_proj"]}"#,
                true,
            ),
            (
                r#"{"train_data": {"path": "b.json"}, "lr_scheduler": "cosine", "chat_date": "2026-01-31"}"#,
                true,
            ),
            (r#"{"rank_pattern": {"q_proj": 4}, "alpha_pattern": {}, "layers_to_transform": [0, 2]}"#, true),
            (r#"{"layers_to_transform": 2}"#, false),
            (r#"{"lora_rank": 16}"#, false),
            (r#"{"lora_r": "many"}"#, false),
            (r#"{"lora_r": -1.5}"#, false),
            (r#"{"overlong": "cut"}"#, false),
            (r#"{"train_data": [{"hash": "faq"}]}"#, false),
            (r#"{"train_data": {"path": "b.json", "hsah": "faq"}}"#, false),
            (r#"{"shuffle": 1}"#, false),
        ] {
            let value: Value = serde_json::from_str(text).unwrap();
            assert_eq!(obeys(&value, &schema, &schema), is_right, "schema: {text}");
            assert_eq!(serde_json::from_value::<Options>(value).is_ok(), is_right, "parser: {text}");
        }
    }
}
