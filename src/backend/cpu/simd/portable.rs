//! Eight lanes in an array, for the instructions that every CPU of the target has.

use std::array;
use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};

use super::{MAX_LANES, Vector};

#[derive(Clone, Copy)]
pub struct F32x8([f32; 8]);

macro_rules! operators {
    ($($trait:ident $method:ident $operator:tt),*) => {
        $(impl $trait for F32x8 {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Self(array::from_fn(|lane| self.0[lane] $operator other.0[lane]))
            }
        })*
    };
}
operators!(Add add +, Sub sub -, Mul mul *, Div div /);

impl Vector for F32x8 {
    const LANES: usize = 8;
    // Sixteen registers of four lanes.
    const REGISTERS: usize = 8;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 8])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's; `[f32; 8]` has the alignment of f32.
        Self(unsafe { from.cast::<[f32; 8]>().read() })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: as in `load`.
        Self(array::from_fn(|lane| unsafe { *from.add(lane) }.to_f32()))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: as in `load`.
        Self(array::from_fn(|lane| unsafe { *from.add(lane) }.to_f32()))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { to.cast::<[f32; 8]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        // SAFETY: the caller's: `count` elements.
        Self(array::from_fn(|lane| if lane < count { unsafe { *from.add(lane) } } else { 0.0 }))
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        for lane in 0..count.min(8) {
            // SAFETY: the caller's: `count` elements.
            unsafe { *to.add(lane) = self.0[lane] };
        }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // Without a fused instruction `f32::mul_add` is a slow library call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            Self(array::from_fn(|lane| self.0[lane].mul_add(factor.0[lane], addend.0[lane])))
        } else {
            self * factor + addend
        }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(array::from_fn(|lane| if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] }))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(array::from_fn(|lane| if self.0[lane] < other.0[lane] { self.0[lane] } else { other.0[lane] }))
    }

    #[inline(always)]
    fn round(self) -> Self {
        // Adding 1.5·2²³ leaves the integer in the mantissa: one instruction each way, where `round_ties_even` is a
        // call without SSE4.1.
        let magic = Self::splat(12_582_912.0);
        (self + magic) - magic
    }

    #[inline(always)]
    fn exp2_of_integer(self) -> Self {
        Self(array::from_fn(|lane| f32::from_bits(((self.0[lane] as i32 + 127) as u32) << 23)))
    }

    #[inline(always)]
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self {
        Self(array::from_fn(
            |lane| {
                if self.0[lane] < bound.0[lane] { then.0[lane] } else { otherwise.0[lane] }
            },
        ))
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(self.0.map(f32::sqrt))
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |greatest, &lane| greatest.max(lane))
    }

    #[inline(always)]
    fn transpose(block: &mut [Self; MAX_LANES]) {
        let rows = *block;
        for (lane, row) in block.iter_mut().take(Self::LANES).enumerate() {
            *row = Self(array::from_fn(|source| rows[source].0[lane]));
        }
    }
}
