//! The adapters' own products, narrow on one side: `s = x·Aᵀ`, `ds = scale·dy·B`, `dB += scale·dyᵀ·s`, `dA += dsᵀ·x`.
//!
//! They do few operations with each element of `x` and `dy`. Packing these, as the wide products do, would cost more
//! than the product: rows are read where they lie, and columns copied once for all tiles of a task.
//!
//! Legend: `T` rows, `I` / `O` widths of `x` / `dy`, `R` summed ranks of the group.

use super::CpuBackend;
use super::memory::{AlignedFloats, DisjointParts};
use super::product::{Before, Left, Right, Shape, multiply};
use super::simd::{MAX_LANES, Simd, simd_fn};
use super::threads::Threads;
use crate::backend::{LinearGroup, PlacedAdapter};

/// Rows of a task of `s` and `ds`; a multiple of a register tile's.
const TASK_ROWS: usize = 48;
/// Columns of `dy` of a task of `dB`; a multiple of a register tile's rows.
const TASK_OUTPUTS: usize = 48;
/// Columns of `x` of a task of `dA`: two cache lines.
const TASK_INPUTS: usize = 32;
/// Rows summed in one go in `dA` and `dB`.
const DEPTH_BLOCK: usize = 128;

/// The adapters of a group, and what computes their products.
pub(super) struct AdapterProducts<'a> {
    pub threads: &'a Threads,
    pub simd: Simd,
    pub group: &'a LinearGroup<CpuBackend>,
    /// `T`, at least 1.
    pub rows: usize,
    /// `R`, at least 1.
    pub rank: usize,
}

impl AdapterProducts<'_> {
    /// `s [T, R] = x [T, I] · Aᵀ`, `a [R, I]`; `transposed` is scratch.
    pub fn down(&self, x: &[f32], a: &[f32], transposed: &mut AlignedFloats, s: &mut [f32]) {
        let (rank, inputs) = (self.rank, self.group.in_features);
        let transposed = transposed.at_least(rank * inputs);
        transpose(self.simd, a, rank, inputs, transposed);
        let a = Right { values: transposed, stride: rank };
        self.for_row_tasks(s, |first, rows, s| {
            let x = Left::rows(&x[first * inputs..][..rows * inputs], inputs);
            let shape = Shape { rows, columns: rank, depth: inputs };
            multiply(self.simd, shape, x, a, Before::Undefined, s, rank);
        });
    }

    /// `ds [T, R] = scale · dy [T, O] · B`, each adapter from its own columns of `dy`.
    pub fn down_gradient(&self, dy: &[f32], adapters: &[f32], ds: &mut [f32]) {
        let (rank, outputs) = (self.rank, self.group.out_features());
        self.for_row_tasks(ds, |first, rows, ds| {
            for PlacedAdapter { slot, out_column, out_features, rank_column } in self.group.adapters() {
                let dy = Left::rows(&dy[first * outputs + out_column..self.rows * outputs], outputs);
                let b = &adapters[slot.b_offset..][..out_features * slot.rank];
                let b = Right { values: b, stride: slot.rank };
                let shape = Shape { rows, columns: slot.rank, depth: out_features };
                multiply(self.simd, shape, dy, b, Before::Undefined, &mut ds[rank_column..], rank);
                for row in ds.chunks_exact_mut(rank) {
                    row[rank_column..][..slot.rank].iter_mut().for_each(|value| *value *= slot.scale);
                }
            }
        });
    }

    /// Adds every adapter's `dB [O, r] = scale · dyᵀ·s` to `gradients`.
    pub fn b_gradients(&self, dy: &[f32], s: &[f32], gradients: &mut [f32]) {
        let outputs = self.group.out_features();
        let gradients = DisjointParts::new(gradients);
        let tasks = |adapter: &PlacedAdapter| outer_product_tasks(adapter.out_features);
        let task_count = self.group.adapters().map(|adapter| tasks(&adapter)).sum();
        self.threads.for_each(task_count, |mut task| {
            for adapter in self.group.adapters() {
                if task >= tasks(&adapter) {
                    task -= tasks(&adapter);
                    continue;
                }
                let PlacedAdapter { slot, out_column, out_features, rank_column } = adapter;
                let product = OuterProduct {
                    simd: self.simd,
                    rows: self.rows,
                    left: Right { values: &dy[out_column..], stride: outputs },
                    outputs: out_features,
                    right: Right { values: &s[rank_column..], stride: self.rank },
                    columns: slot.rank,
                    factor: slot.scale,
                };
                return product.run(task, &mut self.threads.scratch(), &gradients, slot.b_offset);
            }
        });
    }

    /// Adds `dA [R, I] = dsᵀ·x` to `gradient`.
    pub fn a_gradient(&self, x: &[f32], ds: &[f32], gradient: &mut [f32]) {
        let (rank, inputs) = (self.rank, self.group.in_features);
        let gradient = DisjointParts::new(gradient);
        self.threads.for_each(inputs.div_ceil(TASK_INPUTS), |task| {
            let first = task * TASK_INPUTS;
            let columns = TASK_INPUTS.min(inputs - first);
            let mut scratch = self.threads.scratch();
            let elements = rank * columns;
            let (sums, block) = scratch.at_least(elements + DEPTH_BLOCK * columns).split_at_mut(elements);
            let x = Right { values: &x[first..], stride: inputs };
            for_row_blocks(self.simd, self.rows, x, columns, block, |first, depth, x, before| {
                let shape = Shape { rows: rank, columns, depth };
                let ds = Left::transposed(&ds[first * rank..], rank);
                multiply(self.simd, shape, ds, Right { values: x, stride: columns }, before, sums, columns);
            });
            for (row, sums) in sums.chunks_exact(columns).enumerate() {
                let start = row * inputs + first;
                // SAFETY: one part for each row and task.
                let gradient = unsafe { gradient.part(start..start + columns) };
                add_scaled(self.simd, 1.0, sums, gradient);
            }
        });
    }

    /// Cuts `output [T, R]` into tasks of whole rows: `task(first row, rows, their part)`.
    fn for_row_tasks(&self, output: &mut [f32], task: impl Fn(usize, usize, &mut [f32]) + Send + Sync) {
        let output = DisjointParts::new(output);
        self.threads.for_each(self.rows.div_ceil(TASK_ROWS), |number| {
            let first = number * TASK_ROWS;
            let rows = TASK_ROWS.min(self.rows - first);
            // SAFETY: one part for each task.
            task(first, rows, unsafe { output.part(first * self.rank..(first + rows) * self.rank) });
        });
    }
}

