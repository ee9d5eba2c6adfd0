//! Matrix products of the CPU backend: all arithmetic and sums in f32, frozen weights read as they are stored.
//!
//! | function | product | for |
//! |---|---|---|
//! | [`linear`] | `y = start + bias + x·Wᵀ + Σ s_p·(scale·B_p)ᵀ` | forward; logits |
//! | [`linear_backward`] | `dx = start + dy·W + Σ ds·(scale·A)` | backward |
//! | [`decode`] | as [`linear`], few rows | decoding: streams the stored weight once |
//!
//! All matrices are row-major. A weight is f32, f16 or bf16, in up to [`MAX_PARTS`] parts whose rows count one after the
//! other (`q|k|v`), and is converted panel by panel on its way into L2: no second copy of it ever exists.
//!
//! **Determinism.** The bits of an output depend on its own row of the left operand, its own column of the right one, the
//! lengths of the summed axes and the instruction set: never on the number of threads or of other rows. ([`decode`] sums
//! in another order than [`linear`], but the same whatever its number of rows.)
//!
//! **Threads.** The products run on the current rayon pool: wrap calls in `ThreadPool::install`. [`decode`] takes a
//! [`Team`], which starts faster. Scratch belongs to the threads and is kept, so nothing is allocated once the largest
//! shape has been seen.
//!
//! **Speed** (2 cores of Zen 5, AVX-512, f16 weights of SmolLM2-135M, November 2026, by processor time on a busy machine;
//! the peak is 524 GFLOP/s on registers alone). Forward and backward reach 86–90 % of the peak with 128 rows, 84–94 %
//! with 1024 (77 % in the gate|up backward) and 70–78 % with 40 (one thread); a rank-16 term in the same pass costs 1–5 %.
//! The `gemm` crate 0.19 and Debian's OpenBLAS reach 42–50 % (they choose no AVX-512 kernels here). Decoding one row reads
//! 40–50 GB/s where plain reading does 52. Prefetching the outputs while a tile is summed, and the weights while they are
//! packed, took 14 % off a forward of 120 rows and 22 % off the head's logits; 2 MiB pages for the buffers changed nothing. `benches/matmul.rs` measures the products, its peer and the peak.

mod decode;
mod driver;
mod element;
mod pack;
#[cfg(test)]
mod tests;
mod tile;

use std::ops::Range;
use std::sync::OnceLock;

use half::{bf16, f16};

use crate::backend::cpu::simd::Simd;
use crate::backend::cpu::team::Team;
use crate::dtype::DType;
use crate::tensor::WeightTensor;
use driver::{Contiguous, Product};

/// Most parts of a [`Weight`].
pub const MAX_PARTS: usize = 4;

/// Most rows of a [`decode`].
pub const MAX_DECODE_ROWS: usize = 8;

/// Rows of f32 inside a slice: row `i` starts at `values[i · stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// From the first row's first element on.
    pub values: &'a [f32],
    /// Distance between the starts of rows; at least their width.
    pub stride: usize,
}

/// Rows of f32 to write inside a slice: row `i` starts at `values[i · stride]`.
#[derive(Debug)]
pub struct RowsMut<'a> {
    /// From the first row's first element on.
    pub values: &'a mut [f32],
    /// Distance between the starts of rows; at least their width.
    pub stride: usize,
}

