//! f32 memory aligned to cache lines, and shared access to disjoint parts of it.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use bytemuck::{Pod, Zeroable};

/// One cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// f32 elements, the first at a cache line's start; dereferences to a slice.
#[derive(Clone, Default)]
pub struct AlignedFloats {
    lines: Vec<Line>,
    length: usize,
}

impl AlignedFloats {
    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        Self { lines: vec![Line::zeroed(); length.div_ceil(16)], length }
    }

    /// A copy of `values`.
    pub fn copy_of(values: &[f32]) -> Self {
        let mut copy = Self::zeroed(values.len());
        copy.copy_from_slice(values);
        copy
    }

    /// The first `length` elements, after growing to hold them; contents undefined.
    pub fn at_least(&mut self, length: usize) -> &mut [f32] {
        if self.length < length {
            // The old memory goes first: the two need not fit together.
            *self = Self::default();
            *self = Self::zeroed(length);
        }
        &mut self[..length]
    }
}

impl Deref for AlignedFloats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.length]
    }
}

impl DerefMut for AlignedFloats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.length]
    }
}

/// A mutable slice whose parts tasks on several threads write, each its own.
pub(super) struct DisjointParts<'a, T> {
    start: *mut T,
    length: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts through `part` alone, whose callers promise that no two overlap.
unsafe impl<T: Send> Sync for DisjointParts<'_, T> {}
// SAFETY: it is a mutable borrow of a slice.
unsafe impl<T: Send> Send for DisjointParts<'_, T> {}

impl<'a, T> DisjointParts<'a, T> {
    /// Over `slice`, which stays borrowed.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), length: slice.len(), borrow: PhantomData }
    }

    /// The elements `range`.
    ///
    /// # Safety
    /// No two parts that live at the same time may overlap.
    ///
    /// # Panics
    /// When the range is outside the slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.length, "{range:?} of {}", self.length);
        // SAFETY: inside the slice (asserted); unaliased (the caller).
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
