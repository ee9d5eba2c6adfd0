//! Linear groups with adapters, forward and backward.

use super::super::comparison::{Comparison, Outcome, sample_rows};
use super::super::inputs::{batch_of, weight, widen};
use super::super::precision::{Precision, Tolerance};
use super::super::reference::{self, dot, dropout_factors};
use super::rows::stored_half;
use super::{
    Operation, Prepared, Work, expect, poisoned, read, read_floats, read_s, ready, resident, upload, wide_row,
};
use crate::backend::{
    Backend, Dropout, LinearGradients, LinearGroup, LinearInput, LinearShape, LoraSlot, PassSettings,
    PlacedAdapter, Projection, placed_adapters,
};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::WeightTensor;

/// One group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearCase {
    /// Tokens of each sample.
    pub lengths: &'static [usize],
    /// `I`.
    pub in_features: usize,
    /// Width and rank (0: no adapter) of each projection; one of width 0 is none.
    pub projections: [(usize, usize); 3],
    /// Whether there is a bias.
    pub bias: bool,
    /// Dropout's probability.
    pub dropout: f32,
}

/// Rows of activations that are compared, and rows of each gradient.
const SAMPLED_ROWS: usize = 6;
const SAMPLED_GRADIENTS: usize = 3;

const INPUT_INDEX: u32 = 5;

struct Linear {
    precision: Precision,
    case: LinearCase,
    is_backward: bool,
    batch: Batch,
    projections: Vec<Projection>,
    adapters: Vec<PlacedAdapter>,
    dropout: Option<Dropout>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    parameters: Vec<f32>,
    x: Vec<f32>,
    dy: Vec<f32>,
}

pub(super) fn operations<B: Backend + 'static>(
    precision: Precision,
    case: LinearCase,
) -> Vec<Box<dyn Operation<B>>> {
    [false, true]
        .map(|is_backward| -> Box<dyn Operation<B>> { Box::new(Linear::new(precision, case, is_backward)) })
        .into()
}

impl Linear {
    fn new(precision: Precision, case: LinearCase, is_backward: bool) -> Self {
        let inputs = case.in_features;
        let ranks: usize = case.projections.iter().map(|&(_, rank)| rank).sum();
        let (mut a_offset, mut b_offset) = (0, ranks * inputs);
        let mut projections = Vec::new();
        for &(out_features, rank) in case.projections.iter().filter(|&&(out_features, _)| out_features > 0) {
            // A power of two: then its product with B rounds nothing.
            let lora = (rank > 0).then_some(LoraSlot {
                rank,
                scale: 2.0,
                a_offset,
                b_offset,
                magnitude_offset: None,
            });
            projections.push(Projection { out_features, lora });
            a_offset += rank * inputs;
            b_offset += rank * out_features;
        }
        let outs: usize = projections.iter().map(|projection| projection.out_features).sum();
        let batch = batch_of(case.lengths, 9);
        let rows = batch.token_count();
        let half = Precision { compute: stored_half(precision), ..precision };
        Self {
            adapters: placed_adapters(&projections).collect(),
            dropout: (case.dropout > 0.0).then_some(Dropout { probability: case.dropout, seed: 7, epoch: 2 }),
            // In a half type on every backend.
            weight: half.values(outs * inputs, 30),
            bias: precision.values(outs, 40),
            // Rounded, so that a backend's copies of them in the compute type lose nothing.
            parameters: precision.values(b_offset, 41),
            x: precision.values(rows * inputs, 42),
            dy: if is_backward { precision.values(rows * outs, 43) } else { Vec::new() },
            precision,
            case,
            is_backward,
            batch,
            projections,
        }
    }

    fn rows(&self) -> usize {
        self.batch.token_count()
    }

    fn outs(&self) -> usize {
        self.projections.iter().map(|projection| projection.out_features).sum()
    }

    fn ranks(&self) -> usize {
        self.adapters.iter().map(|adapter| adapter.slot.rank).sum()
    }

