//! Blocking and threads: one driver for all products.
//!
//! ```text
//! for each block of rows, for each block of the summed axis:
//!     all threads: pack the left operand once                          (shared, L2/L3)
//!     all threads: for each group of panels (a panel = a tile's columns):
//!         pack the group's right operand                               (the thread's own, L2)
//!         for each tile of rows: for each panel of the group: a register tile
//! ```
//!
//! Every output is one tile's sum per block of the summed axis, added in the order of the blocks, and the blocks depend on
//! the length of that axis alone: not on threads, nor on the other rows.

use std::cell::Cell;
use std::ops::Range;
use std::thread::LocalKey;

use rayon::prelude::*;

use super::element::Element;
use super::pack::{Destination, SPILL, Straight, Transposed};
use super::tile::{Stretch, Target, Tile, TileShape};
use super::{LowRank, Rows, Start, Weight, with_elements};
use crate::backend::cpu::memory::AlignedFloats;
use crate::backend::cpu::simd::Simd;

/// Longest block of the summed axis.
const DEPTH_BLOCK: usize = 768;
/// Most rows packed at once.
const ROW_BLOCK: usize = 2048;
/// Bytes of a group's packed right operand, so that it stays in the thread's L2 (1 MB on Zen 5, less elsewhere).
const GROUP_BYTES: usize = 384 * 1024;
/// Panels in the largest group: beyond, reuse of a left tile from L1 gains nothing.
const MAX_GROUP: usize = 4;
/// Packing of fewer left elements is not worth waking threads.
const PARALLEL_PACK_ELEMENTS: usize = 64 * 1024;

/// Which of the right operand's axes is contiguous in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contiguous {
    /// The summed axis.
    Summed,
    /// The axis that the output keeps.
    Kept,
}

/// `output [rows, columns] = start + bias + left · right + low-rank term`.
pub(super) struct Product<'a> {
    pub simd: Simd,
    pub rows: usize,
    pub columns: usize,
    /// Length of the summed axis.
    pub depth: usize,
    /// `[rows, depth]`.
    pub left: Rows<'a>,
    /// `[columns, depth]`, or `[depth, columns]` where the kept axis is contiguous.
    pub right: &'a Weight<'a>,
    pub right_contiguous: Contiguous,
    pub low_rank: Option<LowRank<'a>>,
    pub bias: Option<&'a [f32]>,
    pub start: Start<'a>,
    pub output: *mut f32,
    pub output_stride: usize,
}

// SAFETY: the threads write disjoint tiles of the output, which the caller borrows exclusively for the product's time.
unsafe impl Sync for Product<'_> {}

impl Product<'_> {
    /// Computes the product on the current thread pool.
    ///
    /// # Safety
    /// `output` is valid for `rows` rows of `columns` elements at `output_stride`, and exclusively the product's; all
    /// operands have the shapes that the fields name (checked by the callers in the module above).
    pub(super) unsafe fn compute(self) {
        let shape = TileShape::of(self.simd);
        if self.rows == 0 || self.columns == 0 {
            return;
        }
        let rank = self.low_rank.map_or(0, |term| term.rank());
        let depth_blocks = self.depth.div_ceil(DEPTH_BLOCK).max(1);
        let block_depth = self.depth.div_ceil(depth_blocks).next_multiple_of(shape.lanes);
        let row_blocks = self.rows.div_ceil(ROW_BLOCK);
        for row_block in 0..row_blocks {
            let rows = share(self.rows, row_blocks, row_block);
            for block in 0..depth_blocks {
                let depth =
                    (block * block_depth).min(self.depth)..((block + 1) * block_depth).min(self.depth);
                let last = block + 1 == depth_blocks;
                let pass = Pass {
                    product: &self,
                    rows: rows.clone(),
                    shape,
                    tiles: rows.len().div_ceil(shape.rows),
                    depth,
                    rank: if last { rank } else { 0 },
                    first: block == 0,
                };
                // SAFETY: passed on to the caller.
                unsafe { pass.run() };
            }
        }
    }
}

/// Part `number` of `total` things shared among `parts` as evenly as possible.
fn share(total: usize, parts: usize, number: usize) -> Range<usize> {
    total * number / parts..total * (number + 1) / parts
}

/// One block of rows × one block of the summed axis.
struct Pass<'a> {
    product: &'a Product<'a>,
    shape: TileShape,
    rows: Range<usize>,
    /// Tiles that share the rows.
    tiles: usize,
    depth: Range<usize>,
    /// Columns of the low-rank term's left operand, packed after the block's.
    rank: usize,
    /// No block came before: the output holds nothing yet.
    first: bool,
}

