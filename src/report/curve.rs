//! The loss as a curve of characters.

use super::History;
use super::plot::{label, range, thinned};

/// Characters of the drawing, without the numbers beside it.
const COLUMNS: usize = 60;
const ROWS: usize = 10;
/// Dots of one character of Unicode's block "Braille Patterns" (U+2800): two by four.
const DOTS: (usize, usize) = (2, 4);
/// The bit of each dot, by column and row.
const BITS: [[u32; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];

/// Training and validation loss over the steps, in plain characters without colours; none for fewer than two steps.
///
/// ```
/// use fastlora::report::{History, StepFigures, loss_curve};
///
/// let step = |step| StepFigures {
///     step,
///     loss: Some(4.0 / step as f64),
///     grad_norm: Some(1.0),
///     learning_rate: 0.1,
///     tokens: 8,
///     seconds: 1.0,
/// };
/// let history = History { steps: (1..=50).map(step).collect(), ..History::default() };
/// let curve = loss_curve(&history).unwrap();
/// assert!(curve.lines().next().unwrap().trim_start().starts_with("4 "));
/// assert!(curve.contains("step 50"));
/// ```
pub fn loss_curve(history: &History) -> Option<String> {
    let (training, validation) = (history.training_losses(), history.validation_losses());
    let (first, last) = (training.first()?.0, training.last()?.0);
    if first == last {
        return None;
    }
    let losses = training.iter().chain(&validation).map(|point| point.1);
    let y = range(losses)?;
    let (width, height) = (COLUMNS * DOTS.0, ROWS * DOTS.1);
    let across =
        |x: f64| (((x - first) / (last - first) * (width - 1) as f64).round() as usize).min(width - 1);
    let down = |loss: f64| ((y.1 - loss) / (y.1 - y.0) * (height - 1) as f64).round() as usize;

    let mut cells = vec![[0u32; COLUMNS]; ROWS];
    let mut before: Option<(usize, usize)> = None;
    for part in thinned(&training, (first, last), width) {
        let (column, row) = (across(part.x), down(part.mean));
        // A line from the dot before, without gaps.
        let (from_column, from_row) = before.unwrap_or((column, row));
        let row_at = |at: usize| match column - from_column {
            0 => row as f64,
            wide => {
                from_row as f64 + (row as f64 - from_row as f64) * (at - from_column) as f64 / wide as f64
            }
        };
        for at in from_column..=column {
            let left = if at > from_column { row_at(at - 1) } else { from_row as f64 };
            let (one, other) = (left.round() as usize, row_at(at).round() as usize);
            for dot in one.min(other)..=one.max(other) {
                cells[dot / DOTS.1][at / DOTS.0] |= BITS[at % DOTS.0][dot % DOTS.1];
            }
        }
        before = Some((column, row));
    }
    let mut rows: Vec<Vec<char>> = cells
        .iter()
        .map(|row| row.iter().map(|bits| char::from_u32(0x2800 + bits).unwrap_or(' ')).collect())
        .collect();
    for (step, loss) in &validation {
        rows[down(*loss) / DOTS.1][across(step.clamp(first, last)) / DOTS.0] = '●';
    }

    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let beside = match number {
            0 => label(y.1),
            _ if number == ROWS - 1 => label(y.0),
            _ if number == ROWS / 2 => label(y.1 + (y.0 - y.1) * (number as f64 + 0.5) / ROWS as f64),
            _ => String::new(),
        };
        // U+2800 is a blank that some fonts draw.
        let row: String = row.iter().map(|cell| if *cell == '\u{2800}' { ' ' } else { *cell }).collect();
        text += &format!("{beside:>9} ┤{}\n", row.trim_end());
    }
    let (from, to) = (format!("step {first:.0}"), format!("step {last:.0}"));
    text += &format!("{:>9} └{}\n", "", "─".repeat(COLUMNS));
    text += &format!("{:>9}  {from}{to:>1$}\n", "", COLUMNS - from.len());
    let legend = if validation.is_empty() { "⠒ training" } else { "⠒ training  ● validation" };
    text += &format!("{:>9}  {legend}", "");
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::super::{StepFigures, ValidationFigures};
    use super::*;

    fn history(losses: &[f64], validations: &[(u64, f64)]) -> History {
        let step = |(number, loss): (usize, &f64)| StepFigures {
            step: number as u64 + 1,
            loss: loss.is_finite().then_some(*loss),
            grad_norm: None,
            learning_rate: 0.1,
            tokens: 1,
            seconds: 1.0,
        };
        let validation = |&(step, loss): &(u64, f64)| ValidationFigures {
            step,
            loss: Some(loss),
            token_accuracy: None,
            by_hash: Default::default(),
        };
        History {
            steps: losses.iter().enumerate().map(step).collect(),
            validations: validations.iter().map(validation).collect(),
        }
    }

    /// The highest dot of each column of dots, as the row of dots from above.
    fn tops(curve: &str) -> Vec<Option<usize>> {
        let rows: Vec<Vec<char>> =
            curve.lines().take(ROWS).map(|line| line.split('┤').nth(1).unwrap().chars().collect()).collect();
        (0..COLUMNS * 2)
            .map(|column| {
                (0..ROWS * 4).find(|dot| {
                    let cell = rows[dot / 4].get(column / 2).copied().unwrap_or(' ') as u32;
                    (0x2800..0x2900).contains(&cell) && cell & BITS[column % 2][dot % 4] != 0
                })
            })
            .collect()
    }

    #[test]
    fn a_straight_fall_is_drawn_as_one() {
        let losses: Vec<f64> = (0..120).map(|step| 10.0 - f64::from(step) / 119.0 * 8.0).collect();
        let curve = loss_curve(&history(&losses, &[])).unwrap();
        for (column, top) in tops(&curve).into_iter().enumerate() {
            let expected = column as f64 / 119.0 * 39.0;
            let top = top.unwrap_or_else(|| panic!("a gap at {column}: {curve}")) as f64;
            assert!((top - expected).abs() <= 1.0, "{column}: {top} against {expected}\n{curve}");
        }
        assert!(curve.lines().next().unwrap().starts_with("       10 ┤"), "{curve}");
        assert!(curve.lines().nth(9).unwrap().starts_with("        2 ┤"), "{curve}");
        assert!(!curve.contains('\u{1b}') && !curve.contains('●'));
    }

    #[test]
    fn few_and_many_steps_leave_no_gap_and_validations_are_marked() {
        for count in [2, 3, 50, 5000] {
            let losses: Vec<f64> = (0..count).map(|step| f64::from(step % 7)).collect();
            let curve = loss_curve(&history(&losses, &[(1, 6.0), (u64::MAX, 0.0)])).unwrap();
            let filled = |line: &str| line.split('┤').nth(1).unwrap().to_string();
            assert!(filled(curve.lines().next().unwrap()).starts_with('●'), "{curve}");
            assert!(filled(curve.lines().nth(9).unwrap()).ends_with('●'), "{curve}");
            // Columns 2 to 117 have no mark over them.
            assert!(tops(&curve)[2..118].iter().all(Option::is_some), "{count}: {curve}");
            assert!(curve.lines().all(|line| line.chars().count() <= 11 + COLUMNS), "{curve}");
        }
    }

    #[test]
    fn nothing_to_draw_is_nothing() {
        assert_eq!(loss_curve(&history(&[], &[])), None);
        assert_eq!(loss_curve(&history(&[1.0], &[(1, 2.0)])), None);
        assert_eq!(loss_curve(&history(&[f64::NAN, f64::NAN], &[])), None);
        assert!(loss_curve(&history(&[2.0, 2.0], &[])).is_some(), "a flat line");
    }
}
