//! Reads a log with a stranger's eyes.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{GENESIS, MAX_LINE, numbered, sha256};
use crate::protocol::LogHead;

/// The most faults that are told.
const MAX_FAULTS: usize = 100;

/// The most renamed files that are looked for.
const MAX_FILES: u32 = 10_000;

/// Something wrong with a log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A record's hash does not fit its bytes.
    #[error("{place}: record {sequence} was changed")]
    Changed {
        /// Where.
        place: Place,
        /// The record.
        sequence: u64,
    },
    /// A record names another hash of the one before than that one has.
    #[error("{place}: record {sequence} was replaced: the next one follows another record")]
    Replaced {
        /// Where the next one stands.
        place: Place,
        /// The record that was replaced.
        sequence: u64,
    },
    /// Records are missing in between.
    #[error("{place}: records {first} to {last} are missing")]
    Missing {
        /// Where the next one stands.
        place: Place,
        /// The first that is missing.
        first: u64,
        /// The last that is missing.
        last: u64,
    },
    /// A record stands after a later one.
    #[error("{place}: record {sequence} stands where record {expected} belongs")]
    Moved {
        /// Where.
        place: Place,
        /// The record.
        sequence: u64,
        /// What should be there.
        expected: u64,
    },
    /// A line that is no record, and that no gate took note of.
    #[error("{place}: not a record, and no gate's crash explains it")]
    Garbage {
        /// Where.
        place: Place,
    },
    /// The record that was kept elsewhere is not the one in the log.
    #[error(
        "record {sequence} is not the one that was kept: the log was written anew from there or before"
    )]
    OtherHead {
        /// The record.
        sequence: u64,
    },
    /// The log ends before the record that was kept elsewhere.
    #[error(
        "the log ends with record {last}, but record {expected} was written: its end was cut off"
    )]
    Truncated {
        /// The last record there is.
        last: u64,
        /// The record that was kept.
        expected: u64,
    },
    /// The log begins after the record that was kept elsewhere.
    #[error("the log begins with record {first}, so record {expected} can't be compared")]
    TooOld {
        /// The first record there is.
        first: u64,
        /// The record that was kept.
        expected: u64,
    },
}

/// A line of a log's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file; empty for text.
    pub file: PathBuf,
    /// The line, from 1.
    pub line: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.file.as_os_str().is_empty() {
            write!(formatter, "line {}", self.line)
        } else {
            write!(formatter, "{} line {}", self.file.display(), self.line)
        }
    }
}

/// A last line that was cut short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub sha256: String,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The first record, if there is one.
    pub first: Option<u64>,
    /// The last record.
    pub head: Option<LogHead>,
    /// How many records there are.
    pub records: u64,
    /// Lines that were cut short by a crash, as the next gate noted.
    pub torn_lines: u64,
    /// The last line is cut short, and no gate has started since.
    pub torn_tail: Option<TornTail>,
    /// What is wrong, at most a hundred.
    pub faults: Vec<Fault>,
    /// The files, oldest first.
    pub files: Vec<PathBuf>,
}

/// The members of a record that matter to the chain.
#[derive(Deserialize)]
struct Link {
    sequence: u64,
    previous: String,
    torn: Option<TornEntry>,
    began: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct TornEntry {
    bytes: u64,
    sha256: String,
}

/// Verifies a log with all its renamed files that are there, and compares it
/// with a head that was kept elsewhere.
///
/// # Errors
/// The host's, if a file can't be read. What is wrong with the log is in the
/// report.
pub fn verify(path: &Path, kept: Option<&LogHead>) -> io::Result<Report> {
    let mut walk = Walk::new(kept);
    let mut files = vec![path.to_owned()];
    for number in 1..MAX_FILES {
        let earlier = numbered(path, number);
        if !earlier.exists() {
            break;
        }
        files.push(earlier);
    }
    files.reverse();
    for path in &files {
        walk.file(path, &mut BufReader::new(File::open(path)?))?;
    }
    let mut report = walk.finish();
    report.files = files;
    Ok(report)
}

/// Verifies one file alone.
pub(super) fn verify_file(file: &mut File) -> io::Result<Report> {
    let mut walk = Walk::new(None);
    walk.file(Path::new(""), &mut BufReader::new(file))?;
    Ok(walk.finish())
}

/// Verifies text.
pub fn verify_text(text: &[u8], kept: Option<&LogHead>) -> Report {
    let mut walk = Walk::new(kept);
    let mut text = text;
    // Reading from memory does not fail.
    let _ = walk.file(Path::new(""), &mut text);
    walk.finish()
}

struct Walk<'a> {
    kept: Option<&'a LogHead>,
    report: Report,
    /// A line that was no record, waiting for the note of a later gate.
    fragment: Option<(Place, TornTail)>,
    compared: bool,
}

impl<'a> Walk<'a> {
    fn new(kept: Option<&'a LogHead>) -> Self {
        Self {
            kept,
            report: Report::default(),
            fragment: None,
            compared: false,
        }
    }

