//! `fastlora tune`: which tiles of Hopper's products are the fastest on this device.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::HumanBytes;
use serde_json::{Value, json};
use tracing::{info, warn};

use super::Cli;
use super::device::{compute_type, gpu_backend, open_gpu};
use super::model::resolve_model;
use super::output::print_line;
use super::signals::Interrupts;
use super::tiles::{file_of, read};
use crate::backend::Backend;
use crate::backend::cuda::tiles::{
    Choice, DeviceKind, MeasuredProduct, ProductKind, ProductShape, TileTable, Tiles, Unusable,
};
use crate::backend::cuda::{ComputeType, CudaBackend};
use crate::checkpoint::atomic::{parent_of, replace_file};
use crate::checkpoint::base::BaseModel;
use crate::config::{DeviceName, TargetModules, check_compute_choices};
use crate::device::Device;
#[cfg(feature = "emulator")]
use crate::device::emulator::Emulator;
use crate::error::{Error, Result, escape_control};
use crate::model::{LoraConfig, ModelShape};
use crate::selftest::Tuner;

/// Arguments of `fastlora tune`.
#[derive(Debug, Args)]
pub struct TuneArgs {
    /// Model whose linears and head are measured: a folder, or a hub id `org/name[@revision]`.
    #[arg(short, long, value_name = "MODEL", required_unless_present = "shapes")]
    model: Option<String>,
    /// Linears to measure, by inputs and outputs: 1536x8960; with commas, or repeat the flag.
    #[arg(long, value_name = "INxOUT", value_delimiter = ',')]
    shapes: Vec<LinearSize>,
    /// Rows (tokens of a batch) to measure; without it, the powers of two from 128 to 32768 for which there is memory.
    #[arg(long, value_name = "ROWS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    rows: Vec<u32>,
    /// Inner width of the adapters, r.
    #[arg(long, value_name = "R", default_value_t = 16, value_parser = clap::value_parser!(u16).range(0..=4096))]
    rank: u16,
    /// `auto` or `cuda[:N]`.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Compute type: `auto`, `f16` or `bf16`.
    #[arg(long, value_name = "DTYPE", default_value = "auto")]
    dtype: String,
    /// File to write, in place of the one where every run looks; earlier measurements in it are kept.
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// `INxOUT`.
#[derive(Clone, Copy, Debug)]
struct LinearSize {
    inputs: usize,
    outputs: usize,
}

impl FromStr for LinearSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let width = |text: &str| text.parse().ok().filter(|width| (1..=1 << 24).contains(width));
        let sizes =
            text.split_once('x').and_then(|(inputs, outputs)| Some((width(inputs)?, width(outputs)?)));
        let (inputs, outputs) = sizes.ok_or("expected inputs and outputs, such as 1536x8960")?;
        Ok(Self { inputs, outputs })
    }
}

/// A linear whose products are measured.
struct Linear {
    name: &'static str,
    size: LinearSize,
    /// Of the adapter that a tile of the forward has its share of, and of all: those of the input's gradient.
    ranks: [usize; 2],
    is_head: bool,
}

/// The groups of a layer by what reads the same input, as models lay them out.
const GROUP_NAMES: [&str; 4] = ["q|k|v", "o", "gate|up", "down"];
/// What is measured unless rows are named.
const USUAL_ROWS: [usize; 9] = [128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768];

pub(super) fn run(args: &TuneArgs, cli: &Cli) -> Result<()> {
    check_compute_choices(&args.device, &args.dtype, None)?;
    let base = match &args.model {
        Some(name) => Some(BaseModel::open(resolve_model(name, cli)?.folder)?),
        None => None,
    };
    let compute = match (&base, &*args.dtype) {
        (Some(base), dtype) => compute_type(dtype, base)?,
        (None, "f16") => ComputeType::F16,
        (None, _) => ComputeType::Bf16,
    };
    let linears = args.linears(base.as_ref())?;
    match DeviceName::parse(&args.device)? {
        DeviceName::Cpu => Err(Error::device("the CPU's products have no tiles to choose from")
            .at("device")
            .hint("tune a GPU with --device cuda")),
        DeviceName::Auto => args.tune(gpu_backend(open_gpu(0)?, compute, false), &linears, cli),
        DeviceName::Cuda { index, is_portable } => {
            args.tune(gpu_backend(open_gpu(index)?, compute, is_portable), &linears, cli)
        }
        #[cfg(feature = "emulator")]
        DeviceName::Emulator { is_hopper, is_checked } => {
            args.tune(CudaBackend::new(Emulator::of(is_hopper, is_checked)?, compute), &linears, cli)
        }
        #[cfg(not(feature = "emulator"))]
        DeviceName::Emulator { .. } => Err(Error::internal("this build has no emulator")),
    }
}

