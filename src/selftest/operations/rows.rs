//! Norm, gated activation, embedding, and moves of rows.

use super::super::comparison::{Comparison, Outcome, sample_rows};
use super::super::inputs::{batch_of, values, weight, widen};
use super::super::precision::{Precision, Tolerance};
use super::super::reference;
use super::{Operation, Prepared, Ready, Work, expect, poisoned, read, ready, resident, upload, wide_row};
use crate::backend::{Activation, Backend, Embedding, PassSettings, RmsNorm, Weight};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::WeightTensor;

/// Rows that are compared.
const SAMPLED_ROWS: usize = 32;
const EPSILON: f32 = 1e-5;

/// Forward or backward.
#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
}

pub(super) struct Norm {
    precision: Precision,
    pass: Pass,
    rows: usize,
    width: usize,
    pub(super) x: Vec<f32>,
    dy: Vec<f32>,
    before: Vec<f32>,
    weight: Vec<f32>,
}

pub(super) fn norm<B: Backend + 'static>(
    precision: Precision,
    rows: usize,
    width: usize,
) -> Vec<Box<dyn Operation<B>>> {
    let of = |pass| -> Box<dyn Operation<B>> { Box::new(Norm::new(precision, pass, rows, width)) };
    vec![of(Pass::Forward), of(Pass::Backward)]
}

impl Norm {
    fn new(precision: Precision, pass: Pass, rows: usize, width: usize) -> Self {
        Self {
            precision,
            pass,
            rows,
            width,
            x: precision.values(rows * width, 1),
            dy: precision.values(rows * width, 2),
            before: precision.values(rows * width, 4),
            weight: precision.values(width, 3),
        }
    }

    /// In front of another operation.
    pub(super) fn forward(precision: Precision, rows: usize, width: usize) -> Self {
        Self::new(precision, Pass::Forward, rows, width)
    }

    pub(super) fn weight<B: Backend>(&self, backend: &B) -> Result<B::Vector> {
        backend.vector(&[WeightTensor::from_f32("norm", vec![self.width], &self.weight)])
    }

    pub(super) fn compare_forward(&self, output: &'static str, found: &[f32]) -> Outcome {
        // x · rstd may be rounded before × w.
        let tolerance = Tolerance { roundings: 2, ..Tolerance::sum(self.precision.compute, self.width) };
        self.compare(output, tolerance, found)
    }

    fn compare(&self, output: &'static str, tolerance: Tolerance, found: &[f32]) -> Outcome {
        let (weight, epsilon) = (widen(&self.weight), f64::from(EPSILON));
        let expected = expect(sample_rows(self.rows, SAMPLED_ROWS), |row| {
            let x = wide_row(&self.x, row, self.width);
            match self.pass {
                Pass::Forward => reference::rms_norm(&x, &weight, epsilon),
                Pass::Backward => {
                    let dy = wide_row(&self.dy, row, self.width);
                    let mut dx = reference::rms_norm_backward(&x, &weight, epsilon, &dy);
                    let before = &self.before[row * self.width..][..self.width];
                    dx.iter_mut().zip(before).for_each(|(dx, &before)| *dx += f64::from(before));
                    dx
                }
            }
        });
        let compute = self.precision.compute;
        Comparison { output, compute, tolerance, columns: self.width }.compare(found, &expected)
    }
}

impl<B: Backend + 'static> Operation<B> for Norm {
    fn name(&self) -> &'static str {
        match self.pass {
            Pass::Forward => "rms_norm",
            Pass::Backward => "rms_norm backward",
        }
    }

    fn shape(&self) -> String {
        format!("{} × {}", self.rows, self.width)
    }

    fn work(&self) -> Work {
        let element = self.precision.compute.bytes();
        Work::of_rms_norm(self.rows * self.width, element, self.pass == Pass::Backward)
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let (rows, width, compute) = (self.rows, self.width, self.precision.compute);
        let weight = self.weight(backend)?;
        let x = upload(backend, &self.x)?;
        match self.pass {
            Pass::Forward => Ok(ready(
                (weight, x, poisoned(backend, rows * width)?),
                move |backend: &B, (weight, x, y)| {
                    backend.rms_norm(plain_norm(weight, width), rows, x, None, y)
                },
                move |backend: &B, (_, _, y)| {
                    Ok(vec![self.compare_forward("y", &read(backend, y, rows * width)?)])
                },
            )),
            Pass::Backward => Ok(ready(
                (weight, x, upload(backend, &self.dy)?, upload(backend, &self.before)?),
                move |backend: &B, (weight, x, dy, dx)| {
                    backend.rms_norm_backward(plain_norm(weight, width), rows, x, dy, dx)
                },
                move |backend: &B, (_, _, _, dx)| {
                    let tolerance = Tolerance::sum(compute, width);
                    Ok(vec![self.compare("dx", tolerance, &read(backend, dx, rows * width)?)])
                },
            )),
        }
    }
}