/// `left [rows, outputs]ᵀ · right [rows, columns]` times `factor`: the gradient of a matrix whose input is `right`.
pub(super) struct OuterProduct<'a> {
    pub simd: Simd,
    pub rows: usize,
    pub left: Right<'a>,
    pub outputs: usize,
    pub right: Right<'a>,
    pub columns: usize,
    pub factor: f32,
}

fn outer_product_tasks(outputs: usize) -> usize {
    outputs.div_ceil(TASK_OUTPUTS)
}

impl OuterProduct<'_> {
    /// Tasks that [`run`](Self::run) knows, each for some of the outputs.
    pub fn task_count(&self) -> usize {
        outer_product_tasks(self.outputs)
    }

    /// Adds a task's rows of the product `[outputs, columns]`, which stands in `gradients` from `offset` on and which no
    /// other task writes.
    pub fn run(
        &self,
        task: usize,
        scratch: &mut AlignedFloats,
        gradients: &DisjointParts<'_, f32>,
        offset: usize,
    ) {
        let Self { simd, rows, left, right, columns, .. } = *self;
        let first = task * TASK_OUTPUTS;
        let outputs = TASK_OUTPUTS.min(self.outputs - first);
        let elements = outputs * columns;
        let (sums, block) = scratch.at_least(elements + DEPTH_BLOCK * outputs).split_at_mut(elements);
        let left = Right { values: &left.values[first..], stride: left.stride };
        for_row_blocks(simd, rows, left, outputs, block, |first, depth, left, before| {
            let shape = Shape { rows: outputs, columns, depth };
            let right = Right { values: &right.values[first * right.stride..], stride: right.stride };
            multiply(simd, shape, Left::transposed(left, outputs), right, before, sums, columns);
        });
        let start = offset + first * columns;
        // SAFETY: one part for each task of the matrix.
        let gradient = unsafe { gradients.part(start..start + sums.len()) };
        add_scaled(simd, self.factor, sums, gradient);
    }
}

