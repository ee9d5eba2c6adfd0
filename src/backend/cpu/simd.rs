//! Instruction sets of the CPU, found at run time, and code written once for all of them.
//!
//! A kernel is generic over a [`Vector`] of f32 lanes. [`Simd::run`] instantiates it under the `target_feature`
//! attributes of the level that the CPU has, and the macro `simd_fn!` turns a function body into such a kernel.
//! The vector types are private to this module: code can reach them through [`Simd::run`] alone, which is what makes
//! their instructions safe to use.
//!
//! Results differ between levels in the last bits (lanes are summed in another order), never within one.

mod math;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;
use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};
pub use math::{exp, sigmoid, tanh};

/// A level of vector instructions that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simd(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Code that is generic over the vector type.
pub trait Kernel {
    /// What it computes.
    type Output;
    /// The code; `#[inline(always)]`, or it loses the instruction set of its caller.
    fn run<V: Vector>(self) -> Self::Output;
}

impl Simd {
    /// The best level that this CPU has.
    pub fn detect() -> Self {
        *Self::available().last().expect("the portable level is always there")
    }

    /// Every level that this CPU has, from the portable one up.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Simd(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                levels.push(Simd(Level::Avx2));
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                    levels.push(Simd(Level::Avx512));
                }
            }
        }
        levels
    }

    /// Its name in logs: "portable", "avx2" or "avx512".
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
        }
    }

    /// Runs `kernel` compiled for this level.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Level::Portable => kernel.run::<portable::F32x8>(),
            // SAFETY: a `Simd` of these levels is made by `available` alone, after the CPU said that it has them.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { x86::run_avx512(kernel) },
        }
    }
}

impl fmt::Display for Simd {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Asks for the cache line at `address`, which need not be valid, ahead of its use.
#[inline(always)]
pub fn prefetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint; it reads nothing that a program could see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Lanes of the widest vector.
pub const MAX_LANES: usize = 16;

/// f32 lanes in one register (or a few).
///
/// The unsafe loads and stores are for inner loops whose bounds were checked outside; the others check.
pub trait Vector:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// Number of lanes.
    const LANES: usize;
    /// Vector registers that the CPU has: sizes the register tiles of products.
    const REGISTERS: usize;

    /// `value` in every lane.
    fn splat(value: f32) -> Self;
    /// Reads `LANES` elements.
    ///
    /// # Safety
    /// `LANES` elements from `from` must be readable.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads `LANES` elements, converted exactly.
    ///
    /// # Safety
    /// `LANES` elements from `from` must be readable.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Reads `LANES` elements, converted exactly.
    ///
    /// # Safety
    /// `LANES` elements from `from` must be readable.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// Writes `LANES` elements.
    ///
    /// # Safety
    /// `LANES` elements from `to` must be writable.
    unsafe fn store(self, to: *mut f32);
    /// Reads `count < LANES` elements; the other lanes are zero.
    ///
    /// # Safety
    /// `count` elements from `from` must be readable.
    unsafe fn load_first(from: *const f32, count: usize) -> Self;
    /// Writes the first `count < LANES` lanes.
    ///
    /// # Safety
    /// `count` elements from `to` must be writable.
    unsafe fn store_first(self, to: *mut f32, count: usize);
    /// `self · factor + addend`, rounded once where the level has fused instructions.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The greater of each pair; `other` where either is NaN.
    fn max(self, other: Self) -> Self;
    /// The lesser of each pair; `other` where either is NaN.
    fn min(self, other: Self) -> Self;
    /// Nearest integer, ties to even; `|self| < 2²²`.
    fn round(self) -> Self;
    /// `2^self` for lanes that hold integers in -126..=127.
    fn exp2_of_integer(self) -> Self;
    /// `then` where `self < bound`, else `otherwise`; `otherwise` where either is NaN.
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Sum of the lanes, halves added to halves.
    fn sum(self) -> f32;
    /// Greatest lane.
    fn max_lane(self) -> f32;
    /// Transposes the first `LANES` vectors as a square.
    fn transpose(block: &mut [Self; MAX_LANES]);