pub(super) fn plain_norm<B: Backend>(weight: &B::Vector, width: usize) -> RmsNorm<'_, B> {
    RmsNorm { weight: Weight::Frozen(weight), weight_offset: 0.0, epsilon: EPSILON, width }
}

struct Gated {
    precision: Precision,
    activation: Activation,
    pass: Pass,
    rows: usize,
    width: usize,
    gate_up: Vec<f32>,
    dact: Vec<f32>,
}

pub(super) fn gated<B: Backend + 'static>(
    precision: Precision,
    activation: Activation,
    rows: usize,
    width: usize,
) -> Vec<Box<dyn Operation<B>>> {
    let of = |pass| -> Box<dyn Operation<B>> {
        let mut gate_up = values(2 * rows * width, 5);
        gate_up.iter_mut().for_each(|x| *x = precision.rounded(6.0 * *x));
        let dact = precision.values(rows * width, 6);
        Box::new(Gated { precision, activation, pass, rows, width, gate_up, dact })
    };
    vec![of(Pass::Forward), of(Pass::Backward)]
}

impl Gated {
    fn compare(&self, output: &'static str, columns: usize, found: &[f32]) -> Outcome {
        let width = self.width;
        let expected = expect(sample_rows(self.rows, SAMPLED_ROWS), |row| {
            let pair = wide_row(&self.gate_up, row, 2 * width);
            if self.pass == Pass::Forward {
                return reference::gated(self.activation, &pair, width);
            }
            let dact = wide_row(&self.dact, row, width);
            let gradient =
                |i: usize| reference::gated_backward(self.activation, pair[i], pair[width + i], dact[i]);
            let part = |which: usize| (0..width).map(move |i| gradient(i)[which]);
            part(0).chain(part(1)).collect()
        });
        // Few operations in f32, one of them an exponential of a few units.
        let (compute, tolerance) = (self.precision.compute, Tolerance::sum(self.precision.compute, 4));
        Comparison { output, compute, tolerance, columns }.compare(found, &expected)
    }
}

