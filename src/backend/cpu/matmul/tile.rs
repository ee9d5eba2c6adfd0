//! The register tile: `ROWS × (VECTORS · LANES)` outputs held in registers while the summed axis runs.

use std::mem::MaybeUninit;

use crate::backend::cpu::simd::{Kernel, MAX_LANES, Simd, Vector, prefetch};

/// Vectors side by side in the widest tile.
pub(super) const MAX_VECTORS: usize = 2;
/// Columns of the widest tile of any instruction set.
const MAX_WIDTH: usize = MAX_VECTORS * MAX_LANES;

/// The largest tile of an instruction set.
#[derive(Clone, Copy)]
pub(super) struct TileShape {
    /// Most rows.
    pub rows: usize,
    /// Lanes of a vector, of which a tile has up to [`MAX_VECTORS`] side by side.
    pub lanes: usize,
}

impl TileShape {
    /// The largest tile of `simd`.
    pub(super) fn of(simd: Simd) -> Self {
        struct Shape;
        impl Kernel for Shape {
            type Output = TileShape;
            #[inline(always)]
            fn run<V: Vector>(self) -> TileShape {
                TileShape { rows: tile_rows::<V>(), lanes: V::LANES }
            }
        }
        simd.run(Shape)
    }

    /// Columns of the widest tile.
    pub(super) fn columns(self) -> usize {
        MAX_VECTORS * self.lanes
    }
}

/// Rows whose sums fit into the registers beside two vectors of the right operand and one of the left.
const fn tile_rows<V: Vector>() -> usize {
    (V::REGISTERS - MAX_VECTORS - 1) / MAX_VECTORS
}

/// A stretch of the summed axis: packed operands, `left [depth][rows]` and `right [depth][vectors · lanes]`.
#[derive(Clone, Copy)]
pub(super) struct Stretch<'a> {
    /// Packed left operand.
    pub left: &'a [f32],
    /// Packed right operand.
    pub right: &'a [f32],
    /// Steps.
    pub depth: usize,
}

/// Where a tile's sums go: `output = sum + bias + (addend | output)`.
#[derive(Clone, Copy)]
pub(super) struct Target {
    /// The tile's first output.
    pub output: *mut f32,
    /// Distance between rows of the output.
    pub output_stride: usize,
    /// Columns of the tile that exist.
    pub columns: usize,
    /// The bias of the tile's first column; null: none.
    pub bias: *const f32,
    /// The tile's first element of what is added, with its row stride; null: nothing.
    pub addend: *const f32,
    /// Distance between rows of the addend.
    pub addend_stride: usize,
}

/// One tile: sums over both stretches, in turn, in the same registers, then writes.
pub(super) struct Tile<'a> {
    /// Rows, from 1 to [`TileShape::rows`].
    pub rows: usize,
    /// Vectors side by side, from 1 to [`MAX_VECTORS`].
    pub vectors: usize,
    /// The product's own axis, then the low-rank term's.
    pub stretches: [Stretch<'a>; 2],
    /// Where the sums go.
    pub target: Target,
}

impl Tile<'_> {
    /// Computes the tile.
    ///
    /// # Safety
    /// `target` is valid for `rows` rows of `columns` elements, and nobody else uses its outputs.
    pub(super) unsafe fn compute(self, simd: Simd) {
        macro_rules! dispatch {
            ($($rows:literal)*) => {
                match (self.rows, self.vectors) {
                    $(($rows, 1) => simd.run(Sized::<$rows, 1>(self)),
                      ($rows, _) => simd.run(Sized::<$rows, 2>(self)),)*
                    _ => unreachable!("tiles have 1 to 14 rows"),
                }
            };
        }
        dispatch!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    }
}

struct Sized<'a, const ROWS: usize, const VECTORS: usize>(Tile<'a>);