/// Runs `product(first row, rows, their columns without gaps, what the sums hold before)` for block after block of `rows`.
/// The columns are copied together because rows far apart in memory share few places in a cache.
fn for_row_blocks(
    simd: Simd,
    rows: usize,
    from: Right<'_>,
    columns: usize,
    block: &mut [f32],
    mut product: impl FnMut(usize, usize, &[f32], Before),
) {
    for first in (0..rows).step_by(DEPTH_BLOCK) {
        let depth = DEPTH_BLOCK.min(rows - first);
        let block = &mut block[..depth * columns];
        copy_columns(simd, &from.values[first * from.stride..], from.stride, columns, block);
        product(first, depth, block, if first == 0 { Before::Undefined } else { Before::Sum });
    }
}

simd_fn! {
    /// `to [columns, rows]` from `from [rows, columns]`.
    fn transpose<V>(simd: Simd, from: &[f32], rows: usize, columns: usize, to: &mut [f32]) -> () {
        for first_row in (0..rows).step_by(V::LANES) {
            let count = V::LANES.min(rows - first_row);
            for first_column in (0..columns).step_by(V::LANES) {
                let width = V::LANES.min(columns - first_column);
                let mut block = [V::splat(0.0); MAX_LANES];
                for (lane, row) in block.iter_mut().enumerate().take(count) {
                    *row = V::from_slice(&from[(first_row + lane) * columns + first_column..][..width]);
                }
                V::transpose(&mut block);
                for (lane, column) in block.iter().enumerate().take(width) {
                    column.to_slice(&mut to[(first_column + lane) * rows + first_row..][..count]);
                }
            }
        }
    }
}

simd_fn! {
    /// The first `columns` of each row, side by side.
    fn copy_columns<V>(simd: Simd, from: &[f32], stride: usize, columns: usize, to: &mut [f32]) -> () {
        for (from, to) in from.chunks(stride).zip(to.chunks_exact_mut(columns)) {
            for (from, to) in from[..columns].chunks(V::LANES).zip(to.chunks_mut(V::LANES)) {
                V::from_slice(from).to_slice(to);
            }
        }
    }
}

