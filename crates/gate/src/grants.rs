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
//! `secmon monitor up` makes its monitor's key itself: in a file for it, the
//! entry with the monitor's name has no `key`.
//!
//! A word that is not known is an error, never ignored: a grant that is
//! misspelt must not come to mean less or more than its author thinks.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use secmon_channel::PublicKey;
use serde::{Deserialize, Serialize};

use crate::protocol::{Limits, Right};

/// The version that this program reads.
pub const VERSION: u32 = 1;

/// The longest grant file.
const MAX_BYTES: u64 = 1 << 20;

/// The most monitors in one file.
const MAX_MONITORS: usize = 256;

/// A grant file that was read and found right. Written down by others, it is
/// its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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
    /// Nothing is said of the monitor that the file is for.
    #[error(
        "nothing is granted to monitor {monitor:?}: add a [[monitor]] with name = \"{monitor}\" and its rights"
    )]
    Absent {
        /// The monitor.
        monitor: String,
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
    key: Option<toml::Spanned<String>>,
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

impl TryFrom<String> for Grants {
    type Error = GrantError;

    fn try_from(text: String) -> Result<Self, GrantError> {
        Self::parse(&text)
    }
}

impl From<Grants> for String {
    fn from(grants: Grants) -> Self {
        grants.to_text()
    }
}

impl Grants {
    /// Reads and checks a grant file.
    ///
    /// # Errors
    /// [`GrantError`].
    pub fn read(path: &Path) -> Result<Self, GrantError> {
        Self::parse(&Self::read_text(path)?)
    }

    /// Reads a grant file's text.
    ///
    /// # Errors
    /// [`GrantError::Read`] and [`GrantError::TooLong`].
    pub fn read_text(path: &Path) -> Result<String, GrantError> {
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
        Ok(text)
    }

    /// Understands a grant file's text.
    ///
    /// # Errors
    /// [`GrantError`], with the line.
    pub fn parse(text: &str) -> Result<Self, GrantError> {
        Self::parse_entries(text, None)
    }

    /// Understands the text of a grant file for a monitor that has just got its
    /// key: the entry with its name needs none, and must be there.
    ///
    /// # Errors
    /// [`GrantError`], with the line.
    pub fn parse_for(text: &str, monitor: &str, key: PublicKey) -> Result<Self, GrantError> {
        let grants = Self::parse_entries(text, Some((monitor, key)))?;
        if grants.of(&key).is_none() {
            return Err(GrantError::Absent {
                monitor: monitor.to_owned(),
            });
        }
        Ok(grants)
    }

    /// What a monitor has for whom there is no grant file: [`Right::Observe`]
    /// alone.
    #[must_use]
    pub fn observe_alone(target: &str, monitor: &str, key: PublicKey) -> Self {
        Self {
            target: target.to_owned(),
            monitors: vec![Grant {
                name: monitor.to_owned(),
                key,
                rights: BTreeSet::from([Right::Observe]),
                limits: Limits::default(),
            }],
        }
    }

    /// The text of a grant file that says the same.
    #[must_use]
    pub fn to_text(&self) -> String {
        use std::fmt::Write as _;
        let mut text = format!("version = {VERSION}\ntarget = \"{}\"\n", self.target);
        for grant in &self.monitors {
            let rights: Vec<String> = grant
                .rights
                .iter()
                .map(|right| format!("\"{right}\""))
                .collect();
            // Writing to a string does not fail; names hold no quotes.
            let _ = write!(
                text,
                "\n[[monitor]]\nname = \"{}\"\nkey = \"{}\"\nrights = [{}]\n\n[monitor.limits]\n",
                grant.name,
                grant.key,
                rights.join(", ")
            );
            for (name, value) in limits(&grant.limits) {
                let _ = writeln!(text, "{name} = {value}");
            }
        }
        text
    }

    fn parse_entries(text: &str, made: Option<(&str, PublicKey)>) -> Result<Self, GrantError> {
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
            let key: PublicKey = match (&monitor.key, made) {
                (None, Some((own, key))) if name == own => key,
                (Some(text), _) => text.get_ref().parse().map_err(|_| {
                    let reason = "a key is 64 hexadecimal digits".to_owned();
                    value(text.span().start, reason)
                })?,
                (None, _) => {
                    let reason = format!("monitor {name:?} has no key: 64 hexadecimal digits");
                    return Err(value(name_at, reason));
                }
            };
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

/// The limits, each by its name in a grant file.
fn limits(limits: &Limits) -> [(&'static str, u32); 6] {
    [
        ("requests_per_second", limits.requests_per_second),
        ("stops_per_second", limits.stops_per_second),
        ("lease_milliseconds", limits.lease_milliseconds),
        (
            "longest_stop_milliseconds",
            limits.longest_stop_milliseconds,
        ),
        ("silence_milliseconds", limits.silence_milliseconds),
        ("breakpoints", limits.breakpoints),
    ]
}

/// The least and the most that each limit can be, in the order of [`limits`].
const BOUNDS: [(u32, u32); 6] = [
    (1, 100_000),
    (1, 10_000),
    (10, Limits::MAX_LEASE_MILLISECONDS),
    (10, 3_600_000),
    (100, 900),
    (1, 4096),
];

fn check_limits(checked: &Limits) -> Result<(), String> {
    for ((name, value), (least, most)) in limits(checked).into_iter().zip(BOUNDS) {
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
    fn a_monitor_that_was_just_made_needs_no_key_and_all_others_do() {
        let key: PublicKey = KEY.parse().expect("a key");
        let text =
            "version = 1\ntarget = \"web1\"\n[[monitor]]\nname = \"m\"\nrights = [\"pause\"]\n";
        let grants = Grants::parse_for(text, "m", key).expect("right");
        assert!(grants.of(&key).expect("granted").allows(Right::Pause));
        assert_eq!(
            Grants::parse(&grants.to_text()).expect("its own text"),
            grants
        );
        for (monitor, said) in [("n", "line 4"), ("m", "")] {
            let refused = Grants::parse_for(text, monitor, key);
            assert_eq!(refused.is_err(), !said.is_empty(), "{monitor}");
            if let Err(error) = refused {
                assert!(error.to_string().contains(said), "{error}");
            }
        }
        assert!(Grants::parse(text).is_err());
        let other = "version = 1\ntarget = \"web1\"\n";
        let error = Grants::parse_for(other, "m", key).expect_err("nothing");
        assert!(error.to_string().contains("[[monitor]]"), "{error}");
        let alone = Grants::observe_alone("web1", "m", key);
        assert_eq!(Grants::parse(&alone.to_text()).expect("right"), alone);
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
