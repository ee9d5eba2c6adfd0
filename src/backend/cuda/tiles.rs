//! How Hopper's products are cut into tiles: by a rule, or as `fastlora tune` measured it on this kind of device.
//!
//! A product is computed in waves: each multiprocessor takes one tile of 128 rows and [`Choice::columns`] columns, alone or
//! beside the block of its cluster, then the next. It takes the number of waves times what one wave takes. The rule guesses the second factor from the tile's width. A
//! table knows it from measurements of the same columns and depth, at the number of rows that is nearest by ratio: where a
//! batch has just that many rows, what was fastest is chosen; for any other, its own waves are counted.
//!
//! Tiles cut rows and columns. The sum of an element runs over the depth in one order whatever its tile, so no choice changes
//! a bit of any result.

mod table;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::products::TILE;
use crate::device::{Device, Limits};

pub use table::{TileTable, Unusable};

/// What a tile costs beside its columns, in columns: filling and draining the pipeline. A guess, not measured.
const OVERHEAD_COLUMNS: usize = 16;

/// A way to cut a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Columns of a tile.
    pub columns: usize,
    /// Blocks of a cluster, 1 or 2: they compute tiles below each other. Each of two fetches half of the columns' operand for
    /// both: a third less of all for tiles of 256.
    pub cluster_blocks: usize,
}

impl Choice {
    /// Every one that there are kernels for, the widest first, pairs of blocks in front: what the rule takes of equals.
    pub const ALL: [Self; 6] = [
        Self { columns: 256, cluster_blocks: 2 },
        Self { columns: 256, cluster_blocks: 1 },
        Self { columns: 192, cluster_blocks: 2 },
        Self { columns: 192, cluster_blocks: 1 },
        Self { columns: 128, cluster_blocks: 2 },
        Self { columns: 128, cluster_blocks: 1 },
    ];

    /// What the rule takes a product to cost, in columns of a tile for each term of its sums.
    pub(super) fn guess(self, rows: usize, columns: usize, multiprocessors: usize) -> usize {
        self.waves(rows, columns, multiprocessors) * (self.columns + OVERHEAD_COLUMNS)
    }

    /// Whether there is work for all blocks of a cluster, and room.
    fn is_of_use(self, rows: usize, multiprocessors: usize) -> bool {
        self.cluster_blocks == 1 || rows > TILE && multiprocessors >= self.cluster_blocks
    }

    /// Clusters that compute a product together, each as many of its tiles as it takes.
    pub(super) fn clusters(self, rows: usize, columns: usize, multiprocessors: usize) -> usize {
        self.tiles(rows, columns).min(self.clusters_at_once(multiprocessors))
    }

    /// Tiles that a multiprocessor computes, at most.
    fn waves(self, rows: usize, columns: usize, multiprocessors: usize) -> usize {
        self.tiles(rows, columns).div_ceil(self.clusters_at_once(multiprocessors))
    }

    /// Tiles of a whole cluster.
    fn tiles(self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(TILE * self.cluster_blocks) * columns.div_ceil(self.columns)
    }

    fn clusters_at_once(self, multiprocessors: usize) -> usize {
        (multiprocessors / self.cluster_blocks).max(1)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.cluster_blocks > 1 {
            write!(formatter, "{}·", self.cluster_blocks)?;
        }
        write!(formatter, "{TILE}×{}", self.columns)
    }
}

/// Which of the two kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProductKind {
    /// `y = x · Wᵀ`.
    Forward,
    /// `dx = dy · W`.
    BackwardInput,
}

impl fmt::Display for ProductKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Forward => "forward",
            Self::BackwardInput => "input gradient",
        })
    }
}

/// What a choice is made for. The adapters' few ranks do not count, they are the same share of every tile; nor does what a product
/// goes on with: it is chosen for as the plain one was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductShape {
    /// Which product.
    pub product: ProductKind,
    /// Rows of the output: tokens.
    pub rows: usize,
    /// Columns of the output.
    pub columns: usize,
    /// Terms of each sum.
    pub depth: usize,
}

impl ProductShape {
    /// Whether the two differ in their rows alone.
    fn is_like(&self, other: &Self) -> bool {
        Self { rows: 0, ..*self } == Self { rows: 0, ..*other }
    }
}

/// What one choice took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The choice.
    #[serde(flatten)]
    pub choice: Choice,
    /// Median time.
    pub microseconds: f64,
    /// 10¹² operations a second.
    pub teraflops: f64,
}

