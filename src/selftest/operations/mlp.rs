//! The gated MLP, forward and backward: what a backend may fuse is compared as a whole, step by step from what it left.

use super::super::comparison::{Comparison, Outcome, sample_rows};
use super::super::inputs::{batch_of, weight, widen};
use super::super::precision::{Precision, Tolerance};
use super::super::reference::{self, dot, dropout_factors};
use super::rows::{Norm, plain_norm, stored_half};
use super::{
    Operation, Prepared, Ready, Work, expect, poisoned, read, read_floats, read_s, ready, resident, upload,
    wide_row,
};
use crate::backend::{
    Activation, Backend, Dropout, LinearGradients, LinearGroup, LinearInput, LinearShape, LoraSlot, Mlp,
    MlpGradient, MlpSaved, NormedInput, PassSettings, PlacedAdapter, Projection, Reach, placed_adapters,
};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::Result;

/// One MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpCase {
    /// Tokens of each sample.
    pub lengths: &'static [usize],
    /// `H`.
    pub hidden: usize,
    /// `F`.
    pub width: usize,
    /// Ranks of gate, up and down; 0: no adapter.
    pub ranks: [usize; 3],
    /// Of the gate.
    pub activation: Activation,
    /// Dropout's probability.
    pub dropout: f32,
}

const SAMPLED_ROWS: usize = 6;
const SAMPLED_GRADIENTS: usize = 3;
/// A power of two: then its product with B rounds nothing.
const SCALE: f32 = 2.0;

/// One of the two groups on the host.
struct Group {
    input_index: u32,
    in_features: usize,
    projections: Vec<Projection>,
    adapters: Vec<PlacedAdapter>,
    weight: Vec<f32>,
}

impl Group {
    /// `projections` of a width and a rank each; `end` of the flat buffer moves behind their adapters.
    fn new(
        precision: Precision,
        input_index: u32,
        in_features: usize,
        projections: &[(usize, usize)],
        end: &mut usize,
    ) -> Self {
        let mut a_offset = *end;
        let mut b_offset = a_offset + projections.iter().map(|&(_, rank)| rank).sum::<usize>() * in_features;
        let mut placed = Vec::new();
        for &(out_features, rank) in projections {
            let slot = LoraSlot { rank, scale: SCALE, a_offset, b_offset, magnitude_offset: None };
            placed.push(Projection { out_features, lora: (rank > 0).then_some(slot) });
            a_offset += rank * in_features;
            b_offset += rank * out_features;
        }
        *end = b_offset;
        let outputs: usize = projections.iter().map(|&(out, _)| out).sum();
        let half = Precision { compute: stored_half(precision), ..precision };
        let weight = half.values(outputs * in_features, 30 + u64::from(input_index));
        Self {
            input_index,
            in_features,
            adapters: placed_adapters(&placed).collect(),
            projections: placed,
            weight: scaled(weight, in_features),
        }
    }

    fn outputs(&self) -> usize {
        self.projections.iter().map(|projection| projection.out_features).sum()
    }

    fn rank(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.slot.rank).sum()
    }

    fn reference<'a>(&'a self, parameters: &'a [f32]) -> reference::Linear<'a, f32, f32> {
        let Self { in_features, adapters, weight, .. } = self;
        reference::Linear { weight, in_features: *in_features, bias: None, adapters, parameters }
    }

    fn shape(&self, rows: usize, precision: Precision) -> LinearShape {
        LinearShape {
            rows,
            inputs: self.in_features,
            outputs: self.outputs(),
            rank: self.rank(),
            b_elements: self.adapters.iter().map(|adapter| adapter.slot.rank * adapter.out_features).sum(),
            weight_bytes: self.weight.len() * stored_half(precision).bytes(),
            has_magnitudes: false,
            frozen_products: 1,
        }
    }

    fn on<B: Backend>(&self, backend: &B, precision: Precision) -> Result<LinearGroup<B>> {
        let shape = vec![self.outputs(), self.in_features];
        let matrix = backend.matrix(&[weight("weight", stored_half(precision), shape, &self.weight, 0)])?;
        LinearGroup::new(backend, self.input_index, matrix, None, self.in_features, self.projections.clone())
    }
}

