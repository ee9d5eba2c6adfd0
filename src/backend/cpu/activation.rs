//! Gated activation `act = silu(gate)·up`, `silu(x) = x·σ(x)` (Shazeer 2020), and its gradient
//! `dup = dact·silu(gate)`, `dgate = dact·up·σ(gate)·(1 + gate·(1 − σ(gate)))`.

use super::CpuBackend;
use super::simd::{sigmoid, simd_fn};

simd_fn! {
    fn gated_rows<V>(simd: Simd, width: usize, gate_up: &[f32], act: &mut [f32]) -> () {
        for (gate_up, act) in gate_up.chunks_exact(2 * width).zip(act.chunks_exact_mut(width)) {
            let (gate, up) = gate_up.split_at(width);
            for ((gate, up), act) in gate.chunks(V::LANES).zip(up.chunks(V::LANES)).zip(act.chunks_mut(V::LANES)) {
                let gate = V::from_slice(gate);
                (gate * sigmoid(gate) * V::from_slice(up)).to_slice(act);
            }
        }
    }
}

simd_fn! {
    fn gated_rows_backward<V>(simd: Simd, width: usize, dact: &[f32], gate_up: &mut [f32]) -> () {
        let one = V::splat(1.0);
        for (gate_up, dact) in gate_up.chunks_exact_mut(2 * width).zip(dact.chunks_exact(width)) {
            let (gate, up) = gate_up.split_at_mut(width);
            let columns = gate.chunks_mut(V::LANES).zip(up.chunks_mut(V::LANES)).zip(dact.chunks(V::LANES));
            for ((gate_chunk, up_chunk), dact) in columns {
                let (gate, up, dact) = (V::from_slice(gate_chunk), V::from_slice(up_chunk), V::from_slice(dact));
                let sigmoid = sigmoid(gate);
                let slope = sigmoid * gate.mul_add(one - sigmoid, one);
                (dact * up * slope).to_slice(gate_chunk);
                (dact * gate * sigmoid).to_slice(up_chunk);
            }
        }
    }
}

impl CpuBackend {
    pub(super) fn gated_silu_forward(&self, rows: usize, width: usize, gate_up: &[f32], act: &mut [f32]) {
        self.threads.for_row_blocks(&mut act[..rows * width], width, |first, act| {
            gated_rows(self.simd, width, &gate_up[2 * first * width..][..2 * act.len()], act);
        });
    }

    pub(super) fn gated_silu_gradient(&self, rows: usize, width: usize, dact: &[f32], gate_up: &mut [f32]) {
        self.threads.for_row_blocks(&mut gate_up[..2 * rows * width], 2 * width, |first, gate_up| {
            gated_rows_backward(self.simd, width, &dact[first * width..][..gate_up.len() / 2], gate_up);
        });
    }
}