/// What every choice took for one product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MeasuredProduct {
    /// The product.
    #[serde(flatten)]
    pub shape: ProductShape,
    /// Its choices, the fastest first.
    pub choices: Vec<Measurement>,
}

/// Devices of one kind take the same tiles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceKind {
    /// As its maker calls it.
    pub name: String,
    /// Such as (9, 0).
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
}

impl DeviceKind {
    /// The kind of a device by its name and what its hardware allows.
    pub fn new(name: String, limits: Limits) -> Self {
        let Limits { compute_capability, multiprocessor_count: multiprocessors, .. } = limits;
        Self { name, compute_capability, multiprocessors }
    }

    /// The kind of `device`.
    pub fn of(device: &impl Device) -> Self {
        Self::new(device.name(), device.limits())
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} with {} multiprocessors", self.name, self.multiprocessors)
    }
}

/// Chooses the tiles of each product.
#[derive(Clone, Debug, Default)]
pub enum Tiles {
    /// By guess.
    #[default]
    Rule,
    /// By what was measured on devices of this kind, and by guess where nothing was.
    Measured(Arc<[MeasuredProduct]>),
}

impl Tiles {
    /// The one of `choices` that costs least, and of equals the first.
    pub fn choose(&self, shape: ProductShape, multiprocessors: usize, choices: &[Choice]) -> Choice {
        let waves = |choice: Choice, rows| choice.waves(rows, shape.columns, multiprocessors) as f64;
        let is_open =
            |choice: &Choice| choices.contains(choice) && choice.is_of_use(shape.rows, multiprocessors);
        if let Some(measured) = self.nearest(shape) {
            let cost = |measurement: &&Measurement| {
                let Measurement { choice, microseconds, .. } = **measurement;
                waves(choice, shape.rows) * microseconds / waves(choice, measured.shape.rows)
            };
            let known = measured.choices.iter().filter(|measurement| is_open(&measurement.choice));
            let least = known.min_by(|one, other| cost(one).total_cmp(&cost(other)));
            if let Some(measurement) = least {
                return measurement.choice;
            }
        }
        let cost = |choice: &Choice| choice.guess(shape.rows, shape.columns, multiprocessors);
        let [widest, ..] = Choice::ALL;
        choices.iter().copied().filter(is_open).min_by_key(cost).unwrap_or(widest)
    }

