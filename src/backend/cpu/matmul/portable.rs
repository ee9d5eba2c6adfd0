//! Vectors as plain arrays, which the compiler maps to whatever the target guarantees (SSE2, NEON).

use half::{bf16, f16};

use super::simd::{MAX_LANES, Simd, Vectorized};

/// The instruction set that every machine has.
#[derive(Clone, Copy)]
pub(super) struct Portable;

const LANES: usize = 4;

#[inline(always)]
fn lanes(value: impl Fn(usize) -> f32) -> [f32; LANES] {
    std::array::from_fn(value)
}

impl Simd for Portable {
    const LANES: usize = LANES;
    const TILE_ROWS: usize = 4;
    type Vector = [f32; LANES];

    #[inline(always)]
    unsafe fn run<T: Vectorized>(task: T) -> T::Output {
        task.run::<Self>()
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Vector {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        // SAFETY: the caller's pointer is valid for `LANES` elements.
        unsafe { from.cast::<Self::Vector>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self::Vector {
        // SAFETY: the caller's pointer is valid for `LANES` elements.
        lanes(|lane| unsafe { *from.add(lane) }.to_f32())
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector {
        // SAFETY: the caller's pointer is valid for `LANES` elements.
        lanes(|lane| unsafe { *from.add(lane) }.to_f32())
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, vector: Self::Vector) {
        // SAFETY: the caller's pointer is valid for `LANES` elements.
        unsafe { to.cast::<Self::Vector>().write_unaligned(vector) }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        lanes(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn multiply(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        lanes(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        // Without a fused instruction `mul_add` would be a library call per lane.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            lanes(|lane| a[lane].mul_add(b[lane], c[lane]))
        } else {
            lanes(|lane| a[lane] * b[lane] + c[lane])
        }
    }

    #[inline(always)]
    unsafe fn transpose(block: &mut [Self::Vector; MAX_LANES]) {
        let rows = *block;
        for (lane, row) in block.iter_mut().take(LANES).enumerate() {
            *row = lanes(|source| rows[source][lane]);
        }
    }
}
