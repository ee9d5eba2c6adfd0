//! Output head and cross-entropy: the loss alone, and with its gradient.

use super::super::comparison::{Comparison, Outcome, sample_rows};
use super::super::inputs::{batch_of, values, weight};
use super::super::precision::{Precision, Tolerance, underflow};
use super::super::reference::{cross_entropy, cross_entropy_backward, product, product_transposed, soft_cap};
use super::rows::stored_half;
use super::{
    Operation, Prepared, Work, expect, poisoned, poisoned_floats, read, read_floats, ready, resident, upload,
    wide_row,
};
use crate::backend::{Backend, Head, PassSettings, Weight};
use crate::batch::Batch;
use crate::dtype::DType;
use crate::error::Result;

/// Rows that are compared: each costs two passes over the whole table.
const SAMPLED_ROWS: usize = 4;
const GRADIENT_SCALE: f32 = 1.0;
/// Standard deviation of the logits.
const LOGIT_DEVIATION: f64 = 2.0;

struct HeadLoss {
    precision: Precision,
    with_gradient: bool,
    batch: Batch,
    vocabulary: usize,
    width: usize,
    soft_cap: Option<f32>,
    table: Vec<f32>,
    x: Vec<f32>,
}

pub(super) fn operations<B: Backend + 'static>(
    precision: Precision,
    tokens: usize,
    vocabulary: usize,
    width: usize,
    soft_cap: Option<f32>,
) -> Vec<Box<dyn Operation<B>>> {
    let of = |with_gradient| -> Box<dyn Operation<B>> {
        let batch = batch_of(&[tokens], vocabulary as u32);
        let half = Precision { compute: stored_half(precision), ..precision };
        // Products of two numbers in -1..1 have the deviation 1/3.
        let scale = (3.0 * LOGIT_DEVIATION / (width as f64).sqrt()) as f32;
        let mut table = values(vocabulary * width, 50);
        table.iter_mut().for_each(|w| *w = half.rounded(scale * *w));
        let x = precision.values(batch.labelled_count() * width, 51);
        Box::new(HeadLoss { precision, with_gradient, batch, vocabulary, width, soft_cap, table, x })
    };
    vec![of(false), of(true)]
}

impl HeadLoss {
    fn check(&self, losses: &[f32], dx: Option<&[f32]>) -> Vec<Outcome> {
        let (width, compute, count) = (self.width, self.precision.compute, self.batch.labelled_count());
        let sample = sample_rows(count, SAMPLED_ROWS);
        let raw =
            expect(sample, |row| product_transposed(&wide_row(&self.x, row, width), &self.table, width));
        let cap = |z: f64| soft_cap(z, self.soft_cap.map(f64::from));
        let logits: Vec<(usize, Vec<f64>)> =
            raw.iter().map(|(row, z)| (*row, z.iter().map(|z| cap(*z)[0]).collect())).collect();
        let highest = raw.iter().flat_map(|(_, z)| z).fold(0.0_f64, |highest, z| highest.max(z.abs()));
        let target = |row: usize| self.batch.targets[row] as usize;
        let (loss, hit): (Vec<_>, Vec<_>) = logits
            .iter()
            .map(|(row, z)| {
                let (loss, hit) = cross_entropy(z, target(*row));
                ((*row, vec![loss]), (*row, vec![f64::from(u8::from(hit))]))
            })
            .unzip();
        // The target's logit and the others are each off by a rounding of at most the highest.
        let absolute = 2.0 * self.precision.rounding_unit() * highest;
        let tolerance = Tolerance { absolute, ..Tolerance::sum(DType::F32, width) };
        let comparison = |output, tolerance, columns| Comparison { output, compute, tolerance, columns };
        let mut outcomes = vec![comparison("loss", tolerance, 1).compare(&losses[..count], &loss)];
        // Which logit is the highest is certain where the next is further away than their roundings.
        let certain: Vec<(usize, Vec<f64>)> = hit
            .into_iter()
            .zip(&logits)
            .filter(|((row, _), (_, z))| {
                let others = z.iter().enumerate().filter(|(v, _)| *v != target(*row)).map(|(_, z)| *z);
                (others.fold(f64::NEG_INFINITY, f64::max) - z[target(*row)]).abs() > absolute
            })
            .map(|(hit, _)| hit)
            .collect();
        if !certain.is_empty() {
            let tolerance = Tolerance::exact(DType::F32);
            outcomes.push(comparison("hit", tolerance, 1).compare(&losses[count..2 * count], &certain));
        }
        if let Some(dx) = dx {
            let expected = expect((0..logits.len()).collect(), |place| {
                let (row, z) = &logits[place];
                let mut dz = cross_entropy_backward(z, target(*row));
                dz.iter_mut()
                    .zip(&raw[place].1)
                    .for_each(|(dz, z)| *dz *= f64::from(GRADIENT_SCALE) * cap(*z)[1]);
                product(&dz, &self.table, width)
            });
            let expected: Vec<(usize, Vec<f64>)> =
                expected.into_iter().map(|(place, dx)| (logits[place].0, dx)).collect();
            let largest_weight = 3.0 * LOGIT_DEVIATION / (width as f64).sqrt();
            let tolerance = Tolerance {
                roundings: 2, // dz of the target, and dx
                // z, in which a probability, and the slope of a cap, are off by as many units as z is large; dz
                inner_roundings: if self.soft_cap.is_some() { 8 } else { 4 },
                // Small probabilities are subnormal in f16.
                absolute: 8.0 * underflow(compute) * (self.vocabulary as f64).sqrt() * largest_weight,
                ..Tolerance::sum(compute, self.vocabulary)
            };
            outcomes.push(comparison("dx", tolerance, width).compare(dx, &expected));
        }
        outcomes
    }
}

