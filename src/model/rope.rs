//! Rotary position embedding (Su et al. 2021): inverse frequencies of each scaling, and the table of cosines and sines.
//!
//! With `R` the columns of a head that are rotated, pair `i < R/2` turns by `position · f_i` with `f_i = θ^(-2i/R)` before
//! scaling. Formulas as in transformers 5; all angles are computed in f64.

mod reading;

use std::f64::consts::TAU;

pub(super) use reading::Ropes;

/// Base and scaling of the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// θ, the base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How frequencies are stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, smoothly in between (Llama 3.1).
    Llama3 {
        /// Stretch of the context.
        factor: f64,
        /// Wavelengths above `original / this` are stretched in full.
        low_frequency_factor: f64,
        /// Wavelengths below `original / this` are kept.
        high_frequency_factor: f64,
        /// Context length before stretching.
        original_max_positions: f64,
    },
    /// NTK-by-parts interpolation with a factor on the attention (Peng et al. 2023).
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Rotations within the original context above which a pair is kept.
        beta_fast: f64,
        /// Rotations within the original context below which a pair is stretched in full.
        beta_slow: f64,
        /// Context length before stretching.
        original_max_positions: f64,
        /// Whether the bounds of the ramp are rounded to whole pairs.
        truncate: bool,
        /// Factor on cosines and sines.
        attention_factor: f64,
    },
    /// Each frequency divided by a factor of its own, others for texts that are longer than the original context (Ding et
    /// al. 2024, "LongRoPE").
    LongRope {
        /// `[R / 2]` of texts up to the original context.
        short_factors: Vec<f64>,
        /// `[R / 2]` of longer ones.
        long_factors: Vec<f64>,
        /// Tokens of the longest text that the short factors are for.
        original_max_positions: usize,
        /// Factor on cosines and sines of both.
        attention_factor: f64,
    },
}

impl Rope {
    /// The same for texts that are longer than the original context, where they have factors of their own.
    pub fn of_long_texts(&self) -> Option<Self> {
        let RopeScaling::LongRope { long_factors, original_max_positions, attention_factor, .. } =
            &self.scaling
        else {
            return None;
        };
        let scaling = RopeScaling::LongRope {
            short_factors: long_factors.clone(),
            long_factors: long_factors.clone(),
            original_max_positions: *original_max_positions,
            attention_factor: *attention_factor,
        };
        Some(Self { theta: self.theta, scaling })
    }

