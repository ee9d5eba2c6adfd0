//! Functions over vectors that no instruction offers.

use super::Vector;

/// `e^x`, within 2 units in the last place of the true value for `-87.3 ≤ x ≤ 88.3`. Below that it is 0 (the true
/// value is subnormal or nearly so), above +∞; NaN stays NaN.
///
/// `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`, `ln 2` in two parts so that `r` is exact; then `e^r` by its Taylor
/// polynomial of degree 7 (remainder below 6e-9), times `2^n`.
#[inline(always)]
pub fn exp<V: Vector>(x: V) -> V {
    const LOWEST: f32 = -87.33;
    const HIGHEST: f32 = 88.37;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // `x` is the second operand, so that a NaN passes.
    let clamped = V::splat(HIGHEST).min(V::splat(LOWEST).max(x));
    let n = (clamped * V::splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(V::splat(-LN2_HIGH), clamped);
    let r = n.mul_add(V::splat(-LN2_LOW), r);
    let mut polynomial = V::splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        polynomial = polynomial.mul_add(r, V::splat(coefficient));
    }
    let power = polynomial * n.exp2_of_integer();
    let power = x.select_less(V::splat(LOWEST), V::splat(0.0), power);
    V::splat(HIGHEST).select_less(x, V::splat(f32::INFINITY), power)
}

/// The logistic function `1/(1 + e^-x)`.
#[inline(always)]
pub fn sigmoid<V: Vector>(x: V) -> V {
    V::splat(1.0) / (V::splat(1.0) + exp(V::splat(0.0) - x))
}

/// The hyperbolic tangent, within 4 units in the last place of the true value.
///
/// From 0.625 on it is `1 − 2/(e^2x + 1)`. Below, where that cancels, Lambert's continued fraction
/// `x/(1 + x²/(3 + x²/(5 + …)))` up to 11 (remainder below 1e-9), evaluated as one quotient.
#[inline(always)]
pub fn tanh<V: Vector>(x: V) -> V {
    const SMALL: f32 = 0.625;
    let (zero, one) = (V::splat(0.0), V::splat(1.0));
    let square = x * x;
    // The fraction's convergent: numerator and denominator by the recurrence from its innermost term.
    let (mut above, mut below) = (V::splat(11.0), one);
    for odd in [9.0, 7.0, 5.0, 3.0, 1.0] {
        (above, below) = (above.mul_add(V::splat(odd), square * below), above);
    }
    let small = x * below / above;
    let size = zero.select_less(x, x, zero - x);
    let large = one - V::splat(2.0) / (exp(size + size) + one);
    let large = zero.select_less(x, large, zero - large);
    size.select_less(V::splat(SMALL), small, large)
}

#[cfg(test)]
mod tests {
    use super::super::{Simd, simd_fn};
    use super::*;

    simd_fn! {
        fn exp_of_all<V>(simd: Simd, values: &mut [f32]) -> () {
            for chunk in values.chunks_mut(V::LANES) {
                exp(V::from_slice(chunk)).to_slice(chunk);
            }
        }
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        // 700 001 points over the whole range, and points between them near zero.
        let mut inputs: Vec<f32> = (0..=700_000).map(|i| -87.3 + i as f32 * (175.6 / 700_000.0)).collect();
        inputs.extend((0..100_000).map(|i| (i as f32 - 50_000.0) * 1e-5));
        for simd in Simd::available() {
            let mut outputs = inputs.clone();
            exp_of_all(simd, &mut outputs);
            let mut worst = (0.0, 0.0);
            for (&x, &y) in inputs.iter().zip(&outputs) {
                let exact = f64::from(x).exp();
                let rounded = exact as f32;
                let unit = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
                let error = (f64::from(y) - exact).abs() / unit;
                if error > worst.0 {
                    worst = (error, x);
                }
            }
            assert!(worst.0 <= 2.0, "{simd}: {} ulp at x = {}", worst.0, worst.1);
        }
    }

    simd_fn! {
        fn tanh_of_all<V>(simd: Simd, values: &mut [f32]) -> () {
            for chunk in values.chunks_mut(V::LANES) {
                tanh(V::from_slice(chunk)).to_slice(chunk);
            }
        }
    }

    #[test]
    fn tanh_is_within_four_units_in_the_last_place() {
        let mut inputs: Vec<f32> = (-400_000..=400_000).map(|i| i as f32 * 2.5e-5).collect();
        inputs.extend((-30..3).flat_map(|exponent| [1.3f32, -1.7].map(|x| x * 2f32.powi(exponent))));
        for simd in Simd::available() {
            let mut outputs = inputs.clone();
            tanh_of_all(simd, &mut outputs);
            for (&x, &y) in inputs.iter().zip(&outputs) {
                let exact = f64::from(x).tanh();
                let magnitude = (exact as f32).abs();
                let unit = f64::from(f32::from_bits(magnitude.to_bits() + 1)) - f64::from(magnitude);
                assert!((f64::from(y) - exact).abs() <= 4.0 * unit, "{simd}: tanh({x}) = {y}, not {exact}");
            }
            let mut edges = [f32::NEG_INFINITY, -100.0, 100.0, f32::INFINITY, f32::NAN];
            tanh_of_all(simd, &mut edges);
            assert_eq!(edges[..4], [-1.0, -1.0, 1.0, 1.0], "{simd}");
            assert!(edges[4].is_nan(), "{simd}");
        }
    }

    #[test]
    fn exp_at_the_edges() {
        let inputs = [f32::NEG_INFINITY, -1e30, -87.4, 0.0, -0.0, 88.8, 1e30, f32::INFINITY, f32::NAN];
        for simd in Simd::available() {
            let mut y = inputs;
            exp_of_all(simd, &mut y);
            assert_eq!(
                y[..8],
                [0.0, 0.0, 0.0, 1.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY],
                "{simd}"
            );
            assert!(y[8].is_nan(), "{simd}");
        }
    }
}
