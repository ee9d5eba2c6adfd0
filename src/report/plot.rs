//! What terminal and page share of drawing: ranges, thinning, round numbers for axes.

/// Lowest and highest of the values, apart from each other; none without values.
pub(super) fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|value| value.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
    if low > high {
        return None;
    }
    // A flat line runs through the middle.
    let margin = if high > low { 0.0 } else { low.abs().max(1.0) * 0.5 };
    Some((low - margin, high + margin))
}

/// The points as at most `columns` equal parts of `x` show them: the mean place of each part's points with their lowest,
/// mean and highest value.
pub(super) fn thinned(points: &[(f64, f64)], x: (f64, f64), columns: usize) -> Vec<Part> {
    let width = (x.1 - x.0).max(f64::MIN_POSITIVE);
    let column = |point: &(f64, f64)| (((point.0 - x.0) / width * columns as f64) as usize).min(columns - 1);
    let parts = points.chunk_by(|one, other| column(one) == column(other));
    parts
        .map(|part| {
            let count = part.len() as f64;
            let mean = |of: fn(&(f64, f64)) -> f64| part.iter().map(of).sum::<f64>() / count;
            let values = || part.iter().map(|point| point.1);
            Part {
                x: mean(|point| point.0),
                low: values().fold(f64::INFINITY, f64::min),
                mean: mean(|point| point.1),
                high: values().fold(f64::NEG_INFINITY, f64::max),
            }
        })
        .collect()
}

/// Points that are drawn as one.
pub(super) struct Part {
    pub x: f64,
    pub low: f64,
    pub mean: f64,
    pub high: f64,
}

/// Round numbers within the range, about `count` of them.
pub(super) fn ticks((low, high): (f64, f64), count: usize) -> Vec<f64> {
    let rough = (high - low) / count as f64;
    if !rough.is_finite() || rough <= 0.0 {
        return vec![low];
    }
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|one| one * power).find(|step| *step >= rough);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|number| number as f64 * step).collect()
}

/// A number with as many digits as a reader wants.
pub(super) fn label(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".into()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{value:.2e}")
    } else if value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        let digits = (3 - size.log10().floor() as i32).clamp(0, 6) as usize;
        let text = format!("{value:.digits$}");
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within() {
        assert_eq!(ticks((0.0, 10.0), 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks((1.0, 44.0), 5), [10.0, 20.0, 30.0, 40.0]);
        let small: Vec<String> = ticks((0.0, 2e-4), 4).into_iter().map(label).collect();
        assert_eq!(small, ["0", "5.00e-5", "1.00e-4", "1.50e-4", "2.00e-4"]);
        assert_eq!(ticks((3.0, 3.0), 4), [3.0]);
        for range in [(-1e-9, 1e9), (5.123, 5.124), (f64::MIN_POSITIVE, 1.0)] {
            let ticks = ticks(range, 6);
            assert!((2..=12).contains(&ticks.len()), "{range:?}: {ticks:?}");
            assert!(ticks.iter().all(|tick| (range.0..=range.1 * (1.0 + 1e-9)).contains(tick)), "{ticks:?}");
        }
    }

    #[test]
    fn labels_are_short() {
        for (value, text) in [
            (2.5, "2.5"),
            (1234.0, "1234"),
            (0.01234, "0.01234"),
            (12.3456, "12.35"),
            (-0.5, "-0.5"),
            (2e-4, "2.00e-4"),
        ] {
            assert_eq!(label(value), text);
        }
    }

    #[test]
    fn thinning_keeps_extremes() {
        let points: Vec<(f64, f64)> =
            (0..1000).map(|x| (x as f64, if x == 500 { 9.0 } else { 1.0 })).collect();
        let parts = thinned(&points, (0.0, 999.0), 10);
        assert_eq!(parts.len(), 10);
        assert!(parts.iter().any(|part| part.high == 9.0 && part.low == 1.0));
        assert_eq!(range(points.iter().map(|point| point.1)), Some((1.0, 9.0)));
        assert_eq!(range([2.0].into_iter()), Some((1.0, 3.0)));
        assert_eq!(range([f64::NAN].into_iter()), None);
    }
}