/// Elements as stored.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary16.
    F16(&'a [f16]),
    /// Upper half of a binary32.
    Bf16(&'a [bf16]),
}

/// Evaluates the body with `$values` bound to the slice, whatever its element type.
macro_rules! with_elements {
    ($elements:expr, $values:ident => $body:expr) => {
        match $elements {
            $crate::backend::cpu::matmul::Elements::F32($values) => $body,
            $crate::backend::cpu::matmul::Elements::F16($values) => $body,
            $crate::backend::cpu::matmul::Elements::Bf16($values) => $body,
        }
    };
}
use with_elements;

impl<'a> Elements<'a> {
    /// The elements of a frozen tensor in place; `None` where its bytes are not aligned to an element (copy it then).
    pub fn of(tensor: &'a WeightTensor) -> Option<Self> {
        let bytes = tensor.bytes();
        match tensor.dtype() {
            DType::F32 => bytemuck::try_cast_slice(bytes).ok().map(Self::F32),
            DType::F16 => bytemuck::try_cast_slice(bytes).ok().map(Self::F16),
            DType::Bf16 => bytemuck::try_cast_slice(bytes).ok().map(Self::Bf16),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        with_elements!(self, values => values.len())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A matrix `[rows, columns]` in place: the rows of its parts in turn.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    parts: [Elements<'a>; MAX_PARTS],
    rows: usize,
    columns: usize,
    scale: f32,
}

impl<'a> Weight<'a> {
    /// The rows of `parts` in turn, each part `[_, columns]` without gaps.
    ///
    /// # Panics
    /// With more than [`MAX_PARTS`] parts, or where a part is not a whole number of rows.
    pub fn new(columns: usize, parts: impl IntoIterator<Item = Elements<'a>>) -> Self {
        let mut weight = Self { parts: [Elements::F32(&[]); MAX_PARTS], rows: 0, columns, scale: 1.0 };
        for (number, part) in parts.into_iter().enumerate() {
            assert!(number < MAX_PARTS, "a weight has at most {MAX_PARTS} parts");
            assert!(
                columns > 0 && part.len() % columns == 0,
                "part {number}: {} elements in rows of {columns}",
                part.len()
            );
            weight.parts[number] = part;
            weight.rows += part.len() / columns;
        }
        weight
    }

    /// An f32 matrix `[_, columns]`.
    ///
    /// # Panics
    /// Where `values` is not a whole number of rows.
    pub fn f32(columns: usize, values: &'a [f32]) -> Self {
        Self::new(columns, [Elements::F32(values)])
    }

    /// The same matrix times `scale`: each element is multiplied as it is read.
    pub fn scaled(mut self, scale: f32) -> Self {
        self.scale *= scale;
        self
    }

    /// Summed rows of the parts.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The parts that hold `rows`, each with the rows' numbers inside it.
    fn rows_by_part(&self, rows: Range<usize>) -> impl Iterator<Item = (Elements<'a>, Range<usize>)> {
        let columns = self.columns;
        let mut first = 0;
        self.parts.into_iter().filter_map(move |part| {
            let end = first + part.len() / columns;
            let inside = rows.start.max(first)..rows.end.min(end);
            let local = (!inside.is_empty()).then(|| (part, inside.start - first..inside.end - first));
            first = end;
            local
        })
    }
}

/// What an output holds before the products are added.
#[derive(Clone, Copy, Debug, Default)]
pub enum Start<'a> {
    /// Nothing: the output is overwritten, whatever it held.
    #[default]
    Zero,
    /// What the output holds: the products are added to it.
    Output,
    /// These rows, as wide as the output.
    Residual(Rows<'a>),
}

/// The low-rank term of a LoRA linear: blocks of columns of the output, each fed by its ranks of `s`.
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// `[rows, R]`.
    pub s: Rows<'a>,
    /// The factors; their columns do not overlap.
    pub blocks: &'a [LowRankBlock<'a>],
}

/// `output[:, columns] += s[:, ranks] · scale·factor` (transposed as the weight is).
#[derive(Clone, Debug)]
pub struct LowRankBlock<'a> {
    /// In [`linear`] `B [columns, ranks]`, in [`linear_backward`] `A [ranks, columns]`; no gaps.
    pub factor: &'a [f32],
    /// Multiplies the factor.
    pub scale: f32,
    /// The output's columns that the block adds to.
    pub columns: Range<usize>,
    /// The columns of `s` that it reads.
    pub ranks: Range<usize>,
}

impl LowRank<'_> {
    /// Columns of `s` in use.
    fn rank(&self) -> usize {
        self.blocks.iter().map(|block| block.ranks.end).max().unwrap_or(0)
    }

    fn check(&self, rows: usize, columns: usize) {
        check_rows("s", self.s.values.len(), self.s.stride, rows, self.rank());
        for (number, block) in self.blocks.iter().enumerate() {
            assert!(
                block.columns.end <= columns,
                "low-rank block {number}: columns {:?} of {columns}",
                block.columns
            );
            assert_eq!(
                block.factor.len(),
                block.columns.len() * block.ranks.len(),
                "low-rank block {number}: factor"
            );
            for other in &self.blocks[..number] {
                let apart =
                    block.columns.end <= other.columns.start || other.columns.end <= block.columns.start;
                assert!(
                    apart,
                    "low-rank block {number}: columns {:?} and {:?} overlap",
                    block.columns, other.columns
                );
            }
        }
    }

    /// Packs the factors of a panel's `columns` as `[ranks][width]`, zero where a block has no part in a rank; returns the
    /// ranks.
    fn pack(
        &self,
        columns: Range<usize>,
        contiguous: Contiguous,
        packed: &mut [f32],
        width: usize,
    ) -> Range<usize> {
        let overlap = |block: &LowRankBlock<'_>| {
            columns.start.max(block.columns.start)..columns.end.min(block.columns.end)
        };
        let touching = || self.blocks.iter().filter(|block| !overlap(block).is_empty());
        let Some(start) = touching().map(|block| block.ranks.start).min() else { return 0..0 };
        let end = touching().map(|block| block.ranks.end).max().unwrap_or(start);
        packed[..(end - start) * width].fill(0.0);
        for block in touching() {
            let rank = block.ranks.len();
            for column in overlap(block) {
                let inside = column - block.columns.start;
                for step in 0..rank {
                    let source = match contiguous {
                        Contiguous::Summed => inside * rank + step,
                        Contiguous::Kept => step * block.columns.len() + inside,
                    };
                    let target = (block.ranks.start - start + step) * width + column - columns.start;
                    packed[target] = block.factor[source] * block.scale;
                }
            }
        }
        start..end
    }
}

