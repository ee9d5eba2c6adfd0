//! A page about a run: one file that needs no network, for any browser, light or dark as the reader's system is.

mod chart;

use std::path::Path;

use serde_json::{Map, Value};

use self::chart::{Series, chart};
use super::{FAILURE, History, PAGE, PROVENANCE, RESOLVED_CONFIG, SAMPLES};
use crate::checkpoint::atomic::replace_file;
use crate::checkpoint::run::read_json;
use crate::error::{Error, Result, shorten};

const STYLE: &str = include_str!("html/style.css");
/// Sampled steps that are shown, the newest.
const SHOWN_STEPS: usize = 20;
/// Characters of a text that are shown.
const SHOWN_CHARACTERS: usize = 4000;

/// Writes `report.html` into an output folder, from the files in it. `environment` says what computed, in pairs of name
/// and value.
///
/// # Errors
/// A file of the run that cannot be read or is damaged, or a page that cannot be written.
pub fn write_page(folder: &Path, environment: &[(&str, String)]) -> Result<()> {
    let history = History::read(folder)?;
    let config = match read_json(&folder.join(RESOLVED_CONFIG))? {
        Value::Object(config) => config,
        _ => Map::new(),
    };
    let provenance = match folder.join(PROVENANCE).exists() {
        true => read_json(&folder.join(PROVENANCE))?,
        false => Value::Null,
    };
    let page = Page { name: folder.display().to_string(), history, config, samples: read_samples(folder)? };
    let mut environment: Vec<(&str, String)> = environment.to_vec();
    if folder.join(FAILURE).exists() {
        let message = read_json(&folder.join(FAILURE))?["error"]["message"].as_str().map(str::to_string);
        environment.push(("ended by an error", message.unwrap_or_else(|| "not known".into())));
    }
    if let Some(files) = provenance["base_sha256"].as_object() {
        let digests =
            files.iter().map(|(file, digest)| format!("{file}: {}", digest.as_str().unwrap_or("?")));
        environment.push(("base model's SHA-256", digests.collect::<Vec<_>>().join("\n")));
    }
    if let Some(digest) = provenance["data_sha256"]["train"].as_str() {
        environment.push(("training samples' SHA-256", digest.to_string()));
    }
    replace_file(&folder.join(PAGE), page.render(&environment).as_bytes())
}

/// The newest lines of `samples.jsonl`; one that is cut short is none.
fn read_samples(folder: &Path) -> Result<Vec<Value>> {
    let path = folder.join(SAMPLES);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).map_err(|source| Error::file("read", &path, source))?;
    let mut newest: Vec<Value> =
        text.lines().rev().filter_map(|line| serde_json::from_str(line).ok()).take(SHOWN_STEPS).collect();
    newest.reverse();
    Ok(newest)
}

/// Text for an element or an attribute; what would be invisible or is no character of a page is made visible.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            '\n' | '\t' => escaped.push(character),
            hidden if hidden.is_control() || u32::from(hidden) & 0xfffe == 0xfffe => {
                escaped.extend(hidden.escape_default());
            }
            other => escaped.push(other),
        }
    }
    escaped
}

struct Page {
    name: String,
    history: History,
    config: Map<String, Value>,
    samples: Vec<Value>,
}

