//! A record of the log, and the line it is written as.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::protocol::{Request, Right};

/// The version of the log's format.
pub const VERSION: u32 = 1;

/// What a record says.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The first record of each file.
    Began {
        /// The format's version.
        version: u32,
        /// The target.
        target: String,
    },
    /// The gate has started.
    Started {
        /// Its version.
        program: String,
    },
    /// The line before this one was cut short by the end of the gate that
    /// wrote it.
    Torn {
        /// Its length, without the end of line.
        bytes: u64,
        /// Its hash.
        sha256: String,
    },
    /// A monitor asked for something.
    Use {
        /// The monitor's name.
        monitor: String,
        /// The right that it needs.
        right: Right,
        /// What it asked.
        request: Request,
        /// Whether it may.
        outcome: Outcome,
        /// Why not, or what went wrong.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// Requests that are counted, not written down one by one.
    Counted {
        /// The monitor's name.
        monitor: String,
        /// Heartbeats and status requests since the last such record.
        routine: u64,
        /// Requests refused for their number.
        limited: u64,
    },
    /// A monitor's session began or ended, or somebody failed to begin one.
    Session {
        /// The monitor's name; empty if it is not known.
        monitor: String,
        /// What happened.
        what: String,
    },
    /// Something that the gate did of itself, or saw at the target.
    Target {
        /// What happened.
        what: String,
    },
}

/// What the gate decided, or what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is within the grant and is being done.
    Allowed,
    /// It is not within the grant.
    Denied,
    /// It was allowed, as the record before says, and did not succeed.
    Failed,
}

#[derive(Serialize)]
struct Record<'a> {
    sequence: u64,
    time: String,
    previous: &'a str,
    #[serde(flatten)]
    entry: &'a Entry,
}

/// The record's line, with its end, and its hash.
pub fn line(sequence: u64, previous: &str, entry: &Entry) -> (Vec<u8>, String) {
    let record = Record {
        sequence,
        time: utc(SystemTime::now()),
        previous,
        entry,
    };
    // Of these types no serialisation fails; an empty object would be found
    // by everyone who verifies.
    let mut line = serde_json::to_vec(&record).unwrap_or_else(|_| b"{}".to_vec());
    line.pop();
    let hash = super::sha256(&line);
    line.extend_from_slice(b",\"hash\":\"");
    line.extend_from_slice(hash.as_bytes());
    line.extend_from_slice(b"\"}\n");
    (line, hash)
}

/// RFC 3339, in milliseconds.
fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = era * 400 + year + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day_of_month:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_written_as_people_read_them() {
        let at = |seconds: u64| utc(UNIX_EPOCH + Duration::from_millis(seconds * 1000 + 7));
        assert_eq!(at(0), "1970-01-01T00:00:00.007Z");
        assert_eq!(at(951_826_154), "2000-02-29T12:09:14.007Z");
        assert_eq!(at(1_704_067_199), "2023-12-31T23:59:59.007Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59.007Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.007Z");
    }
}
