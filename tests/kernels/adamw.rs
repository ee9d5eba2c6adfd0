//! adamw.cu

use fastlora::device::Argument;

use crate::harness::*;

const COUNT: usize = 1500;
const PARTIALS: usize = 3;
const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f64 = 1e-8;
const RATE: f64 = 1e-3;
const DECAY: f64 = 0.01;
/// Ends of runs of As and of Bs, whose rate is `RATIO` times as high.
const RUN_ENDS: [i64; 5] = [8, 512, 513, 1000, COUNT as i64];
const RATIO: f64 = 16.0;
const UNSCALE: f64 = 1.0 / 1024.0;

struct State {
    parameters: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
    gradients: Vec<f32>,
}

/// What the kernels leave: parameters, moments and norm as f32, then the half copies and the flag widened to f32.
fn step(half: Half, state: &State, step: i32, max_norm: f64) -> Vec<f32> {
    let kernel = format!("adamw_{}", half.suffix());
    let float = |value: f64| Argument::F32(value as f32);
    run_everywhere(&kernel, |device| {
        let memories = [&state.parameters, &state.first, &state.second, &state.gradients];
        let [parameters, first, second, gradients] = memories.map(|values| upload(device, values));
        let partials = poisoned::<f32>(device, PARTIALS);
        let half_parameters = poisoned::<u16>(device, COUNT);
        let flag = upload(device, &[0u32]);
        let corrections = [1.0 - BETA1.powi(step), 1.0 - BETA2.powi(step)];
        let scalars = [RATE, corrections[0], corrections[1], UNSCALE, 0.0, 0.0].map(|value| value as f32);
        let scalars = upload(device, &scalars);
        let count = Argument::I64(COUNT as i64);
        let run_ends = upload(device, &RUN_ENDS);
        let arguments = [Argument::of(&gradients), Argument::of(&scalars), Argument::of(&partials), count];
        launch(device, "grad_norm_partials", PARTIALS, 256, &arguments);
        let arguments = [
            Argument::of(&partials),
            Argument::of(&scalars),
            Argument::of(&flag),
            Argument::I32(PARTIALS as i32),
            float(max_norm),
        ];
        launch(device, "grad_norm_finish", 1, 32, &arguments);
        let arguments = [
            Argument::of(&parameters),
            Argument::of(&first),
            Argument::of(&second),
            Argument::of(&half_parameters),
            Argument::of(&gradients),
            Argument::of(&scalars),
            count,
            float(BETA1),
            float(1.0 - BETA1),
            float(BETA2),
            float(1.0 - BETA2),
            float(EPSILON),
            float(DECAY),
            Argument::of(&run_ends),
            Argument::I32(RUN_ENDS.len() as i32),
            float(RATIO),
        ];
        launch(device, &kernel, COUNT.div_ceil(256), 256, &arguments);
        let mut outputs: Vec<f32> = download(device, &parameters);
        outputs.extend(download::<f32>(device, &first));
        outputs.extend(download::<f32>(device, &second));
        outputs.push(download::<f32>(device, &scalars)[4]);
        outputs.push(download::<u32>(device, &flag)[0] as f32);
        // Untouched halves stay NaN when the step is skipped.
        outputs
            .extend(download::<u16>(device, &half_parameters).iter().map(|&bits| half.decode(bits) as f32));
        outputs
    })
}

fn random_state() -> State {
    let mut random = Random(3);
    State {
        parameters: random.floats(COUNT, 1.0),
        first: random.floats(COUNT, 0.1),
        second: random.floats(COUNT, 0.05).iter().map(|value| value.abs()).collect(),
        gradients: random.floats(COUNT, 800.0),
    }
}

#[test]
fn adamw_with_clipping_matches_float64() {
    let state = random_state();
    for (half, max_norm) in
        [(Half::F16, 1.0), (Half::Bf16, 1.0), (Half::F16, 1e9), (Half::Bf16, f64::INFINITY)]
    {
        let outputs = step(half, &state, 3, max_norm);
        let squares = state.gradients.iter().map(|&g| (f64::from(g) * UNSCALE).powi(2)).sum::<f64>();
        let norm = squares.sqrt();
        // A thread adds two squares, then ten levels of butterflies; the root halves the relative error.
        assert_close("norm", 1, &[f64::from(outputs[3 * COUNT])], &[Expected::float_sum(norm, norm, 12)]);
        assert_eq!(outputs[3 * COUNT + 1], 0.0, "the flag");
        let clip = (max_norm / (norm + 1e-6)).min(1.0);
        let mut expected = [Vec::new(), Vec::new(), Vec::new()];
        for i in 0..COUNT {
            let [p, m, v, g] = [&state.parameters, &state.first, &state.second, &state.gradients]
                .map(|values| f64::from(values[i]));
            let g = g * UNSCALE * clip;
            let m_new = BETA1 * m + (1.0 - BETA1) * g;
            let v_new = BETA2 * v + (1.0 - BETA2) * g * g;
            let root = v_new.sqrt() / (1.0 - BETA2.powi(3)).sqrt() + EPSILON;
            let is_b = RUN_ENDS.iter().filter(|end| **end <= i as i64).count() % 2 == 1;
            let rate = if is_b { RATE * RATIO } else { RATE };
            let update = rate / (1.0 - BETA1.powi(3)) * m_new / root;
            let m_magnitude = m.abs() + g.abs();
            expected[0].push(Expected {
                value: p * (1.0 - rate * DECAY) - update,
                // A few roundings of p; the update's share errs relative to the moment's terms, and by the norm's error.
                tolerance: F32_ROUNDOFF * (4.0 * p.abs() + 20.0 * update.abs())
                    + F32_ROUNDOFF * 20.0 * rate / (1.0 - BETA1.powi(3)) * m_magnitude / root,
            });
            expected[1].push(Expected::float_sum(m_new, m_magnitude, 20));
            expected[2].push(Expected { value: v_new, tolerance: F32_ROUNDOFF * 24.0 * v_new + 1e-30 });
        }
        for (which, expected) in expected.iter().enumerate() {
            let actual: Vec<f64> = outputs[which * COUNT..][..COUNT].iter().map(|&v| f64::from(v)).collect();
            assert_close(["parameters", "first moment", "second moment"][which], 1, &actual, expected);
        }
        for i in 0..COUNT {
            let copy = half.decode(half.encode(f64::from(outputs[i])));
            assert_eq!(f64::from(outputs[3 * COUNT + 2 + i]), copy, "half copy {i}");
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_and_raises_the_flag() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut state = random_state();
        state.gradients[777] = bad;
        let outputs = step(Half::F16, &state, 1, 1.0);
        assert_eq!(outputs[3 * COUNT + 1], 1.0, "the flag for {bad}");
        assert!(outputs[..COUNT] == state.parameters, "parameters");
        assert!(outputs[COUNT..2 * COUNT] == state.first, "first moment");
        assert!(outputs[2 * COUNT..3 * COUNT] == state.second, "second moment");
    }
}