/// Times a power of two near `2/√terms`, so that a product's elements are about as large as its input's.
fn scaled(mut values: Vec<f32>, terms: usize) -> Vec<f32> {
    let factor = 2f32.powi(1 - (terms as f32).log2() as i32 / 2);
    values.iter_mut().for_each(|value| *value *= factor);
    values
}

struct MlpOperation {
    precision: Precision,
    case: MlpCase,
    is_backward: bool,
    batch: Batch,
    dropout: Option<Dropout>,
    gate_up: Group,
    down: Group,
    parameters: Vec<f32>,
    norm: Norm,
    dy: Vec<f32>,
}

pub(super) fn operations<B: Backend + 'static>(
    precision: Precision,
    case: MlpCase,
) -> Vec<Box<dyn Operation<B>>> {
    [false, true]
        .map(|is_backward| -> Box<dyn Operation<B>> {
            Box::new(MlpOperation::new(precision, case, is_backward))
        })
        .into()
}

/// What a forward left, on the host: what gate and up read, their outputs, the activation, and `s` of both groups without padding.
struct Found {
    normed: Vec<f32>,
    gate_up: Vec<f32>,
    gate_up_s: Vec<f32>,
    act: Vec<f32>,
    down_s: Vec<f32>,
}

impl MlpOperation {
    fn new(precision: Precision, case: MlpCase, is_backward: bool) -> Self {
        let MlpCase { hidden, width, ranks: [gate, up, down], .. } = case;
        let mut end = 0;
        let gate_up = Group::new(precision, 6, hidden, &[(width, gate), (width, up)], &mut end);
        let down = Group::new(precision, 7, width, &[(hidden, down)], &mut end);
        let batch = batch_of(case.lengths, 9);
        let rows = batch.token_count();
        Self {
            gate_up,
            down,
            dropout: (case.dropout > 0.0).then_some(Dropout { probability: case.dropout, seed: 7, epoch: 2 }),
            // Rounded, so that a backend's copies of them in the compute type lose nothing.
            parameters: scaled(precision.values(end, 41), width),
            norm: Norm::forward(precision, rows, hidden),
            dy: precision.values(rows * hidden, 43),
            precision,
            case,
            is_backward,
            batch,
        }
    }

    fn rows(&self) -> usize {
        self.batch.token_count()
    }

    fn factors(&self, group: &Group, row: usize) -> Vec<f64> {
        dropout_factors(&self.batch, self.dropout, group.input_index, row, group.in_features)
    }

    /// What the adapters of `group` see of a row.
    fn dropped(&self, group: &Group, x: &[f64], row: usize) -> Vec<f64> {
        x.iter().zip(self.factors(group, row)).map(|(x, factor)| x * factor).collect()
    }

    fn dropout_roundings(&self) -> usize {
        usize::from(self.dropout.is_some())
    }

    fn comparison(&self, output: &'static str, tolerance: Tolerance, columns: usize) -> Comparison {
        Comparison { output, compute: self.precision.compute, tolerance, columns }
    }

