//! `token_cache`: where tokenised data are kept for the next start.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// Where tokenised data are kept, so that the next start need not tokenise them again.
///
/// ```
/// use fastlora::config::TokenCache;
///
/// let parse = |text: &str| text.parse::<TokenCache>();
/// assert_eq!(parse("auto")?, TokenCache::Auto);
/// assert_eq!(parse("off")?, TokenCache::Off);
/// assert_eq!(parse("/scratch/tokens")?, TokenCache::Folder("/scratch/tokens".into()));
/// # Ok::<(), fastlora::error::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum TokenCache {
    /// Data of some size in the user's cache folder; smaller ones are tokenised anew.
    #[default]
    Auto,
    /// Nowhere: tokens are in memory.
    Off,
    /// All data in this folder.
    Folder(PathBuf),
}

impl FromStr for TokenCache {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "" => Err(Error::config("the name is empty, expected auto, off or a folder").at("token_cache")),
            folder => Ok(Self::Folder(folder.into())),
        }
    }
}

impl fmt::Display for TokenCache {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Off => formatter.write_str("off"),
            Self::Folder(folder) => write!(formatter, "{}", folder.display()),
        }
    }
}

impl<'de> Deserialize<'de> for TokenCache {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error: Error| serde::de::Error::custom(error.message()))
    }
}

impl Serialize for TokenCache {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
