//! 512-bit vectors of x86-64: AVX-512 F.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::simd::{MAX_LANES, Simd, Vectorized};

/// AVX-512 F.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY of all blocks below: the trait's contract (the CPU has the instructions, pointers hold 16 elements).
impl Simd for Avx512 {
    const LANES: usize = 16;
    // 14 × 2 accumulators, two of B and one of A fill 31 of the 32 registers.
    const TILE_ROWS: usize = 14;
    type Vector = __m512;

    #[inline(always)]
    unsafe fn run<T: Vectorized>(task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx2,fma")]
        fn compiled<T: Vectorized>(task: T) -> T::Output {
            task.run::<Avx512>()
        }
        unsafe { compiled(task) }
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Vector {
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::Vector {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: Self::Vector) {
        unsafe { _mm512_storeu_ps(to, vector) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn transpose(block: &mut [Self::Vector; MAX_LANES]) {
        unsafe {
            // 2×2 of single lanes, 2×2 of pairs, then twice the 128-bit quarters.
            let mut pairs = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(block[2 * i], block[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(block[2 * i], block[2 * i + 1]);
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
                block[c] = _mm512_shuffle_f32x4::<0x88>(even_01, even_23);
                block[4 + c] = _mm512_shuffle_f32x4::<0x88>(odd_01, odd_23);
                block[8 + c] = _mm512_shuffle_f32x4::<0xDD>(even_01, even_23);
                block[12 + c] = _mm512_shuffle_f32x4::<0xDD>(odd_01, odd_23);
            }
        }
    }
}
