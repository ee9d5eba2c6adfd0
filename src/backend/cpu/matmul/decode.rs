//! Products of few rows: dot products that stream the stored weight once.
//!
//! Every output is four vectors of partial sums over the input, added by halves, then the input's tail: the same whatever
//! the number of rows and threads.

use std::ops::Range;

use super::element::Element;
use super::{Linear, MAX_DECODE_ROWS, Rows, Start, with_elements};
use crate::backend::cpu::simd::{Kernel, Simd, Vector, prefetch};
use crate::backend::cpu::team::Team;

/// Weight rows of a task.
const TASK_ROWS: usize = 32;

/// Computes a decoding product.
///
/// # Safety
/// `y` is valid for the product's rows at `y_stride` and exclusively its own; the arguments are checked.
pub(super) unsafe fn compute(team: &Team, simd: Simd, linear: &Linear<'_>, y: *mut f32, y_stride: usize) {
    let outputs = linear.weight.rows();
    let decode = Decode { simd, linear, y, y_stride };
    team.for_each(outputs.div_ceil(TASK_ROWS), |task| {
        let columns = task * TASK_ROWS..((task + 1) * TASK_ROWS).min(outputs);
        // SAFETY: passed on to the caller; tasks have disjoint columns.
        unsafe { decode.compute(columns) };
    });
}

struct Decode<'a> {
    simd: Simd,
    linear: &'a Linear<'a>,
    y: *mut f32,
    y_stride: usize,
}

// SAFETY: tasks write disjoint columns of `y`, which the caller borrows exclusively for the product's time.
unsafe impl Sync for Decode<'_> {}

impl Decode<'_> {
    /// # Safety
    /// As for [`compute()`]; nobody else writes these columns.
    unsafe fn compute(&self, columns: Range<usize>) {
        let Linear { rows, x, weight, bias, start, low_rank } = *self.linear;
        let mut sums = [[0.0; TASK_ROWS]; MAX_DECODE_ROWS];
        let mut first = 0;
        for (part, part_rows) in weight.rows_by_part(columns.clone()) {
            let (width, scale, count) = (weight.columns, weight.scale, part_rows.len());
            with_elements!(part, values => {
                let weight = &values[part_rows.start * width..part_rows.end * width];
                self.simd.run(DotProducts { rows, x, width, weight, scale, sums: &mut sums, first });
            });
            first += count;
        }
        for (s, block) in low_rank.iter().flat_map(|term| term.blocks.iter().map(|block| (term.s, block))) {
            let own = columns.start.max(block.columns.start)..columns.end.min(block.columns.end);
            let width = block.ranks.len();
            if own.is_empty() || width == 0 || rows == 0 {
                continue;
            }
            let x = Rows { values: &s.values[block.ranks.start..], stride: s.stride };
            let first = own.start - columns.start;
            let weight = &block.factor
                [(own.start - block.columns.start) * width..(own.end - block.columns.start) * width];
            self.simd.run(DotProducts { rows, x, width, weight, scale: block.scale, sums: &mut sums, first });
        }
        for (row, sums) in sums.iter().enumerate().take(rows) {
            for (column, sum) in columns.clone().zip(sums) {
                // SAFETY: inside the output, and this task's own.
                unsafe {
                    let output = self.y.add(row * self.y_stride + column);
                    let addend = match start {
                        Start::Zero => 0.0,
                        Start::Output => *output,
                        Start::Residual(residual) => residual.values[row * residual.stride + column],
                    };
                    *output = sum + bias.map_or(0.0, |bias| bias[column]) + addend;
                }
            }
        }
    }
}

/// Sums of a task: `[row of x][column within the task]`.
type Sums = [[f32; TASK_ROWS]; MAX_DECODE_ROWS];

/// `sums[m][first..] += scale · x[m] · Wᵀ` for `rows` rows of `x`.
struct DotProducts<'a, E> {
    rows: usize,
    x: Rows<'a>,
    /// Length of the rows of `x` and `W`.
    width: usize,
    /// Whole rows.
    weight: &'a [E],
    scale: f32,
    sums: &'a mut Sums,
    first: usize,
}

impl<E: Element> Kernel for DotProducts<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self { rows, x, width, weight, scale, sums, first } = self;
        for (column, weight) in (first..).zip(weight.chunks_exact(width)) {
            let mut row = 0;
            while row < rows {
                row += match rows - row {
                    4.. => dots::<V, E, 4>(x, row, weight, scale, sums, column),
                    2.. => dots::<V, E, 2>(x, row, weight, scale, sums, column),
                    _ => dots::<V, E, 1>(x, row, weight, scale, sums, column),
                };
            }
        }
    }
}

/// Dot products of one row of the weight, read front to back as the prefetchers like it, with `X` rows of `x` from `row`
/// on; returns `X`.
#[inline(always)]
fn dots<V: Vector, E: Element, const X: usize>(
    x: Rows<'_>,
    row: usize,
    weight: &[E],
    scale: f32,
    sums: &mut Sums,
    column: usize,
) -> usize {
    // Chains of multiply-adds, to hide their latency.
    const CHAINS: usize = 4;
    // Bytes ahead of the loads: the processors' own prefetchers stop at every page.
    const AHEAD: usize = 2048;
    const LINE: usize = 64;
    let width = weight.len();
    let x: [&[f32]; X] = std::array::from_fn(|i| &x.values[(row + i) * x.stride..][..width]);
    let mut partial = [[V::splat(0.0); CHAINS]; X];
    let mut add = |start: usize, chain: usize| {
        // SAFETY: every slice holds `width` elements, and start + LANES <= width.
        unsafe {
            let weight: V = E::load(weight.as_ptr().add(start));
            for (partial, x) in partial.iter_mut().zip(&x) {
                partial[chain] = weight.mul_add(V::load(x.as_ptr().add(start)), partial[chain]);
            }
        }
    };
    let (step, whole) = (CHAINS * V::LANES, width - width % V::LANES);
    let mut start = 0;
    while start + step <= whole {
        let ahead = weight.as_ptr().wrapping_add(start).wrapping_byte_add(AHEAD);
        for line in (0..step * size_of::<E>()).step_by(LINE) {
            prefetch(ahead.wrapping_byte_add(line));
        }
        for chain in 0..CHAINS {
            add(start + chain * V::LANES, chain);
        }
        start += step;
    }
    while start < whole {
        add(start, 0);
        start += V::LANES;
    }
    for (i, ([a, b, c, d], x)) in partial.into_iter().zip(&x).enumerate() {
        let mut total = ((a + b) + (c + d)).sum();
        for k in whole..width {
            total += weight[k].to_f32() * x[k];
        }
        sums[row + i][column] += scale * total;
    }
    X
}
