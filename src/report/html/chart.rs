//! Curves as inline SVG.

use super::super::plot::{label, range, thinned, ticks};
use super::escape;

/// Width and height of a drawing over the whole page and over half of it, about in pixels, so that both have the same
/// text; and the space around the curves.
const WIDE: (f64, f64) = (1080.0, 300.0);
const HALF: (f64, f64) = (520.0, 230.0);
const LEFT: f64 = 58.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 28.0;
/// Points of a curve that are drawn: more would fall on the same pixel.
const COLUMNS: usize = 320;
/// Colours of the style sheet; a curve beyond them gets one again.
const COLOURS: usize = 8;
/// Marks at every point up to so many of them.
const MARKED: usize = 60;

/// One curve: (step, value).
pub(super) struct Series<'a> {
    pub name: &'a str,
    pub points: Vec<(f64, f64)>,
}

/// A figure with the curves; nothing where no curve has a point.
pub(super) fn chart(title: &str, is_wide: bool, series: &[Series<'_>]) -> String {
    let all = || series.iter().flat_map(|one| &one.points).filter(|point| point.1.is_finite());
    let (Some(x), Some(y)) = (range(all().map(|point| point.0)), range(all().map(|point| point.1))) else {
        return String::new();
    };
    let (width, height) = if is_wide { WIDE } else { HALF };
    let across = |value: f64| LEFT + (value - x.0) / (x.1 - x.0) * (width - LEFT - RIGHT);
    let down = |value: f64| TOP + (y.1 - value) / (y.1 - y.0) * (height - TOP - BOTTOM);
    let mut drawing = String::new();
    for tick in ticks(y, 5) {
        let at = down(tick);
        drawing += &format!(
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            width - RIGHT,
            LEFT - 8.0,
            at + 4.0,
            label(tick)
        );
    }
    for tick in ticks(x, 7).into_iter().filter(|tick| tick.fract() == 0.0) {
        drawing += &format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            across(tick),
            height - 8.0,
            label(tick)
        );
    }
    for (number, one) in series.iter().enumerate() {
        let colour = number % COLOURS;
        let points: Vec<(f64, f64)> =
            one.points.iter().copied().filter(|point| point.1.is_finite()).collect();
        let parts = thinned(&points, x, COLUMNS);
        let path = |value: &dyn Fn(usize) -> f64, places: &mut dyn Iterator<Item = usize>| -> String {
            places.map(|place| format!("{:.1},{:.1} ", across(parts[place].x), down(value(place)))).collect()
        };
        if points.len() > parts.len() {
            let over = path(&|place| parts[place].high, &mut (0..parts.len()));
            let under = path(&|place| parts[place].low, &mut (0..parts.len()).rev());
            drawing += &format!("<polygon class=\"band f{colour}\" points=\"{over}{}\"/>", under.trim_end());
        }
        let line = path(&|place| parts[place].mean, &mut (0..parts.len()));
        drawing += &format!("<polyline class=\"curve s{colour}\" points=\"{}\"/>", line.trim_end());
        if points.len() <= MARKED {
            for (step, value) in &points {
                drawing += &format!(
                    "<circle class=\"f{colour}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.6\"><title>{} step {step}: {}</title></circle>",
                    across(*step),
                    down(*value),
                    escape(one.name),
                    label(*value)
                );
            }
        }
    }
    let legend = match series {
        [_] => String::new(),
        _ => {
            let entry = |(number, one): (usize, &Series<'_>)| {
                format!("<span><i class=\"f{}\"></i>{}</span>", number % COLOURS, escape(one.name))
            };
            let entries: String = series.iter().enumerate().map(entry).collect();
            format!("<div class=\"legend\">{entries}</div>")
        }
    };
    let wide = if is_wide { " class=\"wide\"" } else { "" };
    format!(
        "<figure{wide}><h3>{title}</h3>{legend}<svg viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"{title} by step\">{drawing}</svg></figure>\n",
        title = escape(title)
    )
}