    /// Tokens of the longest text that is not a long one, where long ones differ.
    pub fn original_max_positions(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::LongRope { original_max_positions, .. } => Some(original_max_positions),
            _ => None,
        }
    }

    /// `[width / 2]` angle per position of each pair, in radians, and the factor on cosines and sines.
    pub fn inverse_frequencies(&self, width: usize) -> (Vec<f64>, f64) {
        let unscaled = (0..width / 2).map(|pair| self.theta.powf(-((2 * pair) as f64) / width as f64));
        match self.scaling {
            RopeScaling::Default => (unscaled.collect(), 1.0),
            RopeScaling::Linear { factor } => (unscaled.map(|frequency| frequency / factor).collect(), 1.0),
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_max_positions,
            } => {
                let stretched = unscaled.map(|frequency| {
                    let wavelength = TAU / frequency;
                    if wavelength < original_max_positions / high {
                        frequency
                    } else if wavelength > original_max_positions / low {
                        frequency / factor
                    } else {
                        let kept = (original_max_positions / wavelength - low) / (high - low);
                        (1.0 - kept) * frequency / factor + kept * frequency
                    }
                });
                (stretched.collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_positions,
                truncate,
                attention_factor,
            } => {
                // The pair, as a real number, that makes `rotations` turns within the original context.
                let pair_at = |rotations: f64| {
                    width as f64 * (original_max_positions / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut first, mut last) = (pair_at(beta_fast), pair_at(beta_slow));
                if truncate {
                    (first, last) = (first.floor(), last.ceil());
                }
                // transformers bounds the end by width - 1 and not by the number of pairs.
                (first, last) = (first.max(0.0), last.min(width as f64 - 1.0));
                if first == last {
                    last += 0.001;
                }
                let stretched = unscaled.enumerate().map(|(pair, frequency)| {
                    let interpolated = ((pair as f64 - first) / (last - first)).clamp(0.0, 1.0);
                    frequency / factor * interpolated + frequency * (1.0 - interpolated)
                });
                (stretched.collect(), attention_factor)
            }
            RopeScaling::LongRope { ref short_factors, attention_factor, .. } => {
                let divided = unscaled.zip(short_factors).map(|(frequency, factor)| frequency / factor);
                (divided.collect(), attention_factor)
            }
        }
    }

    /// `[positions, 2, width / 2]`: cosines, then sines, of each position's angles, times the attention factor.
    pub fn table(&self, width: usize, positions: usize) -> Vec<f32> {
        let (inverse_frequencies, attention_factor) = self.inverse_frequencies(width);
        let mut table = Vec::with_capacity(positions * width);
        for position in 0..positions {
            let angles = inverse_frequencies.iter().map(|frequency| position as f64 * frequency);
            table.extend(angles.clone().map(|angle| (angle.cos() * attention_factor) as f32));
            table.extend(angles.map(|angle| (angle.sin() * attention_factor) as f32));
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{ErrorKind, Result};
    use crate::model::config::Family;
    use crate::model::fields::Fields;
    use serde_json::json;

    fn parse(parameters: serde_json::Value) -> Result<Rope> {
        let config = json!({ "rope_parameters": parameters });
        let fields = Fields::of(&config, "config.json")?;
        Ok(Ropes::from_fields(fields, Family::Llama, 128, 32768)?.rope)
    }

    /// `expected` was computed apart, from the formulas of transformers in Python; a few roundings of f64 differ.
    fn assert_frequencies(rope: &Rope, head_dim: usize, first: usize, expected: &[f64]) {
        let (frequencies, _) = rope.inverse_frequencies(head_dim);
        assert_eq!(frequencies.len(), head_dim / 2);
        for (pair, (found, expected)) in frequencies[first..].iter().zip(expected).enumerate() {
            let error = (found / expected - 1.0).abs();
            assert!(error < 1e-14, "pair {}: {found:e}, expected {expected:e}", first + pair);
        }
    }

    #[test]
    fn default_and_linear_frequencies() {
        let rope = parse(json!({ "rope_type": "default" })).unwrap();
        assert_frequencies(&rope, 8, 0, &[1.0, 0.1, 0.01, 0.001]);
        let rope = parse(json!({ "type": "linear", "factor": 4 })).unwrap();
        assert_frequencies(&rope, 8, 0, &[0.25, 0.025, 0.0025, 0.00025]);
    }

    #[test]
    fn llama3_frequencies() {
        let mut parameters = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 10000.0 });
        let expected = [
            1.0,
            0.09583998588296266,
            1.25e-02,
            0.003952847075210474,
            1.25e-03,
            0.00039528470752104737,
            1.25e-04,
            3.952847075210474e-5,
        ];
        assert_frequencies(&parse(parameters.clone()).unwrap(), 16, 0, &expected);
        // Llama 3.1: pairs 24 to 39 hold both ends of the smooth part.
        parameters["original_max_position_embeddings"] = json!(8192);
        parameters["rope_theta"] = json!(500000.0);
        let expected = [
            0.0072926647372171085,
            0.005940730375674967,
            0.004839421345719893,
            0.003942276030116656,
            0.0032114459947525913,
            0.002166570763503359,
            0.0013718935677611381,
            0.0008567514129196321,
            0.0005248461609929547,
            0.00031269375038406517,
            0.00017850781276799638,
            9.556212353964683e-5,
            7.78465527393245e-5,
            6.341514345777615e-5,
            5.165906874818956e-5,
            4.208236768725526e-5,
        ];
        assert_frequencies(&parse(parameters).unwrap(), 128, 24, &expected);
    }

    #[test]
    fn yarn_frequencies() {
        let yarn = |more: serde_json::Value| {
            let mut parameters = json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                "original_max_position_embeddings": 32768 });
            parameters.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            parse(parameters).unwrap()
        };
        let ends = |third: f64, fourth: f64| {
            let first = [1.0, 0.17782794100389226, 0.03162277660168379];
            let last = [4.445698525097307e-5, 7.905694150420949e-6, 1.4058533129758728e-6];
            [first.as_slice(), &[third, fourth], &last].concat()
        };
        let truncated = ends(0.004217559938927618, 5.0e-04);
        assert_frequencies(&yarn(json!({})), 16, 0, &truncated);
        assert_frequencies(
            &yarn(json!({ "truncate": true, "beta_fast": 32, "beta_slow": 1 })),
            16,
            0,
            &truncated,
        );
        let exact = ends(0.0055172704751341225, 0.0006074079378798391);
        assert_frequencies(&yarn(json!({ "truncate": false })), 16, 0, &exact);
        let narrower = ends(0.005623413251903491, 0.0007685198446995982);
        let narrow = yarn(json!({ "truncate": false, "beta_fast": 8, "beta_slow": 2 }));
        assert_frequencies(&narrow, 16, 0, &narrower);
        // Without `factor` it is max_position_embeddings / original.
        let implied = parse(
            json!({ "rope_type": "yarn", "rope_theta": 1e6, "original_max_position_embeddings": 8192 }),
        );
        let RopeScaling::Yarn { factor, .. } = implied.unwrap().scaling else { panic!("not yarn") };
        assert_eq!(factor, 4.0);
    }

    #[test]
    fn yarn_attention_factor_scales_cosines_and_sines() {
        let factor = |more: serde_json::Value| {
            let mut parameters = json!({ "rope_type": "yarn", "factor": 40.0 });
            parameters.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let rope = parse(parameters).unwrap();
            let table = rope.table(4, 1);
            let (_, factor) = rope.inverse_frequencies(4);
            assert_eq!(table, [factor as f32, factor as f32, 0.0, 0.0]);
            factor
        };
        let close = |found: f64, expected: f64| {
            assert!((found - expected).abs() < 1e-15, "{found}, expected {expected}")
        };
        close(factor(json!({})), 0.1 * 40_f64.ln() + 1.0);
        close(factor(json!({ "mscale": 0.707, "mscale_all_dim": 1.0 })), 0.9210423553163399);
        close(factor(json!({ "mscale": 1.0, "mscale_all_dim": 0.5 })), 1.1557219901962608);
        // Only both together count.
        close(factor(json!({ "mscale": 0.707 })), 0.1 * 40_f64.ln() + 1.0);
        close(factor(json!({ "attention_factor": 1.5, "mscale": 0.707, "mscale_all_dim": 1.0 })), 1.5);
    }

    #[test]
    fn table_holds_cosines_then_sines_of_each_position() {
        let rope = parse(json!({ "rope_theta": 100.0 })).unwrap();
        let table = rope.table(4, 3);
        let row = |position: f64| {
            let angles = [position, position * 0.1];
            [angles[0].cos() as f32, angles[1].cos() as f32, angles[0].sin() as f32, angles[1].sin() as f32]
        };
        assert_eq!(table, [row(0.0), row(1.0), row(2.0)].concat());
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (parameters, named) in [
            (json!({ "rope_type": "dynamic", "factor": 2.0 }), "`dynamic`"),
            (json!({ "type": "longrope" }), "`short_factor`"),
            (json!({ "rope_type": "proportional" }), "`proportional`"),
            (json!({ "rope_type": "default", "partial_rotary_factor": 0.5 }), "`partial_rotary_factor`"),
            (json!({ "full_attention": { "rope_type": "default" } }), "`full_attention`"),
            (json!({ "rope_type": "linear" }), "`factor`"),
            (json!({ "rope_type": "linear", "factor": 0 }), "`factor`"),
            (json!({ "rope_type": "default", "rope_theta": -1.0 }), "`rope_theta`"),
            (json!({ "rope_type": "default", "rope_theta": 1.0 }), "`rope_theta`"),
            (
                json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4 }),
                "`high_freq_factor`",
            ),
            (json!({ "rope_type": "yarn" }), "`factor`"),
            (json!({ "rope_type": "yarn", "factor": 40, "mscale": -10, "mscale_all_dim": 1 }), "`mscale`"),
            (json!(["linear"]), "expected a JSON object"),
        ] {
            let error = parse(parameters.clone()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Model);
            assert!(error.to_string().contains(named), "{parameters}: {error}");
            assert!(
                error.to_string().starts_with("config.json: rope_parameters") || named == "`rope_theta`",
                "{error}"
            );
        }
        let config = json!({ "partial_rotary_factor": 0.75 });
        let fields = Fields::of(&config, "config.json").unwrap();
        let error = Ropes::from_fields(fields, Family::Llama, 128, 10).err().unwrap();
        assert!(error.to_string().contains("`partial_rotary_factor` 0.75"), "{error}");
    }
}
