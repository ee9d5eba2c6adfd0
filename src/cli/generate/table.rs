//! The answers to test cases as a table.

use comfy_table::{ContentArrangement, Table, presets};

use super::super::output::{for_terminal, on_one_line};
use super::{Answer, Prepared};

/// Columns of the table in a file or a pipe.
const WIDTH_WITHOUT_TERMINAL: u16 = 120;

/// One row a case; below, how many answers are exactly the expected ones.
pub(super) fn render(
    prepared: &[Prepared],
    answers: &[Answer],
    base_answers: Option<&[Answer]>,
    has_adapter: bool,
) -> String {
    let has_expected = prepared.iter().any(|prepared| prepared.case.expected.is_some());
    let mut header = vec!["hash", "instruction"];
    if has_expected {
        header.push("expected");
    }
    header.push(if has_adapter { "with adapter" } else { "answer" });
    if base_answers.is_some() {
        header.push("without");
    }
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header);
    if table.width().is_none() {
        table.set_width(WIDTH_WITHOUT_TERMINAL);
    }
    for (place, (Prepared { case, hash, .. }, answer)) in prepared.iter().zip(answers).enumerate() {
        let mut row = vec![hash.as_deref().unwrap_or("–"), &case.instruction];
        if has_expected {
            row.push(case.expected.as_deref().unwrap_or_default());
        }
        row.push(&answer.text);
        if let Some(base_answers) = base_answers {
            row.push(&base_answers[place].text);
        }
        table.add_row(row.into_iter().map(|cell| for_terminal(&on_one_line(cell))));
    }
    let mut text = table.to_string();
    if has_expected {
        let expected = || prepared.iter().filter_map(|prepared| prepared.case.expected.as_deref());
        let exact = |answers: &[Answer]| {
            let hits = prepared.iter().zip(answers).filter(|(prepared, answer)| {
                prepared.case.expected.as_deref().is_some_and(|expected| answer.is_exact(expected))
            });
            hits.count()
        };
        text += &format!("\nexact answers: {} of {}", exact(answers), expected().count());
        if let Some(base_answers) = base_answers {
            text += &format!(" with the adapter, {} without", exact(base_answers));
        }
    }
    text
}
