//! The user that a monitor's processes run as.
//!
//! Run by root, each monitor gets a user id of its own out of the range that
//! systemd keeps for services without an account (61184 to 65519), one that
//! neither the password file nor a running process has. Such a user owns
//! nothing. Run by anybody else, processes stay that user's.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::MonitorName;

/// The ids of users without an account, systemd's `DynamicUser=`.
const FIRST: u32 = 61184;
const LAST: u32 = 65519;

/// The most of a password file that is read.
const MAX_FILE: u64 = 16 << 20;

/// A user and group that owns nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// The user and the group, which have the same number.
    pub id: u32,
}

/// Why there is no user for a monitor.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// The system does not tell which ids are taken.
    #[error("which user ids are in use can't be told: {path}: {source}")]
    Host {
        /// What was read.
        path: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// All ids are taken.
    #[error("every user id from {FIRST} to {LAST} is in use")]
    NoneFree,
}

impl Account {
    /// A user id that nobody has, the same one for the same name if it is
    /// free. `number` tells users of one monitor apart; `taken` are ids that
    /// were given out already.
    ///
    /// # Errors
    /// [`AccountError`].
    pub fn unused(name: &MonitorName, number: u32, taken: &[u32]) -> Result<Self, AccountError> {
        let known = |path: &'static str| {
            ids_in(Path::new(path)).map_err(|source| AccountError::Host { path, source })
        };
        let mut used = known("/etc/passwd")?;
        used.extend(known("/etc/group")?);
        used.extend_from_slice(taken);
        let running = running_users();
        used.extend(running.map_err(|source| AccountError::Host {
            path: "/proc",
            source,
        })?);
        first_free(start(name, number), &used).ok_or(AccountError::NoneFree)
    }
}

/// Where the search for an id begins: by the name (FNV-1a).
fn start(name: &MonitorName, number: u32) -> u32 {
    let hash = name.as_str().bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    FIRST + hash.wrapping_add(number) % (LAST - FIRST + 1)
}

fn first_free(start: u32, used: &[u32]) -> Option<Account> {
    (start..=LAST)
        .chain(FIRST..start)
        .find(|id| !used.contains(id))
        .map(|id| Account { id })
}

/// The ids in the third field of each line.
fn ids_in(path: &Path) -> io::Result<Vec<u32>> {
    let mut text = Vec::new();
    fs::File::open(path)?
        .take(MAX_FILE)
        .read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let ids = text
        .lines()
        .filter_map(|line| line.split(':').nth(2)?.parse().ok());
    Ok(ids.collect())
}

/// The users of running processes.
fn running_users() -> io::Result<Vec<u32>> {
    use std::os::unix::fs::MetadataExt;
    let mut users = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let name = entry.file_name();
        let process = name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
        if process && let Ok(metadata) = entry.metadata() {
            users.push(metadata.uid());
        }
    }
    users.sort_unstable();
    users.dedup();
    Ok(users)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_nobodys() {
        let name: MonitorName = "web1".parse().expect("a name");
        let first = Account::unused(&name, 0, &[]).expect("an account");
        assert!((FIRST..=LAST).contains(&first.id));
        assert_eq!(Account::unused(&name, 0, &[]).expect("again"), first);
        let second = Account::unused(&name, 0, &[first.id]).expect("another");
        assert_ne!(second, first);
        let listed = ids_in(Path::new("/etc/passwd")).expect("users");
        assert!(listed.contains(&0) && !listed.contains(&first.id));
    }

    #[test]
    fn the_search_goes_round_and_ends() {
        let all: Vec<u32> = (FIRST..=LAST).collect();
        assert_eq!(first_free(LAST, &all), None);
        assert_eq!(first_free(LAST, &[LAST]), Some(Account { id: FIRST }));
    }
}