impl Pass<'_> {
    /// # Safety
    /// As for [`Product::compute`].
    unsafe fn run(&self) {
        let tile_elements = self.shape.rows * (self.depth.len() + self.rank) + SPILL;
        with_scratch(&LEFT, self.tiles * tile_elements, |left| {
            let pack = |(tile, packed): (usize, &mut [f32])| self.pack_left(tile, packed);
            if self.rows.len() * self.depth.len() < PARALLEL_PACK_ELEMENTS {
                left.chunks_mut(tile_elements).enumerate().for_each(pack);
            } else {
                left.par_chunks_mut(tile_elements).enumerate().with_min_len(4).for_each(pack);
            }
            let left = &*left;
            let grid = Grid::choose(self);
            (0..grid.groups * grid.row_parts).into_par_iter().with_max_len(1).for_each(|task| {
                let panels = share(grid.panels, grid.groups, task % grid.groups);
                let tiles = share(self.tiles, grid.row_parts, task / grid.groups);
                // SAFETY: passed on to the caller; tasks have disjoint panels or tiles.
                unsafe { self.compute(panels, tiles, left, tile_elements) };
            });
        });
    }

    /// Rows of tile `tile`, in the product.
    fn tile_rows(&self, tile: usize) -> Range<usize> {
        let rows = share(self.rows.len(), self.tiles, tile);
        self.rows.start + rows.start..self.rows.start + rows.end
    }

    fn pack_left(&self, tile: usize, packed: &mut [f32]) {
        let rows = self.tile_rows(tile);
        let (width, depth) = (rows.len(), self.depth.len());
        let Rows { values, stride } = self.product.left;
        let destination = Destination { to: &mut *packed, width, offset: 0, scale: 1.0 };
        self.product.simd.run(Transposed {
            from: &values[rows.start * stride + self.depth.start..],
            stride,
            count: width,
            depth,
            destination,
        });
        if let (Some(term), 1..) = (self.product.low_rank, self.rank) {
            self.product.simd.run(Transposed {
                from: &term.s.values[rows.start * term.s.stride..],
                stride: term.s.stride,
                count: width,
                depth: self.rank,
                destination: Destination { to: &mut packed[depth * width..], width, offset: 0, scale: 1.0 },
            });
        }
    }

    /// # Safety
    /// As for [`Product::compute`]; nobody else computes these panels' tiles.
    unsafe fn compute(&self, panels: Range<usize>, tiles: Range<usize>, left: &[f32], tile_elements: usize) {
        let panel_elements = self.shape.columns() * (self.depth.len() + self.rank) + SPILL;
        with_scratch(&RIGHT, panels.len() * panel_elements, |right| {
            let mut ranks: [Range<usize>; MAX_GROUP] = Default::default();
            for ((panel, packed), ranks) in
                panels.clone().zip(right.chunks_mut(panel_elements)).zip(&mut ranks)
            {
                *ranks = self.pack_right(panel, packed);
            }
            for tile in tiles {
                let left = &left[tile * tile_elements..][..tile_elements];
                for ((panel, right), ranks) in panels.clone().zip(right.chunks(panel_elements)).zip(&ranks) {
                    // SAFETY: passed on to the caller.
                    unsafe { self.compute_tile(tile, panel, left, right, ranks) };
                }
            }
        });
    }

    /// Columns of panel `panel`.
    fn panel_columns(&self, panel: usize) -> Range<usize> {
        let width = self.shape.columns();
        panel * width..((panel + 1) * width).min(self.product.columns)
    }

    /// Packs a panel; returns the ranks that its columns have a part in, packed after the block's depth.
    fn pack_right(&self, panel: usize, packed: &mut [f32]) -> Range<usize> {
        let columns = self.panel_columns(panel);
        let width = columns.len().next_multiple_of(self.shape.lanes);
        for offset in (0..width).step_by(self.shape.lanes) {
            let first = columns.start + offset;
            let count = self.shape.lanes.min(columns.end - first);
            self.pack_right_block(first, count, packed, width, offset);
        }
        match self.product.low_rank {
            Some(term) if self.rank > 0 => {
                let packed = &mut packed[self.depth.len() * width..];
                term.pack(columns, self.product.right_contiguous, packed, width)
            }
            _ => 0..0,
        }
    }

    /// Packs `count ≤ LANES` columns from `first` on.
    fn pack_right_block(&self, first: usize, count: usize, packed: &mut [f32], width: usize, offset: usize) {
        let weight = self.product.right;
        let (stride, scale) = (weight.columns, weight.scale);
        // Columns of the product are rows of the weight where the summed axis is contiguous, else its columns.
        let wanted = match self.product.right_contiguous {
            Contiguous::Summed => first..first + count,
            Contiguous::Kept => self.depth.clone(),
        };
        let mut done = 0;
        for (part, rows) in weight.rows_by_part(wanted) {
            with_elements!(part, values => match self.product.right_contiguous {
                Contiguous::Summed if rows.len() == count => {
                    let from = &values[rows.start * stride + self.depth.start..];
                    let destination = Destination { to: &mut *packed, width, offset, scale };
                    let depth = self.depth.len();
                    self.product.simd.run(Transposed { from, stride, count, depth, destination });
                }
                Contiguous::Summed => {
                    // Columns of two parts side by side: rare enough to go one by one.
                    for (lane, row) in rows.clone().enumerate() {
                        let from = &values[row * stride..][self.depth.clone()];
                        for (step, value) in from.iter().enumerate() {
                            packed[step * width + offset + done + lane] = value.to_f32() * scale;
                        }
                    }
                }
                Contiguous::Kept => {
                    let from = &values[rows.start * stride + first..];
                    let destination = Destination { to: &mut packed[done * width..], width, offset, scale };
                    let (available, depth) = (stride - first, rows.len());
                    self.product.simd.run(Straight { from, stride, count, available, depth, destination });
                }
            });
            done += rows.len();
        }
    }

    /// # Safety
    /// As for [`Product::compute`]; nobody else computes this tile.
    unsafe fn compute_tile(
        &self,
        tile: usize,
        panel: usize,
        left: &[f32],
        right: &[f32],
        ranks: &Range<usize>,
    ) {
        let product = self.product;
        let rows = self.tile_rows(tile);
        let columns = self.panel_columns(panel);
        let vectors = columns.len().div_ceil(self.shape.lanes);
        let (depth, width) = (self.depth.len(), vectors * self.shape.lanes);
        let stretches = [
            Stretch { left, right, depth },
            Stretch {
                left: &left[(depth + ranks.start) * rows.len()..],
                right: &right[depth * width..],
                depth: ranks.len(),
            },
        ];
        // SAFETY: the tile's rows and columns lie inside the output, the bias and the addend.
        unsafe {
            let output = product.output.add(rows.start * product.output_stride + columns.start);
            let (addend, addend_stride) = match product.start {
                _ if !self.first => (output.cast_const(), product.output_stride),
                Start::Output => (output.cast_const(), product.output_stride),
                Start::Zero => (std::ptr::null(), 0),
                Start::Residual(Rows { values, stride }) => {
                    (values[rows.start * stride + columns.start..].as_ptr(), stride)
                }
            };
            let bias = match product.bias {
                Some(bias) if self.first => bias[columns.clone()].as_ptr(),
                _ => std::ptr::null(),
            };
            let target = Target {
                output,
                output_stride: product.output_stride,
                columns: columns.len(),
                bias,
                addend,
                addend_stride,
            };
            Tile { rows: rows.len(), vectors, stretches, target }.compute(product.simd);
        }
    }
}

