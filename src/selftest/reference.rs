//! The operations in float64, written as the formulas read.

mod attention;
mod linear;

use crate::backend::Activation;
pub use attention::{Attention, Rotated};
pub use linear::{Linear, dropout_factors};

/// `Σ a·b`, whatever the two are stored as.
pub fn dot<A: Copy + Into<f64>, B: Copy + Into<f64>>(a: &[A], b: &[B]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a.into() * b.into()).sum()
}

/// Rows of `x [_, width]` through `y = x · rstd · w` (Zhang & Sennrich 2019), `width` being that of `weight`.
pub fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    x.chunks(weight.len())
        .flat_map(|row| {
            let rstd = 1.0 / (dot(row, row) / row.len() as f64 + epsilon).sqrt();
            row.iter().zip(weight).map(move |(x, w)| x * rstd * w).collect::<Vec<_>>()
        })
        .collect()
}

/// The gradient of one row `x` through its norm, given `dy`.
pub fn rms_norm_backward(x: &[f64], weight: &[f64], epsilon: f64, dy: &[f64]) -> Vec<f64> {
    let count = x.len() as f64;
    let rstd = 1.0 / (dot(x, x) / count + epsilon).sqrt();
    let weighted: Vec<f64> = dy.iter().zip(weight).map(|(dy, w)| dy * w).collect();
    let along = dot(&weighted, x) * rstd * rstd / count;
    weighted.iter().zip(x).map(|(g, x)| rstd * (g - x * along)).collect()
}

/// `f(x)` and `f'(x)` of an activation.
fn activate(activation: Activation, x: f64) -> [f64; 2] {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-x).exp());
            [x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid))]
        }
        Activation::GeluTanh => {
            let (c, a) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044715);
            let tanh = (c * (x + a * x * x * x)).tanh();
            let slope = (1.0 - tanh * tanh) * c * (1.0 + 3.0 * a * x * x);
            [0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * slope]
        }
    }
}

/// `activation(gate) · up [_, width]` of rows `gate | up` (Shazeer 2020).
pub fn gated(activation: Activation, gate_up: &[f64], width: usize) -> Vec<f64> {
    let of_row = |row: &[f64]| -> Vec<f64> {
        (0..width).map(|i| activate(activation, row[i])[0] * row[width + i]).collect()
    };
    gate_up.chunks(2 * width).flat_map(of_row).collect()
}

/// The gradients of one element's gate and up.
pub fn gated_backward(activation: Activation, gate: f64, up: f64, dact: f64) -> [f64; 2] {
    let [value, slope] = activate(activation, gate);
    [dact * up * slope, dact * value]
}

/// `cap · tanh(x / cap)`, and its slope; `x` and 1 where there is no cap.
pub fn soft_cap(x: f64, cap: Option<f64>) -> [f64; 2] {
    let Some(cap) = cap else { return [x, 1.0] };
    let tanh = (x / cap).tanh();
    [cap * tanh, 1.0 - tanh * tanh]
}

/// `x [T, I] · Wᵀ` for `W [O, I]`.
pub fn product_transposed<A, B>(x: &[A], weight: &[B], inputs: usize) -> Vec<f64>
where
    A: Copy + Into<f64>,
    B: Copy + Into<f64>,
{
    x.chunks(inputs).flat_map(|x| weight.chunks(inputs).map(|w| dot(x, w)).collect::<Vec<_>>()).collect()
}

/// `x [R] · W [R, O]`.
pub fn product<B: Copy + Into<f64>>(x: &[f64], weight: &[B], outputs: usize) -> Vec<f64> {
    let mut y = vec![0.0; outputs];
    for (x, row) in x.iter().zip(weight.chunks(outputs)) {
        y.iter_mut().zip(row).for_each(|(y, &w)| *y += x * w.into());
    }
    y
}

/// Loss of a row of logits, and whether the first of the highest is the target.
pub fn cross_entropy(logits: &[f64], target: usize) -> (f64, bool) {
    let highest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - highest).exp()).sum();
    let argmax = logits.iter().position(|&logit| logit == highest);
    (highest + sum.ln() - logits[target], argmax == Some(target))
}

/// The loss's gradient at the logits: softmax minus one at the target.
pub fn cross_entropy_backward(logits: &[f64], target: usize) -> Vec<f64> {
    let (loss, _) = cross_entropy(logits, target);
    let log_sum = loss + logits[target];
    let hit = |v: usize| if v == target { 1.0 } else { 0.0 };
    logits.iter().enumerate().map(|(v, logit)| (logit - log_sum).exp() - hit(v)).collect()
}
