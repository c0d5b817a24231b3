//! The grant file: which monitor may do what with a target.
//!
//! ```toml
//! version = 1
//! target = "web1"
//!
//! [[monitor]]
//! name = "watcher"
//! key = "6f1c…"                    # its public key, 64 hexadecimal digits
//! rights = ["observe", "pause"]     # "observe" alone where nothing is said
//!
//! [monitor.limits]                  # all of them have defaults
//! stops_per_second = 10
//! ```
//!
//! A word that is not known is an error, never ignored: a grant that is
//! misspelt must not come to mean less or more than its author thinks.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use secmon_channel::PublicKey;
use serde::Deserialize;

use crate::protocol::{Limits, Right};

/// The version that this program reads.
pub const VERSION: u32 = 1;

/// The longest grant file.
const MAX_BYTES: u64 = 1 << 20;

/// The most monitors in one file.
const MAX_MONITORS: usize = 256;

/// A grant file that was read and found right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grants {
    /// The target's name, for people and the log.
    pub target: String,
    /// The monitors.
    pub monitors: Vec<Grant>,
}

/// What one monitor is granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Its name, for people and the log.
    pub name: String,
    /// Its public key.
    pub key: PublicKey,
    /// Its rights; [`Right::Observe`] is always among them.
    pub rights: BTreeSet<Right>,
    /// Its limits.
    pub limits: Limits,
}

/// Why a grant file is not taken.
#[derive(Debug, thiserror::Error)]
pub enum GrantError {
    /// It can't be read.
    #[error("reading the grant file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: std::io::Error,
    },
    /// It is too long to be one.
    #[error("the grant file {path} is longer than {MAX_BYTES} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// It is no TOML, or has a field, right or value that is not known. The
    /// text shows the line.
    #[error("{0}")]
    Syntax(String),
    /// It is of another version.
    #[error("line {line}: version {found}; this program reads version {VERSION}")]
    Version {
        /// Where.
        line: usize,
        /// What it says.
        found: u32,
    },
    /// Two monitors that can't be told apart.
    #[error("line {line}: monitor {name:?} has the same {what} as another one")]
    Duplicate {
        /// Where.
        line: usize,
        /// The monitor.
        name: String,
        /// `name` or `key`.
        what: &'static str,
    },
    /// A value out of bounds.
    #[error("line {line}: {reason}")]
    Value {
        /// Where.
        line: usize,
        /// What is wrong with it and what is right.
        reason: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    #[allow(dead_code, reason = "checked before all else, as a VersionForm")]
    version: toml::Spanned<u32>,
    target: toml::Spanned<String>,
    #[serde(default)]
    monitor: Vec<toml::Spanned<MonitorForm>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MonitorForm {
    name: toml::Spanned<String>,
    key: toml::Spanned<String>,
    #[serde(default)]
    rights: Vec<Right>,
    #[serde(default)]
    limits: Limits,
}

/// Only to read the version of a file whose other fields may be unknown.
#[derive(Deserialize)]
struct VersionForm {
    version: toml::Spanned<u32>,
}

impl Grants {
    /// Reads and checks a grant file.
    ///
    /// # Errors
    /// [`GrantError`].
    pub fn read(path: &Path) -> Result<Self, GrantError> {
        let failed = |source| GrantError::Read {
            path: path.to_owned(),
            source,
        };
        let mut text = String::new();
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(failed)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(GrantError::TooLong {
                path: path.to_owned(),
            });
        }
        Self::parse(&text)
    }

    /// Understands a grant file's text.
    ///
    /// # Errors
    /// [`GrantError`], with the line.
    pub fn parse(text: &str) -> Result<Self, GrantError> {
        let line = |at: usize| {
            let before = text.as_bytes().get(..at).unwrap_or_default();
            1 + before.iter().filter(|byte| **byte == b'\n').count()
        };
        // The version first: a newer file's other fields mean nothing here.
        if let Ok(form) = toml::from_str::<VersionForm>(text)
            && *form.version.get_ref() != VERSION
        {
            return Err(GrantError::Version {
                line: line(form.version.span().start),
                found: *form.version.get_ref(),
            });
        }
        let form: FileForm =
            toml::from_str(text).map_err(|error| GrantError::Syntax(error.to_string()))?;
        let value = |at: usize, reason: String| GrantError::Value {
            line: line(at),
            reason,
        };
        check_name(form.target.get_ref())
            .map_err(|reason| value(form.target.span().start, reason))?;
        if form.monitor.len() > MAX_MONITORS {
            return Err(value(0, format!("more than {MAX_MONITORS} monitors")));
        }
        let mut monitors: Vec<Grant> = Vec::new();
        for monitor in form.monitor {
            let start = monitor.span().start;
            let monitor = monitor.into_inner();
            let name_at = monitor.name.span().start;
            let name = monitor.name.into_inner();
            check_name(&name).map_err(|reason| value(name_at, reason))?;
            let key: PublicKey = monitor.key.get_ref().parse().map_err(|_| {
                let reason = "a key is 64 hexadecimal digits".to_owned();
                value(monitor.key.span().start, reason)
            })?;
            let same = |what| GrantError::Duplicate {
                line: line(name_at),
                name: name.clone(),
                what,
            };
            if monitors.iter().any(|other| other.name == name) {
                return Err(same("name"));
            }
            if monitors.iter().any(|other| other.key == key) {
                return Err(same("key"));
            }
            check_limits(&monitor.limits).map_err(|reason| value(start, reason))?;
            let mut rights: BTreeSet<Right> = monitor.rights.into_iter().collect();
            rights.insert(Right::Observe);
            monitors.push(Grant {
                name,
                key,
                rights,
                limits: monitor.limits,
            });
        }
        Ok(Self {
            target: form.target.into_inner(),
            monitors,
        })
    }

    /// The grant of the monitor with this key.
    pub fn of(&self, key: &PublicKey) -> Option<&Grant> {
        self.monitors.iter().find(|grant| grant.key == *key)
    }
}