    fn reference(&self) -> reference::Linear<'_, f32, f32> {
        reference::Linear {
            weight: &self.weight,
            in_features: self.case.in_features,
            bias: self.case.bias.then_some(&self.bias[..]),
            adapters: &self.adapters,
            parameters: &self.parameters,
        }
    }

    fn factors(&self, row: usize) -> Vec<f64> {
        dropout_factors(&self.batch, self.dropout, INPUT_INDEX, row, self.case.in_features)
    }

    fn dropped_x(&self, row: usize) -> Vec<f64> {
        let x = wide_row(&self.x, row, self.case.in_features);
        x.iter().zip(self.factors(row)).map(|(x, factor)| x * factor).collect()
    }

    /// Roundings of dropped inputs.
    fn dropout_roundings(&self) -> usize {
        usize::from(self.dropout.is_some())
    }

    fn comparison(&self, output: &'static str, tolerance: Tolerance, columns: usize) -> Comparison {
        Comparison { output, compute: self.precision.compute, tolerance, columns }
    }

    /// `s` and `y`; `y` given the `s` that was found, as the backend's main product reads it.
    fn check_forward(&self, s: &[f32], y: &[f32]) -> Vec<Outcome> {
        let (inputs, ranks, compute) = (self.case.in_features, self.ranks(), self.precision.compute);
        let reference = self.reference();
        let sample = sample_rows(self.rows(), SAMPLED_ROWS);
        let mut outcomes = Vec::new();
        if ranks > 0 {
            let expected = expect(sample.clone(), |row| reference.s_row(&self.dropped_x(row)));
            let tolerance =
                Tolerance { inner_roundings: self.dropout_roundings(), ..Tolerance::sum(compute, inputs) };
            outcomes.push(self.comparison("s", tolerance, ranks).compare(s, &expected));
        }
        let expected = expect(sample, |row| {
            reference.y_row(&wide_row(&self.x, row, inputs), &widen(&s[row * ranks..(row + 1) * ranks]))
        });
        let tolerance = Tolerance::sum(compute, inputs + ranks);
        outcomes.push(self.comparison("y", tolerance, self.outs()).compare(y, &expected));
        outcomes
    }

    /// `dx`, and the gradients of `A` and `B`, given the `s` that the backward read.
    fn check_backward(&self, s: &[f32], gradients: &[f32], dx: &[f32]) -> Vec<Outcome> {
        let (rows, inputs, outs, ranks) = (self.rows(), self.case.in_features, self.outs(), self.ranks());
        let reference = self.reference();
        let expected = expect(sample_rows(rows, SAMPLED_ROWS), |row| {
            let dy = wide_row(&self.dy, row, outs);
            reference.dx_row(&dy, &reference.ds_row(&dy), &self.factors(row))
        });
        let tolerance = Tolerance {
            inner_roundings: 1 + self.dropout_roundings(), // ds
            ..Tolerance::sum(self.precision.compute, outs + ranks)
        };
        let mut outcomes = vec![self.comparison("dx", tolerance, inputs).compare(dx, &expected)];
        for adapter in &self.adapters {
            let slot = adapter.slot;
            let scale = f64::from(slot.scale);
            let b = &self.parameters[slot.b_offset..][..slot.rank * adapter.out_features];
            let expected = expect(sample_rows(slot.rank, SAMPLED_GRADIENTS), |rank| {
                let column: Vec<f32> = b.chunks(slot.rank).map(|b| b[rank]).collect();
                let mut da = vec![0.0; inputs];
                for row in 0..rows {
                    let ds = scale
                        * dot(&self.dy[row * outs + adapter.out_column..][..adapter.out_features], &column);
                    da.iter_mut().zip(self.dropped_x(row)).for_each(|(da, x)| *da += ds * x);
                }
                da
            });
            // Each ds is a sum itself, of O products of deviation 1/3, whose error meets a value of deviation 1/√3 in each row.
            let ds_error = 2f64.powi(-23) * scale * adapter.out_features as f64 / 3.0;
            let tolerance = Tolerance {
                inner_roundings: 1 + self.dropout_roundings(), // ds
                absolute: 8.0 * ds_error * (rows as f64 / 3.0).sqrt(),
                ..Tolerance::sum(DType::F32, rows)
            };
            let found = &gradients[slot.a_offset..][..slot.rank * inputs];
            outcomes.push(self.comparison("dA", tolerance, inputs).compare(found, &expected));
            let expected = expect(sample_rows(adapter.out_features, 8 * SAMPLED_GRADIENTS), |out| {
                let mut db = vec![0.0; slot.rank];
                for row in 0..rows {
                    let dy = scale * f64::from(self.dy[row * outs + adapter.out_column + out]);
                    let s = &s[row * ranks + adapter.rank_column..][..slot.rank];
                    db.iter_mut().zip(s).for_each(|(db, &s)| *db += dy * f64::from(s));
                }
                db
            });
            let found = &gradients[slot.b_offset..][..slot.rank * adapter.out_features];
            let comparison = self.comparison("dB", Tolerance::sum(DType::F32, rows), slot.rank);
            outcomes.push(comparison.compare(found, &expected));
        }
        outcomes
    }
}

/// What lies on the backend.
struct State<B: Backend> {
    group: LinearGroup<B>,
    adapters: B::Floats,
    batch: B::Batch,
    x: B::Buffer,
    s: B::Buffer,
    y: B::Buffer,
    backward: Option<Backward<B>>,
}

