//! Small matrix products on one thread, inside attention: `C (+)= A·B` from cache, register tile by register tile.
//!
//! A tile of C stays in registers over the whole summed axis: six rows times four vectors where the CPU has 32
//! registers, six times two with 16. `A` is read by broadcast, at any strides, so it may be transposed; `B` is read by
//! vectors along its rows.

use super::simd::{Vector, simd_fn};

/// `A`, element `(row, depth)` at `values[row · row_stride + depth · depth_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub values: &'a [f32],
    pub row_stride: usize,
    pub depth_stride: usize,
}

impl<'a> Left<'a> {
    /// Rows one after the other, `stride` apart.
    pub fn rows(values: &'a [f32], stride: usize) -> Self {
        Self { values, row_stride: stride, depth_stride: 1 }
    }

    /// The transpose of rows `stride` apart.
    pub fn transposed(values: &'a [f32], stride: usize) -> Self {
        Self { values, row_stride: 1, depth_stride: stride }
    }
}

/// `B`, element `(depth, column)` at `values[depth · stride + column]`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// Lengths of the axes of `C [rows, columns] = A [rows, depth] · B [depth, columns]`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
}

/// What `C` holds before the product.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Before {
    /// Nothing: it is overwritten.
    Undefined,
    /// What the product is added to.
    Sum,
}