    /// Each step given what the one before it left.
    fn check_forward(&self, found: &Found, y: &[f32]) -> Vec<Outcome> {
        let MlpCase { hidden, width, activation, .. } = self.case;
        let compute = self.precision.compute;
        let sample = || sample_rows(self.rows(), SAMPLED_ROWS);
        let mut outcomes = vec![self.norm.compare_forward("norm(x)", &found.normed)];
        for (group, x, s, y, names) in [
            (&self.gate_up, &found.normed, &found.gate_up_s, &found.gate_up[..], ["s of gate|up", "gate|up"]),
            (&self.down, &found.act, &found.down_s, y, ["s of down", "y"]),
        ] {
            let (reference, inputs, rank) =
                (group.reference(&self.parameters), group.in_features, group.rank());
            if rank > 0 {
                let expected = expect(sample(), |row| {
                    reference.s_row(&self.dropped(group, &wide_row(x, row, inputs), row))
                });
                let tolerance = Tolerance {
                    inner_roundings: self.dropout_roundings(),
                    ..Tolerance::sum(compute, inputs)
                };
                outcomes.push(self.comparison(names[0], tolerance, rank).compare(s, &expected));
            }
            let expected = expect(sample(), |row| {
                reference.y_row(&wide_row(x, row, inputs), &widen(&s[row * rank..][..rank]))
            });
            let tolerance = Tolerance::sum(compute, inputs + rank);
            outcomes.push(self.comparison(names[1], tolerance, group.outputs()).compare(y, &expected));
        }
        let expected = expect(sample(), |row| {
            reference::gated(activation, &wide_row(&found.gate_up, row, 2 * width), width)
        });
        outcomes
            .push(self.comparison("act", Tolerance::sum(compute, 4), width).compare(&found.act, &expected));
        debug_assert_eq!(y.len(), self.rows() * hidden);
        outcomes
    }

    /// `dx`, and the gradients of the `B`s of gate and up and of the `A` of down, given what the forward left. Those of the
    /// other adapters are a linear's.
    fn check_backward(&self, found: &Found, gradients: &[f32], dx: &[f32]) -> Vec<Outcome> {
        let MlpCase { hidden, width, activation, .. } = self.case;
        let rows = self.rows();
        let [gate_up, down] = [&self.gate_up, &self.down].map(|group| group.reference(&self.parameters));
        let dy = |row| wide_row(&self.dy, row, hidden);
        let pair = |row| wide_row(&found.gate_up, row, 2 * width);
        let expected = expect(sample_rows(rows, SAMPLED_ROWS), |row| {
            let dact = down.dx_row(&dy(row), &down.ds_row(&dy(row)), &self.factors(&self.down, row));
            let pair = pair(row);
            let gradient =
                |i: usize| reference::gated_backward(activation, pair[i], pair[width + i], dact[i]);
            let part = |which: usize| (0..width).map(move |i| gradient(i)[which]);
            let gradient: Vec<f64> = part(0).chain(part(1)).collect();
            gate_up.dx_row(&gradient, &gate_up.ds_row(&gradient), &self.factors(&self.gate_up, row))
        });
        let inner_roundings = 4 + self.dropout_roundings(); // both ds, dact, and the gradients of gate and up
        let terms = 2 * width + hidden + self.gate_up.rank();
        let tolerance = Tolerance { inner_roundings, ..Tolerance::sum(self.precision.compute, terms) };
        let mut outcomes = vec![self.comparison("dx", tolerance, hidden).compare(dx, &expected)];

        let down_ds: Vec<Vec<f64>> = (0..rows).map(|row| down.ds_row(&dy(row))).collect();
        let tolerance = Tolerance { inner_roundings, ..Tolerance::sum(DType::F32, rows + hidden) };
        for adapter in &self.down.adapters {
            let expected = expect(sample_rows(adapter.slot.rank, SAMPLED_GRADIENTS), |rank| {
                let mut da = vec![0.0; width];
                for (row, ds) in down_ds.iter().enumerate() {
                    let act = reference::gated(activation, &pair(row), width);
                    let dropped = self.dropped(&self.down, &act, row);
                    da.iter_mut().zip(dropped).for_each(|(da, x)| *da += ds[rank] * x);
                }
                da
            });
            let found = &gradients[adapter.slot.a_offset..][..adapter.slot.rank * width];
            outcomes.push(self.comparison("dA of down", tolerance, width).compare(found, &expected));
        }
        for adapter in &self.gate_up.adapters {
            let (slot, which) = (adapter.slot, adapter.out_column / width);
            let expected = expect(sample_rows(width, 2 * SAMPLED_GRADIENTS), |column| {
                let weights: Vec<f32> =
                    self.down.weight.iter().skip(column).step_by(width).copied().collect();
                let mut db = vec![0.0; slot.rank];
                for (row, ds) in down_ds.iter().enumerate() {
                    let through = |(a, ds): (&PlacedAdapter, &[f64])| -> f64 {
                        let a = self.parameters[a.slot.a_offset..].iter().skip(column).step_by(width);
                        a.zip(ds).map(|(&a, ds)| f64::from(a) * ds).sum()
                    };
                    let of_adapter = self.down.adapters.first().map_or(0.0, |a| through((a, ds)));
                    let factor =
                        if self.dropout.is_some() { self.factors(&self.down, row)[column] } else { 1.0 };
                    let dact = dot(&dy(row), &weights) + factor * of_adapter;
                    let [gate, up] =
                        [0, width].map(|side| f64::from(found.gate_up[row * 2 * width + side + column]));
                    let gradient = reference::gated_backward(activation, gate, up, dact)[which];
                    let s = &found.gate_up_s[row * self.gate_up.rank() + adapter.rank_column..][..slot.rank];
                    db.iter_mut()
                        .zip(s)
                        .for_each(|(db, &s)| *db += f64::from(slot.scale) * gradient * f64::from(s));
                }
                db
            });
            let found = &gradients[slot.b_offset..][..slot.rank * width];
            outcomes.push(self.comparison("dB of gate|up", tolerance, slot.rank).compare(found, &expected));
        }
        outcomes
    }
}

