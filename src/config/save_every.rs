//! `save_every`: steps, minutes, or never.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// When a checkpoint is saved, besides when the run is asked to stop.
///
/// ```
/// use fastlora::config::SaveEvery;
///
/// let parse = |text: &str| text.parse::<SaveEvery>();
/// assert_eq!(parse("500")?, SaveEvery::Steps(500));
/// assert_eq!(parse("10m")?, SaveEvery::Minutes(10));
/// assert_eq!(parse("2h")?, SaveEvery::Minutes(120));
/// assert_eq!(parse("never")?, SaveEvery::Never);
/// assert!(parse("0").is_err());
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveEvery {
    /// Only on request.
    Never,
    /// After every so many steps.
    Steps(u64),
    /// After the first step that ends so many minutes after the checkpoint before.
    Minutes(u64),
}

impl FromStr for SaveEvery {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text == "never" {
            return Ok(Self::Never);
        }
        let (digits, unit) = text.split_at(text.trim_end_matches(char::is_alphabetic).len());
        let number = digits.parse().ok().filter(|&number: &u64| number > 0);
        let every = match (number, unit) {
            (Some(steps), "") => Some(Self::Steps(steps)),
            (Some(minutes), "m") => Some(Self::Minutes(minutes)),
            (Some(hours), "h") => hours.checked_mul(60).map(Self::Minutes),
            _ => None,
        };
        every.ok_or_else(|| {
            Error::config(format!("`{text}`, expected steps (500), minutes (10m), hours (2h) or never"))
                .at("save_every")
        })
    }
}

impl fmt::Display for SaveEvery {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => formatter.write_str("never"),
            Self::Steps(steps) => write!(formatter, "{steps}"),
            Self::Minutes(minutes) => write!(formatter, "{minutes}m"),
        }
    }
}

impl<'de> Deserialize<'de> for SaveEvery {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match serde_json::Value::deserialize(deserializer)? {
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        };
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

impl Serialize for SaveEvery {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Steps(steps) => serializer.serialize_u64(*steps),
            _ => serializer.collect_str(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for (json, every) in [
            ("500", SaveEvery::Steps(500)),
            ("\"10m\"", SaveEvery::Minutes(10)),
            ("\"never\"", SaveEvery::Never),
        ] {
            assert_eq!(serde_json::from_str::<SaveEvery>(json).unwrap(), every);
            assert_eq!(serde_json::to_string(&every).unwrap(), json);
        }
    }

    #[test]
    fn fault_44_what_is_no_interval_is_refused_with_what_is() {
        for text in ["", "0", "0m", "-3", "1.5", "10s", "m", "always", "18446744073709551615h"] {
            let error = text.parse::<SaveEvery>().unwrap_err();
            assert!(error.to_string().contains("minutes (10m)"), "{text}: {error}");
        }
        assert!(serde_json::from_str::<SaveEvery>("-3").is_err());
    }
}
