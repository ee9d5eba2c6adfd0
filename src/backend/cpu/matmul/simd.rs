//! The few vector operations that the products are made of, for each instruction set, chosen once at run time.

use std::sync::OnceLock;

use half::{bf16, f16};

/// Lanes of the widest vector; a block to transpose has room for it.
pub(super) const MAX_LANES: usize = 16;

/// Work that wants to be compiled for an instruction set: everything inside is inlined into [`Simd::run`].
pub(super) trait Vectorized {
    /// What the work returns.
    type Output;
    /// The work itself; implementations are `#[inline(always)]`.
    fn run<S: Simd>(self) -> Self::Output;
}

/// Vectors of `LANES` f32 of one instruction set.
///
/// Every operation is rounded once and touches its own lane only, so results do not depend on where in a matrix a
/// vector starts.
///
/// # Safety
/// All functions need a CPU with the instruction set: only [`with_instruction_set`], which has checked, calls
/// [`Simd::run`], and only code under it calls the others. Pointers must be valid for `LANES` elements; they need no
/// alignment beyond the element's.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// f32 per vector.
    const LANES: usize;
    /// Rows of the largest register tile; at most `LANES` (packing transposes one block per tile).
    const TILE_ROWS: usize;
    /// The vector.
    type Vector: Copy;

    /// Runs `task` compiled for this instruction set.
    unsafe fn run<T: Vectorized>(task: T) -> T::Output;
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self::Vector;
    /// `LANES` consecutive f32.
    unsafe fn load(from: *const f32) -> Self::Vector;
    /// `LANES` consecutive f16, converted.
    unsafe fn load_f16(from: *const f16) -> Self::Vector;
    /// `LANES` consecutive bf16, converted.
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector;
    /// Writes `LANES` consecutive f32.
    unsafe fn store(to: *mut f32, vector: Self::Vector);
    /// `a + b`.
    unsafe fn add(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b`.
    unsafe fn multiply(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a · b + c`, fused where the instruction set can.
    unsafe fn multiply_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Transposes the first `LANES` vectors as a square.
    unsafe fn transpose(block: &mut [Self::Vector; MAX_LANES]);
}

/// An element as stored, loaded as f32.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// The value.
    fn to_f32(self) -> f32;
    /// `S::LANES` consecutive elements.
    ///
    /// # Safety
    /// As for [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector {
        // SAFETY: passed on to the caller.
        unsafe { S::load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector {
        // SAFETY: passed on to the caller.
        unsafe { S::load_f16(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector {
        // SAFETY: passed on to the caller.
        unsafe { S::load_bf16(from) }
    }
}

/// The instruction sets with kernels of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// 512-bit vectors (x86-64 with AVX-512 F).
    Avx512,
    /// 256-bit vectors (x86-64 with AVX2, FMA and F16C).
    Avx2,
    /// What the compiler's target guarantees.
    Portable,
}

impl InstructionSet {
    /// Every instruction set that this machine can run, the fastest first.
    pub fn available() -> Vec<Self> {
        [Self::Avx512, Self::Avx2, Self::Portable].into_iter().filter(|set| set.is_available()).collect()
    }

    /// The fastest instruction set of this machine, found once.
    pub fn best() -> Self {
        static BEST: OnceLock<InstructionSet> = OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    /// Its name in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Portable => true,
        }
    }
}

/// Work that is generic over the instruction set but need not be compiled for it (it calls [`Simd::run`] inside).
pub(super) trait Generic {
    /// The work.
    ///
    /// # Safety
    /// The CPU must have `S`.
    unsafe fn run<S: Simd>(self);
}

/// Runs `task` with the types of `set`.
///
/// # Panics
/// When this machine lacks `set`.
pub(super) fn with_instruction_set(set: InstructionSet, task: impl Generic) {
    assert!(set.is_available(), "{} is not available on this machine", set.name());
    // SAFETY: the machine has the instruction set.
    unsafe {
        match set {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => task.run::<super::avx512::Avx512>(),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => task.run::<super::avx2::Avx2>(),
            _ => task.run::<super::portable::Portable>(),
        }
    }
}
