//! The gated MLP of a block as one operation, and of what it is composed where a backend fuses nothing.

use super::{Activation, Backend, LinearGroup, LinearInput, NormedInput, Reach};
use crate::error::Result;

/// A gated MLP: `down(activation(gate)·up)`, `gate|up = gate_up(x)` (Shazeer 2020).
pub struct Mlp<'a, B: Backend + ?Sized> {
    /// From `[T, H]` to `[T, 2F]`.
    pub gate_up: &'a LinearGroup<B>,
    /// From `[T, F]` to `[T, H]`.
    pub down: &'a LinearGroup<B>,
    /// Of the gate.
    pub activation: Activation,
}

// Derived, these would ask for `B: Copy`.
impl<B: Backend + ?Sized> Clone for Mlp<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend + ?Sized> Copy for Mlp<'_, B> {}

impl<B: Backend + ?Sized> Mlp<'_, B> {
    /// `F`.
    pub fn width(&self) -> usize {
        self.down.in_features
    }
}

/// What the forward of an [`Mlp`] leaves for its backward.
pub struct MlpSaved<'a, B: Backend + ?Sized> {
    /// Output of gate and up, `[T, 2F]`; in the backward it becomes their gradient.
    pub gate_up: &'a mut B::Buffer,
    /// `s` of gate and up, as [`linear`](Backend::linear) leaves it.
    pub gate_up_s: &'a mut B::Buffer,
    /// Input of down, `[T, F]`.
    pub act: &'a mut B::Buffer,
    /// `s` of down.
    pub down_s: &'a mut B::Buffer,
}

/// Where the backward of an [`Mlp`] begins and ends.
pub struct MlpGradient<'a, B: Backend + ?Sized> {
    /// The gradient at the output of down, `[T, H]`.
    pub dy: &'a B::Buffer,
    /// Whether `act` still is what the forward left; else it is computed again where it is needed.
    pub act_is_kept: bool,
    /// Room for the gradient of `act`, `[T, F]`.
    pub dact: &'a mut B::Buffer,
    /// How far gradients are wanted.
    pub reach: Reach<'a, B>,
}

/// [`Backend::mlp`] of other operations.
pub(super) fn forward<B: Backend + ?Sized>(
    backend: &B,
    mlp: Mlp<'_, B>,
    adapters: &B::Floats,
    input: NormedInput<'_, B>,
    residual: Option<&B::Buffer>,
    saved: MlpSaved<'_, B>,
    y: &mut B::Buffer,
) -> Result<()> {
    let (rows, batch) = (input.rows, input.batch);
    let MlpSaved { gate_up, gate_up_s, act, down_s } = saved;
    backend.normed_linear(mlp.gate_up, adapters, input, gate_up_s, gate_up)?;
    backend.gated(mlp.activation, rows, mlp.width(), gate_up, act)?;
    backend.linear(mlp.down, adapters, LinearInput { x: act, rows, batch }, residual, down_s, y)
}

/// [`Backend::mlp_backward`] of other operations.
pub(super) fn backward<B: Backend + ?Sized>(
    backend: &B,
    mlp: Mlp<'_, B>,
    adapters: &B::Floats,
    input: LinearInput<'_, B>,
    saved: MlpSaved<'_, B>,
    gradient: MlpGradient<'_, B>,
    gradients: &mut B::Floats,
) -> Result<()> {
    let LinearInput { rows, batch, .. } = input;
    let MlpSaved { gate_up, gate_up_s, act, down_s } = saved;
    let MlpGradient { dy, act_is_kept, dact, reach } = gradient;
    if !act_is_kept && mlp.down.total_rank() > 0 {
        backend.gated(mlp.activation, rows, mlp.width(), gate_up, act)?;
    }
    let wanted = if matches!(reach, Reach::Second) { None } else { Some(&mut *dact) };
    let of_down = LinearInput { x: act, rows, batch };
    backend.linear_backward(mlp.down, adapters, of_down, down_s, dy, gradients, wanted)?;
    let dx = match reach {
        Reach::Second => return Ok(()),
        Reach::First => None,
        Reach::Input(dx) => Some(dx),
    };
    backend.gated_backward(mlp.activation, rows, mlp.width(), dact, gate_up)?;
    backend.linear_backward(mlp.gate_up, adapters, input, gate_up_s, gate_up, gradients, dx)
}
