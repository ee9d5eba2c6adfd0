//! Elements as they are stored, loaded as f32.

use half::{bf16, f16};

use crate::backend::cpu::simd::Vector;

/// A stored element.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// The value.
    fn to_f32(self) -> f32;
    /// `V::LANES` consecutive elements.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: passed on to the caller.
        unsafe { V::load(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: passed on to the caller.
        unsafe { V::load_f16(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: passed on to the caller.
        unsafe { V::load_bf16(from) }
    }
}