impl Grant {
    /// Whether it gives a right.
    pub fn allows(&self, right: Right) -> bool {
        self.rights.contains(&right)
    }
}

/// Names appear in logs and on terminals.
fn check_name(name: &str) -> Result<(), String> {
    let fits = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte));
    if fits {
        Ok(())
    } else {
        Err("a name is 1 to 64 of the characters a-z A-Z 0-9 - _ . :".to_owned())
    }
}

fn check_limits(limits: &Limits) -> Result<(), String> {
    let bounds = [
        (
            "requests_per_second",
            limits.requests_per_second,
            1,
            100_000,
        ),
        ("stops_per_second", limits.stops_per_second, 1, 10_000),
        (
            "lease_milliseconds",
            limits.lease_milliseconds,
            10,
            Limits::MAX_LEASE_MILLISECONDS,
        ),
        (
            "longest_stop_milliseconds",
            limits.longest_stop_milliseconds,
            10,
            3_600_000,
        ),
        (
            "silence_milliseconds",
            limits.silence_milliseconds,
            100,
            900,
        ),
        ("breakpoints", limits.breakpoints, 1, 4096),
    ];
    for (name, value, least, most) in bounds {
        if !(least..=most).contains(&value) {
            return Err(format!("{name} = {value} is not within {least} to {most}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    fn file(monitor: &str) -> String {
        format!(
            "version = 1\ntarget = \"web1\"\n\n[[monitor]]\nname = \"a\"\nkey = \"{KEY}\"\n{monitor}"
        )
    }

    #[test]
    fn observe_is_given_where_nothing_is_said() {
        let grants = Grants::parse(&file("")).expect("right");
        assert_eq!(grants.target, "web1");
        let grant = &grants.monitors[0];
        assert_eq!(grant.rights, BTreeSet::from([Right::Observe]));
        assert_eq!(grant.limits, Limits::default());
        assert_eq!(grants.of(&grant.key), Some(grant));
        let other: PublicKey = KEY.replace('0', "9").parse().expect("a key");
        assert_eq!(grants.of(&other), None);
    }

    #[test]
    fn rights_are_what_is_listed_and_no_more() {
        let text =
            file("rights = [\"respond\", \"trace\"]\n[monitor.limits]\nstops_per_second = 3\n");
        let grants = Grants::parse(&text).expect("right");
        let grant = &grants.monitors[0];
        assert!(grant.allows(Right::Observe) && grant.allows(Right::Trace));
        assert!(grant.allows(Right::Respond));
        assert!(!grant.allows(Right::Pause) && !grant.allows(Right::Control));
        assert_eq!(grant.limits.stops_per_second, 3);
        assert_eq!(grant.limits.lease_milliseconds, 500);
    }

    #[test]
    fn what_is_not_known_is_an_error_with_its_line() {
        let second = format!("[[monitor]]\nname = \"b\"\nkey = \"{KEY}\"\n");
        let cases = [
            (file("right = [\"pause\"]\n"), "line 7"),
            (file("rights = [\"obey\"]\n"), "line 7"),
            (file("rights = \"pause\"\n"), "line 7"),
            (file("[monitor.limits]\nstops = 3\n"), "line 8"),
            (
                file("[monitor.limits]\nlease_milliseconds = 900\n"),
                "line 4",
            ),
            (file(&second), "line 8"),
            (file("").replace("\"a\"", "\"a\\u001b[31m\""), "line 5"),
            (file("").replace("0001", "001"), "line 6"),
            ("version = 1\n".to_owned(), "target"),
            ("version = 2\nelse = 1\n".to_owned(), "line 1: version 2"),
            (String::new(), "version"),
            (
                "version = 1\ntarget = \"x\"\nmonitors = []\n".to_owned(),
                "line 3",
            ),
        ];
        for (text, said) in cases {
            let error = Grants::parse(&text).expect_err(&text).to_string();
            assert!(error.contains(said), "{error}\nof\n{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "\\PC{0,200}") {
            let _ = Grants::parse(&text);
            let _ = Grants::parse(&file(&text));
        }
    }
}