/// What lies on the backend.
struct State<B: Backend> {
    gate_up_group: LinearGroup<B>,
    down_group: LinearGroup<B>,
    adapters: B::Floats,
    batch: B::Batch,
    norm_weight: B::Vector,
    x: B::Buffer,
    normed: B::Buffer,
    gate_up: B::Buffer,
    gate_up_s: B::Buffer,
    act: B::Buffer,
    down_s: B::Buffer,
    y: B::Buffer,
    backward: Option<Backward<B>>,
}

struct Backward<B: Backend> {
    dy: B::Buffer,
    dact: B::Buffer,
    dx: B::Buffer,
    gradients: B::Floats,
    /// What the forward left.
    found: Found,
}

impl<B: Backend> State<B> {
    fn forward(&mut self, backend: &B, operation: &MlpOperation) -> Result<()> {
        let Self {
            gate_up_group,
            down_group,
            adapters,
            batch,
            norm_weight,
            x,
            normed,
            gate_up,
            gate_up_s,
            act,
            down_s,
            y,
            ..
        } = self;
        let mlp = Mlp { gate_up: gate_up_group, down: down_group, activation: operation.case.activation };
        let norm = plain_norm(norm_weight, operation.case.hidden);
        let input = NormedInput { norm, x, rows: operation.rows(), batch, normed };
        backend.mlp(mlp, adapters, input, None, MlpSaved { gate_up, gate_up_s, act, down_s }, y)
    }

    fn backward(&mut self, backend: &B, operation: &MlpOperation) -> Result<()> {
        let Self {
            gate_up_group,
            down_group,
            adapters,
            batch,
            normed,
            gate_up,
            gate_up_s,
            act,
            down_s,
            backward,
            ..
        } = self;
        let Some(Backward { dy, dact, dx, gradients, .. }) = backward else { return Ok(()) };
        let mlp = Mlp { gate_up: gate_up_group, down: down_group, activation: operation.case.activation };
        let input = LinearInput { x: normed, rows: operation.rows(), batch };
        let saved = MlpSaved { gate_up, gate_up_s, act, down_s };
        let gradient = MlpGradient { dy, act_is_kept: false, dact, reach: Reach::Input(dx) };
        backend.mlp_backward(mlp, adapters, input, saved, gradient, gradients)
    }

    fn read(&self, backend: &B, operation: &MlpOperation) -> Result<Found> {
        let MlpCase { hidden, width, .. } = operation.case;
        let rows = operation.rows();
        Ok(Found {
            normed: read(backend, &self.normed, rows * hidden)?,
            gate_up: read(backend, &self.gate_up, 2 * rows * width)?,
            gate_up_s: read_s(backend, &self.gate_up_s, rows, operation.gate_up.rank())?,
            act: read(backend, &self.act, rows * width)?,
            down_s: read_s(backend, &self.down_s, rows, operation.down.rank())?,
        })
    }
}

