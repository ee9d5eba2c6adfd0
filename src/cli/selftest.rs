//! `fastlora selftest`: the operations on this machine's own device, against float64 and against its limits.

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::Cli;
use super::device::{gpu_backend, open_gpu};
use super::output::print_line;
use super::tiles::with_tiles;
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::{ComputeType, CudaBackend};
use crate::config::{DeviceName, TileSource, check_compute_choices};
use crate::device::driver::Driver;
#[cfg(feature = "emulator")]
use crate::device::emulator::Emulator;
use crate::error::{Error, Result};
use crate::selftest::{Measurable, Outcome, Rates, Row, Scale, Timing, cases, run as run_cases};

/// Arguments of `fastlora selftest`.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// `auto`, `cpu` or `cuda[:N][:portable]`.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// CPU threads; without it, all cores.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Small shapes alone.
    #[arg(long)]
    quick: bool,
}

/// The rows of one backend.
struct Section {
    description: String,
    best: Option<Rates>,
    rows: Vec<Row>,
}

const COMPUTE_TYPES: [ComputeType; 2] = [ComputeType::Bf16, ComputeType::F16];

pub(super) fn run(args: &SelftestArgs, cli: &Cli) -> Result<()> {
    check_compute_choices(&args.device, "auto", args.threads)?;
    let sections = args.sections()?;
    if cli.json {
        let sections: Value = sections.iter().map(Section::to_json).collect();
        print_line(&format!("{:#}", json!({ "sections": sections })))?;
    } else {
        for section in &sections {
            print_line(&section.to_text())?;
        }
    }
    verdict(&sections)
}

impl SelftestArgs {
    fn sections(&self) -> Result<Vec<Section>> {
        let scale = |full| if self.quick { Scale::Quick } else { full };
        let on_gpu = |driver: Driver, is_portable| -> Result<Vec<Section>> {
            let section = |compute| {
                let backend = gpu_backend(driver.clone(), compute, is_portable);
                examine(&with_tiles(backend, &TileSource::Auto)?, scale(Scale::Gpu), true)
            };
            COMPUTE_TYPES.into_iter().map(section).collect()
        };
        match DeviceName::parse(&self.device)? {
            DeviceName::Cuda { index, is_portable } => on_gpu(open_gpu(index)?, is_portable),
            #[cfg(feature = "emulator")]
            DeviceName::Emulator { is_hopper, is_checked } => {
                let emulator = Emulator::of(is_hopper, is_checked)?;
                if !self.quick {
                    tracing::info!("the emulator runs the quick cases alone, and its time says nothing");
                }
                let section =
                    |compute| examine(&CudaBackend::new(emulator.clone(), compute), Scale::Quick, false);
                COMPUTE_TYPES.into_iter().map(section).collect()
            }
            DeviceName::Auto if let Ok(driver) = Driver::new(0) => on_gpu(driver, false),
            _ => Ok(vec![examine(&CpuBackend::new(self.threads)?, scale(Scale::Cpu), true)?]),
        }
    }
}

fn examine<B: Measurable>(backend: &B, scale: Scale, timed: bool) -> Result<Section> {
    let description = backend.description();
    tracing::info!("device: {description}");
    let best = timed.then(|| backend.best_rates()).transpose()?;
    let rows = run_cases(backend, &cases(scale), best, |row| {
        let verdict = if row.passes() { "ok" } else { "WRONG" };
        tracing::info!("{} {}: {verdict}", row.operation, row.shape);
    });
    Ok(Section { description, best, rows })
}

/// A device error where an operation is wrong.
fn verdict(sections: &[Section]) -> Result<()> {
    let rows = || sections.iter().flat_map(|section| &section.rows);
    let wrong: Vec<&Row> = rows().filter(|row| !row.passes()).collect();
    let Some(first) = wrong.first() else { return Ok(()) };
    let example = match &first.outcomes {
        Err(error) => error.to_string(),
        Ok(_) => first.worst().map(describe).unwrap_or_default(),
    };
    let message = format!(
        "{} of {} operations are wrong; the first: {} {} {}: {example}",
        wrong.len(),
        rows().count(),
        first.operation,
        first.shape,
        first.dtype
    );
    Err(Error::device(message).hint("do not train on this device; report this with `fastlora doctor --json`"))
}

fn describe(outcome: &Outcome) -> String {
    let Outcome { output, place: (row, column), found, expected, error, tolerance, .. } = outcome;
    format!(
        "{output}[{row}, {column}] is {found}, expected {expected}: off by {error:.2e}, allowed {tolerance:.2e}"
    )
}

impl Section {
    fn to_json(&self) -> Value {
        json!({
            "device": self.description,
            "best_rates": self.best,
            "operations": self.rows.iter().map(row_to_json).collect::<Value>(),
        })
    }