    fn file(&mut self, file: &Path, input: &mut impl BufRead) -> io::Result<()> {
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let place = Place {
                file: file.to_owned(),
                line: number,
            };
            let whole = read_line(input, &mut line)?;
            if line.is_empty() && !whole {
                return Ok(());
            }
            self.line(&place, &line, whole);
            if !whole {
                return Ok(());
            }
        }
        Ok(())
    }

    fn line(&mut self, place: &Place, line: &[u8], whole: bool) {
        self.take_tail();
        let Some((link, own, sound)) = understand(line) else {
            self.drop_fragment();
            let tail = TornTail {
                bytes: line.len() as u64,
                sha256: sha256(line),
            };
            if whole {
                self.fragment = Some((place.clone(), tail));
            } else {
                self.report.torn_tail = Some(tail);
                self.fragment = Some((
                    place.clone(),
                    TornTail {
                        bytes: 0,
                        sha256: String::new(),
                    },
                ));
            }
            return;
        };
        if let Some((_, fragment)) = &self.fragment
            && link
                .torn
                .as_ref()
                .is_some_and(|torn| torn.bytes == fragment.bytes && torn.sha256 == fragment.sha256)
        {
            self.fragment = None;
            self.report.torn_lines += 1;
        }
        self.drop_fragment();
        self.follow(place, &link);
        if !sound {
            self.fault(Fault::Changed {
                place: place.clone(),
                sequence: link.sequence,
            });
        }
        if let Some(kept) = self.kept
            && kept.sequence == link.sequence
            && !std::mem::replace(&mut self.compared, true)
            && !kept.hash.eq_ignore_ascii_case(&own)
        {
            self.fault(Fault::OtherHead {
                sequence: link.sequence,
            });
        }
        self.report.records += 1;
        self.report.head = Some(LogHead {
            sequence: link.sequence,
            hash: own,
        });
    }

    /// Whether this record is the one after the last.
    fn follow(&mut self, place: &Place, link: &Link) {
        let sequence = link.sequence;
        let Some(head) = &self.report.head else {
            self.report.first = Some(sequence);
            // Only a file's first record may follow one that is not there.
            let genesis = sequence == 1 && link.previous == GENESIS;
            if !genesis && link.began.is_none() {
                self.fault(Fault::Missing {
                    place: place.clone(),
                    first: 1,
                    last: sequence.saturating_sub(1),
                });
            }
            return;
        };
        let expected = head.sequence.saturating_add(1);
        let follows = head.hash == link.previous;
        let last = head.sequence;
        if sequence > expected {
            self.fault(Fault::Missing {
                place: place.clone(),
                first: expected,
                last: sequence.saturating_sub(1),
            });
        } else if sequence < expected {
            self.fault(Fault::Moved {
                place: place.clone(),
                sequence,
                expected,
            });
        } else if !follows {
            self.fault(Fault::Replaced {
                place: place.clone(),
                sequence: last,
            });
        }
    }

    /// A torn tail that is followed by another file's lines was no tail.
    fn take_tail(&mut self) {
        if let Some(tail) = self.report.torn_tail.take()
            && let Some((_, fragment)) = &mut self.fragment
        {
            *fragment = tail;
        }
    }

    fn drop_fragment(&mut self) {
        if let Some((place, _)) = self.fragment.take() {
            self.fault(Fault::Garbage { place });
        }
    }

    fn fault(&mut self, fault: Fault) {
        if self.report.faults.len() < MAX_FAULTS {
            self.report.faults.push(fault);
        }
    }

    fn finish(mut self) -> Report {
        if self.report.torn_tail.is_some() {
            self.fragment = None;
        }
        self.drop_fragment();
        if let Some(kept) = self.kept
            && !self.compared
        {
            let first = self.report.first.unwrap_or(0);
            let last = self.report.head.as_ref().map_or(0, |head| head.sequence);
            if kept.sequence < first {
                self.fault(Fault::TooOld {
                    first,
                    expected: kept.sequence,
                });
            } else if kept.sequence > last {
                self.fault(Fault::Truncated {
                    last,
                    expected: kept.sequence,
                });
            }
        }
        self.report
    }
}

/// A record's members, its stated hash, and whether that fits.
fn understand(line: &[u8]) -> Option<(Link, String, bool)> {
    const MARK: &[u8] = b",\"hash\":\"";
    const DIGITS: usize = 64;
    let end = line.strip_suffix(b"\"}")?;
    let (body, hash) = end.split_at_checked(end.len().checked_sub(DIGITS)?)?;
    let body = body.strip_suffix(MARK)?;
    let link: Link = serde_json::from_slice(line).ok()?;
    let own = String::from_utf8(hash.to_vec()).ok()?;
    let sound = sha256(body) == own;
    Some((link, own, sound))
}

/// Reads up to the end of the line, which is left out; `false` if the file
/// ends first. Of a line that is too long to be a record only the first part
/// is kept, and that is none either.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        let available = input.fill_buf()?;
        if available.is_empty() {
            return Ok(false);
        }
        let end = available.iter().position(|byte| *byte == b'\n');
        let part = available.get(..end.unwrap_or(available.len()));
        let room = (MAX_LINE + 1).saturating_sub(line.len());
        line.extend(part.unwrap_or_default().iter().take(room));
        let used = end.map_or(available.len(), |end| end + 1);
        input.consume(used);
        if end.is_some() {
            return Ok(true);
        }
    }
}
