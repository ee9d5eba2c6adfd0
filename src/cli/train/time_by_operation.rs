//! `--profile`: where the time of some steps went, by operation.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use crate::error::Result;
use crate::ranges::timing::{TimedRange, listen, stop_listening};
use crate::selftest::{Measurable, Rates};

/// The marks of a window, set by the ranges as they begin and end.
struct Marks<B: Measurable> {
    backend: Arc<B>,
    set: Vec<B::Mark>,
    /// The first that could not be set.
    failure: Result<()>,
}

impl<B: Measurable> Marks<B> {
    fn set(&mut self) -> usize {
        match self.backend.mark() {
            Ok(mark) => self.set.push(mark),
            Err(error) if self.failure.is_ok() => self.failure = Err(error),
            Err(_) => {}
        }
        self.set.len().saturating_sub(1)
    }
}

/// A window that is open: every range's time is taken.
pub(super) struct OpenWindow<B: Measurable> {
    marks: Arc<Mutex<Marks<B>>>,
}

impl<B: Measurable> OpenWindow<B> {
    /// Begins to take times.
    pub(super) fn open(backend: &Arc<B>) -> Result<Self> {
        backend.time_operations(true)?;
        let marks = Marks { backend: Arc::clone(backend), set: Vec::new(), failure: Ok(()) };
        let marks = Arc::new(Mutex::new(marks));
        let setting = Arc::clone(&marks);
        let mark = move || setting.lock().unwrap_or_else(PoisonError::into_inner).set();
        mark();
        listen(mark);
        Ok(Self { marks })
    }

    /// Ends it: the times of `steps` steps by operation.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn close(self, steps: u64) -> Result<TimeByOperation> {
        let ranges = stop_listening();
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let end = marks.set();
        let Marks { backend, set, failure } = &mut *marks;
        std::mem::replace(failure, Ok(()))?;
        backend.time_operations(false)?;
        let between = |start: usize, end: usize| backend.seconds_between(&set[start], &set[end]);
        let mut operations: BTreeMap<&'static str, Operation> = BTreeMap::new();
        for TimedRange { name, flops, bytes, marks, .. } in ranges.iter().filter(|range| range.is_leaf) {
            let operation = operations.entry(name).or_default();
            operation.calls += 1;
            operation.seconds += between(marks.start, marks.end)?;
            operation.flops += flops;
            operation.bytes += bytes;
        }
        let mut operations: Vec<_> = operations.into_iter().collect();
        operations.sort_by(|(_, one), (_, other)| other.seconds.total_cmp(&one.seconds));
        Ok(TimeByOperation { steps, seconds: between(0, end)?, operations, best: None })
    }
}

/// All calls of one operation in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Operation {
    calls: u64,
    seconds: f64,
    flops: f64,
    bytes: f64,
}

/// What a window showed.
pub(super) struct TimeByOperation {
    steps: u64,
    /// Of the whole window, what lies between the operations included.
    seconds: f64,
    /// By falling time.
    operations: Vec<(&'static str, Operation)>,
    /// What the machine reaches, where that says anything.
    best: Option<Rates>,
}

impl TimeByOperation {
    /// Measures what the machine reaches.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn beside_limits<B: Measurable>(self, backend: &B) -> Result<Self> {
        let best = if B::IS_REAL { Some(backend.best_rates()?) } else { None };
        Ok(Self { best, ..self })
    }

    /// A table.
    pub(super) fn to_text(&self) -> String {
        let best = self.best;
        let mut table = Table::new();
        table.load_preset(presets::UTF8_FULL_CONDENSED);
        table.set_header(["operation", "calls a step", "ms a step", "of the step", "rate", "of the limit"]);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let steps = self.steps as f64;
        let share = |seconds: f64| format!("{:.1} %", 100.0 * seconds / self.seconds);
        let milliseconds = |seconds: f64| format!("{:.3}", seconds * 1e3 / steps);
        for &(name, operation) in &self.operations {
            let Operation { calls, seconds, .. } = operation;
            let [rate, of_limit] = operation.rate(best);
            let calls = format!("{:.0}", calls as f64 / steps);
            table.add_row([name.to_owned(), calls, milliseconds(seconds), share(seconds), rate, of_limit]);
        }
        let inside: f64 = self.operations.iter().map(|(_, operation)| operation.seconds).sum();
        let row = |name: &str, seconds| {
            let none = String::new;
            [name.to_owned(), none(), milliseconds(seconds), share(seconds), none(), none()]
        };
        table.add_row(row("between them", (self.seconds - inside).max(0.0)));
        table.add_row(row("step", self.seconds));
        let limits = match best {
            Some(Rates { flops, flops_of, bytes }) => format!(
                "limits measured here: {:.3} TFLOP/s ({flops_of}), {:.1} GB/s (a copy)",
                flops / 1e12,
                bytes / 1e9
            ),
            None => "the emulator's time says nothing of a GPU's: no limits".to_owned(),
        };
        format!("{table}\n{limits}")
    }
}

impl TimeByOperation {
    /// All calls of the window, its steps and the limits.
    pub(super) fn to_json(&self) -> Value {
        let operation = |&(name, operation): &(&str, Operation)| {
            let Operation { calls, seconds, flops, bytes } = operation;
            json!({ "operation": name, "calls": calls, "seconds": seconds, "flops": flops, "bytes": bytes })
        };
        json!({
            "steps": self.steps,
            "seconds": self.seconds,
            "operations": self.operations.iter().map(operation).collect::<Value>(),
            "limits": self.best,
        })
    }
}

impl Operation {
    /// Its rate, and the part of the limit that it reaches: of arithmetic or of memory, whichever binds it.
    fn rate(&self, best: Option<Rates>) -> [String; 2] {
        let Self { seconds, flops, bytes, .. } = *self;
        let none = || "–".to_owned();
        if seconds <= 0.0 || flops + bytes <= 0.0 {
            return [none(), none()];
        }
        let Some(best) = best else { return [none(), none()] };
        let [arithmetic, memory] = [flops / best.flops, bytes / best.bytes];
        let rate = match arithmetic >= memory {
            true => format!("{:.3} TFLOP/s", flops / seconds / 1e12),
            false => format!("{:.1} GB/s", bytes / seconds / 1e9),
        };
        [rate, format!("{:.0} %", 100.0 * arithmetic.max(memory) / seconds)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_tells_shares_rates_and_limits() {
        let linear = Operation { calls: 4, seconds: 0.06, flops: 6e9, bytes: 1e6 };
        let norm = Operation { calls: 8, seconds: 0.02, flops: 1e6, bytes: 1e8 };
        let operations = vec![("linear", linear), ("norm", norm)];
        let best = Some(Rates { flops: 2e11, flops_of: "a product", bytes: 1e10 });
        let text = TimeByOperation { steps: 2, seconds: 0.1, operations, best }.to_text();
        let row = |name: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.contains(name)).unwrap();
            line.split(['│', '┆'])
                .map(|cell| cell.trim().to_owned())
                .filter(|cell| !cell.is_empty())
                .collect()
        };
        assert_eq!(row("linear"), ["linear", "2", "30.000", "60.0 %", "0.100 TFLOP/s", "50 %"]);
        assert_eq!(row("norm"), ["norm", "4", "10.000", "20.0 %", "5.0 GB/s", "50 %"]);
        assert_eq!(row("between"), ["between them", "10.000", "20.0 %"]);
        assert_eq!(row("step  "), ["step", "50.000", "100.0 %"]);
    }
}