    /// The measured product that differs in its rows alone, and by the smallest ratio.
    fn nearest(&self, shape: ProductShape) -> Option<&MeasuredProduct> {
        let Self::Measured(products) = self else { return None };
        let ratio = |product: &&MeasuredProduct| {
            let [rows, other] = [shape.rows, product.shape.rows].map(|rows| rows.max(1) as f64);
            (rows / other).ln().abs()
        };
        let like = products.iter().filter(|product| product.shape.is_like(&shape));
        like.min_by(|one, other| ratio(one).total_cmp(&ratio(other)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without clusters.
    const ALONE: [Choice; 3] = [Choice::ALL[1], Choice::ALL[3], Choice::ALL[5]];

    const fn forward(rows: usize, columns: usize, depth: usize) -> ProductShape {
        ProductShape { product: ProductKind::Forward, rows, columns, depth }
    }

    fn measured(shape: ProductShape, microseconds: [f64; 3]) -> MeasuredProduct {
        let mut choices: Vec<Measurement> = ALONE
            .iter()
            .zip(microseconds)
            .map(|(&choice, microseconds)| Measurement { choice, microseconds, teraflops: 1.0 })
            .collect();
        choices.sort_by(|one, other| one.microseconds.total_cmp(&other.microseconds));
        MeasuredProduct { shape, choices }
    }

    #[test]
    fn the_rule_fits_the_width_and_the_waves() {
        let columns = |rows, columns, multiprocessors| {
            Tiles::Rule.choose(forward(rows, columns, 64), multiprocessors, &ALONE).columns
        };
        // 576 columns are three times 192: 256 would compute a quarter for nothing.
        assert_eq!(columns(16_384, 576, 132), 192);
        assert_eq!(columns(16_384, 8960, 132), 256);
        // One row of tiles: as many multiprocessors as possible.
        assert_eq!(columns(100, 1536, 132), 128);
        assert_eq!(columns(1, 8, 4), 128);
        assert_eq!(columns(0, 0, 132), 256);
    }

    #[test]
    fn pairs_of_blocks_are_taken_where_they_make_no_more_waves() {
        let blocks = |rows, columns, width, multiprocessors| {
            let mut choices = Choice::ALL.to_vec();
            choices.retain(|choice| choice.columns == width);
            Tiles::Rule.choose(forward(rows, columns, 64), multiprocessors, &choices).cluster_blocks
        };
        // 128 · 6 tiles are as many in pairs.
        assert_eq!(blocks(16_384, 1536, 256, 132), 2);
        // One row of tiles has no neighbour; 33 · 4 tiles are one wave, and 17 · 4 pairs are two.
        assert_eq!(blocks(128, 1536, 128, 132), 1);
        assert_eq!(blocks(33 * 128, 1024, 256, 132), 1);
        // Of three rows of tiles the last leaves a multiprocessor idle that has nothing to do anyway.
        assert_eq!(blocks(300, 72, 128, 132), 2);
        assert_eq!(blocks(300, 72, 128, 1), 1);
        // One row of tiles: nor does a measurement make a pair of use.
        let pair = Choice { columns: 256, cluster_blocks: 2 };
        let choices = vec![Measurement { choice: pair, microseconds: 1.0, teraflops: 1.0 }];
        let tiles = Tiles::Measured([MeasuredProduct { shape: forward(4096, 512, 64), choices }].into());
        assert_eq!(tiles.choose(forward(4096, 512, 64), 132, &Choice::ALL), pair);
        assert_eq!(tiles.choose(forward(100, 512, 64), 132, &Choice::ALL).cluster_blocks, 1);
    }

    #[test]
    fn what_was_fastest_is_chosen_where_the_rule_says_otherwise() {
        let shape = forward(16_384, 8960, 1536);
        let tiles = Tiles::Measured([measured(shape, [30.0, 10.0, 20.0])].into());
        assert_eq!(Tiles::Rule.choose(shape, 132, &ALONE).columns, 256);
        assert_eq!(tiles.choose(shape, 132, &ALONE).columns, 192);
        // A kernel that has fewer tiles takes the best of them.
        let [widest, _, narrowest] = ALONE;
        assert_eq!(tiles.choose(shape, 132, &[widest, narrowest]), narrowest);
        assert_eq!(Tiles::Rule.choose(shape, 132, &[narrowest]), narrowest);
        // Another depth, width or direction was not measured.
        for other in [
            ProductShape { depth: 1544, ..shape },
            ProductShape { columns: 8968, ..shape },
            ProductShape { product: ProductKind::BackwardInput, ..shape },
        ] {
            assert_eq!(tiles.choose(other, 132, &ALONE), Tiles::Rule.choose(other, 132, &ALONE), "{other:?}");
        }
    }

    #[test]
    fn between_measured_rows_the_nearest_tells_what_a_wave_takes() {
        // 10 multiprocessors, 2560 columns: a row of tiles is 10 of 256, 14 of 192 or 20 of 128.
        let products = [
            // One wave and twice two: a wave of each width takes 10, 6 and 7.
            measured(forward(128, 2560, 64), [10.0, 12.0, 14.0]),
            // 20, 28 and 40 waves: 13, 9 and 10.
            measured(forward(2560, 2560, 64), [260.0, 252.0, 400.0]),
        ];
        let tiles = Tiles::Measured(products.into());
        let columns = |rows| tiles.choose(forward(rows, 2560, 64), 10, &ALONE).columns;
        assert_eq!((columns(1), columns(128), columns(2560), columns(1 << 20)), (256, 256, 192, 192));
        // As the first: two waves of 256 take 20, three of 192 take 18.
        assert_eq!(columns(256), 192);
        // As the second: 5 waves of 256 take 65, 7 of 192 take 63. As the first they would take 50 and 42, those of 128 70.
        assert_eq!(columns(640), 192);
        // An empty batch launches nothing, whatever is chosen.
        assert_eq!(columns(0), 256);
    }

    /// A wave more is what makes a width lose between the rows that were measured.
    #[test]
    fn waves_are_counted_for_the_rows_at_hand() {
        // 4 multiprocessors, 512 columns: tiles of 256 and 128 come to 2 and 4 a row of tiles.
        let tiles = Tiles::Measured([measured(forward(256, 512, 64), [10.0, 100.0, 11.0])].into());
        let columns = |rows| tiles.choose(forward(rows, 512, 64), 4, &ALONE).columns;
        // One wave of 256 takes 10, two of 128 take 11.
        assert_eq!(columns(256), 256);
        // One row of tiles: still one wave of 256, but only one of 128.
        assert_eq!(columns(128), 128);
        // Three: two waves of 256 are 20, three of 128 are 16.5.
        assert_eq!(columns(384), 128);
    }
}
