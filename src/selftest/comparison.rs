//! What a backend computed beside what float64 says.

use super::Tolerance;
use crate::dtype::DType;

/// The element of one output that is furthest off, as a share of what it may be off.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Which output: "y", "dx".
    pub output: &'static str,
    /// Elements compared.
    pub compared: usize,
    /// How far the element is off.
    pub error: f64,
    /// How far it may be off.
    pub tolerance: f64,
    /// Its row and column.
    pub place: (usize, usize),
    /// Its value.
    pub found: f32,
    /// Its value in float64.
    pub expected: f64,
}

impl Outcome {
    /// Whether every element compared is within its tolerance, and every other one finite.
    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }

    /// Its error as a share of the tolerance.
    pub fn share(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.tolerance }
    }
}

/// One output to compare.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// Which output.
    pub output: &'static str,
    /// The backend's compute type.
    pub compute: DType,
    /// How far its elements may be off.
    pub tolerance: Tolerance,
    /// Row length.
    pub columns: usize,
}

/// Columns from which on a row's own size says what its errors may be; below, all rows' does.
const MIN_COLUMNS: usize = 32;

impl Comparison {
    /// Compares the whole rows of `expected` with those of `found [rows, columns]`, every element of which must be finite.
    pub fn compare(&self, found: &[f32], expected: &[(usize, Vec<f64>)]) -> Outcome {
        let all = size(expected.iter().flat_map(|(_, row)| row));
        let mut worst = self.outcome((0, 0), f32::NAN, f64::NAN, 0.0);
        worst.error = -1.0; // less than any
        for (row, values) in expected {
            let (rms, largest) = if values.len() < MIN_COLUMNS { all } else { size(values) };
            for (column, &value) in values.iter().enumerate() {
                let bound = self.tolerance.bound(self.compute, value, rms, largest);
                let outcome = self.outcome((*row, column), found[row * self.columns + column], value, bound);
                if worst.error < 0.0 || outcome.error.is_nan() || outcome.share() > worst.share() {
                    worst = outcome;
                }
                if worst.error.is_nan() {
                    return worst;
                }
            }
        }
        // What was not compared was at least written.
        if let Some(place) = found.iter().position(|value| !value.is_finite()) {
            return self.outcome((place / self.columns, place % self.columns), found[place], f64::NAN, 0.0);
        }
        worst.compared = expected.iter().map(|(_, row)| row.len()).sum();
        worst
    }

    fn outcome(&self, place: (usize, usize), found: f32, expected: f64, tolerance: f64) -> Outcome {
        let error = (f64::from(found) - expected).abs();
        Outcome { output: self.output, compared: 0, error, tolerance, place, found, expected }
    }
}

/// Root of the mean square, and the largest size.
fn size<'a>(values: impl IntoIterator<Item = &'a f64>) -> (f64, f64) {
    let (mut count, mut squares, mut largest) = (0, 0.0, 0.0_f64);
    for value in values {
        count += 1;
        squares += value * value;
        largest = largest.max(value.abs());
    }
    ((squares / count.max(1) as f64).sqrt(), largest)
}

/// At most `count` of `rows` rows: the first and last, those about the tiles' edges, and others.
pub fn sample_rows(rows: usize, count: usize) -> Vec<usize> {
    if rows <= count {
        return (0..rows).collect();
    }
    let edges = [0, rows - 1, 63, 64, 127, 128, 15, 16, 1];
    // A step that is no multiple of any tile.
    let others = (0..rows).map(|place| (place * 7919 + 331) % rows);
    let mut sample = Vec::with_capacity(count);
    for row in edges.into_iter().filter(|&row| row < rows).chain(others) {
        if sample.len() == count {
            break;
        }
        if !sample.contains(&row) {
            sample.push(row);
        }
    }
    sample.sort_unstable();
    sample
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(tolerance: Tolerance, found: &[f32], expected: &[(usize, Vec<f64>)]) -> Outcome {
        Comparison { output: "y", compute: DType::Bf16, tolerance, columns: 2 }.compare(found, expected)
    }

    #[test]
    fn the_worst_element_is_told_with_its_place_and_a_wrong_one_fails() {
        let tolerance = Tolerance::sum(DType::Bf16, 1);
        let expected = [(0, vec![1.0, -1.0]), (2, vec![2.0, 3.0])];
        let outcome = compare(tolerance, &[1.0, -1.0, 9.0, 9.0, 2.0, 3.01], &expected);
        assert!(outcome.passes(), "{outcome:?}");
        assert_eq!((outcome.place, outcome.compared), ((2, 1), 4));
        let outcome = compare(tolerance, &[1.0, -1.0, 9.0, 9.0, 2.02, 3.0], &expected);
        assert!(!outcome.passes(), "{outcome:?}");
        assert_eq!(outcome.place, (2, 0));
    }

    #[test]
    fn poison_that_is_left_fails_whether_compared_or_not() {
        let tolerance = Tolerance::sum(DType::Bf16, 1);
        let expected = [(0, vec![1.0, 1.0])];
        assert!(!compare(tolerance, &[1.0, f32::NAN, 1.0, 1.0], &expected).passes());
        let outcome = compare(tolerance, &[1.0, 1.0, 1.0, f32::NAN], &expected);
        assert!(!outcome.passes());
        assert_eq!(outcome.place, (1, 1));
        assert!(!compare(tolerance, &[1.0, 1.0, f32::INFINITY, 1.0], &expected).passes());
    }

    #[test]
    fn exact_means_equal() {
        let tolerance = Tolerance::exact(DType::Bf16);
        let expected = [(0, vec![1.0, 0.0])];
        assert!(compare(tolerance, &[1.0, 0.0], &expected).passes());
        assert!(!compare(tolerance, &[1.0, 1e-30], &expected).passes());
    }

    #[test]
    fn samples_hold_both_ends_and_no_row_twice() {
        assert_eq!(sample_rows(3, 8), [0, 1, 2]);
        let sample = sample_rows(8192, 6);
        assert_eq!(sample, [0, 63, 64, 127, 128, 8191]);
        let mut sample = sample_rows(130, 20);
        sample.dedup();
        assert_eq!(sample.len(), 20);
    }
}