/// What [`linear`] and [`decode`] read: `x [rows, I]`, `W [O, I]`.
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// Rows of `x` and `y`.
    pub rows: usize,
    /// `[rows, I]`.
    pub x: Rows<'a>,
    /// `[O, I]`.
    pub weight: Weight<'a>,
    /// `[O]`.
    pub bias: Option<&'a [f32]>,
    /// What `y` starts from.
    pub start: Start<'a>,
    /// The adapters' term, summed in the same pass.
    pub low_rank: Option<LowRank<'a>>,
}

impl<'a> Linear<'a> {
    /// `y = x·Wᵀ`, to be refined by struct update.
    pub fn new(rows: usize, x: Rows<'a>, weight: Weight<'a>) -> Self {
        Self { rows, x, weight, bias: None, start: Start::Zero, low_rank: None }
    }

    fn check(&self, y: &RowsMut<'_>) {
        let (rows, inputs, outputs) = (self.rows, self.weight.columns(), self.weight.rows());
        check_rows("x", self.x.values.len(), self.x.stride, rows, inputs);
        check_rows("y", y.values.len(), y.stride, rows, outputs);
        check_start(self.start, rows, outputs);
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), outputs, "bias");
        }
        if let Some(term) = &self.low_rank {
            term.check(rows, outputs);
        }
    }
}

/// What [`linear_backward`] reads: `dy [rows, O]`, `W [O, I]`.
#[derive(Clone, Copy, Debug)]
pub struct LinearBackward<'a> {
    /// Rows of `dy` and `dx`.
    pub rows: usize,
    /// `[rows, O]`.
    pub dy: Rows<'a>,
    /// `[O, I]`.
    pub weight: Weight<'a>,
    /// What `dx` starts from.
    pub start: Start<'a>,
    /// The adapters' term `ds·A`, summed in the same pass.
    pub low_rank: Option<LowRank<'a>>,
}

impl<'a> LinearBackward<'a> {
    /// `dx = dy·W`, to be refined by struct update.
    pub fn new(rows: usize, dy: Rows<'a>, weight: Weight<'a>) -> Self {
        Self { rows, dy, weight, start: Start::Zero, low_rank: None }
    }
}