/// What lies on the backend.
struct State<B: Backend> {
    weight: B::Matrix,
    batch: B::Batch,
    x: B::Buffer,
    losses: B::Floats,
    dx: Option<B::Buffer>,
}

impl<B: Backend + 'static> Operation<B> for HeadLoss {
    fn name(&self) -> &'static str {
        if self.with_gradient { "head loss with gradient" } else { "head loss" }
    }

    fn shape(&self) -> String {
        format!("{} × {} → {}", self.batch.labelled_count(), self.width, self.vocabulary)
    }

    fn work(&self) -> Work {
        let (rows, width, element) =
            (self.batch.labelled_count(), self.width, self.precision.compute.bytes());
        let weight_bytes = self.vocabulary * width * stored_half(self.precision).bytes();
        Work::of_head(rows, width, self.vocabulary, weight_bytes, element, [self.with_gradient, false])
    }

    fn prepare<'a>(&'a self, backend: &B) -> Result<Box<dyn Prepared<B> + 'a>> {
        let (count, width, vocabulary) = (self.batch.labelled_count(), self.width, self.vocabulary);
        let soft_cap = self.soft_cap;
        let shape = vec![vocabulary, width];
        let state = State::<B> {
            weight: backend.matrix(&[weight("head", stored_half(self.precision), shape, &self.table, 0)])?,
            batch: resident(
                backend,
                &self.batch,
                PassSettings { gradient_scale: GRADIENT_SCALE, ..PassSettings::default() },
            )?,
            x: upload(backend, &self.x)?,
            losses: poisoned_floats(backend, 2 * count)?,
            dx: self.with_gradient.then(|| poisoned(backend, count * width)).transpose()?,
        };
        Ok(ready(
            state,
            move |backend: &B, State { weight, batch, x, losses, dx }: &mut State<B>| {
                let head = Head { weight: Weight::Frozen(weight), vocabulary, width, soft_cap };
                backend.head_loss(head, batch, x, losses, dx.as_mut(), None)
            },
            move |backend: &B, State { losses, dx, .. }: &State<B>| {
                let losses = read_floats(backend, losses, 2 * count)?;
                let dx = dx.as_ref().map(|dx| read(backend, dx, count * width)).transpose()?;
                Ok(self.check(&losses, dx.as_deref()))
            },
        ))
    }
}