simd_fn! {
    /// `C = A·B` or `C += A·B`; row `i` of `C` is at `c[i · c_stride]`.
    pub(super) fn multiply<V>(
        simd: Simd, shape: Shape, a: Left<'_>, b: Right<'_>, before: Before, c: &mut [f32], c_stride: usize,
    ) -> () {
        let Shape { rows, columns, depth } = shape;
        if rows == 0 || columns == 0 {
            return;
        }
        let last = depth.saturating_sub(1);
        assert!(depth == 0 || (rows - 1) * a.row_stride + last * a.depth_stride < a.values.len(), "A is too short");
        assert!(depth == 0 || last * b.stride + columns <= b.values.len(), "B is too short");
        assert!((rows - 1) * c_stride + columns <= c.len(), "C is too short");
        let operands = Operands {
            a: a.values.as_ptr(),
            row_stride: a.row_stride,
            depth_stride: a.depth_stride,
            b: b.values.as_ptr(),
            b_stride: b.stride,
            depth,
            c: c.as_mut_ptr(),
            c_stride,
            before,
        };
        // SAFETY: the tiles stay inside `rows × columns`, and all three operands hold that (asserted above).
        unsafe {
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    6.. => stripe::<V, 6>(operands.at_row(row), columns),
                    4.. => stripe::<V, 4>(operands.at_row(row), columns),
                    2.. => stripe::<V, 2>(operands.at_row(row), columns),
                    _ => stripe::<V, 1>(operands.at_row(row), columns),
                };
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Operands {
    a: *const f32,
    row_stride: usize,
    depth_stride: usize,
    b: *const f32,
    b_stride: usize,
    depth: usize,
    c: *mut f32,
    c_stride: usize,
    before: Before,
}

impl Operands {
    /// # Safety
    /// `row` must be a row of `A` and `C`.
    #[inline(always)]
    unsafe fn at_row(self, row: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { Self { a: self.a.add(row * self.row_stride), c: self.c.add(row * self.c_stride), ..self } }
    }

    /// # Safety
    /// `column` must be a column of `B` and `C`.
    #[inline(always)]
    unsafe fn at_column(self, column: usize) -> Self {
        // SAFETY: the caller's.
        unsafe { Self { b: self.b.add(column), c: self.c.add(column), ..self } }
    }
}

/// `ROWS` rows of `C`; returns `ROWS`.
///
/// # Safety
/// The operands must hold `ROWS` rows and `columns` columns.
#[inline(always)]
unsafe fn stripe<V: Vector, const ROWS: usize>(operands: Operands, columns: usize) -> usize {
    let mut column = 0;
    // SAFETY: every tile ends before `columns`.
    unsafe {
        if V::REGISTERS >= 32 {
            while column + 4 * V::LANES <= columns {
                tile::<V, ROWS, 4>(operands.at_column(column), V::LANES);
                column += 4 * V::LANES;
            }
        }
        while column + 2 * V::LANES <= columns {
            tile::<V, ROWS, 2>(operands.at_column(column), V::LANES);
            column += 2 * V::LANES;
        }
        while column < columns {
            tile::<V, ROWS, 1>(operands.at_column(column), (columns - column).min(V::LANES));
            column += V::LANES;
        }
    }
    ROWS
}

/// One tile; the last of its `VECTORS` vectors has `last_lanes` lanes.
///
/// # Safety
/// The operands must hold the tile.
#[inline(always)]
unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(operands: Operands, last_lanes: usize) {
    let Operands { a, row_stride, depth_stride, b, b_stride, depth, c, c_stride, before } = operands;
    let whole = last_lanes == V::LANES;
    let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
    // SAFETY: rows, columns and depth are inside the operands: the caller's.
    unsafe {
        if whole {
            for step in 0..depth {
                let b = b.add(step * b_stride);
                let mut right = [V::splat(0.0); VECTORS];
                for (vector, right) in right.iter_mut().enumerate() {
                    *right = V::load(b.add(vector * V::LANES));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let left = V::splat(*a.add(row * row_stride + step * depth_stride));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = left.mul_add(right, *sum);
                    }
                }
            }
        } else {
            for step in 0..depth {
                let right = V::load_first(b.add(step * b_stride), last_lanes);
                for (row, sums) in sums.iter_mut().enumerate() {
                    let left = V::splat(*a.add(row * row_stride + step * depth_stride));
                    sums[0] = left.mul_add(right, sums[0]);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            for (vector, &sum) in sums.iter().enumerate() {
                let c = c.add(row * c_stride + vector * V::LANES);
                match (whole, before) {
                    (true, Before::Undefined) => sum.store(c),
                    (true, Before::Sum) => (V::load(c) + sum).store(c),
                    (false, Before::Undefined) => sum.store_first(c, last_lanes),
                    (false, Before::Sum) => (V::load_first(c, last_lanes) + sum).store_first(c, last_lanes),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Simd;
    use super::*;

    #[test]
    fn products_of_every_remainder_match_float64() {
        let value = |seed: usize| ((seed * 7919 + 13) % 1009) as f32 / 504.5 - 1.0;
        for simd in Simd::available() {
            for rows in [1, 2, 3, 5, 6, 7, 13] {
                for columns in [1, 7, 8, 15, 16, 17, 33, 64, 80, 131] {
                    for depth in [0, 1, 9, 64] {
                        for transposed in [false, true] {
                            let a: Vec<f32> = (0..rows * depth).map(value).collect();
                            let b: Vec<f32> = (0..depth * (columns + 3)).map(|i| value(i + 5)).collect();
                            let start: Vec<f32> = (0..rows * (columns + 2)).map(|i| value(i + 9)).collect();
                            let left =
                                if transposed { Left::transposed(&a, rows) } else { Left::rows(&a, depth) };
                            let right = Right { values: &b, stride: columns + 3 };
                            for before in [Before::Undefined, Before::Sum] {
                                let mut c = start.clone();
                                let shape = Shape { rows, columns, depth };
                                multiply(simd, shape, left, right, before, &mut c, columns + 2);
                                for (place, &found) in c.iter().enumerate() {
                                    let (row, column) = (place / (columns + 2), place % (columns + 2));
                                    if column >= columns {
                                        assert_eq!(found, start[place], "written past a row");
                                        continue;
                                    }
                                    let sum = if before == Before::Sum { start[place] } else { 0.0 };
                                    let expected: f64 = f64::from(sum)
                                        + (0..depth)
                                            .map(|d| {
                                                let a = a[row * left.row_stride + d * left.depth_stride];
                                                f64::from(a) * f64::from(b[d * (columns + 3) + column])
                                            })
                                            .sum::<f64>();
                                    let bound = (depth + 2) as f64 * f64::from(f32::EPSILON);
                                    let error = (f64::from(found) - expected).abs();
                                    assert!(
                                        error <= bound,
                                        "{simd} {rows}×{columns}×{depth} ({row}, {column}): {error:e}"
                                    );
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
