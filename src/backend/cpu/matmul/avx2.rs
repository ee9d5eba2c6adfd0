//! 256-bit vectors of x86-64: AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::simd::{MAX_LANES, Simd, Vectorized};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY of all blocks below: the trait's contract (the CPU has the instructions, pointers hold 8 elements).
impl Simd for Avx2 {
    const LANES: usize = 8;
    // 6 × 2 accumulators, two of B and one of A fill 15 of the 16 registers.
    const TILE_ROWS: usize = 6;
    type Vector = __m256;

    #[inline(always)]
    unsafe fn run<T: Vectorized>(task: T) -> T::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<T: Vectorized>(task: T) -> T::Output {
            task.run::<Avx2>()
        }
        unsafe { compiled(task) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Vector {
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::Vector {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: Self::Vector) {
        unsafe { _mm256_storeu_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn transpose(block: &mut [Self::Vector; MAX_LANES]) {
        unsafe {
            // 2×2 of single lanes, 2×2 of pairs, then the 128-bit halves.
            let mut pairs = [_mm256_setzero_ps(); 8];
            for i in 0..4 {
                pairs[2 * i] = _mm256_unpacklo_ps(block[2 * i], block[2 * i + 1]);
                pairs[2 * i + 1] = _mm256_unpackhi_ps(block[2 * i], block[2 * i + 1]);
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
                block[i] = _mm256_permute2f128_ps::<0x20>(quads[i], quads[i + 4]);
                block[i + 4] = _mm256_permute2f128_ps::<0x31>(quads[i], quads[i + 4]);
            }
        }
    }
}
