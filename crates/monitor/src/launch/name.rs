//! What a monitor is called.

use std::fmt;
use std::str::FromStr;

/// The most characters of a name. It is part of the paths of UNIX sockets,
/// which hold 107 bytes.
const LONGEST: usize = 32;

/// The name of a monitor: part of its folder's path and of the names that
/// processes show.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MonitorName(String);

/// Why a text names no monitor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} names no monitor: a name has 1 to {LONGEST} letters, digits, `-`, `_` or `.`, and \
     begins with a letter or digit"
)]
pub struct NameError {
    /// What was given.
    pub text: String,
}

impl MonitorName {
    /// The name's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MonitorName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let fits = |character: char| {
            character.is_ascii_alphanumeric() || matches!(character, '-' | '_' | '.')
        };
        let begins = text.starts_with(|character: char| character.is_ascii_alphanumeric());
        if begins && text.len() <= LONGEST && text.chars().all(fits) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError {
                text: text.to_owned(),
            })
        }
    }
}

impl fmt::Display for MonitorName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_never_leads_out_of_its_folder() {
        for good in ["web1", "a", "9-b_c.d"] {
            assert_eq!(good.parse::<MonitorName>().expect(good).as_str(), good);
        }
        for bad in ["", ".", "..", "a/b", "-a", "a b", "ä", &"x".repeat(33)] {
            assert!(bad.parse::<MonitorName>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_a_name_is_one_part_of_a_path(text in "\\PC{0,40}") {
            if let Ok(name) = text.parse::<MonitorName>() {
                let path = std::path::Path::new(name.as_str());
                prop_assert_eq!(path.components().count(), 1);
                prop_assert_eq!(path.file_name().and_then(|part| part.to_str()), Some(name.as_str()));
            }
        }
    }
}
