//! AdamW, step after step, against the formulas in float64.

use fastlora::backend::{AdamWStep, BRate, Backend, OptimizerState};

use super::{Record, read_floats, values, widen};

pub fn run<B: Backend>(backend: &B, record: &mut Record) {
    for (count, max_grad_norm) in [(1, 1.0), (77, f64::INFINITY), (40_003, 0.5)] {
        steps(backend, record, count, max_grad_norm, 1.0, &[]);
    }
    // LoRA+: runs within a block of every backend, over several, and of one element.
    steps(backend, record, 40_003, 0.5, 16.0, &[8, 9, 16_384, 16_400, 39_000, 40_003]);
    steps(backend, record, 300, f64::INFINITY, 0.25, &[256, 300]);
    a_norm_that_is_not_finite_changes_nothing(backend);
}

/// Four steps; where there are `ends` of runs, every other one has `ratio` times the rate.
fn steps<B: Backend>(
    backend: &B,
    record: &mut Record,
    count: usize,
    max_grad_norm: f64,
    ratio: f64,
    ends: &[usize],
) {
    let runs = backend.runs(ends).unwrap();
    let mut factors = vec![1.0; count];
    for run in ends.windows(2).step_by(2) {
        factors[run[0]..run[1]].fill(ratio);
    }
    let start = values(count, 60);
    let mut parameters = backend.floats(&start).unwrap();
    let mut first_moment = backend.floats(&vec![0.0; count]).unwrap();
    let mut second_moment = backend.floats(&vec![0.0; count]).unwrap();
    let (mut p, mut m, mut v) = (widen(&start), vec![0.0; count], vec![0.0; count]);
    let (learning_rate, beta1, beta2, epsilon, weight_decay) = (1e-2, 0.9, 0.999, 1e-8, 0.1);
    for step in 1..=4 {
        let g = values(count, 60 + step);
        // As much too large as the loss scale says; powers of two round nothing.
        let scaled: Vec<f32> = g.iter().map(|g| g * 2f32.powi(3 * step as i32 - 3)).collect();
        let gradients = backend.floats(&scaled).unwrap();
        let state = OptimizerState {
            parameters: &mut parameters,
            gradients: &gradients,
            first_moment: &mut first_moment,
            second_moment: &mut second_moment,
            b_rate: (!ends.is_empty()).then_some(BRate { ratio, runs: &runs }),
        };
        let loss_scale = 2f64.powi(3 * step as i32 - 3);
        let settings =
            AdamWStep { learning_rate, beta1, beta2, epsilon, weight_decay, step, max_grad_norm, loss_scale };
        let norm = backend.adamw(state, settings).unwrap();
        let g = widen(&g);
        let expected_norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!(
            (norm - expected_norm).abs() <= record.precision.norm_tolerance * expected_norm,
            "{norm}, expected {expected_norm}"
        );
        let clip = (max_grad_norm / (expected_norm + 1e-6)).min(1.0);
        let power = step as i32;
        for i in 0..count {
            let g = g[i] * clip;
            let learning_rate = learning_rate * factors[i];
            p[i] -= learning_rate * weight_decay * p[i];
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let mean = m[i] / (1.0 - beta1.powi(power));
            let root = (v[i] / (1.0 - beta2.powi(power))).sqrt();
            p[i] -= learning_rate * mean / (root + epsilon);
        }
    }
    let case = format!("adamw {count} at most {max_grad_norm}, ratio {ratio}");
    record.check_f32(&format!("{case} parameters"), &read_floats(backend, &parameters, count), &p, 8);
    record.check_f32(&format!("{case} first moment"), &read_floats(backend, &first_moment, count), &m, 8);
    record.check_f32(&format!("{case} second moment"), &read_floats(backend, &second_moment, count), &v, 8);
}

fn a_norm_that_is_not_finite_changes_nothing<B: Backend>(backend: &B) {
    for poison in [f32::NAN, f32::INFINITY] {
        let start = values(100, 70);
        let mut gradient = values(100, 71);
        gradient[63] = poison;
        let gradients = backend.floats(&gradient).unwrap();
        let [mut parameters, mut first_moment, mut second_moment] =
            [(); 3].map(|()| backend.floats(&start).unwrap());
        let state = OptimizerState {
            parameters: &mut parameters,
            gradients: &gradients,
            first_moment: &mut first_moment,
            second_moment: &mut second_moment,
            b_rate: None,
        };
        let settings = AdamWStep {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
            step: 1,
            max_grad_norm: 1.0,
            loss_scale: 1.0,
        };
        assert!(!backend.adamw(state, settings).unwrap().is_finite());
        for floats in [&parameters, &first_moment, &second_moment] {
            assert_eq!(read_floats(backend, floats, 100), start);
        }
    }
}
