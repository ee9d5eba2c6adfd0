//! Linear groups: adapters on any projections, bias, residual, dropout, stored types.

use fastlora::backend::{
    Backend, Dropout, LinearGroup, LinearInput, LoraSlot, PassSettings, PlacedAdapter, Projection,
};
use fastlora::batch::Batch;
use fastlora::dtype::DType;
use fastlora::tensor::WeightTensor;

use super::reference::{self, dot, dropout_factors};
use super::{
    Precision, Record, batch_of, buffer, finite_differences, read, read_floats, resident_with, stored,
    values, widen,
};

/// One shape.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub lengths: &'static [usize],
    pub in_features: usize,
    /// Width and rank (0: no adapter) of each projection.
    pub projections: &'static [(usize, usize)],
    pub bias: bool,
    pub residual: bool,
    pub dropout: f32,
    pub dtype: DType,
    /// Whether the adapters have magnitudes (DoRA).
    pub magnitudes: bool,
}

pub const CASES: &[Case] = &[
    Case {
        lengths: &[1],
        in_features: 12,
        projections: &[(10, 2), (6, 3), (5, 1)],
        bias: true,
        residual: false,
        dropout: 0.0,
        dtype: DType::F32,
        magnitudes: false,
    },
    Case {
        lengths: &[4, 1, 14],
        in_features: 40,
        projections: &[(24, 4), (8, 0), (8, 2)],
        bias: true,
        residual: false,
        dropout: 0.3,
        dtype: DType::F16,
        magnitudes: false,
    },
    Case {
        lengths: &[9, 3],
        in_features: 17,
        projections: &[(11, 0), (7, 16)],
        bias: false,
        residual: false,
        dropout: 0.5,
        dtype: DType::Bf16,
        magnitudes: false,
    },
    Case {
        lengths: &[13],
        in_features: 33,
        projections: &[(18, 5)],
        bias: false,
        residual: true,
        dropout: 0.0,
        dtype: DType::F32,
        magnitudes: false,
    },
    Case {
        lengths: &[3, 8],
        in_features: 16,
        projections: &[(20, 0), (4, 0)],
        bias: true,
        residual: true,
        dropout: 0.1,
        dtype: DType::F16,
        magnitudes: false,
    },
    Case {
        lengths: &[5],
        in_features: 20,
        projections: &[(10, 2), (6, 0), (70, 3)],
        bias: true,
        residual: false,
        dropout: 0.0,
        dtype: DType::F32,
        magnitudes: true,
    },
    // Few rows, which stream the weight, and more.
    Case {
        lengths: &[3],
        in_features: 33,
        projections: &[(18, 5)],
        bias: true,
        residual: true,
        dropout: 0.4,
        dtype: DType::F16,
        magnitudes: true,
    },
    Case {
        lengths: &[4, 1, 14],
        in_features: 40,
        projections: &[(24, 4), (8, 0), (8, 2)],
        bias: false,
        residual: true,
        dropout: 0.3,
        dtype: DType::Bf16,
        magnitudes: true,
    },
];

const INPUT_INDEX: u32 = 5;
const SEED: u64 = 0x1234_5678_9ABC;

/// A case on a backend, and in float64.
pub struct Setup<B: Backend> {
    pub case: Case,
    precision: Precision,
    pub group: LinearGroup<B>,
    pub dropout: Option<Dropout>,
    pub adapters: Vec<f32>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    /// `‖W + scale·B·A‖` of each row.
    norms: Vec<f64>,
}

impl<B: Backend> Setup<B> {
    pub fn new(backend: &B, case: Case, precision: Precision) -> Self {
        Self::behind(0, backend, case, precision)
    }

