//! Which chat template: the model's own, one of several that it has, a file, or ChatML.

use std::fs;
use std::path::{Path, PathBuf};

use chrono::NaiveDate;
use serde_json::{Map, Value};

use super::super::json::read_optional;
use super::template::ChatTemplate;
use crate::error::{Error, Result};

/// The one template that is built in, for base models without a template of their own.
const CHATML: &str = "\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}";

/// Which template is meant, and the day that it sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TemplateChoice {
    /// The name of one of the model's templates, a file, or `chatml`; none: the model's own.
    pub name: Option<String>,
    /// What `strftime_now` tells; none: today.
    pub date: Option<NaiveDate>,
}

/// A template by name, where it stands and its text.
struct Candidate {
    name: String,
    place: String,
    source: String,
}

impl TemplateChoice {
    /// Finds and compiles the template. `folders` are searched in order for the model's own: the first that has any
    /// decides (an adapter's folder before its base's).
    ///
    /// A folder's templates are `chat_template.jinja` and `additional_chat_templates/NAME.jinja`, or else
    /// `chat_template` in `tokenizer_config.json`, a string or a list of `{name, template}`.
    ///
    /// # Errors
    /// Model errors: no template, or none of that name (fault 25, with the choices there are); one that does not
    /// compile; broken files.
    pub fn open(&self, folders: &[&Path]) -> Result<ChatTemplate> {
        let mut candidates = Vec::new();
        for folder in folders {
            candidates = candidates_in(folder)?;
            if !candidates.is_empty() {
                break;
            }
        }
        let chosen = self.choose(candidates, folders)?;
        ChatTemplate::new(&chosen.source, &chosen.place, special_tokens(folders)?, self.date)
    }

    fn choose(&self, mut candidates: Vec<Candidate>, folders: &[&Path]) -> Result<Candidate> {
        let mut choices: Vec<String> = candidates.iter().map(|found| format!("`{}`", found.name)).collect();
        choices.extend(["a .jinja file".to_string(), "`chatml`".to_string()]);
        let choices = format!("set chat_template to one of: {}", choices.join(", "));
        let place = || folders.last().map_or(String::new(), |folder| folder.display().to_string());
        let Some(name) = &self.name else {
            let only = candidates.len() == 1;
            let default = candidates.iter().position(|found| only || found.name == "default");
            return match default {
                Some(index) => Ok(candidates.swap_remove(index)),
                None if candidates.is_empty() => {
                    Err(Error::model("a conversation needs a chat template, and the model has none")
                        .at(place())
                        .hint(choices))
                }
                None => Err(Error::model("the model has several chat templates and none is its default")
                    .at(place())
                    .hint(choices)),
            };
        };
        if let Some(index) = candidates.iter().position(|found| found.name == *name) {
            return Ok(candidates.swap_remove(index));
        }
        let path = Path::new(name);
        if path.is_file() {
            return Ok(Candidate { name: name.clone(), place: name.clone(), source: read(path)? });
        }
        if name == "chatml" {
            return Ok(Candidate { name: name.clone(), place: name.clone(), source: CHATML.into() });
        }
        Err(Error::model("there is no such chat template").at(name.clone()).hint(choices))
    }
}

fn candidates_in(folder: &Path) -> Result<Vec<Candidate>> {
    let mut candidates = Vec::new();
    let mut add = |name: &str, path: PathBuf| -> Result<()> {
        let place = path.display().to_string();
        candidates.push(Candidate { name: name.to_string(), place, source: read(&path)? });
        Ok(())
    };
    let own = folder.join("chat_template.jinja");
    if own.is_file() {
        add("default", own)?;
    }
    let additional = folder.join("additional_chat_templates");
    if additional.is_dir() {
        let entries = fs::read_dir(&additional).map_err(|error| Error::file("read", &additional, error))?;
        let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths {
            if let (Some("jinja"), Some(name)) = (
                path.extension().and_then(|end| end.to_str()),
                path.file_stem().and_then(|name| name.to_str()),
            ) {
                add(name, path.clone())?;
            }
        }
    }
    if !candidates.is_empty() {
        return Ok(candidates);
    }
    let path = folder.join("tokenizer_config.json");
    let Some(config) = read_optional(&path)? else { return Ok(candidates) };
    let place = format!("{} chat_template", path.display());
    let candidate = |name: &str, source: &str| Candidate {
        name: name.into(),
        place: place.clone(),
        source: source.into(),
    };
    Ok(match &config["chat_template"] {
        Value::Null => Vec::new(),
        Value::String(source) => vec![candidate("default", source)],
        Value::Array(list) => list
            .iter()
            .map(|entry| match (entry["name"].as_str(), entry["template"].as_str()) {
                (Some(name), Some(source)) => Ok(candidate(name, source)),
                _ => Err(Error::model("an entry without `name` and `template`").at(place.clone())),
            })
            .collect::<Result<_>>()?,
        _ => return Err(Error::model("neither a template nor a list of them").at(place)),
    })
}

/// `bos_token` and the like of the first folder that names any, as templates see them.
fn special_tokens(folders: &[&Path]) -> Result<Map<String, Value>> {
    let mut tokens = Map::new();
    for folder in folders {
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let Some(settings) = read_optional(&folder.join(file))? else { continue };
            for (name, token) in settings.as_object().into_iter().flatten() {
                let text = token.as_str().or_else(|| token["content"].as_str());
                if let Some(text) = text.filter(|_| name.ends_with("_token") && !tokens.contains_key(name)) {
                    tokens.insert(name.clone(), Value::String(text.to_string()));
                }
            }
        }
        if !tokens.is_empty() {
            break;
        }
    }
    Ok(tokens)
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|error| Error::file("read", path, error))?;
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        Error::model(format!("the chat template is not UTF-8 at byte {offset}"))
            .at(path.display().to_string())
    })
}