    fn to_text(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::UTF8_FULL_CONDENSED);
        table.set_header([
            "operation",
            "shape",
            "dtype",
            "furthest off",
            "error",
            "allowed",
            "time",
            "rate",
            "of the limit",
            "",
        ]);
        for column in table.column_iter_mut().skip(4).take(5) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for row in &self.rows {
            table.add_row(cells(row));
        }
        let limit = match &self.best {
            Some(best) => {
                let (flops, bytes) = (best.flops / 1e12, best.bytes / 1e9);
                format!(
                    "limits measured here: {flops:.3} TFLOP/s ({}), {bytes:.1} GB/s (a copy)",
                    best.flops_of
                )
            }
            None => "not timed: an emulator's time says nothing of a GPU's".to_owned(),
        };
        let wrong = self.rows.iter().filter(|row| !row.passes()).count();
        let count = self.rows.len();
        let verdict =
            if wrong == 0 { format!("all {count} right") } else { format!("{wrong} of {count} WRONG") };
        format!("{}\n{limit}\n{table}\n{verdict}\n", self.description)
    }
}

fn row_to_json(row: &Row) -> Value {
    let outcome = |outcome: &Outcome| {
        json!({
            "output": outcome.output,
            "compared": outcome.compared,
            "error": outcome.error,
            "tolerance": outcome.tolerance,
            "row": outcome.place.0,
            "column": outcome.place.1,
            "found": outcome.found,
            "expected": outcome.expected,
            "passes": outcome.passes(),
        })
    };
    let (outcomes, failure) = match &row.outcomes {
        Ok(outcomes) => (outcomes.iter().map(outcome).collect(), Value::Null),
        Err(error) => (Value::Null, error.to_json()["error"].clone()),
    };
    json!({
        "operation": row.operation,
        "shape": row.shape,
        "dtype": row.dtype.to_string(),
        "passes": row.passes(),
        "outputs": outcomes,
        "failure": failure,
        "timing": row.timing.map(|timing| json!({
            "seconds": timing.seconds,
            "flops": timing.work.flops,
            "bytes": timing.work.bytes,
            "limit": if timing.is_arithmetic { "arithmetic" } else { "memory" },
            "fraction_of_limit": timing.fraction_of_limit,
        })),
    })
}

fn cells(row: &Row) -> [String; 10] {
    let none = || "–".to_owned();
    let [place, error, tolerance] = match (&row.outcomes, row.worst()) {
        (Err(error), _) => [error.to_string(), none(), none()],
        (_, Some(Outcome { output, place: (row, column), error, tolerance, .. })) => {
            [format!("{output}[{row}, {column}]"), format!("{error:.1e}"), format!("{tolerance:.1e}")]
        }
        (_, None) => [none(), none(), none()],
    };
    let [time, rate, fraction] = match row.timing {
        None => [none(), none(), none()],
        Some(Timing { seconds, work, fraction_of_limit, is_arithmetic }) => {
            let rate = match is_arithmetic {
                true => format!("{:.3} TFLOP/s", work.flops / seconds / 1e12),
                false => format!("{:.1} GB/s", work.bytes / seconds / 1e9),
            };
            let fraction = fraction_of_limit.map(|fraction| format!("{:.0} %", 100.0 * fraction));
            [duration(seconds), rate, fraction.unwrap_or_else(none)]
        }
    };
    let verdict = if row.passes() { "ok" } else { "WRONG" };
    let (operation, shape) = (row.operation.to_owned(), row.shape.clone());
    [
        operation,
        shape,
        row.dtype.to_string(),
        place,
        error,
        tolerance,
        time,
        rate,
        fraction,
        verdict.to_owned(),
    ]
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} µs", 1e6 * s),
        s if s < 1.0 => format!("{:.2} ms", 1e3 * s),
        s => format!("{s:.2} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    #[test]
    fn a_wrong_operation_ends_with_the_device_code_and_its_place() {
        let outcome = |error| Outcome {
            output: "dx",
            compared: 64,
            error,
            tolerance: 0.25,
            place: (127, 3),
            found: 1.5,
            expected: 1.0,
        };
        let row = |error| Row {
            operation: "rms_norm backward",
            shape: "128 × 64".into(),
            dtype: DType::Bf16,
            outcomes: Ok(vec![outcome(0.1), outcome(error)]),
            timing: None,
        };
        let section = |rows| [Section { description: "gpu".into(), best: None, rows }];
        assert!(verdict(&section(vec![row(0.2)])).is_ok());
        for error in [0.5, f64::NAN] {
            let sections = section(vec![row(0.2), row(error)]);
            let found = verdict(&sections).unwrap_err();
            assert_eq!(found.kind().exit_code(), 5);
            let text = found.to_string();
            assert!(
                text.starts_with("1 of 2 operations are wrong; the first: rms_norm backward 128 × 64 bf16"),
                "{text}"
            );
            assert!(text.contains("dx[127, 3] is 1.5, expected 1"), "{text}");
            assert!(sections[0].to_text().contains("1 of 2 WRONG"));
        }
        let failed = Row { outcomes: Err(Error::device("launch failed")), ..row(0.0) };
        assert!(verdict(&section(vec![failed])).unwrap_err().to_string().contains("launch failed"));
    }
}
