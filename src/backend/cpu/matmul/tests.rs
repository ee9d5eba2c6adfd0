//! The products against float64, for every instruction set that the machine has.

use half::{bf16, f16};

use super::*;

/// Deterministic values in [-1, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn vec(&mut self, elements: usize) -> Vec<f32> {
        (0..elements).map(|_| self.next()).collect()
    }
}

fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    TEAM.get_or_init(|| Team::new(3).expect("a team"))
}

/// An owned weight part.
enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Stored {
    fn new(dtype: DType, values: &[f32]) -> Self {
        match dtype {
            DType::F32 => Self::F32(values.to_vec()),
            DType::F16 => Self::F16(values.iter().map(|value| f16::from_f32(*value)).collect()),
            DType::Bf16 => Self::Bf16(values.iter().map(|value| bf16::from_f32(*value)).collect()),
        }
    }

    fn elements(&self) -> Elements<'_> {
        match self {
            Self::F32(values) => Elements::F32(values),
            Self::F16(values) => Elements::F16(values),
            Self::Bf16(values) => Elements::Bf16(values),
        }
    }

    fn to_f64(&self) -> Vec<f64> {
        with_elements!(self.elements(), values => {
            values.iter().map(|value| f64::from(element::Element::to_f32(*value))).collect()
        })
    }
}

/// A LoRA linear of ragged shape: parts of different dtypes, two adapters with a gap between, strided rows.
struct Case {
    rows: usize,
    inputs: usize,
    part_rows: Vec<usize>,
    ranks: [usize; 2],
    parts: Vec<Stored>,
    x: Vec<f32>,
    dy: Vec<f32>,
    bias: Vec<f32>,
    residual: Vec<f32>,
    s: Vec<f32>,
    b: [Vec<f32>; 2],
    a: Vec<f32>,
}

/// Elements between the end of a row and the start of the next, in every strided matrix of a case.
const GAP: usize = 3;
const SCALE: f32 = 1.5;

impl Case {
    fn new(rows: usize, inputs: usize, part_rows: &[usize], dtypes: &[DType], ranks: [usize; 2]) -> Self {
        let mut random = Random(rows as u64 * 31 + inputs as u64 * 7 + part_rows[0] as u64);
        let outputs: usize = part_rows.iter().sum();
        let rank = ranks[0] + ranks[1];
        let parts = part_rows
            .iter()
            .zip(dtypes.iter().cycle())
            .map(|(rows, dtype)| Stored::new(*dtype, &random.vec(rows * inputs)))
            .collect();
        let [first, second] = adapter_columns(outputs);
        Self {
            rows,
            inputs,
            part_rows: part_rows.to_vec(),
            ranks,
            parts,
            x: random.vec(rows * (inputs + GAP)),
            dy: random.vec(rows * (outputs + GAP)),
            bias: random.vec(outputs),
            residual: random.vec(rows * (inputs.max(outputs) + GAP)),
            s: random.vec(rows * (rank + GAP)),
            b: [random.vec(first.len() * ranks[0]), random.vec(second.len() * ranks[1])],
            a: random.vec(rank * inputs),
        }
    }

    fn outputs(&self) -> usize {
        self.part_rows.iter().sum()
    }

    fn rank(&self) -> usize {
        self.ranks[0] + self.ranks[1]
    }

