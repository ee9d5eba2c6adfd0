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
