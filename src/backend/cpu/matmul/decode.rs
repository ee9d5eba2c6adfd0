//! Products of few rows: dot products that stream the stored weight once.
//!
//! Every output is `LANES` partial sums over the input, added by halves, then the input's tail: the same whatever the
//! number of rows and threads.

use std::ops::Range;

use rayon::prelude::*;

use super::simd::{Element, Generic, InstructionSet, MAX_LANES, Simd, Vectorized, with_instruction_set};
use super::{Linear, MAX_DECODE_ROWS, Rows, Start, with_elements};

/// Weight rows of a task.
const TASK_ROWS: usize = 64;

/// Computes a decoding product.
///
/// # Safety
/// `y` is valid for the product's rows at `y_stride` and exclusively its own; the arguments are checked.
pub(super) unsafe fn compute(set: InstructionSet, linear: &Linear<'_>, y: *mut f32, y_stride: usize) {
    with_instruction_set(set, Decode { linear, y, y_stride });
}

struct Decode<'a> {
    linear: &'a Linear<'a>,
    y: *mut f32,
    y_stride: usize,
}

// SAFETY: tasks write disjoint columns of `y`, which the caller borrows exclusively for the product's time.
unsafe impl Sync for Decode<'_> {}

impl Generic for Decode<'_> {
    unsafe fn run<S: Simd>(self) {
        let outputs = self.linear.weight.rows();
        (0..outputs.div_ceil(TASK_ROWS)).into_par_iter().for_each(|task| {
            let columns = task * TASK_ROWS..((task + 1) * TASK_ROWS).min(outputs);
            // SAFETY: passed on to the caller; tasks have disjoint columns.
            unsafe { self.compute::<S>(columns) };
        });
    }
}

impl Decode<'_> {
    /// # Safety
    /// As for [`compute`], with the CPU's `S`; nobody else writes these columns.
    unsafe fn compute<S: Simd>(&self, columns: Range<usize>) {
        let Linear { rows, x, weight, bias, start, low_rank } = *self.linear;
        let mut sums = [[0.0; TASK_ROWS]; MAX_DECODE_ROWS];
        let mut first = 0;
        for (part, part_rows) in weight.rows_by_part(columns.clone()) {
            let (width, scale, count) = (weight.columns, weight.scale, part_rows.len());
            with_elements!(part, values => {
                let weight = &values[part_rows.start * width..part_rows.end * width];
                // SAFETY: the CPU has `S`.
                unsafe { S::run(DotProducts { rows, x, width, weight, scale, sums: &mut sums, first }) };
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
            // SAFETY: the CPU has `S`.
            unsafe {
                S::run(DotProducts { rows, x, width, weight, scale: block.scale, sums: &mut sums, first })
            };
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

impl<E: Element> Vectorized for DotProducts<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self) {
        const WEIGHT_ROWS: usize = 4;
        let Self { rows, x, width, weight, scale, sums, first } = self;
        let mut column = first;
        let mut groups = weight.chunks_exact(WEIGHT_ROWS * width);
        for group in &mut groups {
            let mut row = 0;
            while row + 4 <= rows {
                dots::<S, E, WEIGHT_ROWS, 4>(x, row, group, width, scale, sums, column);
                row += 4;
            }
            while row < rows {
                dots::<S, E, WEIGHT_ROWS, 1>(x, row, group, width, scale, sums, column);
                row += 1;
            }
            column += WEIGHT_ROWS;
        }
        for weight_row in groups.remainder().chunks_exact(width) {
            for row in 0..rows {
                dots::<S, E, 1, 1>(x, row, weight_row, width, scale, sums, column);
            }
            column += 1;
        }
    }
}

/// `W × X` dot products: weight rows from `column` on with rows of `x` from `row` on.
#[inline(always)]
fn dots<S: Simd, E: Element, const W: usize, const X: usize>(
    x: Rows<'_>,
    row: usize,
    weight: &[E],
    width: usize,
    scale: f32,
    sums: &mut Sums,
    column: usize,
) {
    let weight: [&[E]; W] = std::array::from_fn(|i| &weight[i * width..][..width]);
    let x: [&[f32]; X] = std::array::from_fn(|i| &x.values[(row + i) * x.stride..][..width]);
    let whole = width - width % S::LANES;
    // SAFETY: every slice holds `width` elements, of which vectors cover the first `whole`.
    unsafe {
        let mut partial = [[S::splat(0.0); X]; W];
        for start in (0..whole).step_by(S::LANES) {
            let mut inputs = [S::splat(0.0); X];
            for (input, x) in inputs.iter_mut().zip(&x) {
                *input = S::load(x.as_ptr().add(start));
            }
            for (partial, weight) in partial.iter_mut().zip(&weight) {
                let weight = E::load::<S>(weight.as_ptr().add(start));
                for (sum, input) in partial.iter_mut().zip(inputs) {
                    *sum = S::multiply_add(weight, input, *sum);
                }
            }
        }
        for (i, partial) in partial.iter().enumerate() {
            for (j, sum) in partial.iter().enumerate() {
                let mut total = sum_lanes::<S>(*sum);
                for k in whole..width {
                    total += weight[i][k].to_f32() * x[j][k];
                }
                sums[row + j][column + i] += scale * total;
            }
        }
    }
}

/// The sum of all lanes: the halves added until one lane is left.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn sum_lanes<S: Simd>(vector: S::Vector) -> f32 {
    let mut lanes = [0.0; MAX_LANES];
    // SAFETY: room for the widest vector.
    unsafe { S::store(lanes.as_mut_ptr(), vector) };
    let mut half = S::LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}