    fn weight(&self) -> Weight<'_> {
        Weight::new(self.inputs, self.parts.iter().map(Stored::elements))
    }

    fn weight_f64(&self) -> Vec<f64> {
        self.parts.iter().flat_map(Stored::to_f64).collect()
    }

    fn up_blocks(&self) -> [LowRankBlock<'_>; 2] {
        let [first, second] = adapter_columns(self.outputs());
        [
            LowRankBlock { factor: &self.b[0], scale: SCALE, columns: first, ranks: 0..self.ranks[0] },
            LowRankBlock {
                factor: &self.b[1],
                scale: -1.0,
                columns: second,
                ranks: self.ranks[0]..self.rank(),
            },
        ]
    }

    fn s(&self) -> Rows<'_> {
        Rows { values: &self.s, stride: self.rank() + GAP }
    }

    /// The forward with everything that it can do: `rows` rows from `first` on.
    fn forward(&self, simd: Simd, first: usize, rows: usize, everything: bool, few: bool) -> Vec<f32> {
        let blocks = self.up_blocks();
        let (stride, s_stride) = (self.inputs + GAP, self.rank() + GAP);
        let residual_stride = self.inputs.max(self.outputs()) + GAP;
        let x = Rows { values: &self.x[first * stride..], stride };
        let mut linear = Linear::new(rows, x, self.weight());
        if everything {
            let s = Rows { values: &self.s[first * s_stride..], stride: s_stride };
            let residual =
                Rows { values: &self.residual[first * residual_stride..], stride: residual_stride };
            linear.bias = Some(&self.bias);
            linear.start = Start::Residual(residual);
            linear.low_rank = Some(LowRank { s, blocks: &blocks });
        }
        let y_stride = self.outputs() + GAP;
        let mut y = vec![f32::NAN; rows * y_stride];
        let output = RowsMut { values: &mut y, stride: y_stride };
        if few {
            decode_with(team(), simd, linear, output)
        } else {
            linear_with(simd, linear, output)
        }
        y
    }

    fn backward(&self, simd: Simd, first: usize, rows: usize) -> Vec<f32> {
        let rank = self.rank();
        let (stride, s_stride) = (self.outputs() + GAP, rank + GAP);
        let blocks =
            [LowRankBlock { factor: &self.a, scale: SCALE, columns: 0..self.inputs, ranks: 0..rank }];
        let dy = Rows { values: &self.dy[first * stride..], stride };
        let mut backward = LinearBackward::new(rows, dy, self.weight());
        backward.low_rank = Some(LowRank {
            s: Rows { values: &self.s[first * s_stride..], stride: s_stride },
            blocks: &blocks,
        });
        let dx_stride = self.inputs + GAP;
        let mut dx = vec![f32::NAN; rows * dx_stride];
        linear_backward_with(simd, backward, RowsMut { values: &mut dx, stride: dx_stride });
        dx
    }
}

/// Columns of the two adapters: a gap before, between and after, none of them at a tile's edge.
fn adapter_columns(outputs: usize) -> [Range<usize>; 2] {
    [outputs / 8..outputs / 2, (outputs / 2 + 1).min(outputs)..outputs - outputs / 9]
}

/// `|sum| terms` in f64: the sum, and the sum of magnitudes that its rounding is proportional to.
#[derive(Clone, Copy, Default)]
struct Exact {
    sum: f64,
    magnitude: f64,
    terms: usize,
}

impl Exact {
    fn add(&mut self, term: f64) {
        self.sum += term;
        self.magnitude += term.abs();
        self.terms += 1;
    }

    /// Bound on the error of an f32 sum in any order, a product with a scale included (Higham 2002, §4.2).
    fn tolerance(&self) -> f64 {
        (self.terms + 3) as f64 * f64::from(f32::EPSILON) / 2.0 * self.magnitude
    }
}

/// Compares `found` (rows of `width` at `stride`, NaN between) with `exact`.
fn assert_close(
    name: &str,
    found: &[f32],
    stride: usize,
    width: usize,
    exact: impl Fn(usize, usize) -> Exact,
) {
    let mut worst = (0.0, 0, 0);
    for (row, found) in found.chunks(stride).enumerate() {
        for (column, found) in found.iter().enumerate() {
            if column >= width {
                assert!(found.is_nan(), "{name}: wrote between rows at ({row}, {column})");
                continue;
            }
            let exact = exact(row, column);
            let share = (f64::from(*found) - exact.sum).abs() / exact.tolerance().max(f64::MIN_POSITIVE);
            if share > worst.0 || share.is_nan() {
                worst = (share, row, column);
            }
            assert!(
                share <= 1.0,
                "{name}: ({row}, {column}) is {found}, not {} ({share} of the bound)",
                exact.sum
            );
        }
    }
}