struct Backward<B: Backend> {
    dy: B::Buffer,
    dx: B::Buffer,
    gradients: B::Floats,
}

impl<B: Backend> State<B> {
    fn forward(&mut self, backend: &B, operation: &Linear) -> Result<()> {
        let input = LinearInput { x: &self.x, rows: operation.rows(), batch: &self.batch };
        backend.linear(&self.group, &self.adapters, input, None, &mut self.s, &mut self.y)
    }

    fn run(&mut self, backend: &B, operation: &Linear) -> Result<()> {
        let Some(Backward { dy, dx, gradients }) = &mut self.backward else {
            return self.forward(backend, operation);
        };
        let input = LinearInput { x: &self.x, rows: operation.rows(), batch: &self.batch };
        backend.linear_backward(&self.group, &self.adapters, input, &self.s, dy, gradients, Some(dx))
    }
}

impl<B: Backend + 'static> Operation<B> for Linear {
    fn name(&self) -> &'static str {
        if self.is_backward { "linear backward" } else { "linear" }
    }

    fn shape(&self) -> String {
        let widths: Vec<String> =
            self.projections.iter().map(|projection| projection.out_features.to_string()).collect();
        let ranks: Vec<String> = self
            .projections
            .iter()
            .map(|projection| projection.lora.map_or(0, |slot| slot.rank).to_string())
            .collect();
        let dropout = if self.dropout.is_some() { ", dropout" } else { "" };
        let (rows, inputs) = (self.rows(), self.case.in_features);
        format!("{rows} × {inputs} → {}, r {}{dropout}", widths.join("+"), ranks.join("+"))
    }

    fn work(&self) -> Work {
        let (inputs, outputs) = (self.case.in_features, self.outs());
        let shape = LinearShape {
            rows: self.rows(),
            inputs,
            outputs,
            rank: self.ranks(),
            b_elements: self.adapters.iter().map(|adapter| adapter.slot.rank * adapter.out_features).sum(),
            weight_bytes: inputs * outputs * stored_half(self.precision).bytes(),
            has_magnitudes: false,
            frozen_products: 1,
        };
        let element = self.precision.compute.bytes();
        match self.is_backward {
            false => Work::of_linear(shape, element),
            true => Work::of_linear_backward(shape, element, LinearGradients::with_dx(true)),
        }
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let (rows, inputs, outs, ranks) = (self.rows(), self.case.in_features, self.outs(), self.ranks());
        let matrix = backend.matrix(&[weight(
            "weight",
            stored_half(self.precision),
            vec![outs, inputs],
            &self.weight,
            0,
        )])?;
        let bias = WeightTensor::from_f32("bias", vec![outs], &self.bias);
        let bias = self.case.bias.then(|| backend.vector(&[bias])).transpose()?;
        let backward = match self.is_backward {
            false => None,
            true => Some(Backward {
                dy: upload(backend, &self.dy)?,
                dx: poisoned(backend, rows * inputs)?,
                gradients: backend.floats(&vec![0.0; self.parameters.len()])?,
            }),
        };
        let mut state = State {
            group: LinearGroup::new(backend, INPUT_INDEX, matrix, bias, inputs, self.projections.clone())?,
            adapters: backend.floats(&self.parameters)?,
            batch: resident(
                backend,
                &self.batch,
                PassSettings { dropout: self.dropout, ..PassSettings::default() },
            )?,
            x: upload(backend, &self.x)?,
            s: poisoned(backend, rows * backend.low_rank_stride(ranks).max(1))?,
            y: poisoned(backend, rows * outs)?,
            backward,
        };
        backend.renew_group(&state.group, &state.adapters)?;
        if self.is_backward {
            state.forward(backend, self)?;
        }
        Ok(ready(
            state,
            move |backend: &B, state: &mut State<B>| state.run(backend, self),
            move |backend: &B, state: &State<B>| {
                let s = read_s(backend, &state.s, rows, ranks)?;
                let Some(Backward { dx, gradients, .. }) = &state.backward else {
                    return Ok(self.check_forward(&s, &read(backend, &state.y, rows * outs)?));
                };
                let gradients = read_floats(backend, gradients, self.parameters.len())?;
                Ok(self.check_backward(&s, &gradients, &read(backend, dx, rows * inputs)?))
            },
        ))
    }
}

/// One product of 8192 in each dimension, without adapters: what a backend's arithmetic reaches.
pub(crate) fn large_product<B: Backend + 'static>(precision: Precision) -> Box<dyn Operation<B>> {
    let projections = [(8192, 0), (0, 0), (0, 0)];
    let case = LinearCase { lengths: &[8192], in_features: 8192, projections, bias: false, dropout: 0.0 };
    Box::new(Linear::new(precision, case, false))
}
