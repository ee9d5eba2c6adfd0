//! Gated activation `act = f(gate)·up` (Shazeer 2020), and its gradient `dup = dact·f(gate)`, `dgate = dact·up·f'(gate)`.
//!
//! Both activations are a logistic function, for `(1 + tanh(u))/2 = σ(2u)`: `f(x) = x·σ(h)` with `h = x` (SiLU) or
//! `h = 2·√(2/π)·(x + a·x³)` (GELU), and `f'(x) = σ(h)·(1 + x·h'·(1 − σ(h)))`.

use super::CpuBackend;
use super::simd::{Vector, exp, sigmoid, simd_fn};
use crate::backend::Activation;

/// The argument of an activation's logistic function, and the slope of that argument.
trait Gate {
    fn argument<V: Vector>(x: V) -> [V; 2];

    /// `σ(h)` and `1 − σ(h)`.
    #[inline(always)]
    fn logistic<V: Vector>(argument: V) -> [V; 2] {
        let value = sigmoid(argument);
        [value, V::splat(1.0) - value]
    }
}

struct Silu;

impl Gate for Silu {
    #[inline(always)]
    fn argument<V: Vector>(x: V) -> [V; 2] {
        [x, V::splat(1.0)]
    }
}

struct GeluTanh;

impl Gate for GeluTanh {
    #[inline(always)]
    fn argument<V: Vector>(x: V) -> [V; 2] {
        /// `2·√(2/π)`.
        const FACTOR: f32 = 1.595_769;
        const CUBE: f32 = 0.044_715;
        let square = x * x;
        let argument = x * square.mul_add(V::splat(FACTOR * CUBE), V::splat(FACTOR));
        [argument, square.mul_add(V::splat(3.0 * FACTOR * CUBE), V::splat(FACTOR))]
    }

    /// `x·h'` grows with the cube of `x`, and would raise the rounding of a `σ(h)` close to 1 with it.
    #[inline(always)]
    fn logistic<V: Vector>(argument: V) -> [V; 2] {
        let (zero, one) = (V::splat(0.0), V::splat(1.0));
        let power = exp(zero - argument);
        let value = one / (one + power);
        [value, argument.select_less(zero, one - value, power * value)]
    }
}

#[inline(always)]
fn rows<V: Vector, G: Gate>(width: usize, gate_up: &[f32], act: &mut [f32]) {
    for (gate_up, act) in gate_up.chunks_exact(2 * width).zip(act.chunks_exact_mut(width)) {
        let (gate, up) = gate_up.split_at(width);
        for ((gate, up), act) in gate.chunks(V::LANES).zip(up.chunks(V::LANES)).zip(act.chunks_mut(V::LANES))
        {
            let gate = V::from_slice(gate);
            let [argument, _] = G::argument(gate);
            (gate * sigmoid(argument) * V::from_slice(up)).to_slice(act);
        }
    }
}

#[inline(always)]
fn rows_backward<V: Vector, G: Gate>(width: usize, dact: &[f32], gate_up: &mut [f32]) {
    let one = V::splat(1.0);
    for (gate_up, dact) in gate_up.chunks_exact_mut(2 * width).zip(dact.chunks_exact(width)) {
        let (gate, up) = gate_up.split_at_mut(width);
        let columns = gate.chunks_mut(V::LANES).zip(up.chunks_mut(V::LANES)).zip(dact.chunks(V::LANES));
        for ((gate_chunk, up_chunk), dact) in columns {
            let (gate, up, dact) = (V::from_slice(gate_chunk), V::from_slice(up_chunk), V::from_slice(dact));
            let [argument, argument_slope] = G::argument(gate);
            let [value, complement] = G::logistic(argument);
            let slope = value * (gate * argument_slope).mul_add(complement, one);
            (dact * up * slope).to_slice(gate_chunk);
            (dact * gate * value).to_slice(up_chunk);
        }
    }
}

simd_fn! {
    fn gated_rows<V>(
        simd: Simd, activation: Activation, width: usize, gate_up: &[f32], act: &mut [f32],
    ) -> () {
        match activation {
            Activation::Silu => rows::<V, Silu>(width, gate_up, act),
            Activation::GeluTanh => rows::<V, GeluTanh>(width, gate_up, act),
        }
    }
}

simd_fn! {
    fn gated_rows_backward<V>(
        simd: Simd, activation: Activation, width: usize, dact: &[f32], gate_up: &mut [f32],
    ) -> () {
        match activation {
            Activation::Silu => rows_backward::<V, Silu>(width, dact, gate_up),
            Activation::GeluTanh => rows_backward::<V, GeluTanh>(width, dact, gate_up),
        }
    }
}

impl CpuBackend {
    pub(super) fn gated_forward(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        gate_up: &[f32],
        act: &mut [f32],
    ) {
        self.threads.for_row_blocks(&mut act[..rows * width], width, |first, act| {
            gated_rows(self.simd, activation, width, &gate_up[2 * first * width..][..2 * act.len()], act);
        });
    }

    pub(super) fn gated_gradient(
        &self,
        activation: Activation,
        rows: usize,
        width: usize,
        dact: &[f32],
        gate_up: &mut [f32],
    ) {
        self.threads.for_row_blocks(&mut gate_up[..2 * rows * width], 2 * width, |first, gate_up| {
            let dact = &dact[first * width..][..gate_up.len() / 2];
            gated_rows_backward(self.simd, activation, width, dact, gate_up);
        });
    }
}