impl<const ROWS: usize, const VECTORS: usize> Kernel for Sized<'_, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        if ROWS > tile_rows::<V>() {
            unreachable!("no such tile");
        }
        let Tile { stretches, target, .. } = self.0;
        let width = VECTORS * V::LANES;
        // What the sums are added to, and where they go, arrives while they are summed.
        for row in 0..ROWS {
            for column in (0..width).step_by(V::LANES) {
                prefetch(target.output.wrapping_add(row * target.output_stride + column));
                if !target.addend.is_null() {
                    prefetch(target.addend.wrapping_add(row * target.addend_stride + column));
                }
            }
        }
        // SAFETY: the asserts bound every load; the target is valid by the contract of `compute`.
        unsafe {
            let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
            for Stretch { left, right, depth } in stretches {
                assert!(left.len() >= depth * ROWS && right.len() >= depth * width);
                let (mut left, mut right) = (left.as_ptr(), right.as_ptr());
                for _ in 0..depth {
                    let mut columns = [V::splat(0.0); VECTORS];
                    for (vector, column) in columns.iter_mut().enumerate() {
                        *column = V::load(right.add(vector * V::LANES));
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let value = V::splat(*left.add(row));
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = value.mul_add(column, *sum);
                        }
                    }
                    left = left.add(ROWS);
                    right = right.add(width);
                }
            }
            // Through memory: indexed by a variable below, the sums themselves would live there, not in registers.
            let mut stored = MaybeUninit::<[[f32; MAX_WIDTH]; ROWS]>::uninit();
            let stored = stored.as_mut_ptr().cast::<f32>();
            for (row, sums) in sums.iter().enumerate() {
                for (vector, sum) in sums.iter().enumerate() {
                    sum.store(stored.add(row * MAX_WIDTH + vector * V::LANES));
                }
            }
            write::<V, VECTORS>(ROWS, stored, target);
        }
    }
}

/// Adds bias and addend to `rows` rows of sums, [`MAX_WIDTH`] apart, and writes them.
///
/// # Safety
/// As for [`Tile::compute`].
#[inline(always)]
unsafe fn write<V: Vector, const VECTORS: usize>(rows: usize, sums: *mut f32, target: Target) {
    let Target { output, output_stride, columns, bias, addend, addend_stride } = target;
    let whole = columns == VECTORS * V::LANES;
    // SAFETY: whole rows are read and written in place; of a shorter one only the `columns` elements that exist are
    // touched, by way of copies with room for whole vectors.
    unsafe {
        let (mut bias_copy, mut addend_copy) = ([0.0; MAX_WIDTH], [0.0; MAX_WIDTH]);
        let bias = if whole { bias } else { copy(bias, &mut bias_copy, columns) };
        for row in 0..rows {
            let sums = sums.add(row * MAX_WIDTH);
            let output = output.add(row * output_stride);
            let addend = if addend.is_null() { addend } else { addend.add(row * addend_stride) };
            if whole {
                write_row::<V, VECTORS>(sums, output, bias, addend);
            } else {
                let addend = copy(addend, &mut addend_copy, columns);
                write_row::<V, VECTORS>(sums, sums, bias, addend);
                output.copy_from_nonoverlapping(sums, columns);
            }
        }
    }
}

/// A copy of the `columns` elements from `from` on, in a row with room for whole vectors; null stays null.
///
/// # Safety
/// `from` is null or valid for `columns` elements.
#[inline(always)]
unsafe fn copy(from: *const f32, row: &mut [f32; MAX_WIDTH], columns: usize) -> *const f32 {
    if from.is_null() {
        return from;
    }
    // SAFETY: passed on to the caller.
    row[..columns].copy_from_slice(unsafe { std::slice::from_raw_parts(from, columns) });
    row.as_ptr()
}

/// # Safety
/// `sums`, `output` (which may be one) and, unless null, `bias` and `addend` are valid for whole vectors.
#[inline(always)]
unsafe fn write_row<V: Vector, const VECTORS: usize>(
    sums: *const f32,
    output: *mut f32,
    bias: *const f32,
    addend: *const f32,
) {
    for offset in (0..VECTORS * V::LANES).step_by(V::LANES) {
        // SAFETY: passed on to the caller.
        unsafe {
            let mut value = V::load(sums.add(offset));
            if !bias.is_null() {
                value = value + V::load(bias.add(offset));
            }
            if !addend.is_null() {
                value = value + V::load(addend.add(offset));
            }
            value.store(output.add(offset));
        }
    }
}
