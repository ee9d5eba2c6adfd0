//! AVX2 with FMA, and AVX-512.
//!
//! Every method here uses instructions that its level promises. The types cannot be named outside [`super`], and
//! values of them exist only inside [`run_avx2`] and [`run_avx512`], whose callers prove the level: that is the
//! `SAFETY` of every block below that has no other.

use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};

use super::{Kernel, MAX_LANES, Vector};

/// Runs `kernel` over eight lanes.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<F32x8>()
}

/// Runs `kernel` over sixteen lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<F32x16>()
}

#[derive(Clone, Copy)]
pub struct F32x8(__m256);

#[derive(Clone, Copy)]
pub struct F32x16(__m512);

macro_rules! operators {
    ($vector:ident: $($trait:ident $method:ident $intrinsic:ident),*) => {
        $(impl $trait for $vector {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: the head of this file.
                Self(unsafe { $intrinsic(self.0, other.0) })
            }
        })*
    };
}
operators!(F32x8: Add add _mm256_add_ps, Sub sub _mm256_sub_ps, Mul mul _mm256_mul_ps, Div div _mm256_div_ps);
operators!(F32x16: Add add _mm512_add_ps, Sub sub _mm512_sub_ps, Mul mul _mm512_mul_ps, Div div _mm512_div_ps);

/// The mask of the first `count` of eight lanes.
#[inline(always)]
fn first_of_eight(count: usize) -> __m256i {
    // SAFETY: the head of this file.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes)
    }
}

// SAFETY of the blocks: the head of this file; of loads and stores besides: the caller's.
impl Vector for F32x8 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        let wide = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())) };
        Self(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        Self(unsafe { _mm256_maskload_ps(from, first_of_eight(count)) })
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        unsafe { _mm256_maskstore_ps(to, first_of_eight(count), self.0) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }

    #[inline(always)]
    fn exp2_of_integer(self) -> Self {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }

    #[inline(always)]
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self {
        unsafe {
            let less = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, bound.0);
            Self(_mm256_blendv_ps(otherwise.0, then.0, less))
        }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(unsafe { _mm256_sqrt_ps(self.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn transpose(block: &mut [Self; MAX_LANES]) {
        unsafe {
            // 2×2 of single lanes, 2×2 of pairs, then the 128-bit halves.
            let mut pairs = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                pairs[2 * i] = _mm256_unpacklo_ps(block[2 * i].0, block[2 * i + 1].0);
                pairs[2 * i + 1] = _mm256_unpackhi_ps(block[2 * i].0, block[2 * i + 1].0);
            }
            let mut quads = [_mm256_setzero_ps(); 8];
            for i in 0..2 {
                for j in 0..2 {
                    let (low, high) = (pairs[4 * i + j], pairs[4 * i + j + 2]);
                    quads[4 * i + 2 * j] = _mm256_shuffle_ps::<0x44>(low, high);
                    quads[4 * i + 2 * j + 1] = _mm256_shuffle_ps::<0xEE>(low, high);
                }
            }
            for i in 0..4 {
                block[i] = Self(_mm256_permute2f128_ps::<0x20>(quads[i], quads[i + 4]));
                block[i + 4] = Self(_mm256_permute2f128_ps::<0x31>(quads[i], quads[i + 4]));
            }
        }
    }
}

/// The mask of the first `count` of sixteen lanes.
#[inline(always)]
fn first_of_sixteen(count: usize) -> __mmask16 {
    ((1u32 << count) - 1) as __mmask16
}

// SAFETY of the blocks: the head of this file; of loads and stores besides: the caller's.
impl Vector for F32x16 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        let wide = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())) };
        Self(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize) -> Self {
        Self(unsafe { _mm512_maskz_loadu_ps(first_of_sixteen(count), from) })
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, first_of_sixteen(count), self.0) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }

    #[inline(always)]
    fn exp2_of_integer(self) -> Self {
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
        }
    }

    #[inline(always)]
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self {
        unsafe {
            let less = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, bound.0);
            Self(_mm512_mask_blend_ps(less, otherwise.0, then.0))
        }
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(unsafe { _mm512_sqrt_ps(self.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let low = _mm512_castps512_ps256(self.0);
            F32x8(_mm256_add_ps(low, _mm512_extractf32x8_ps::<1>(self.0))).sum()
        }
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        unsafe {
            let low = _mm512_castps512_ps256(self.0);
            F32x8(_mm256_max_ps(low, _mm512_extractf32x8_ps::<1>(self.0))).max_lane()
        }
    }

    #[inline(always)]
    fn transpose(block: &mut [Self; MAX_LANES]) {
        unsafe {
            // 2×2 of single lanes, 2×2 of pairs, then twice the 128-bit quarters.
            let mut pairs = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(block[2 * i].0, block[2 * i + 1].0);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(block[2 * i].0, block[2 * i + 1].0);
            }
            let mut quads = [_mm512_setzero_ps(); 16];
            for i in 0..4 {
                for j in 0..2 {
                    let (low, high) = (pairs[4 * i + j], pairs[4 * i + j + 2]);
                    quads[4 * i + 2 * j] = _mm512_shuffle_ps::<0x44>(low, high);
                    quads[4 * i + 2 * j + 1] = _mm512_shuffle_ps::<0xEE>(low, high);
                }
            }
            // quads[4i + c] holds, in quarter q, rows 4i..4i+4 of column 4q + c.
            for c in 0..4 {
                let even_01 = _mm512_shuffle_f32x4::<0x88>(quads[c], quads[4 + c]);
                let odd_01 = _mm512_shuffle_f32x4::<0xDD>(quads[c], quads[4 + c]);
                let even_23 = _mm512_shuffle_f32x4::<0x88>(quads[8 + c], quads[12 + c]);
                let odd_23 = _mm512_shuffle_f32x4::<0xDD>(quads[8 + c], quads[12 + c]);
                block[c] = Self(_mm512_shuffle_f32x4::<0x88>(even_01, even_23));
                block[4 + c] = Self(_mm512_shuffle_f32x4::<0x88>(odd_01, odd_23));
                block[8 + c] = Self(_mm512_shuffle_f32x4::<0xDD>(even_01, even_23));
                block[12 + c] = Self(_mm512_shuffle_f32x4::<0xDD>(odd_01, odd_23));
            }
        }
    }
}
