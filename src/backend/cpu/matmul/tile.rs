//! The register tile: `ROWS × (VECTORS · LANES)` outputs held in registers while the summed axis runs.

use super::simd::{MAX_LANES, Simd, Vectorized};

/// Vectors side by side in the widest tile.
pub(super) const MAX_VECTORS: usize = 2;

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
    /// Rows, from 1 to `TILE_ROWS`.
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
    /// The CPU has `S`; `target` is valid for `rows` rows of `columns` elements, and nobody else uses its outputs.
    pub(super) unsafe fn compute<S: Simd>(self) {
        macro_rules! dispatch {
            ($($rows:literal)*) => {
                match (self.rows, self.vectors) {
                    // SAFETY: passed on to the caller.
                    $(($rows, 1) => unsafe { S::run(Sized::<$rows, 1>(self)) },
                      ($rows, _) => unsafe { S::run(Sized::<$rows, 2>(self)) },)*
                    _ => unreachable!("tiles have 1 to 14 rows"),
                }
            };
        }
        dispatch!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
    }
}

struct Sized<'a, const ROWS: usize, const VECTORS: usize>(Tile<'a>);

impl<const ROWS: usize, const VECTORS: usize> Vectorized for Sized<'_, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        if ROWS > S::TILE_ROWS {
            unreachable!("no such tile");
        }
        let Tile { stretches, target, .. } = self.0;
        let width = VECTORS * S::LANES;
        // SAFETY: the asserts bound every load; the target is valid by the contract of `compute`.
        unsafe {
            let mut sums = [[S::splat(0.0); VECTORS]; ROWS];
            for Stretch { left, right, depth } in stretches {
                assert!(left.len() >= depth * ROWS && right.len() >= depth * width);
                let (mut left, mut right) = (left.as_ptr(), right.as_ptr());
                for _ in 0..depth {
                    let mut columns = [S::splat(0.0); VECTORS];
                    for (vector, column) in columns.iter_mut().enumerate() {
                        *column = S::load(right.add(vector * S::LANES));
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let value = S::splat(*left.add(row));
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = S::multiply_add(value, column, *sum);
                        }
                    }
                    left = left.add(ROWS);
                    right = right.add(width);
                }
            }
            write::<S, ROWS, VECTORS>(&sums, target);
        }
    }
}

/// Adds bias and addend to the sums and writes them.
///
/// # Safety
/// As for [`Tile::compute`].
#[inline(always)]
unsafe fn write<S: Simd, const ROWS: usize, const VECTORS: usize>(
    sums: &[[S::Vector; VECTORS]; ROWS],
    target: Target,
) {
    let whole = target.columns == VECTORS * S::LANES;
    // SAFETY: a whole row is read and written in place; of a shorter one only the `columns` elements that exist are
    // touched, by way of copies that hold a whole row.
    unsafe {
        let staged_bias = Staged::new(target.bias, target.columns, whole);
        for (row, sums) in sums.iter().enumerate() {
            let output = target.output.add(row * target.output_stride);
            let addend = match target.addend.is_null() {
                true => target.addend,
                false => target.addend.add(row * target.addend_stride),
            };
            if whole {
                write_row::<S, VECTORS>(sums, output, target.bias, addend);
            } else {
                let staged_addend = Staged::new(addend, target.columns, whole);
                let mut staged = [0.0; MAX_VECTORS * MAX_LANES];
                write_row::<S, VECTORS>(
                    sums,
                    staged.as_mut_ptr(),
                    staged_bias.pointer(target.bias),
                    staged_addend.pointer(addend),
                );
                output.copy_from_nonoverlapping(staged.as_ptr(), target.columns);
            }
        }
    }
}

/// A copy of the existing elements of a row that is shorter than its vectors.
struct Staged([f32; MAX_VECTORS * MAX_LANES]);

impl Staged {
    /// # Safety
    /// `from` is null or valid for `columns` elements.
    #[inline(always)]
    unsafe fn new(from: *const f32, columns: usize, whole: bool) -> Self {
        let mut row = [0.0; MAX_VECTORS * MAX_LANES];
        if !whole && !from.is_null() {
            // SAFETY: passed on to the caller; `columns` is less than the row's length.
            unsafe { row.as_mut_ptr().copy_from_nonoverlapping(from, columns) };
        }
        Self(row)
    }

    #[inline(always)]
    fn pointer(&self, original: *const f32) -> *const f32 {
        if original.is_null() { original } else { self.0.as_ptr() }
    }
}

/// # Safety
/// `output` and, unless null, `bias` and `addend` are valid for a whole row.
#[inline(always)]
unsafe fn write_row<S: Simd, const VECTORS: usize>(
    sums: &[S::Vector; VECTORS],
    output: *mut f32,
    bias: *const f32,
    addend: *const f32,
) {
    for (vector, sum) in sums.iter().enumerate() {
        let offset = vector * S::LANES;
        // SAFETY: passed on to the caller.
        unsafe {
            let mut value = *sum;
            if !bias.is_null() {
                value = S::add(value, S::load(bias.add(offset)));
            }
            if !addend.is_null() {
                value = S::add(value, S::load(addend.add(offset)));
            }
            S::store(output.add(offset), value);
        }
    }
}
