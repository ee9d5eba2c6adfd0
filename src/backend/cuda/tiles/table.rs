//! What `fastlora tune` measured, as a file.

use std::fmt;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Choice, DeviceKind, MeasuredProduct, Tiles};

/// The form of the file.
const FORMAT: u64 = 1;
/// The sources of the products' kernels, hashed by the build script.
const KERNELS: &str = env!("FASTLORA_PRODUCT_KERNELS");

/// Measurements of one kind of device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TileTable {
    format: u64,
    /// Where they were taken.
    pub device: DeviceKind,
    /// Whether that is hardware; the times of an emulator say nothing of a GPU.
    pub is_real: bool,
    kernels: String,
    fastlora: String,
    /// When the latest were taken.
    pub tuned_at: DateTime<Utc>,
    /// The products, in the order in which they were measured.
    pub products: Vec<MeasuredProduct>,
}

/// Why a table is of no use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It is whole, but of something else.
    Foreign(String),
    /// It is no table, or not as it was written.
    Damaged(String),
}

impl fmt::Display for Unusable {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Foreign(reason) | Self::Damaged(reason)) = self;
        formatter.write_str(reason)
    }
}

impl TileTable {
    /// An empty one for the kernels of this build.
    pub fn new(device: DeviceKind, is_real: bool) -> Self {
        Self {
            format: FORMAT,
            device,
            is_real,
            kernels: KERNELS.to_owned(),
            fastlora: env!("CARGO_PKG_VERSION").to_owned(),
            tuned_at: Utc::now(),
            products: Vec::new(),
        }
    }

    /// Reads a file's text for the kernels of this build on `device`.
    ///
    /// # Errors
    /// A table of another device, of other kernels or of another form; or text that is none.
    pub fn parse(text: &str, device: &DeviceKind) -> Result<Self, Unusable> {
        let damaged = |reason: &dyn fmt::Display| Unusable::Damaged(reason.to_string());
        let value: Value = serde_json::from_str(text).map_err(|error| damaged(&error))?;
        match value["format"].as_u64() {
            Some(FORMAT) => {}
            Some(other) => {
                return Err(Unusable::Foreign(format!("it has form {other}, this fastlora reads {FORMAT}")));
            }
            None => return Err(damaged(&"it has no `format`")),
        }
        let table: Self = serde_json::from_value(value).map_err(|error| damaged(&error))?;
        if table.device != *device {
            return Err(Unusable::Foreign(format!("it was measured on {}, this is {device}", table.device)));
        }
        if table.kernels != KERNELS {
            let version = &table.fastlora;
            return Err(Unusable::Foreign(format!(
                "it was measured with other kernels (fastlora {version})"
            )));
        }
        match table.products.iter().position(|product| !is_plausible(product)) {
            Some(place) => Err(damaged(&format!("product {} cannot have been measured", place + 1))),
            None => Ok(table),
        }
    }

    /// Takes in a measurement, in place of an earlier one of the same product.
    pub fn add(&mut self, product: MeasuredProduct) {
        self.tuned_at = Utc::now();
        match self.products.iter_mut().find(|known| known.shape == product.shape) {
            Some(known) => *known = product,
            None => self.products.push(product),
        }
    }

    /// The tiles that it chooses.
    pub fn tiles(&self) -> Tiles {
        Tiles::Measured(Arc::from(&self.products[..]))
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", serde_json::json!(self))
    }
}

/// Whether [`Tiles`] can reckon with it.
fn is_plausible(product: &MeasuredProduct) -> bool {
    let MeasuredProduct { shape, choices } = product;
    let sizes = [shape.rows, shape.columns, shape.depth];
    let is_known = |choice: &Choice| Choice::ALL.contains(choice);
    sizes.iter().all(|&size| size > 0 && i32::try_from(size).is_ok())
        && !choices.is_empty()
        && choices.iter().all(|measurement| {
            is_known(&measurement.choice)
                && measurement.microseconds.is_finite()
                && measurement.microseconds > 0.0
        })
}

#[cfg(test)]
mod tests {
    use super::super::{Measurement, ProductKind, ProductShape};
    use super::*;

    fn device() -> DeviceKind {
        DeviceKind { name: "GPU".into(), compute_capability: (9, 0), multiprocessors: 132 }
    }

    fn product(rows: usize, columns_of_tile: usize) -> MeasuredProduct {
        let shape = ProductShape { product: ProductKind::BackwardInput, rows, columns: 576, depth: 1536 };
        let choice = Choice { columns: columns_of_tile, cluster_blocks: 1 };
        MeasuredProduct { shape, choices: vec![Measurement { choice, microseconds: 12.5, teraflops: 580.0 }] }
    }

    fn table() -> TileTable {
        let mut table = TileTable::new(device(), true);
        table.add(product(128, 256));
        table.add(product(4096, 192));
        table
    }

    #[test]
    fn a_table_is_read_back_and_chooses() {
        let text = table().to_json();
        let read = TileTable::parse(&text, &device()).unwrap();
        assert_eq!(read, table_at(read.tuned_at));
        assert_eq!(read.tiles().choose(product(4096, 0).shape, 132, &Choice::ALL).columns, 192);
        // What people read of it.
        for part in [r#""product": "backward_input""#, r#""rows": 4096"#, r#""teraflops": 580.0"#, "\"GPU\""]
        {
            assert!(text.contains(part), "no {part} in {text}");
        }
    }

    fn table_at(tuned_at: DateTime<Utc>) -> TileTable {
        TileTable { tuned_at, ..table() }
    }

    #[test]
    fn a_product_that_is_measured_again_is_replaced() {
        let mut table = table();
        table.add(product(128, 128));
        assert_eq!(table.products, [product(128, 128), product(4096, 192)]);
    }

    #[test]
    fn tables_of_something_else_are_told_apart_from_damaged_ones() {
        let text = table().to_json();
        let foreign = [
            ("\"GPU\"", "\"GPX\"", "measured on GPX with 132 multiprocessors"),
            ("132", "114", "this is GPU with 132"),
            (KERNELS, "0", "other kernels (fastlora 0."),
            ("\"format\": 1", "\"format\": 2", "form 2"),
        ];
        for (old, new, part) in foreign {
            let Err(Unusable::Foreign(reason)) = TileTable::parse(&text.replace(old, new), &device()) else {
                panic!("{old} → {new} is taken");
            };
            assert!(reason.contains(part), "{reason}");
        }
        let damaged = [
            ("\"format\": 1", "\"form\": 1"),
            ("\"rows\": 4096", "\"rows\": 0"),
            ("\"rows\": 4096", "\"rows\": -1"),
            ("\"rows\": 4096", "\"rows\": 4294967296"),
            ("\"columns\": 192", "\"columns\": 100"),
            ("\"cluster_blocks\": 1", "\"cluster_blocks\": 3"),
            ("12.5", "0.0"),
            ("12.5", "-1e3"),
            ("\"choices\"", "\"chances\""),
            ("backward_input", "sideways"),
        ];
        for (old, new) in damaged {
            assert!(text.contains(old), "no {old} in {text}");
            let found = TileTable::parse(&text.replacen(old, new, 1), &device());
            assert!(matches!(found, Err(Unusable::Damaged(_))), "{old} → {new}: {found:?}");
        }
        // Cut anywhere.
        for length in 0..text.trim_end().len() {
            let found = text.get(..length).map(|part| TileTable::parse(part, &device()));
            assert!(found.is_none_or(|found| matches!(found, Err(Unusable::Damaged(_)))), "{length}");
        }
    }
}