    /// The same with its adapters behind the first `taken` numbers of the flat buffer.
    pub fn behind(taken: usize, backend: &B, case: Case, precision: Precision) -> Self {
        let case = Case { in_features: precision.width(case.in_features), ..case };
        let width = case.in_features;
        let widened = case.projections.iter().map(|&(out, rank)| (precision.width(out), rank));
        let (mut tensors, mut weight) = (Vec::new(), Vec::new());
        for (number, (out, _)) in widened.clone().enumerate() {
            let (tensor, seen) = stored(
                precision,
                "w",
                case.dtype,
                vec![out, width],
                &values(out * width, 30 + number as u64),
                0,
            );
            tensors.push(tensor);
            weight.extend(seen);
        }
        let outs: usize = widened.clone().map(|(out, _)| out).sum();
        let bias = precision.values(outs, 40);
        // A matrices side by side, B matrices behind them in the opposite order, gaps around.
        let ranks: usize = case.projections.iter().map(|&(_, rank)| rank).sum();
        let mut a_offset = precision.width(taken + 3);
        let mut b_offset = a_offset + ranks * width + 2;
        let mut projections = Vec::new();
        let ranked = widened.clone().filter(|&(_, rank)| rank > 0);
        let mut magnitude_offset = b_offset + ranked.map(|(out, rank)| out * rank).sum::<usize>() + 3;
        for (out_features, rank) in widened {
            let scale = 0.5 + rank as f32;
            let slot = LoraSlot {
                rank,
                scale,
                a_offset,
                b_offset,
                magnitude_offset: case.magnitudes.then_some(magnitude_offset),
            };
            let lora = (rank > 0).then_some(slot);
            magnitude_offset += if rank > 0 && case.magnitudes { out_features } else { 0 };
            projections.push(Projection { out_features, lora });
            a_offset += rank * width;
            b_offset += rank * out_features;
        }
        let bias_vector =
            case.bias.then(|| backend.vector(&[WeightTensor::from_f32("b", vec![outs], &bias)]).unwrap());
        let matrix = backend.matrix(&tensors).unwrap();
        let group = LinearGroup::new(backend, INPUT_INDEX, matrix, bias_vector, width, projections).unwrap();
        let dropout =
            (case.dropout > 0.0).then_some(Dropout { probability: case.dropout, seed: SEED, epoch: 2 });
        let adapters = values(magnitude_offset + 4, 41);
        let places: Vec<PlacedAdapter> = group.adapters().collect();
        let mut sums = weight.clone();
        for PlacedAdapter { slot, out_column, out_features, .. } in places {
            for row in 0..out_features {
                for r in 0..slot.rank {
                    let factor =
                        f64::from(slot.scale) * f64::from(adapters[slot.b_offset + row * slot.rank + r]);
                    let a = &adapters[slot.a_offset + r * width..][..width];
                    let sums = &mut sums[(out_column + row) * width..][..width];
                    sums.iter_mut().zip(a).for_each(|(sum, &a)| *sum += factor * f64::from(a));
                }
            }
        }
        let norms = sums.chunks(width).map(|row| dot(row, row).sqrt()).collect();
        Self { case, precision, group, dropout, adapters, weight, bias: widen(&bias), norms }
    }

    /// `(v, y)` of a row with magnitudes, given what the adapters see of it and their `s`.
    fn with_magnitudes(&self, x: &[f64], seen: &[f64], s: &[f64], adapters: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let places: Vec<PlacedAdapter> = self.group.adapters().collect();
        let width = self.case.in_features;
        let frozen = reference::Linear {
            weight: &self.weight,
            in_features: width,
            bias: None,
            adapters: &[],
            parameters: adapters,
        };
        let v = reference::Linear { adapters: &places, ..frozen }.y_row(seen, s);
        let bias = self.case.bias.then_some(&self.bias[..]);
        let mut y = reference::Linear { bias, ..frozen }.y_row(x, &[]);
        let of_seen = frozen.y_row(seen, &[]);
        let mut gains = vec![1.0; v.len()];
        for PlacedAdapter { slot, out_column, out_features, .. } in &places {
            for row in 0..*out_features {
                let magnitude = adapters[slot.magnitude_offset.unwrap() + row];
                gains[out_column + row] = magnitude / self.norms[out_column + row];
            }
        }
        for (place, y) in y.iter_mut().enumerate() {
            *y += gains[place] * v[place] - of_seen[place];
        }
        (v, y)
    }

    /// Factors of the mask, `[T, I]`.
    pub fn mask(&self, batch: &Batch) -> Vec<f64> {
        let factors = |row| dropout_factors(batch, self.dropout, INPUT_INDEX, row, self.case.in_features);
        (0..batch.token_count()).flat_map(factors).collect()
    }

    /// `(s, v, y)`; no `v` without magnitudes.
    pub fn forward(&self, mask: &[f64], x: &[f64], adapters: &[f64], residual: &[f64]) -> [Vec<f64>; 3] {
        let width = self.case.in_features;
        let places: Vec<PlacedAdapter> = self.group.adapters().collect();
        let linear = reference::Linear {
            weight: &self.weight,
            in_features: width,
            bias: self.case.bias.then_some(&self.bias[..]),
            adapters: &places,
            parameters: adapters,
        };
        let (mut all_s, mut all_v, mut all_y) = (Vec::new(), Vec::new(), Vec::new());
        for (x, mask) in x.chunks(width).zip(mask.chunks(width)) {
            let dropped: Vec<f64> = x.iter().zip(mask).map(|(x, mask)| x * mask).collect();
            let s = linear.s_row(&dropped);
            if self.case.magnitudes {
                let (v, y) = self.with_magnitudes(x, &dropped, &s, adapters);
                all_v.extend(v);
                all_y.extend(y);
            } else {
                all_y.extend(linear.y_row(x, &s));
            }
            all_s.extend(s);
        }
        if self.case.residual {
            all_y.iter_mut().zip(residual).for_each(|(y, residual)| *y += residual);
        }
        [all_s, all_v, all_y]
    }
}

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    for &case in CASES {
        let setup = Setup::new(backend, case, record.precision);
        check(backend, record, setup);
    }
}