    /// The lanes of `from`, which holds at most `LANES` elements; absent ones are zero.
    #[inline(always)]
    fn from_slice(from: &[f32]) -> Self {
        // SAFETY: both branches read what the slice holds.
        unsafe {
            if from.len() >= Self::LANES {
                Self::load(from.as_ptr())
            } else {
                Self::load_first(from.as_ptr(), from.len())
            }
        }
    }

    /// Writes as many lanes as `to` holds, at most all.
    #[inline(always)]
    fn to_slice(self, to: &mut [f32]) {
        // SAFETY: both branches write what the slice holds.
        unsafe {
            if to.len() >= Self::LANES {
                self.store(to.as_mut_ptr())
            } else {
                self.store_first(to.as_mut_ptr(), to.len())
            }
        }
    }
}

/// Turns `fn name<V>(simd: Simd, arguments…) -> Output { body over V }` into a function that runs `body` compiled for
/// the level `simd`.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident<$vector:ident>(
        simd: Simd, $($argument:ident: $type:ty),* $(,)?
    ) -> $output:ty $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $visibility fn $name(simd: $crate::backend::cpu::simd::Simd, $($argument: $type),*) -> $output {
            struct Call<Arguments>(Arguments);
            impl $crate::backend::cpu::simd::Kernel for Call<($($type,)*)> {
                type Output = $output;
                #[inline(always)]
                fn run<$vector: $crate::backend::cpu::simd::Vector>(self) -> $output {
                    let ($($argument,)*) = self.0;
                    $body
                }
            }
            simd.run(Call(($($argument,)*)))
        }
    };
}
pub(crate) use simd_fn;

#[cfg(test)]
mod tests {
    use super::*;

    simd_fn! {
        fn lanes_of<V>(simd: Simd, input: &[f32], output: &mut [f32], operation: usize) -> [f32; 2] {
            let x = V::from_slice(input);
            let y = match operation {
                0 => x + V::splat(1.0),
                1 => x.mul_add(x, V::splat(-1.0)),
                2 => x.round(),
                3 => (x.round()).exp2_of_integer(),
                4 => x.select_less(V::splat(0.0), V::splat(-7.0), x),
                5 => x.max(V::splat(0.25)),
                6 => x.min(V::splat(0.25)),
                7 => (x * x).sqrt(),
                8 => x / V::splat(4.0),
                _ => x - V::splat(0.5),
            };
            y.to_slice(output);
            [x.sum(), x.max_lane()]
        }
    }

    #[test]
    fn every_level_computes_what_scalars_compute() {
        let input: Vec<f32> = (0..16).map(|lane| lane as f32 * 1.25 - 7.5).collect();
        for simd in Simd::available() {
            for count in 1..=8 {
                let scalar = |operation: usize, x: f32| match operation {
                    0 => x + 1.0,
                    1 => x * x - 1.0,
                    2 => x.round_ties_even(),
                    3 => x.round_ties_even().exp2(),
                    4 => {
                        if x < 0.0 {
                            -7.0
                        } else {
                            x
                        }
                    }
                    5 => x.max(0.25),
                    6 => x.min(0.25),
                    7 => x.abs(),
                    8 => x / 4.0,
                    _ => x - 0.5,
                };
                for operation in 0..10 {
                    let mut output = [99.0; 9];
                    let [sum, greatest] = lanes_of(simd, &input[..count], &mut output[..count], operation);
                    for lane in 0..count {
                        assert_eq!(output[lane], scalar(operation, input[lane]), "{simd} {operation} {lane}");
                    }
                    assert_eq!(output[count], 99.0, "{simd}: a lane past the end was written");
                    assert_eq!(sum, input[..count].iter().sum::<f32>(), "{simd}");
                    // Absent lanes are zero and take part.
                    let all = if count < 8 || simd.name() == "avx512" { 0.0 } else { f32::MIN };
                    assert_eq!(greatest, input[..count].iter().fold(all, |a, &b| a.max(b)), "{simd}");
                }
            }
        }
    }
}
