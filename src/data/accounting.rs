//! What became of every record: used whole, truncated, skipped, dropped or refused, by file, line and reason.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::records::Origin;
use crate::error::Error;

/// What became of a record that is not used whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Used, cut to `max_length`.
    Truncated,
    /// A bad record left out (`on_bad_record: skip`).
    Skipped,
    /// An overlong sample left out (`overlong: drop`).
    Dropped,
    /// The reason why the run does not start.
    Refused,
}

impl Outcome {
    /// The outcome's name.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Truncated => "truncated",
            Outcome::Skipped => "skipped",
            Outcome::Dropped => "dropped",
            Outcome::Refused => "refused",
        }
    }
}

/// A record that is not used whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Where it begins.
    pub origin: Origin,
    /// What became of it.
    pub outcome: Outcome,
    /// Why.
    pub reason: String,
}

/// The account of every record; each is in `used` or among the exceptions (a truncated one in both).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounting {
    /// Records that are trained on, truncated ones included.
    pub used: usize,
    /// The others and the truncated ones, in the order of the data.
    pub exceptions: Vec<Exception>,
}

/// Exceptions that the log names one by one; the rest only with `-v`.
const NAMED_IN_LOG: usize = 20;

/// Further refused records that an error names after the first.
const NAMED_IN_ERROR: usize = 4;

impl Accounting {
    /// Notes what became of one record.
    pub fn note(&mut self, origin: &Origin, outcome: Outcome, reason: impl Into<String>) {
        self.exceptions.push(Exception { origin: origin.clone(), outcome, reason: reason.into() });
    }

    /// Number of records with that outcome.
    pub fn count(&self, outcome: Outcome) -> usize {
        self.exceptions.iter().filter(|exception| exception.outcome == outcome).count()
    }

    /// Number of all records.
    pub fn total(&self) -> usize {
        self.used + self.exceptions.len() - self.count(Outcome::Truncated)
    }

    /// The error for the refused records, if there are any: the first with its place, the next few, and the count.
    pub fn refusal(&self, hint: &str) -> Option<Error> {
        let mut refused = self.exceptions.iter().filter(|exception| exception.outcome == Outcome::Refused);
        let first = refused.next()?;
        let mut message = first.reason.clone();
        let others = self.count(Outcome::Refused) - 1;
        for (number, exception) in refused.take(NAMED_IN_ERROR).enumerate() {
            message += if number == 0 { "; also " } else { ", " };
            message += &format!("{}: {}", exception.origin, exception.reason);
        }
        if others > NAMED_IN_ERROR {
            message += &format!(" and {} more", others - NAMED_IN_ERROR);
        }
        Some(Error::data(message).at(first.origin.to_string()).hint(hint))
    }

    /// Logs the summary, and each exception by file, line and reason.
    pub fn log(&self) {
        use crate::error::escape_control;
        tracing::info!("{self}");
        for (number, Exception { origin, outcome, reason }) in self.exceptions.iter().enumerate() {
            let line = escape_control(&format!("{origin}: {}: {reason}", outcome.name()));
            if number < NAMED_IN_LOG {
                tracing::warn!("{line}");
            } else {
                tracing::debug!("{line}");
            }
        }
        if self.exceptions.len() > NAMED_IN_LOG {
            tracing::warn!("… and {} more (-v names all)", self.exceptions.len() - NAMED_IN_LOG);
        }
    }
}

impl fmt::Display for Accounting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} of {} records used", self.used, self.total())?;
        for outcome in [Outcome::Truncated, Outcome::Skipped, Outcome::Dropped, Outcome::Refused] {
            let count = self.count(outcome);
            if count > 0 {
                write!(formatter, ", {count} {}", outcome.name())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_is_counted_once() {
        let origin = Origin { file: "a.json".into(), line: 3 };
        let mut accounting = Accounting { used: 10, ..Accounting::default() };
        accounting.note(&origin, Outcome::Truncated, "600 tokens");
        accounting.note(&origin, Outcome::Skipped, "`output` is missing");
        accounting.note(&origin, Outcome::Dropped, "700 tokens");
        assert_eq!(accounting.total(), 12);
        assert_eq!(accounting.to_string(), "10 of 12 records used, 1 truncated, 1 skipped, 1 dropped");
        assert!(accounting.refusal("").is_none());
    }

    #[test]
    fn a_refusal_names_the_first_records_and_counts_the_rest() {
        let mut accounting = Accounting::default();
        for line in 1..=9 {
            accounting.note(&Origin { file: "a.json".into(), line }, Outcome::Refused, "bad");
        }
        let error = accounting.refusal("mend it").unwrap();
        assert_eq!(error.location(), Some("a.json:1"));
        assert_eq!(
            error.message(),
            "bad; also a.json:2: bad, a.json:3: bad, a.json:4: bad, a.json:5: bad and 4 more"
        );
    }
}