fn check<B: Backend>(backend: &B, record: &mut Record, setup: Setup<B>) {
    let case = setup.case;
    let host_batch = batch_of(case.lengths, 9);
    let settings = PassSettings { dropout: setup.dropout, ..PassSettings::default() };
    let batch = resident_with(backend, &host_batch, settings);
    let (rows, width) = (host_batch.token_count(), case.in_features);
    let (outs, ranks) = (setup.group.out_features(), setup.group.total_rank());
    let precision = setup.precision;
    let (x, dy) = (precision.values(rows * width, 42), precision.values(rows * outs, 43));
    let residual = precision.values(rows * outs, 44);
    let adapters = backend.floats(&setup.adapters).unwrap();
    let (x_buffer, dy_buffer) = (buffer(backend, &x), buffer(backend, &dy));
    let input = || LinearInput { x: &x_buffer, rows, batch: &batch };
    let stride = backend.low_rank_stride(ranks);
    let untouched = vec![7.5; rows * (stride.max(1) + if case.magnitudes { outs } else { 0 })];
    backend.renew_group(&setup.group, &adapters).unwrap();
    let mut s = buffer(backend, &untouched);
    let mut y = backend.buffer(rows * outs).unwrap();
    let residual_buffer = case.residual.then(|| buffer(backend, &residual));
    backend.linear(&setup.group, &adapters, input(), residual_buffer.as_ref(), &mut s, &mut y).unwrap();

    let mask = setup.mask(&host_batch);
    let (wide_x, wide_adapters, wide_residual) = (widen(&x), widen(&setup.adapters), widen(&residual));
    let [expected_s, expected_v, expected_y] = setup.forward(&mask, &wide_x, &wide_adapters, &wide_residual);
    if ranks == 0 {
        assert_eq!(read(backend, &s, rows), untouched, "{case:?}: s without adapters");
    } else {
        let padded = read(backend, &s, rows * stride + expected_v.len());
        let (padded, v) = padded.split_at(rows * stride);
        record.check(&format!("{case:?} v"), v, &expected_v, width + ranks);
        let found: Vec<f32> = padded.chunks(stride).flat_map(|row| &row[..ranks]).copied().collect();
        record.check(&format!("{case:?} s"), &found, &expected_s, width);
    }
    record.check(&format!("{case:?} y"), &read(backend, &y, rows * outs), &expected_y, width + ranks);

    let before = values(setup.adapters.len(), 45);
    let mut gradients = backend.floats(&before).unwrap();
    let mut dx = backend.buffer(rows * width).unwrap();
    backend
        .linear_backward(&setup.group, &adapters, input(), &s, &dy_buffer, &mut gradients, Some(&mut dx))
        .unwrap();
    let dy = widen(&dy);
    let loss = |x: &[f64], adapters: &[f64]| dot(&setup.forward(&mask, x, adapters, &wide_residual)[2], &dy);
    let expected_dx = finite_differences(&wide_x, |x| loss(x, &wide_adapters));
    record.check(&format!("{case:?} dx"), &read(backend, &dx, rows * width), &expected_dx, outs + ranks);
    let mut expected = finite_differences(&wide_adapters, |adapters| loss(&wide_x, adapters));
    expected.iter_mut().zip(&before).for_each(|(sum, &before)| *sum += f64::from(before));
    let found = read_floats(backend, &gradients, before.len());
    record.check(&format!("{case:?} gradients"), &found, &expected, rows + outs);
    for (place, (&found, &before)) in found.iter().zip(&before).enumerate() {
        let inside = |offset: usize, count: usize| (offset..offset + count).contains(&place);
        let owned = setup.group.adapters().any(|adapter| {
            inside(adapter.slot.a_offset, adapter.slot.rank * width)
                || inside(adapter.slot.b_offset, adapter.slot.rank * adapter.out_features)
                || adapter.slot.magnitude_offset.is_some_and(|offset| inside(offset, adapter.out_features))
        });
        assert!(owned || found == before, "{case:?}: gradient {place} belongs to no adapter");
    }

    let mut again = backend.floats(&before).unwrap();
    backend.linear_backward(&setup.group, &adapters, input(), &s, &dy_buffer, &mut again, None).unwrap();
    assert_eq!(read_floats(backend, &again, before.len()), found, "{case:?}: without dx");
}
