//! `tiles`: how the products of Hopper are cut into tiles.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// Where the tiles of Hopper's products come from. They change a run's speed, and no bit of its results.
///
/// ```
/// use fastlora::config::TileSource;
///
/// let parse = |text: &str| text.parse::<TileSource>();
/// assert_eq!(parse("auto")?, TileSource::Auto);
/// assert_eq!(parse("rule")?, TileSource::Rule);
/// assert_eq!(parse("h100.json")?, TileSource::File("h100.json".into()));
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TileSource {
    /// What `fastlora tune` measured on this kind of device, where it has; else the rule.
    #[default]
    Auto,
    /// A guess from the shape.
    Rule,
    /// A file that `fastlora tune` wrote.
    File(PathBuf),
}

impl TileSource {
    /// Refuses a file that is not there.
    ///
    /// # Errors
    /// A config error that names it.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::File(path) if !path.is_file() => {
                Err(Error::config(format!("there is no file {}", path.display()))
                    .at("tiles")
                    .hint("`fastlora tune --out FILE` writes one; without it there are auto and rule"))
            }
            _ => Ok(()),
        }
    }
}

impl FromStr for TileSource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "rule" => Ok(Self::Rule),
            "" => Err(Error::config("the name is empty, expected auto, rule or a file").at("tiles")),
            file => Ok(Self::File(file.into())),
        }
    }
}

impl fmt::Display for TileSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Rule => formatter.write_str("rule"),
            Self::File(file) => write!(formatter, "{}", file.display()),
        }
    }
}

impl<'de> Deserialize<'de> for TileSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

impl Serialize for TileSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
