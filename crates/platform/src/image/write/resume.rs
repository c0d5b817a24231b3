//! The small file beside an unfinished dump that says how far it came.
//!
//! It has a fixed length and is written in place, so that it can still be
//! brought up to date when the disk is full.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::WriteError;

const TITLE: &str = "secmon unfinished dump 1\n";
/// The title, 64 hexadecimal digits, 20 decimal ones, a line end after each.
const SIZE: usize = TITLE.len() + 65 + 21;

/// The state of an unfinished dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// [`Plan::fingerprint`](super::plan::Plan::fingerprint).
    pub(crate) plan: [u8; 32],
    /// The file is whole up to this offset.
    pub(crate) position: u64,
}

impl State {
    fn encode(&self) -> String {
        format!(
            "{TITLE}{}\n{:020}\n",
            hexadecimal(&self.plan),
            self.position
        )
    }

    /// `None` if the bytes are not what [`encode`](Self::encode) makes.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut lines = text.strip_prefix(TITLE)?.lines();
        let digits = lines.next()?.as_bytes();
        let position = lines.next()?.parse().ok()?;
        let mut plan = [0; 32];
        if digits.len() != 64 || lines.next().is_some() {
            return None;
        }
        for (byte, pair) in plan.iter_mut().zip(digits.chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self { plan, position })
    }
}

/// The bytes as people compare them.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The state's file: `<dump>.unfinished`.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    file: File,
}

impl StateFile {
    pub(crate) fn path_for(dump: &Path) -> PathBuf {
        let mut name = dump.as_os_str().to_owned();
        name.push(".unfinished");
        PathBuf::from(name)
    }

    /// Starts one for a new dump.
    pub(crate) fn create(dump: &Path, state: &State) -> Result<Self, WriteError> {
        let path = Self::path_for(dump);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| WriteError::Open {
                path: path.clone(),
                source,
            })?;
        let mut created = Self { path, file };
        created.update(state)?;
        Ok(created)
    }

    /// The one of an unfinished dump, if there is one.
    pub(crate) fn open(dump: &Path) -> Result<Option<(Self, State)>, WriteError> {
        let path = Self::path_for(dump);
        let failed = |source| WriteError::Open {
            path: path.clone(),
            source,
        };
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        (&file)
            .take(SIZE as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        let state = State::decode(&bytes).ok_or_else(|| WriteError::NotResumable {
            path: path.clone(),
            reason: "its state file makes no sense",
        })?;
        Ok(Some((Self { path, file }, state)))
    }

    /// Replaces the state.
    pub(crate) fn update(&mut self, state: &State) -> Result<(), WriteError> {
        let write = |source| WriteError::Write {
            path: self.path.clone(),
            offset: 0,
            source,
        };
        self.file
            .write_all_at(state.encode().as_bytes(), 0)
            .map_err(write)?;
        self.file.sync_data().map_err(write)
    }

    /// Removes it: the dump is whole.
    pub(crate) fn remove(self) -> Result<(), WriteError> {
        std::fs::remove_file(&self.path).map_err(|source| WriteError::Open {
            path: self.path,
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_reads_back_and_nothing_else_does() {
        let state = State {
            plan: [0xa5; 32],
            position: u64::MAX,
        };
        let text = state.encode();
        assert_eq!(text.len(), SIZE);
        assert_eq!(State::decode(text.as_bytes()), Some(state));
        for length in 0..text.len() - 1 {
            assert_eq!(
                State::decode(&text.as_bytes()[..length]).filter(|s| *s == state),
                None
            );
        }
        assert_eq!(State::decode(b"something else"), None);
        assert_eq!(State::decode(format!("{text}more\n").as_bytes()), None);
    }
}