impl<B: Backend + 'static> Operation<B> for MlpOperation {
    fn name(&self) -> &'static str {
        if self.is_backward { "mlp backward" } else { "mlp" }
    }

    fn shape(&self) -> String {
        let MlpCase { hidden, width, ranks: [gate, up, down], activation, .. } = self.case;
        let dropout = if self.dropout.is_some() { ", dropout" } else { "" };
        let rows = self.rows();
        format!("{rows} × {hidden} → {width} → {hidden}, {activation:?}, r {gate}+{up}, {down}{dropout}")
    }

    fn work(&self) -> Work {
        let (rows, width, element) = (self.rows(), self.case.width, self.precision.compute.bytes());
        let [gate_up, down] = [&self.gate_up, &self.down].map(|group| group.shape(rows, self.precision));
        if !self.is_backward {
            let gated = Work::of_gated(rows * width, element, false);
            let norm = Work::of_rms_norm(rows * self.case.hidden, element, false);
            return norm + Work::of_linear(gate_up, element) + gated + Work::of_linear(down, element);
        }
        let of_down = LinearGradients { a: false, b: true, dx: true };
        let of_gate_up = LinearGradients { a: true, b: false, dx: true };
        Work::of_linear_backward(down, element, of_down)
            + Work::of_mlp_middle_backward(rows, width, [gate_up.rank, down.rank], element)
            + Work::of_linear_backward(gate_up, element, of_gate_up)
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let MlpCase { hidden, width, .. } = self.case;
        let rows = self.rows();
        let settings = PassSettings { dropout: self.dropout, ..PassSettings::default() };
        let room = |group: &Group| poisoned(backend, rows * backend.low_rank_stride(group.rank()).max(1));
        let mut state = State {
            gate_up_group: self.gate_up.on(backend, self.precision)?,
            down_group: self.down.on(backend, self.precision)?,
            adapters: backend.floats(&self.parameters)?,
            batch: resident(backend, &self.batch, settings)?,
            norm_weight: self.norm.weight(backend)?,
            x: upload(backend, &self.norm.x)?,
            normed: poisoned(backend, rows * hidden)?,
            gate_up: poisoned(backend, 2 * rows * width)?,
            gate_up_s: room(&self.gate_up)?,
            act: poisoned(backend, rows * width)?,
            down_s: room(&self.down)?,
            y: poisoned(backend, rows * hidden)?,
            backward: None,
        };
        for group in [&state.gate_up_group, &state.down_group] {
            backend.renew_group(group, &state.adapters)?;
        }
        if !self.is_backward {
            return Ok(ready(
                state,
                move |backend: &B, state: &mut State<B>| state.forward(backend, self),
                move |backend: &B, state: &State<B>| {
                    let y = read(backend, &state.y, rows * hidden)?;
                    Ok(self.check_forward(&state.read(backend, self)?, &y))
                },
            ));
        }
        state.forward(backend, self)?;
        state.backward = Some(Backward {
            dy: upload(backend, &self.dy)?,
            dact: poisoned(backend, rows * width)?,
            dx: poisoned(backend, rows * hidden)?,
            gradients: backend.floats(&vec![0.0; self.parameters.len()])?,
            found: state.read(backend, self)?,
        });
        Ok(Box::new(Ready {
            state,
            run: move |backend: &B, state: &mut State<B>| state.backward(backend, self),
            // The outputs of gate and up became their gradients.
            restore: move |backend: &B, state: &mut State<B>| match &state.backward {
                Some(backward) => backend.write_buffer(&mut state.gate_up, &backward.found.gate_up),
                None => Ok(()),
            },
            check: move |backend: &B, state: &State<B>| {
                let Some(Backward { dx, gradients, found, .. }) = &state.backward else {
                    return Ok(Vec::new());
                };
                let gradients = read_floats(backend, gradients, self.parameters.len())?;
                Ok(self.check_backward(found, &gradients, &read(backend, dx, rows * hidden)?))
            },
        }))
    }
}
