//! `init_lora_weights`: how the adapters begin.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::error::{Error, Result};

/// How A and B begin, in PEFT's words.
///
/// ```
/// use fastlora::config::InitLoraWeights;
///
/// assert_eq!("pissa_niter_4".parse::<InitLoraWeights>()?, InitLoraWeights::PissaIterations(4));
/// assert!("olora".parse::<InitLoraWeights>().is_err());
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A random, B zero.
    #[default]
    Random,
    /// `pissa`: from the largest singular values of the weight (Meng et al. 2024).
    Pissa,
    /// `pissa_niter_N`: the same, found by N iterations from a random subspace.
    PissaIterations(u32),
}

/// Most iterations that can be asked for.
const MOST_ITERATIONS: u32 = 1000;

impl InitLoraWeights {
    /// Whether A and B are taken out of the weight.
    pub fn is_pissa(self) -> bool {
        self != Self::Random
    }
}

impl FromStr for InitLoraWeights {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let iterations = |digits: &str| digits.parse().ok().filter(|count| *count <= MOST_ITERATIONS);
        match text {
            "true" => Ok(Self::Random),
            "pissa" => Ok(Self::Pissa),
            _ => {
                text.strip_prefix("pissa_niter_").and_then(iterations).map(Self::PissaIterations).ok_or_else(
                    || {
                        Error::config(format!(
                            "`{text}`, expected true, pissa or pissa_niter_N with N up to {MOST_ITERATIONS}"
                        ))
                        .at("init_lora_weights")
                    },
                )
            }
        }
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => formatter.write_str("true"),
            Self::Pissa => formatter.write_str("pissa"),
            Self::PissaIterations(count) => write!(formatter, "pissa_niter_{count}"),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match Value::deserialize(deserializer)? {
            Value::String(text) => text,
            other => other.to_string(),
        };
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Random => serializer.serialize_bool(true),
            _ => serializer.collect_str(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for (json, init) in [
            ("true", InitLoraWeights::Random),
            ("\"pissa\"", InitLoraWeights::Pissa),
            ("\"pissa_niter_16\"", InitLoraWeights::PissaIterations(16)),
        ] {
            assert_eq!(serde_json::from_str::<InitLoraWeights>(json).unwrap(), init);
            assert_eq!(serde_json::to_string(&init).unwrap(), json);
        }
    }

    #[test]
    fn fault_44_a_start_that_is_none_is_refused_with_those_there_are() {
        for text in ["", "false", "pissa_niter_", "pissa_niter_-1", "pissa_niter_1001", "gaussian"] {
            let error = text.parse::<InitLoraWeights>().unwrap_err();
            assert!(error.to_string().contains("pissa_niter_N"), "{text}: {error}");
        }
        assert!(serde_json::from_str::<InitLoraWeights>("false").is_err());
    }
}
