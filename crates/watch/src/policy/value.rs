//! The values of a policy that are more than a number or a word.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer};

/// A share of one core: `"5%"`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Deserialize)]
#[serde(try_from = "String")]
pub struct Budget(f64);

impl Budget {
    /// The share, of 1.
    #[must_use]
    pub const fn share(self) -> f64 {
        self.0
    }

    /// The share in percent.
    #[must_use]
    pub fn percent(self) -> f64 {
        self.0 * 100.0
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self(0.05)
    }
}

impl TryFrom<String> for Budget {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent: Option<f64> = text
            .trim()
            .strip_suffix('%')
            .and_then(|number| number.trim().parse().ok());
        match percent {
            Some(percent) if (0.1..=100.0).contains(&percent) => Ok(Self(percent / 100.0)),
            _ => Err(format!(
                "{text:?} is no share of a core: write \"0.1%\" to \"100%\""
            )),
        }
    }
}

/// A time from one millisecond to a week: `"500ms"`, `"10s"`, `"5m"`, `"1h"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct Interval(Duration);

impl Interval {
    /// The time.
    #[must_use]
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl TryFrom<String> for Interval {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        const UNITS: [(&str, u64); 5] = [
            ("ms", 1),
            ("s", 1000),
            ("m", 60_000),
            ("h", 3_600_000),
            ("d", 86_400_000),
        ];
        const WEEK: u64 = 7 * 86_400_000;
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(0);
        let (number, unit) = text.split_at(digits);
        let milliseconds = UNITS
            .iter()
            .find(|(name, _)| *name == unit.trim())
            .and_then(|(_, factor)| number.parse::<u64>().ok()?.checked_mul(*factor));
        match milliseconds {
            Some(milliseconds @ 1..=WEEK) => Ok(Self(Duration::from_millis(milliseconds))),
            _ => Err(format!(
                "{text:?} is no time: write a number with its unit, as \"500ms\", \"10s\", \"5m\", \
                 \"1h\" or \"7d\""
            )),
        }
    }
}

/// The name of a detector that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DetectorName(&'static str);

impl DetectorName {
    /// The name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.0
    }
}

impl<'de> Deserialize<'de> for DetectorName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::try_from(text).map_err(serde::de::Error::custom)
    }
}

impl TryFrom<String> for DetectorName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if let Some(detector) = secmon_detect::detector(&text) {
            return Ok(Self(detector.name()));
        }
        let names: Vec<&str> = secmon_detect::detectors()
            .iter()
            .map(|detector| detector.name())
            .collect();
        Err(format!(
            "there is no detector {text:?}: write one of {}",
            names.join(", ")
        ))
    }
}

/// A day, in UTC: `2027-06-30`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Day {
    year: u16,
    month: u8,
    day: u8,
}

impl Day {
    /// The day at this moment, in UTC.
    #[must_use]
    pub fn today() -> Self {
        let seconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs());
        Self::of_unix_days(seconds / 86_400)
    }

    /// The day that many days after 1970-01-01.
    #[must_use]
    pub fn of_unix_days(days: u64) -> Self {
        // Civil from days, with years that begin in March so that the leap day
        // is the last of one: 400 years have 146,097 days.
        let days = days.min(3_000_000) + 719_468;
        let era = days / 146_097;
        let of_era = days % 146_097;
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 {
            month_from_march + 3
        } else {
            month_from_march - 9
        };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        Self {
            year: u16::try_from(year).unwrap_or(u16::MAX),
            month: u8::try_from(month).unwrap_or(12),
            day: u8::try_from(day).unwrap_or(31),
        }
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

impl<'de> Deserialize<'de> for Day {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wrong = || {
            serde::de::Error::custom(
                "this is no day: write it without quotation marks, as expires = 2027-06-30",
            )
        };
        let moment = toml::value::Datetime::deserialize(deserializer).map_err(|_| wrong())?;
        match (moment.date, moment.time) {
            (Some(date), None) => Ok(Self {
                year: date.year,
                month: date.month,
                day: date.day,
            }),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_as_the_calendar_does() {
        for (days, text) in [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_819, "2027-01-01"),
            (20_999, "2027-06-30"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(Day::of_unix_days(days).to_string(), text);
        }
        assert!(Day::of_unix_days(20_999) > Day::of_unix_days(20_998));
    }

    #[test]
    fn times_and_shares_have_units() {
        let interval = |text: &str| Interval::try_from(text.to_owned()).map(Interval::duration);
        assert_eq!(interval("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(interval("5 m"), Ok(Duration::from_secs(300)));
        for wrong in [
            "",
            "5",
            "s",
            "5x",
            "0s",
            "-5s",
            "99999999999999999999s",
            "8d",
        ] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
        assert_eq!("5%".parse::<Budget>().map(Budget::share), Ok(0.05));
        for wrong in ["5", "%", "0%", "101%", "NaN%", "-1%"] {
            assert!(wrong.parse::<Budget>().is_err(), "{wrong}");
        }
    }
}
