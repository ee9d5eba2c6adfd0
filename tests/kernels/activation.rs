//! The activations of gated.h in float64, with what a right kernel may be off.

use crate::harness::*;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    Silu,
    GeluTanh,
}

impl Activation {
    pub fn kernel(self) -> &'static str {
        match self {
            Activation::Silu => "gated_silu",
            Activation::GeluTanh => "gated_gelu",
        }
    }

    /// f(g), f'(g), and the magnitudes of what they are sums of: 1 − σ and 1 + t lose their relative precision where they
    /// are small.
    fn at(self, g: f64) -> ([f64; 2], [f64; 2]) {
        match self {
            Activation::Silu => {
                let s = 1.0 / (1.0 + (-g).exp());
                ([g * s, s * (1.0 + g * (1.0 - s))], [(g * s).abs(), s * (1.0 + g.abs())])
            }
            Activation::GeluTanh => {
                let (c, a) = ((2.0 / std::f64::consts::PI).sqrt(), 0.044715);
                let t = (c * (g + a * g.powi(3))).tanh();
                let slope = c * (1.0 + 3.0 * a * g * g) * 0.5;
                let value = [0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + g * (1.0 - t * t) * slope];
                (value, [g.abs(), 1.0 + 2.0 * (g * slope).abs()])
            }
        }
    }

    /// f32 error relative to those magnitudes: the exponent's argument is rounded, so e^x errs by up to |x| roundings, and
    /// the special-function unit adds 2 ulp; of that σ(x) keeps |x|·σ·(1 − σ) ≤ 0.23 of one, and GELU's x is 2y.
    fn error(self, g: f64) -> f64 {
        F32_ROUNDOFF * (2.0 * g.abs() + 12.0)
    }

    fn expected(self, half: Half, g: f64, value: f64, magnitude: f64) -> Expected {
        let error = self.error(g) * magnitude.abs();
        let rounding = half.unit_roundoff() * (value.abs() + error) + half.underflow();
        Expected { value, tolerance: error + rounding }
    }

    /// f(g) · u.
    pub fn act(self, half: Half, g: f64, u: f64) -> Expected {
        let ([value, _], [magnitude, _]) = self.at(g);
        self.expected(half, g, value * u, magnitude * u)
    }

    /// dg and du.
    pub fn gradient(self, half: Half, g: f64, u: f64, dact: f64) -> [Expected; 2] {
        let ([value, slope], [value_magnitude, slope_magnitude]) = self.at(g);
        [
            self.expected(half, g, dact * u * slope, dact * u * slope_magnitude),
            self.expected(half, g, dact * value, dact * value_magnitude),
        ]
    }
}