impl TuneArgs {
    fn linears(&self, base: Option<&BaseModel>) -> Result<Vec<Linear>> {
        let rank = usize::from(self.rank);
        let named = self.shapes.iter();
        let mut linears: Vec<Linear> =
            named.map(|&size| Linear { name: "linear", size, ranks: [rank; 2], is_head: false }).collect();
        let Some(base) = base else { return Ok(linears) };
        let targets = TargetModules::Pattern(TargetModules::ALL_LINEAR.into());
        let lora = (rank > 0).then(|| LoraConfig::new(rank, 1.0, targets));
        let shape = ModelShape::new(base.config(), lora.as_ref())?;
        // The layers of all models that there are have the same widths.
        for (name, group) in GROUP_NAMES.into_iter().zip(shape.groups()) {
            let size = LinearSize { inputs: group.in_features, outputs: group.out_features };
            linears.push(Linear {
                name,
                size,
                ranks: [rank.min(group.rank()), group.rank()],
                is_head: false,
            });
        }
        let size = LinearSize { inputs: base.config().hidden_size, outputs: base.config().vocabulary };
        linears.push(Linear { name: "head", size, ranks: [0; 2], is_head: true });
        Ok(linears)
    }

    /// Measures, writes and prints. What is measured is written at once: a signal costs the product under way at most.
    fn tune<D: Device>(&self, backend: CudaBackend<D>, linears: &[Linear], cli: &Cli) -> Result<()> {
        backend.check_choice_of_tiles()?;
        let device = DeviceKind::of(backend.device());
        let path = self.out.clone().or_else(|| file_of(&device)).ok_or_else(|| {
            Error::config("there is no folder for the measurements: neither XDG_CACHE_HOME nor HOME is set")
                .hint("name a file with --out FILE")
        })?;
        let mut table = self.table(&path, &device, D::IS_REAL)?;
        info!("device: {}", backend.description());
        let folder = parent_of(&path);
        fs::create_dir_all(folder).map_err(|source| Error::file("create", folder, source))?;
        let interrupts = Interrupts::install()?;
        interrupts.arm();
        let tuner = Tuner::new(&backend);
        let wanted = self.products(&backend, linears);
        let mut rows = Vec::new();
        let mut is_stopped = false;
        for product in &wanted {
            is_stopped = interrupts.is_requested();
            if is_stopped {
                break;
            }
            if let Some(row) = product.measure(&backend, &tuner)? {
                table.add(row.product.clone());
                replace_file(&path, table.to_json().as_bytes())?;
                rows.push(row);
            }
        }
        if !rows.is_empty() {
            self.print(&device, D::IS_REAL, &rows, &path, cli)?;
        }
        if is_stopped {
            let (done, all) = (rows.len(), wanted.len());
            let message = format!(
                "{done} of {all} products were measured, as asked; the others go by the rule, or by what was measured before"
            );
            return Err(Error::stopped(message).hint("the same command measures all of them"));
        }
        match rows.is_empty() {
            false => Ok(()),
            true => Err(Error::device("no product fits the free memory").hint("name fewer rows with --rows")),
        }
    }

    fn print(&self, device: &DeviceKind, is_real: bool, rows: &[Row], path: &Path, cli: &Cli) -> Result<()> {
        if cli.json {
            let products: Value = rows.iter().map(Row::to_json).collect();
            let report = json!({ "device": device, "is_real": is_real, "file": path, "products": products });
            return print_line(&format!("{report:#}"));
        }
        let label = match is_real {
            true => "TFLOP/s, the median of each",
            false => "TFLOP/s of the emulator: they say nothing of a GPU",
        };
        print_line(&format!("{device}\n{label}\n{}\nwritten to {}", to_text(rows), path.display()))
    }

    /// What is in the file of an earlier run, to go on with.
    fn table(&self, path: &Path, device: &DeviceKind, is_real: bool) -> Result<TileTable> {
        let name = path.display();
        match read(path, device) {
            Ok(Some(table)) => return Ok(table),
            Ok(None) => {}
            Err(Unusable::Foreign(reason)) => {
                info!("{name}: {}; it will be replaced", escape_control(&reason));
            }
            // It may be anything.
            Err(Unusable::Damaged(reason)) if self.out.is_some() => {
                return Err(Error::config(format!("it is no table of tiles: {}", escape_control(&reason)))
                    .at(name.to_string())
                    .hint("name another file with --out, or delete this one"));
            }
            Err(Unusable::Damaged(reason)) => {
                warn!("{name} is no table: {}; it will be replaced", escape_control(&reason));
            }
        }
        Ok(TileTable::new(device.clone(), is_real))
    }

