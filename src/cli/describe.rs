//! What a person wants to see of data and memory before a run: samples with their loss mask, lengths, bytes.

use std::io::IsTerminal;

use serde_json::{Value, json};

use super::output::for_terminal;
use crate::error::{Result, escape_control};
use crate::tokens::{NO_LOSS, SampleSet, SampleView, Tokenizer, length_buckets};

/// Tokens of a sample that are shown from each end where it is too long.
const SHOWN_TOKENS: usize = 400;
/// Characters of the longest bar.
const BAR_WIDTH: usize = 40;

/// How text that is learned is told from text that is read only.
#[derive(Clone, Copy)]
enum Marks {
    /// Green, and the rest dim.
    Colour,
    /// Between ⟦ and ⟧.
    Brackets,
}

impl Marks {
    fn of_stdout() -> Self {
        let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if std::io::stdout().is_terminal() && !is_plain { Marks::Colour } else { Marks::Brackets }
    }

    fn mark(self, text: &str, is_learned: bool) -> String {
        match (self, is_learned) {
            (Marks::Colour, true) => format!("\u{1b}[32m{text}\u{1b}[0m"),
            (Marks::Colour, false) => format!("\u{1b}[2m{text}\u{1b}[0m"),
            (Marks::Brackets, true) => format!("⟦{text}⟧"),
            (Marks::Brackets, false) => text.to_string(),
        }
    }
}

/// Runs of tokens that are all learned or all not, as text; ids where there is no tokenizer.
fn spans(token_ids: &[u32], labels: &[i32], tokenizer: Option<&Tokenizer>) -> Result<Vec<(String, bool)>> {
    let is_learned: Vec<bool> =
        labels.iter().enumerate().map(|(place, &label)| place > 0 && label != NO_LOSS).collect();
    let mut spans = Vec::new();
    let mut start = 0;
    for part in is_learned.chunk_by(|one, other| one == other) {
        let ids = &token_ids[start..start + part.len()];
        start += part.len();
        let text = match tokenizer {
            Some(tokenizer) => tokenizer.decode_all(ids)?,
            None => ids.iter().map(|id| format!("{id} ")).collect(),
        };
        spans.push((text, part[0]));
    }
    Ok(spans)
}

/// The first `count` samples with their mask.
pub(super) fn samples_text(set: &SampleSet, tokenizer: Option<&Tokenizer>, count: usize) -> Result<String> {
    let marks = Marks::of_stdout();
    let mut text = match marks {
        Marks::Colour => "samples (what is learned is green):\n".to_string(),
        Marks::Brackets => "samples (what is learned stands between ⟦ and ⟧):\n".to_string(),
    };
    for sample in set.iter().take(count) {
        text += &format!(
            "--- {} · hash {} · {} tokens, {} learned\n",
            escape_control(&sample.origin().to_string()),
            escape_control(&set.hash_names[sample.hash()]),
            sample.token_ids.len(),
            sample.labelled_count()
        );
        let shown = sample.token_ids.len().min(SHOWN_TOKENS);
        for (part, is_learned) in spans(&sample.token_ids[..shown], &sample.labels[..shown], tokenizer)? {
            text += &marks.mark(&for_terminal(&part), is_learned);
        }
        text += if shown < sample.token_ids.len() { " …\n" } else { "\n" };
    }
    Ok(text)
}

/// The same as objects.
pub(super) fn samples_json(set: &SampleSet, tokenizer: Option<&Tokenizer>, count: usize) -> Result<Value> {
    let sample = |sample: SampleView<'_>| -> Result<Value> {
        let spans = spans(sample.token_ids, sample.labels, tokenizer)?;
        let spans: Vec<Value> =
            spans.iter().map(|(text, is_learned)| json!({ "text": text, "learned": is_learned })).collect();
        Ok(json!({
            "origin": sample.origin().to_string(),
            "hash": set.hash_names[sample.hash()],
            "tokens": sample.token_ids.len(),
            "learned": sample.labelled_count(),
            "spans": spans,
        }))
    };
    Ok(Value::Array(set.iter().take(count).map(sample).collect::<Result<_>>()?))
}

/// A histogram of lengths with bars.
pub(super) fn lengths_text(unit: &str, lengths: &[usize]) -> String {
    let buckets = length_buckets(lengths.iter().copied());
    let most = buckets.values().max().copied().unwrap_or(1);
    let mut text = format!("lengths in {unit}:\n");
    for (bound, count) in &buckets {
        let bar = "█".repeat((count * BAR_WIDTH).div_ceil(most));
        text += &format!("  ≤{bound:<7} {count:>8} {bar}\n");
    }
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let mean = lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64;
    text + &format!("  mean {mean:.1}, longest {longest}\n")
}

/// The same as an object.
pub(super) fn lengths_json(lengths: &[usize]) -> Value {
    let buckets = length_buckets(lengths.iter().copied());
    json!({
        "longest": lengths.iter().max(),
        "mean": lengths.iter().sum::<usize>() as f64 / lengths.len().max(1) as f64,
        "up_to": buckets.iter().map(|(bound, count)| (bound.to_string(), json!(count)))
            .collect::<serde_json::Map<_, _>>(),
    })
}

/// Bytes as a person reads them.
pub(super) fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Origin;
    use crate::tokens::Sample;

    #[test]
    fn the_first_label_is_never_learned() {
        let spans = spans(&[5, 6, 7, 8], &[5, NO_LOSS, 7, 8], None).unwrap();
        assert_eq!(spans, [("5 6 ".to_string(), false), ("7 8 ".to_string(), true)]);
    }

    #[test]
    fn bytes_read_naturally() {
        for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")] {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn fault_42_samples_cannot_drive_the_terminal() {
        let origin = Origin { file: "\u{7}.json".into(), line: 1 };
        let sample = Sample::new(vec![5, 6, 7, 8], vec![5, NO_LOSS, 7, 8], origin);
        let set = SampleSet::new([sample], vec!["\u{1b}[31m".into()]);
        let text = samples_text(&set, None, 1).unwrap();
        assert!(text.contains("\\u{1b}[31m") && text.contains("\\u{7}.json"), "{text}");
        assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'), "{text}");
    }
}