impl Page {
    fn render(&self, environment: &[(&str, String)]) -> String {
        let model = self.config.get("model_name").and_then(Value::as_str).unwrap_or_default();
        let rows: Vec<(String, String)> =
            self.config.iter().map(|(key, value)| (key.clone(), plain(value))).collect();
        let environment: Vec<(String, String)> =
            environment.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <title>{name} – fastlora</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
             <h1>{name}</h1>\n<p>LoRA on {model}</p>\n{tiles}<h2>Curves</h2>\n<div class=\"charts\">\n{curves}</div>\n\
             {hashes}{samples}<h2>Configuration</h2>\n{configuration}<h2>Environment</h2>\n{environment}\
             </main>\n</body>\n</html>\n",
            name = escape(&self.name),
            model = escape(model),
            tiles = self.tiles(),
            curves = self.curves(),
            hashes = self.hashes(),
            samples = self.samples(),
            configuration = pairs(&rows),
            environment = pairs(&environment),
        )
    }

    fn tiles(&self) -> String {
        let history = &self.history;
        let losses = history.training_losses();
        let number = |value: Option<f64>| value.map_or("–".to_string(), |value| format!("{value:.4}"));
        let mut tiles = vec![
            ("steps", history.steps.last().map_or(0, |step| step.step).to_string()),
            ("first training loss", number(losses.first().map(|point| point.1))),
            ("last training loss", number(losses.last().map(|point| point.1))),
        ];
        if let Some((step, loss)) = history.best_validation() {
            tiles.push(("best validation loss", format!("{loss:.4}")));
            tiles.push(("at step", step.to_string()));
        }
        if let Some(speed) = history.tokens_per_second() {
            tiles.push(("tokens/s", format!("{speed:.0}")));
        }
        let tile =
            |(name, value): (&str, String)| format!("<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
        format!("<dl class=\"tiles\">{}</dl>\n", tiles.into_iter().map(tile).collect::<String>())
    }

    fn curves(&self) -> String {
        let history = &self.history;
        let steps = |value: fn(&super::StepFigures) -> Option<f64>| -> Vec<(f64, f64)> {
            history.steps.iter().filter_map(|step| Some((step.step as f64, value(step)?))).collect()
        };
        let mut losses = vec![Series { name: "training", points: history.training_losses() }];
        if !history.validations.is_empty() {
            losses.push(Series { name: "validation", points: history.validation_losses() });
        }
        let mut text = chart("Loss", true, &losses);
        let hashes = history.hashes();
        if hashes.len() > 1 {
            let series: Vec<Series<'_>> =
                hashes.iter().map(|hash| Series { name: hash, points: history.losses_of(hash) }).collect();
            text += &chart("Validation loss by hash", true, &series);
        }
        let speed =
            |step: &super::StepFigures| (step.seconds > 0.0).then(|| step.tokens as f64 / step.seconds);
        for (title, points) in [
            ("Learning rate", steps(|step| Some(step.learning_rate))),
            ("Gradient norm", steps(|step| step.grad_norm)),
            ("Tokens/s", steps(speed)),
        ] {
            text += &chart(title, false, &[Series { name: title, points }]);
        }
        text
    }

    fn hashes(&self) -> String {
        let hashes = self.history.hashes();
        if hashes.is_empty() {
            return String::new();
        }
        let row = |name: &str, losses: &[(f64, f64)]| {
            let best = losses.iter().map(|point| point.1).reduce(f64::min);
            let (first, last) = (losses.first().map(|point| point.1), losses.last().map(|point| point.1));
            let cell = |value: Option<f64>, digits: usize| {
                let text = value.map_or("–".to_string(), |value| format!("{value:.digits$}"));
                format!("<td class=\"number\">{text}</td>")
            };
            let values = [cell(first, 4), cell(best, 4), cell(last, 4), cell(last.map(f64::exp), 2)].concat();
            format!("<tr><td>{}</td>{values}</tr>\n", escape(name))
        };
        let mut rows: String = hashes.iter().map(|hash| row(hash, &self.history.losses_of(hash))).collect();
        rows += &row("all", &self.history.validation_losses());
        let header: String = ["first loss", "best loss", "last loss", "last perplexity"]
            .map(|name| format!("<th class=\"number\">{name}</th>"))
            .concat();
        format!(
            "<h2>Validation by hash</h2>\n<div class=\"scroll\"><table>\n<tr><th>hash</th>{header}</tr>\n{rows}</table></div>\n"
        )
    }

    fn samples(&self) -> String {
        if self.samples.is_empty() {
            return String::new();
        }
        let mut text = String::from("<h2>Samples</h2>\n");
        for (number, line) in self.samples.iter().enumerate() {
            let open = if number + 1 == self.samples.len() { " open=\"open\"" } else { "" };
            let step = plain(&line["step"]);
            text += &format!(
                "<details{open}><summary>after step {}</summary><div class=\"scroll\"><table>\n\
                 <tr><th>hash</th><th>instruction</th><th>expected</th><th>answer</th></tr>\n",
                escape(&step)
            );
            for sample in line["samples"].as_array().into_iter().flatten() {
                let cell = |key: &str| {
                    let value = sample[key].as_str().unwrap_or("–");
                    format!("<td>{}</td>", escape(&shorten(value, SHOWN_CHARACTERS)))
                };
                let cells = ["hash", "instruction", "expected", "answer"].map(cell).concat();
                text += &format!("<tr>{cells}</tr>\n");
            }
            text += "</table></div></details>\n";
        }
        text
    }
}

/// A table of names and values.
fn pairs(rows: &[(String, String)]) -> String {
    let row = |(name, value): &(String, String)| {
        format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), escape(&shorten(value, SHOWN_CHARACTERS)))
    };
    format!(
        "<div class=\"scroll\"><table class=\"pairs\">\n{}</table></div>\n",
        rows.iter().map(row).collect::<String>()
    )
}

/// A value as a reader wants it: strings without quotes, `–` for none.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "–".into(),
        other => other.to_string(),
    }
}