/// `y [rows, O] = start + bias + x·Wᵀ + low-rank term`.
///
/// # Panics
/// Where a slice is shorter than its shape.
pub fn linear(arguments: Linear<'_>, y: RowsMut<'_>) {
    linear_with(best_simd(), arguments, y);
}

fn linear_with(simd: Simd, arguments: Linear<'_>, y: RowsMut<'_>) {
    arguments.check(&y);
    let Linear { rows, x, weight, bias, start, low_rank } = arguments;
    let product = Product {
        simd,
        rows,
        columns: weight.rows(),
        depth: weight.columns(),
        left: x,
        right: &weight,
        right_contiguous: Contiguous::Summed,
        low_rank,
        bias,
        start,
        output: y.values.as_mut_ptr(),
        output_stride: y.stride,
    };
    // SAFETY: the shapes are checked, `y` is borrowed exclusively.
    unsafe { product.compute() };
}

/// `dx [rows, I] = start + dy·W + low-rank term`.
///
/// # Panics
/// Where a slice is shorter than its shape.
pub fn linear_backward(arguments: LinearBackward<'_>, dx: RowsMut<'_>) {
    linear_backward_with(best_simd(), arguments, dx);
}

fn linear_backward_with(simd: Simd, arguments: LinearBackward<'_>, dx: RowsMut<'_>) {
    let LinearBackward { rows, dy, weight, start, low_rank } = arguments;
    let (inputs, outputs) = (weight.columns(), weight.rows());
    check_rows("dy", dy.values.len(), dy.stride, rows, outputs);
    check_rows("dx", dx.values.len(), dx.stride, rows, inputs);
    check_start(start, rows, inputs);
    if let Some(term) = &low_rank {
        term.check(rows, inputs);
    }
    let product = Product {
        simd,
        rows,
        columns: inputs,
        depth: outputs,
        left: dy,
        right: &weight,
        right_contiguous: Contiguous::Kept,
        low_rank,
        bias: None,
        start,
        output: dx.values.as_mut_ptr(),
        output_stride: dx.stride,
    };
    // SAFETY: the shapes are checked, `dx` is borrowed exclusively.
    unsafe { product.compute() };
}

/// `y [rows, O] = start + bias + x·Wᵀ + low-rank term` for at most [`MAX_DECODE_ROWS`] rows: reads the weight once, as
/// stored, at memory speed. Sums in another order than [`linear`].
///
/// # Panics
/// Where a slice is shorter than its shape, and with more rows.
pub fn decode(team: &Team, arguments: Linear<'_>, y: RowsMut<'_>) {
    decode_with(team, best_simd(), arguments, y);
}

fn decode_with(team: &Team, simd: Simd, arguments: Linear<'_>, y: RowsMut<'_>) {
    arguments.check(&y);
    assert!(
        arguments.rows <= MAX_DECODE_ROWS,
        "decode takes at most {MAX_DECODE_ROWS} rows, not {}",
        arguments.rows
    );
    // SAFETY: the shapes are checked, `y` is borrowed exclusively.
    unsafe { decode::compute(team, simd, &arguments, y.values.as_mut_ptr(), y.stride) };
}

/// The best instructions of this CPU, detected once.
fn best_simd() -> Simd {
    static BEST: OnceLock<Simd> = OnceLock::new();
    *BEST.get_or_init(Simd::detect)
}

/// Panics unless `rows` rows of `width` elements at `stride` fit into `elements`.
#[track_caller]
fn check_rows(name: &str, elements: usize, stride: usize, rows: usize, width: usize) {
    let needed = if rows == 0 { 0 } else { (rows - 1) * stride + width };
    assert!(
        stride >= width && needed <= elements,
        "{name} [{rows}, {width}] at row stride {stride} needs {needed} elements, there are {elements}"
    );
}

#[track_caller]
fn check_start(start: Start<'_>, rows: usize, columns: usize) {
    if let Start::Residual(residual) = start {
        check_rows("residual", residual.values.len(), residual.stride, rows, columns);
    }
}
