//! f32 memory aligned to cache lines, and shared access to disjoint parts of it.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;

/// One cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Memory of at least this many bytes is mapped on its own, in pages of this size where the system has them: with those
/// of 4 KiB, operations that walk down the columns of a large matrix wait for address translation.
const LARGE_PAGE: usize = 2 << 20;

/// f32 elements, the first at a cache line's start; dereferences to a slice.
#[derive(Default)]
pub struct AlignedFloats {
    memory: Memory,
    length: usize,
}

enum Memory {
    Lines(Vec<Line>),
    /// Used from byte `start` on.
    Mapped {
        map: MmapMut,
        start: usize,
    },
}

impl Default for Memory {
    fn default() -> Self {
        Self::Lines(Vec::new())
    }
}

impl Memory {
    /// Zeros for `length` elements.
    fn zeroed(length: usize) -> Self {
        let bytes = length * size_of::<f32>();
        if bytes >= LARGE_PAGE
            && let Ok(map) = MmapMut::map_anon(bytes + LARGE_PAGE)
        {
            // Advice: what the system makes of it changes no value.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            let start = map.as_ptr().align_offset(LARGE_PAGE);
            return Self::Mapped { map, start };
        }
        Self::Lines(vec![Line::zeroed(); length.div_ceil(16)])
    }
}

impl AlignedFloats {
    /// `length` zeros.
    pub fn zeroed(length: usize) -> Self {
        Self { memory: Memory::zeroed(length), length }
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

impl Clone for AlignedFloats {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl Deref for AlignedFloats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &self.memory {
            Memory::Lines(lines) => &bytemuck::cast_slice(lines)[..self.length],
            Memory::Mapped { map, start } => {
                bytemuck::cast_slice(&map[*start..][..size_of::<f32>() * self.length])
            }
        }
    }
}

impl DerefMut for AlignedFloats {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.memory {
            Memory::Lines(lines) => &mut bytemuck::cast_slice_mut(lines)[..self.length],
            Memory::Mapped { map, start } => {
                bytemuck::cast_slice_mut(&mut map[*start..][..size_of::<f32>() * self.length])
            }
        }
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