impl<B: Backend + 'static> Operation<B> for Gated {
    fn name(&self) -> &'static str {
        match (self.activation, self.pass) {
            (Activation::Silu, Pass::Forward) => "gated_silu",
            (Activation::Silu, Pass::Backward) => "gated_silu backward",
            (Activation::GeluTanh, Pass::Forward) => "gated_gelu",
            (Activation::GeluTanh, Pass::Backward) => "gated_gelu backward",
        }
    }

    fn shape(&self) -> String {
        format!("{} × {}", self.rows, self.width)
    }

    fn work(&self) -> Work {
        let element = self.precision.compute.bytes();
        Work::of_gated(self.rows * self.width, element, self.pass == Pass::Backward)
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let (activation, rows, width) = (self.activation, self.rows, self.width);
        let gate_up = upload(backend, &self.gate_up)?;
        match self.pass {
            Pass::Forward => Ok(ready(
                (gate_up, poisoned(backend, rows * width)?),
                move |backend: &B, (gate_up, act)| backend.gated(activation, rows, width, gate_up, act),
                move |backend: &B, (_, act)| {
                    Ok(vec![self.compare("act", width, &read(backend, act, rows * width)?)])
                },
            )),
            Pass::Backward => Ok(Box::new(Ready {
                state: (gate_up, upload(backend, &self.dact)?),
                run: move |backend: &B, (gate_up, dact): &mut (B::Buffer, B::Buffer)| {
                    backend.gated_backward(activation, rows, width, dact, gate_up)
                },
                restore: move |backend: &B, (gate_up, _): &mut (B::Buffer, B::Buffer)| {
                    backend.write_buffer(gate_up, &self.gate_up)
                },
                check: move |backend: &B, (gate_up, _): &(B::Buffer, B::Buffer)| {
                    let found = read(backend, gate_up, 2 * rows * width)?;
                    Ok(vec![self.compare("dgate|dup", 2 * width, &found)])
                },
            })),
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Move {
    Embedding,
    Gather,
    Scatter,
}

struct Moves {
    precision: Precision,
    which: Move,
    batch: Batch,
    width: usize,
    vocabulary: usize,
    /// The table, or the rows.
    x: Vec<f32>,
}

pub(super) fn moves<B: Backend + 'static>(
    precision: Precision,
    lengths: &[usize],
    width: usize,
    vocabulary: usize,
) -> Vec<Box<dyn Operation<B>>> {
    let of = |which| -> Box<dyn Operation<B>> {
        let batch = batch_of(lengths, vocabulary as u32);
        let rows = match which {
            Move::Embedding => vocabulary,
            Move::Gather => batch.token_count(),
            Move::Scatter => batch.labelled_count(),
        };
        // The table is stored in a half type on every backend.
        let mut x = precision.values(rows * width, 7);
        if which == Move::Embedding && precision.compute == DType::F32 {
            x.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
        }
        Box::new(Moves { precision, which, batch, width, vocabulary, x })
    };
    vec![of(Move::Embedding), of(Move::Gather), of(Move::Scatter)]
}

impl Moves {
    /// Compares rows of `found [rows, width]`: `source` names each one's row of `x`, if it has one.
    fn compare(&self, found: &[f32], rows: usize, source: impl Fn(usize) -> Option<usize> + Sync) -> Outcome {
        let expected = expect(sample_rows(rows, SAMPLED_ROWS), |row| match source(row) {
            Some(source) => wide_row(&self.x, source, self.width),
            None => vec![0.0; self.width],
        });
        let compute = self.precision.compute;
        let tolerance = Tolerance::exact(compute);
        Comparison { output: "rows", compute, tolerance, columns: self.width }.compare(found, &expected)
    }
}

impl<B: Backend + 'static> Operation<B> for Moves {
    fn name(&self) -> &'static str {
        match self.which {
            Move::Embedding => "embedding",
            Move::Gather => "gather_labelled",
            Move::Scatter => "scatter_labelled",
        }
    }

    fn shape(&self) -> String {
        match self.which {
            Move::Embedding => {
                format!("{} × {} of {}", self.batch.token_count(), self.width, self.vocabulary)
            }
            _ => format!("{} of {} × {}", self.batch.labelled_count(), self.batch.token_count(), self.width),
        }
    }

    fn work(&self) -> Work {
        let (tokens, labelled) = (self.batch.token_count(), self.batch.labelled_count());
        let rows = match self.which {
            Move::Embedding => 2 * tokens,
            Move::Gather => 2 * labelled,
            Move::Scatter => tokens + 2 * labelled, // zeros first
        };
        Work::of_moving(rows * self.width, self.precision.compute.bytes())
    }

    /// The embedding's table is there whole, and few of its rows are read.
    fn resident_bytes(&self) -> f64 {
        let table = match self.which {
            Move::Embedding => self.vocabulary * self.width * stored_half(self.precision).bytes(),
            Move::Gather | Move::Scatter => 0,
        };
        Operation::<B>::work(self).bytes + table as f64
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let (width, batch) = (self.width, &self.batch);
        let loaded = resident(backend, batch, PassSettings::default())?;
        let (tokens, labelled) = (batch.token_count(), batch.labelled_count());
        if self.which == Move::Embedding {
            let shape = vec![self.vocabulary, width];
            let table = backend.matrix(&[weight("table", stored_half(self.precision), shape, &self.x, 0)])?;
            return Ok(ready(
                (table, loaded, poisoned(backend, tokens * width)?),
                move |backend: &B, (table, batch, x)| {
                    backend.embedding(batch, Embedding { table, width, scale: 1.0 }, x)
                },
                move |backend: &B, (_, _, x)| {
                    let id = |row: usize| Some(batch.token_ids[row] as usize);
                    Ok(vec![self.compare(&read(backend, x, tokens * width)?, tokens, id)])
                },
            ));
        }
        let input = upload(backend, &self.x)?;
        if self.which == Move::Gather {
            return Ok(ready(
                (loaded, input, poisoned(backend, labelled * width)?),
                move |backend: &B, (batch, x, packed)| backend.gather_labelled(batch, width, x, packed),
                move |backend: &B, (_, _, packed)| {
                    let row = |row: usize| Some(batch.labelled_rows[row] as usize);
                    Ok(vec![self.compare(&read(backend, packed, labelled * width)?, labelled, row)])
                },
            ));
        }
        Ok(ready(
            (loaded, input, poisoned(backend, tokens * width)?),
            move |backend: &B, (batch, packed, dx)| backend.scatter_labelled(batch, width, packed, dx),
            move |backend: &B, (_, _, dx)| {
                let place = |row: usize| batch.labelled_rows.binary_search(&(row as u32)).ok();
                Ok(vec![self.compare(&read(backend, dx, tokens * width)?, tokens, place)])
            },
        ))
    }
}

/// The type in which frozen weights are stored: the compute type, and bf16 for a backend that computes in f32.
pub(super) fn stored_half(precision: Precision) -> DType {
    match precision.compute {
        DType::F32 => DType::Bf16,
        half => half,
    }
}