simd_fn! {
    /// `to += factor · x`.
    fn add_scaled<V>(simd: Simd, factor: f32, x: &[f32], to: &mut [f32]) -> () {
        for (x, to) in x.chunks(V::LANES).zip(to.chunks_mut(V::LANES)) {
            V::from_slice(x).mul_add(V::splat(factor), V::from_slice(to)).to_slice(to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, LoraSlot, Projection};
    use crate::tensor::WeightTensor;

    const INPUTS: usize = 70;
    /// Output widths and ranks of the projections; no adapter where the rank is 0.
    const PROJECTIONS: [(usize, usize); 4] = [(50, 3), (20, 0), (61, 17), (9, 8)];

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i + seed) * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    fn group(backend: &CpuBackend) -> (LinearGroup<CpuBackend>, usize) {
        let rank: usize = PROJECTIONS.iter().map(|projection| projection.1).sum();
        let (mut a_offset, mut b_offset) = (5, 5 + rank * INPUTS);
        let projection = |(number, &(out_features, rank)): (usize, &(usize, usize))| {
            let slot =
                LoraSlot { rank, scale: 0.5 + number as f32, a_offset, b_offset, magnitude_offset: None };
            a_offset += rank * INPUTS;
            b_offset += rank * out_features;
            Projection { out_features, lora: (rank > 0).then_some(slot) }
        };
        let projections: Vec<_> = PROJECTIONS.iter().enumerate().map(projection).collect();
        let outputs = PROJECTIONS.iter().map(|projection| projection.0).sum();
        let weight = WeightTensor::from_f32("w", vec![outputs, INPUTS], &vec![0.0; outputs * INPUTS]);
        let weight = backend.matrix(&[weight]).unwrap();
        (LinearGroup::new(backend, 0, weight, None, INPUTS, projections).unwrap(), b_offset)
    }

    /// `s`, `ds` and all gradients on `threads` threads.
    fn run(simd: Simd, threads: usize, rows: usize) -> [Vec<f32>; 3] {
        let backend = CpuBackend::new(Some(threads)).unwrap();
        let (group, parameters) = group(&backend);
        let (rank, outputs) = (group.total_rank(), group.out_features());
        let products = AdapterProducts { threads: &backend.threads, simd, group: &group, rows, rank };
        let (x, dy, adapters) = (values(rows * INPUTS, 1), values(rows * outputs, 2), values(parameters, 3));
        let (mut s, mut ds) = (vec![f32::NAN; rows * rank], vec![f32::NAN; rows * rank]);
        let mut gradients = values(parameters, 4);
        let a = 5..5 + rank * INPUTS;
        products.down(&x, &adapters[a.clone()], &mut AlignedFloats::default(), &mut s);
        products.down_gradient(&dy, &adapters, &mut ds);
        products.b_gradients(&dy, &s, &mut gradients);
        products.a_gradient(&x, &ds, &mut gradients[a]);
        [s, ds, gradients]
    }

    /// Asserts that `found` is the sum of `terms` in any order (Higham 2002, §4.2).
    fn assert_sum(name: &str, found: f32, terms: impl Iterator<Item = f64>) {
        let (mut sum, mut magnitude, mut count) = (0.0, 0.0, 3.0);
        for term in terms {
            sum += term;
            magnitude += term.abs();
            count += 1.0;
        }
        let bound = count * f64::from(f32::EPSILON) / 2.0 * magnitude;
        assert!((f64::from(found) - sum).abs() <= bound, "{name}: {found}, not {sum} (± {bound:e})");
    }

    #[test]
    fn products_equal_float64_on_any_number_of_threads() {
        let backend = CpuBackend::new(Some(1)).unwrap();
        let (group, parameters) = group(&backend);
        let (rank, outputs) = (group.total_rank(), group.out_features());
        for rows in [1, 13, 128, 309] {
            let (x, dy) = (values(rows * INPUTS, 1), values(rows * outputs, 2));
            let (adapters, before) = (values(parameters, 3), values(parameters, 4));
            let wide = |a: f32, b: f32| f64::from(a) * f64::from(b);
            for simd in Simd::available() {
                let found = run(simd, 1, rows);
                for threads in 2..=3 {
                    let bits = |values: &[Vec<f32>; 3]| {
                        values.clone().map(|v| v.into_iter().map(f32::to_bits).collect::<Vec<_>>())
                    };
                    assert_eq!(
                        bits(&run(simd, threads, rows)),
                        bits(&found),
                        "{simd}, {rows} rows, {threads} threads"
                    );
                }
                let [s, ds, gradients] = found;
                assert_eq!(gradients[..5], before[..5], "what is no adapter's stays");
                for PlacedAdapter { slot, out_column, out_features, rank_column } in group.adapters() {
                    for r in 0..slot.rank {
                        let column = rank_column + r;
                        let name = |what: &str, index: usize| {
                            format!("{simd} {what} ({index}, {column}) of {rows} rows")
                        };
                        let a = slot.a_offset + r * INPUTS;
                        let b = |out: usize| slot.b_offset + out * slot.rank + r;
                        let scale = f64::from(slot.scale);
                        for row in 0..rows {
                            let terms = (0..INPUTS).map(|i| wide(x[row * INPUTS + i], adapters[a + i]));
                            assert_sum(&name("s", row), s[row * rank + column], terms);
                            let terms = (0..out_features).map(|out| {
                                scale * wide(dy[row * outputs + out_column + out], adapters[b(out)])
                            });
                            assert_sum(&name("ds", row), ds[row * rank + column], terms);
                        }
                        let over_rows = |term: &dyn Fn(usize) -> f64| (0..rows).map(term).collect::<Vec<_>>();
                        for input in 0..INPUTS {
                            let terms =
                                over_rows(&|row| wide(ds[row * rank + column], x[row * INPUTS + input]));
                            let terms = terms.into_iter().chain([f64::from(before[a + input])]);
                            assert_sum(&name("dA", input), gradients[a + input], terms);
                        }
                        for out in 0..out_features {
                            let term = |row: usize| {
                                scale * wide(dy[row * outputs + out_column + out], s[row * rank + column])
                            };
                            let terms = over_rows(&term).into_iter().chain([f64::from(before[b(out)])]);
                            assert_sum(&name("dB", out), gradients[b(out)], terms);
                        }
                    }
                }
            }
        }
    }
}
