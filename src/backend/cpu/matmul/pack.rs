//! Packing: the operands' values, converted to f32, in the order in which the register tiles read them.
//!
//! A packed operand is `[depth][width]`: for each step along the summed axis the `width` values of a tile's rows (left
//! operand) or columns (right operand) side by side. Both operands come in both orientations, so two routines do all:
//! [`Transposed`] where the summed axis is contiguous in memory, [`Straight`] where the other one is.

use super::element::Element;
use crate::backend::cpu::simd::{Kernel, MAX_LANES, Vector, prefetch};

/// Elements that a packed operand may spill over its end (a vector is stored where fewer lanes count; the next step's
/// store overwrites the surplus, and the last one's lands here).
pub(super) const SPILL: usize = MAX_LANES;

/// Distance of prefetching along the summed axis.
const STEPS_AHEAD: usize = 16;

/// Where packed values go: `to[step · width + offset..]`, and what they are multiplied by.
pub(super) struct Destination<'a> {
    /// The packed operand, with [`SPILL`] elements after its end.
    pub to: &'a mut [f32],
    /// Values per step.
    pub width: usize,
    /// First of this block's values within a step.
    pub offset: usize,
    /// Factor on every value.
    pub scale: f32,
}

impl Destination<'_> {
    /// Stores `vector` as the values of step `step`.
    #[inline(always)]
    fn put<V: Vector>(&mut self, step: usize, vector: V) {
        let start = step * self.width + self.offset;
        let target = &mut self.to[start..start + V::LANES];
        let scaled = if self.scale == 1.0 { vector } else { vector * V::splat(self.scale) };
        // SAFETY: `target` holds `LANES` elements.
        unsafe { scaled.store(target.as_mut_ptr()) };
    }
}

/// Packs `count` rows of a row-major matrix whose rows run along the summed axis: a transpose.
pub(super) struct Transposed<'a, E> {
    /// From the first row's first wanted element on; row `i` starts at `i · stride`.
    pub from: &'a [E],
    /// Distance between rows.
    pub stride: usize,
    /// Rows, from 1 to `LANES`.
    pub count: usize,
    /// Elements of each row.
    pub depth: usize,
    /// Where they go.
    pub destination: Destination<'a>,
}

impl<E: Element> Kernel for Transposed<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let Self { from, stride, count, depth, .. } = self;
        assert!((1..=V::LANES).contains(&count));
        if depth == 0 {
            return;
        }
        let needed = (count - 1) * stride + depth;
        assert!(needed <= from.len());
        let whole = depth - depth % V::LANES;
        for start in (0..whole).step_by(V::LANES) {
            {
                let mut block = [V::splat(0.0); MAX_LANES];
                for (lane, row) in block.iter_mut().enumerate().take(V::LANES) {
                    // Lanes past the last row repeat it: their values are never used.
                    let source = lane.min(count - 1) * stride + start;
                    // SAFETY: the source row is less than `count` and start + LANES <= depth, so the load ends within
                    // `needed` elements.
                    *row = unsafe { E::load(from.as_ptr().add(source)) };
                    // The next block's rows follow, mostly, and their order defeats the CPU's own prefetching.
                    prefetch(from.as_ptr().wrapping_add(source + V::LANES * stride));
                }
                V::transpose(&mut block);
                for (step, column) in block.iter().enumerate().take(V::LANES) {
                    self.destination.put(start + step, *column);
                }
            }
        }
        for step in whole..depth {
            let mut lanes = [0.0; MAX_LANES];
            for (row, lane) in lanes.iter_mut().enumerate().take(count) {
                *lane = from[row * stride + step].to_f32();
            }
            self.destination.put(step, V::from_slice(&lanes));
        }
    }
}

/// Packs `count` columns of a row-major matrix whose rows are the steps of the summed axis: a copy.
pub(super) struct Straight<'a, E> {
    /// From the first step's first wanted element on; step `k` starts at `k · stride`.
    pub from: &'a [E],
    /// Distance between steps.
    pub stride: usize,
    /// Columns, from 1 to `LANES`.
    pub count: usize,
    /// Elements of each row from the first wanted one to the row's end; at least `count`.
    pub available: usize,
    /// Steps.
    pub depth: usize,
    /// Where they go.
    pub destination: Destination<'a>,
}

impl<E: Element> Kernel for Straight<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let Self { from, stride, count, available, depth, .. } = self;
        assert!((1..=V::LANES).contains(&count) && count <= available);
        if depth == 0 {
            return;
        }
        if available >= V::LANES {
            assert!((depth - 1) * stride + V::LANES <= from.len());
            for step in 0..depth {
                // SAFETY: the load of the last step ends inside `from`, as asserted.
                let vector: V = unsafe { E::load(from.as_ptr().add(step * stride)) };
                prefetch(from.as_ptr().wrapping_add((step + STEPS_AHEAD) * stride));
                self.destination.put(step, vector);
            }
        } else {
            for step in 0..depth {
                let mut lanes = [0.0; MAX_LANES];
                for (lane, value) in lanes.iter_mut().zip(&from[step * stride..][..count]) {
                    *lane = value.to_f32();
                }
                self.destination.put(step, V::from_slice(&lanes));
            }
        }
    }
}