fn cases() -> Vec<Case> {
    use DType::*;
    let mut cases = vec![
        Case::new(1, 1, &[1], &[F32], [0, 0]),
        Case::new(1, 70, &[33], &[F16], [4, 0]),
        Case::new(2, 16, &[16, 5, 11], &[F16, Bf16, F32], [1, 2]),
        Case::new(14, 32, &[32], &[Bf16], [8, 8]),
        Case::new(15, 31, &[64, 16, 16], &[F16], [16, 16]),
        Case::new(29, 100, &[65, 30], &[Bf16, F16], [5, 17]),
        Case::new(43, 769, &[50], &[F16], [3, 4]),
        Case::new(5, 1700, &[47, 2], &[Bf16], [16, 16]),
        Case::new(7, 40, &[1601], &[F16], [4, 4]),
        Case::new(130, 48, &[96, 32, 32], &[F32], [8, 8]),
        Case::new(2100, 5, &[7], &[F32], [2, 1]),
    ];
    for rows in 3..=13 {
        cases.push(Case::new(rows, 20 + rows, &[30 + rows], &[F16, Bf16, F32][rows % 3..], [2, 3]));
    }
    cases
}

fn forward_exact(case: &Case, weight: &[f64], row: usize, column: usize, everything: bool) -> Exact {
    let mut exact = Exact::default();
    for k in 0..case.inputs {
        exact.add(f64::from(case.x[row * (case.inputs + GAP) + k]) * weight[column * case.inputs + k]);
    }
    if everything {
        for block in case.up_blocks().iter().filter(|block| block.columns.contains(&column)) {
            for (r, rank) in block.ranks.clone().enumerate() {
                let factor = block.factor[(column - block.columns.start) * block.ranks.len() + r];
                let s = case.s[row * (case.rank() + GAP) + rank];
                exact.add(f64::from(s) * f64::from(factor) * f64::from(block.scale));
            }
        }
        exact.add(f64::from(case.bias[column]));
        exact.add(f64::from(case.residual[row * (case.inputs.max(case.outputs()) + GAP) + column]));
    }
    exact
}

#[test]
fn linear_equals_float64() {
    for simd in Simd::available() {
        for case in cases() {
            let (weight, outputs) = (case.weight_f64(), case.outputs());
            for everything in [false, true] {
                let name = format!("{} {}x{}x{outputs} {everything}", simd.name(), case.rows, case.inputs);
                let y = case.forward(simd, 0, case.rows, everything, false);
                assert_close(&name, &y, outputs + GAP, outputs, |row, column| {
                    forward_exact(&case, &weight, row, column, everything)
                });
            }
        }
    }
}

#[test]
fn decode_equals_float64_whatever_its_rows() {
    for simd in Simd::available() {
        for case in cases() {
            let (weight, outputs) = (case.weight_f64(), case.outputs());
            let rows = case.rows.min(MAX_DECODE_ROWS);
            let y = case.forward(simd, 0, rows, true, true);
            let name = format!("{} decode {rows}x{}x{outputs}", simd.name(), case.inputs);
            assert_close(&name, &y, outputs + GAP, outputs, |row, column| {
                forward_exact(&case, &weight, row, column, true)
            });
            for row in 0..rows {
                let alone = case.forward(simd, row, 1, true, true);
                assert_eq!(
                    bits(&alone),
                    bits(&y[row * (outputs + GAP)..][..outputs + GAP]),
                    "{name} row {row}"
                );
            }
        }
    }
}