/// How a pass is cut into tasks.
struct Grid {
    /// Panels of the output.
    panels: usize,
    /// Groups of panels, each packed by one task (per row part).
    groups: usize,
    /// Parts of the tiles of rows.
    row_parts: usize,
}

impl Grid {
    /// The cut with the shortest expected time of the slowest thread; of equals the one with the largest groups.
    fn choose(pass: &Pass<'_>) -> Self {
        let threads = rayon::current_num_threads();
        let panel_width = pass.shape.columns();
        let panels = pass.product.columns.div_ceil(panel_width);
        let panel_bytes = (pass.depth.len() + pass.rank).max(1) * panel_width * size_of::<f32>();
        let max_group = (GROUP_BYTES / panel_bytes).clamp(1, MAX_GROUP).min(panels);
        let mut best: Option<(usize, Self)> = None;
        for group in (1..=max_group).rev() {
            let groups = panels.div_ceil(group);
            let mut row_parts = 1;
            while row_parts <= pass.tiles && row_parts <= 2 * threads {
                // Packing a panel costs about as much as a tile.
                let task_tiles = panels.div_ceil(groups) * (pass.tiles.div_ceil(row_parts) + 1);
                let time = (groups * row_parts).div_ceil(threads) * task_tiles;
                if best.as_ref().is_none_or(|(best_time, _)| time < *best_time) {
                    best = Some((time, Self { panels, groups, row_parts }));
                }
                row_parts *= 2;
            }
        }
        best.expect("a group of one panel is always possible").1
    }
}

thread_local! {
    /// The packed left operand of the product that this thread started.
    static LEFT: Cell<AlignedFloats> = Cell::default();
    /// The packed right operand of this thread's task.
    static RIGHT: Cell<AlignedFloats> = Cell::default();
}

/// Calls `work` with `elements` values of scratch, contents undefined. Kept for the next call.
///
/// While `work` waits for other threads, this thread may run another product's task, which then finds the scratch
/// taken and makes its own.
fn with_scratch<R>(
    scratch: &'static LocalKey<Cell<AlignedFloats>>,
    elements: usize,
    work: impl FnOnce(&mut [f32]) -> R,
) -> R {
    let mut buffer = scratch.take();
    let result = work(buffer.at_least(elements));
    scratch.set(buffer);
    result
}