    /// What is to be measured, each shape once.
    fn products<D: Device>(&self, backend: &CudaBackend<D>, linears: &[Linear]) -> Vec<Product> {
        let mut wanted: Vec<Product> = Vec::new();
        for linear in linears {
            let most = if linear.is_head {
                backend.head_rows(linear.size.outputs, linear.size.inputs)
            } else {
                usize::MAX
            };
            for rows in self.rows(D::IS_REAL, most) {
                for product in linear.products(rows) {
                    if wanted.iter().all(|known| known.shape != product.shape) {
                        wanted.push(product);
                    }
                }
            }
        }
        wanted
    }

    fn rows(&self, is_real: bool, most: usize) -> Vec<usize> {
        let wanted: Vec<usize> = match (self.rows.is_empty(), is_real) {
            (false, _) => self.rows.iter().map(|&rows| rows as usize).collect(),
            (true, true) => USUAL_ROWS.to_vec(),
            (true, false) => USUAL_ROWS[..1].to_vec(),
        };
        wanted.into_iter().map(|rows| rows.min(most)).collect()
    }
}

impl Linear {
    /// Forward and input gradient.
    fn products(&self, rows: usize) -> [Product; 2] {
        let LinearSize { inputs, outputs } = self.size;
        let [share, all] = self.ranks;
        let linear = self.name;
        let forward = ProductShape { product: ProductKind::Forward, rows, columns: outputs, depth: inputs };
        let backward =
            ProductShape { product: ProductKind::BackwardInput, rows, columns: inputs, depth: outputs };
        [Product { linear, shape: forward, rank: share }, Product { linear, shape: backward, rank: all }]
    }
}

/// A product to be measured, with the rank of its adapters.
struct Product {
    linear: &'static str,
    shape: ProductShape,
    rank: usize,
}

impl Product {
    /// None where there is too little memory.
    fn measure<D: Device>(&self, backend: &CudaBackend<D>, tuner: &Tuner<'_, D>) -> Result<Option<Row>> {
        let &Self { linear, shape, rank } = self;
        let needed = Tuner::<D>::bytes_needed(shape, rank) as u64;
        let free = backend.device().free_memory_bytes()?;
        if free.is_some_and(|free| needed > free / 2) {
            info!("{linear} {} is left out: it takes {}", describe(shape), HumanBytes(needed));
            return Ok(None);
        }
        let product = tuner.measure(shape, rank)?;
        let multiprocessors = backend.device().limits().multiprocessor_count as usize;
        let rule = Tiles::Rule.choose(shape, multiprocessors, &Choice::ALL);
        let row = Row { linear, product, rule };
        info!("{linear} {}: {}, {:+.1} %", describe(shape), row.best(), 100.0 * row.gain());
        Ok(Some(row))
    }
}

/// A measured product beside the rule.
struct Row {
    linear: &'static str,
    product: MeasuredProduct,
    rule: Choice,
}

impl Row {
    fn best(&self) -> Choice {
        self.product.choices[0].choice
    }

    /// How much faster the best is than the rule's choice.
    fn gain(&self) -> f64 {
        let time = |choice| {
            let mut choices = self.product.choices.iter();
            choices.find(|measured| measured.choice == choice).map_or(f64::NAN, |found| found.microseconds)
        };
        time(self.rule) / time(self.best()) - 1.0
    }

    fn to_json(&self) -> Value {
        let mut object = json!(self.product);
        object["linear"] = json!(self.linear);
        object["by_rule"] = json!(self.rule);
        object["gain"] = json!(self.gain());
        object
    }
}

fn describe(shape: ProductShape) -> String {
    let ProductShape { product, rows, columns, depth } = shape;
    format!("{product} {rows} × {depth} → {columns}")
}

fn to_text(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let header = ["linear", "product"].map(str::to_owned).into_iter();
    let header = header.chain(Choice::ALL.iter().map(Choice::to_string));
    table.set_header(header.chain(["by rule", "fastest", "gain"].map(str::to_owned)));
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for row in rows {
        let choices = &row.product.choices;
        let rate = |choice: &Choice| {
            let found = choices.iter().find(|measured| measured.choice == *choice);
            found.map_or("–".to_owned(), |found| format!("{:.3}", found.teraflops))
        };
        let mut cells = vec![row.linear.to_owned(), describe(row.product.shape)];
        cells.extend(Choice::ALL.iter().map(rate));
        cells.extend([row.rule.to_string(), row.best().to_string(), format!("{:.1} %", 100.0 * row.gain())]);
        table.add_row(cells);
    }
    table.to_string()
}