#[test]
fn linear_backward_equals_float64() {
    for simd in Simd::available() {
        for case in cases() {
            let (weight, outputs, inputs) = (case.weight_f64(), case.outputs(), case.inputs);
            let dx = case.backward(simd, 0, case.rows);
            let name = format!("{} backward {}x{outputs}x{inputs}", simd.name(), case.rows);
            assert_close(&name, &dx, inputs + GAP, inputs, |row, column| {
                let mut exact = Exact::default();
                for k in 0..outputs {
                    exact.add(f64::from(case.dy[row * (outputs + GAP) + k]) * weight[k * inputs + column]);
                }
                for rank in 0..case.rank() {
                    let (s, a) =
                        (case.s().values[row * case.s().stride + rank], case.a[rank * inputs + column]);
                    exact.add(f64::from(s) * f64::from(a) * f64::from(SCALE));
                }
                exact
            });
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn bits_do_not_depend_on_threads_or_other_rows() {
    let pools: Vec<_> = (1..=3)
        .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool"))
        .collect();
    for simd in Simd::available() {
        for case in cases() {
            let run = || {
                [case.forward(simd, 0, case.rows, true, false), case.backward(simd, 0, case.rows)]
                    .map(|values| bits(&values))
            };
            let expected = pools[0].install(run);
            for pool in &pools[1..] {
                assert_eq!(pool.install(run), expected, "{} threads", pool.current_num_threads());
            }
            for row in [0, case.rows / 2, case.rows - 1] {
                let (y_stride, dx_stride) = (case.outputs() + GAP, case.inputs + GAP);
                let y = bits(&case.forward(simd, row, 1, true, false));
                assert_eq!(
                    y[..],
                    expected[0][row * y_stride..][..y_stride],
                    "row {row} of {} alone",
                    case.rows
                );
                let dx = bits(&case.backward(simd, row, 1));
                assert_eq!(
                    dx[..],
                    expected[1][row * dx_stride..][..dx_stride],
                    "row {row} of {} alone",
                    case.rows
                );
            }
        }
    }
}

#[test]
fn start_from_the_output_adds_to_it() {
    let case = Case::new(9, 33, &[40], &[DType::F16], [0, 0]);
    let x = Rows { values: &case.x, stride: case.inputs + GAP };
    let product = case.forward(best_simd(), 0, 9, false, false);
    let mut y = case.residual[..9 * 43].to_vec();
    let linear = Linear { start: Start::Output, ..Linear::new(9, x, case.weight()) };
    super::linear(linear, RowsMut { values: &mut y, stride: 43 });
    for row in 0..9 {
        for column in 0..43 {
            let index = row * 43 + column;
            let added = if column < 40 { product[index] } else { 0.0 };
            assert_eq!(y[index], added + case.residual[index], "({row}, {column})");
        }
    }
}

#[test]
fn empty_products_are_fine() {
    let weight = Weight::f32(4, &[]);
    linear(
        Linear::new(3, Rows { values: &[1.0; 12], stride: 4 }, weight),
        RowsMut { values: &mut [], stride: 0 },
    );
    // A sum over nothing is what the output starts from.
    let mut dx = [f32::NAN; 8];
    let dy = Rows { values: &[], stride: 0 };
    linear_backward(LinearBackward::new(2, dy, weight), RowsMut { values: &mut dx, stride: 4 });
    assert_eq!(dx, [0.0; 8]);
    let mut y = [7.0; 4];
    linear(Linear::new(0, Rows { values: &[], stride: 4 }, weight), RowsMut { values: &mut y, stride: 0 });
    assert_eq!(y, [7.0; 4]);
}

#[test]
#[should_panic(expected = "x [2, 4] at row stride 4 needs 8 elements, there are 7")]
fn a_short_slice_is_a_clear_panic() {
    let weight = Weight::f32(4, &[0.0; 8]);
    linear(
        Linear::new(2, Rows { values: &[0.0; 7], stride: 4 }, weight),
        RowsMut { values: &mut [0.0; 4], stride: 2 },
    );
}

#[test]
fn tensors_are_read_in_place() {
    let tensor = WeightTensor::from_f32("w", vec![2, 2], &[1.0, 2.0, 3.0, 4.0]);
    match Elements::of(&tensor) {
        Some(Elements::F32(values)) => assert_eq!(values, [1.0, 2.0, 3.0, 4.0]),
        // A vector of bytes need not be aligned.
        other => assert!(other.is_none() && tensor.bytes().as_ptr().align_offset(4) != 0),
    }
}
