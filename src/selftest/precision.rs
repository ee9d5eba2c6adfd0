//! What a check must know of a backend's numbers, and how far they may be from float64's.

use crate::dtype::DType;

/// A backend's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Precision {
    /// Type of activations and of frozen weights in products.
    pub compute: DType,
    /// Widths are multiples of this.
    pub width_multiple: usize,
    /// Relative error of the gradients' norm over a few thousand values.
    pub norm_tolerance: f64,
}

/// Half the distance of 1 and the next number of a type: the largest relative error of one rounding to it.
pub fn rounding_unit(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::Bf16 => 2f64.powi(-8),
    }
}

/// The largest absolute error of one rounding where numbers are subnormal.
pub fn underflow(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-25),
        DType::F32 | DType::Bf16 => 2f64.powi(-126),
    }
}

impl Precision {
    /// f32 throughout, any width, the norm summed in f64.
    pub const F32: Self = Self { compute: DType::F32, width_multiple: 1, norm_tolerance: 1e-12 };

    /// A half type with f32 sums, as the CUDA kernels compute.
    pub fn half(compute: DType) -> Self {
        // The norm: a square, at most 2 additions in a thread, 10 over the block, each within 2⁻²⁴; halved by the root.
        Self { compute, width_multiple: 8, norm_tolerance: 9.0 * 2f64.powi(-24) }
    }

    /// [`rounding_unit`] of the compute type.
    pub fn rounding_unit(self) -> f64 {
        rounding_unit(self.compute)
    }

    /// `width` or the next that the backend takes.
    pub fn width(self, width: usize) -> usize {
        width.next_multiple_of(self.width_multiple)
    }

    /// What a value becomes on the backend.
    pub fn rounded(self, value: f32) -> f32 {
        match self.compute {
            DType::F32 => value,
            DType::F16 => half::f16::from_f32(value).to_f32(),
            DType::Bf16 => half::bf16::from_f32(value).to_f32(),
        }
    }

    /// As [`values`](super::values), in the compute type.
    pub fn values(self, count: usize, seed: u64) -> Vec<f32> {
        let mut values = super::values(count, seed);
        values.iter_mut().for_each(|value| *value = self.rounded(*value));
        values
    }
}

/// How many standard deviations of a random error are allowed: beyond eight none is expected in any run.
const DEVIATIONS: f64 = 8.0;

/// Where an element's error comes from.
///
/// A stored element is off by its own roundings, each within the unit of its type. The sum behind it is added up in f32
/// (the tensor cores truncate, so a unit is 2⁻²³): over `terms` terms the error grows as a random walk, √terms steps of the
/// size of the largest partial sum, which is about the largest element's. What was rounded to the compute type on the way
/// (dropped inputs, `ds`, probabilities) has errors that are independent from term to term, so that each such rounding
/// adds one unit of the sum's own size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Type in which the element is stored.
    pub stored: DType,
    /// Roundings of the element itself.
    pub roundings: usize,
    /// Terms of its sum.
    pub terms: usize,
    /// Roundings of the terms to the compute type.
    pub inner_roundings: usize,
    /// Allowed besides, where values cancel.
    pub absolute: f64,
}

impl Tolerance {
    /// Bits must be equal.
    pub fn exact(stored: DType) -> Self {
        Self { stored, roundings: 0, terms: 0, inner_roundings: 0, absolute: 0.0 }
    }

    /// A sum of `terms` terms, rounded once when it is stored.
    pub fn sum(stored: DType, terms: usize) -> Self {
        Self { stored, roundings: 1, terms, inner_roundings: 0, absolute: 0.0 }
    }

    /// How far `expected` may be off, among elements of the given root of the mean square and largest size.
    pub fn bound(self, compute: DType, expected: f64, rms: f64, largest: f64) -> f64 {
        let own =
            self.roundings as f64 * (rounding_unit(self.stored) * expected.abs() + underflow(self.stored));
        let sum = 2f64.powi(-23) * (self.terms as f64).sqrt() * largest;
        let inner = rounding_unit(compute) * (self.inner_roundings as f64).sqrt() * rms;
        own + DEVIATIONS * (sum + inner) + self.absolute
    }
}
