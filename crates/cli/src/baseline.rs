//! First states of kernels (`secmon check --baseline`), a file for each boot in
//! a folder of the user's.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow};
use secmon_guest::Guest;
use secmon_guest::linux::boot::boot_identity;
use secmon_reference::{BootId, FirstState};

use crate::report::{Advise as _, Reporter};

const SUFFIX: &str = ".first-state";
const TEMPORARY: &str = ".new";
/// Of more boots than this none is kept: the oldest go.
const MOST_FILES: usize = 16;
/// More files of the folder are not looked at.
const MOST_LISTED: usize = 1 << 12;
/// No first state is longer.
const LONGEST: u64 = 1 << 29;
/// What was begun and not ended for so long never will be.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Where first states are kept: at `given`, or by the XDG base directory
/// specification.
///
/// # Errors
/// If nobody says where.
pub fn folder(given: &Path) -> Result<PathBuf> {
    if !given.as_os_str().is_empty() {
        return Ok(given.to_owned());
    }
    let absolute = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .map(|state| state.join("secmon/first-states"))
        .ok_or_else(|| anyhow!("--baseline: neither XDG_STATE_HOME nor HOME says where to keep it"))
        .advise("name a folder: --baseline=FOLDER")
}

/// Makes the folder, for its owner alone.
///
/// # Errors
/// If it can't be made.
pub fn make(folder: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("making the folder {}", folder.display()))
}

/// Gives the guest the first state of this boot of its kernel: the one that is
/// kept in the folder, or what is there now, which is then kept.
///
/// # Errors
/// If what is kept is damaged, or nothing can be kept or seen.
pub fn attach(guest: Guest, folder: &Path, reporter: Reporter) -> Result<Guest> {
    let numbers = boot_identity(&guest, "baseline").context("telling this boot from others")?;
    let boot = BootId::of(&numbers);
    let build_id = guest.kernel().profile.build_id();
    let kernel = build_id.map_or_else(|| "unnamed".to_owned(), ToString::to_string);
    let path = folder.join(format!("{kernel}-{}{SUFFIX}", boot.short()));
    let state = match read(&path, boot)? {
        Some(state) => state,
        None => {
            let state = secmon_detect::first_state(&guest)
                .context("looking at the kernel for the first time")?;
            let kept = keep(folder, &path, &state.encode(boot))
                .with_context(|| format!("keeping the first state in {}", path.display()))?;
            prune(folder, &path);
            reporter.say(format_args!(
                "this boot of the kernel is looked at for the first time: {} is what later \
                 checks compare with",
                path.display()
            ));
            match kept {
                true => state,
                // Somebody else was first.
                false => read(&path, boot)?.unwrap_or(state),
            }
        }
    };
    if state.build_id() != build_id {
        return Err(anyhow!(
            "{}: it is of a kernel with another build id",
            path.display()
        ));
    }
    let expected = secmon_detect::expected_of_first_state(&guest, state)?;
    Ok(guest.with_first_state(Arc::new(expected.into())))
}

/// What is kept of this boot, if something is.
fn read(path: &Path, boot: BootId) -> Result<Option<FirstState>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file,
    };
    let shown = || format!("reading the first state {}", path.display());
    let mut bytes = Vec::new();
    file.and_then(|file| file.take(LONGEST).read_to_end(&mut bytes))
        .with_context(shown)?;
    FirstState::decode(&bytes, boot)
        .map(Some)
        .with_context(shown)
        .advise("if it is given up, remove it: the next check then keeps what is there by then")
}

/// Writes a file whole or not at all; false if there is one already, which
/// stays.
fn keep(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let name = format!("{}-{}{TEMPORARY}", std::process::id(), now.as_nanos());
    let temporary = folder.join(name);
    let write = || {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // Unlike a change of the name, a second name replaces nothing.
        match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            linked => linked.map(|()| true),
        }
    };
    let written = write();
    // What can't be removed is removed once it is old.
    let _ = fs::remove_file(&temporary);
    let written = written?;
    File::open(folder)?.sync_all()?;
    Ok(written)
}

/// Removes the oldest of too many, and what was begun and not ended.
fn prune(folder: &Path, keep: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut states = Vec::new();
    for entry in entries.take(MOST_LISTED).flatten() {
        let path = entry.path();
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let (Ok(modified), Some(name)) = (modified, path.file_name()) else {
            continue;
        };
        let name = name.to_string_lossy();
        if name.ends_with(TEMPORARY) {
            let age = SystemTime::now().duration_since(modified);
            if age.is_ok_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(&path);
            }
        } else if name.ends_with(SUFFIX) && path != keep {
            states.push((modified, path));
        }
    }
    states.sort();
    let surplus = (states.len() + 1).saturating_sub(MOST_FILES);
    for (_, path) in states.iter().take(surplus) {
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_to_keep_a_state_wins_and_few_are_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        let name = |number: usize| folder.join(format!("{number:02}{SUFFIX}"));
        assert!(keep(folder, &name(0), b"first").expect("kept"));
        assert!(!keep(folder, &name(0), b"second").expect("not kept"));
        assert_eq!(fs::read(name(0)).expect("a file"), b"first");
        for number in 1..=MOST_FILES + 3 {
            assert!(keep(folder, &name(number), b"more").expect("kept"));
            prune(folder, &name(number));
        }
        let files = fs::read_dir(folder).expect("a folder").count();
        assert_eq!(files, MOST_FILES);
        assert!(name(MOST_FILES + 3).is_file());
    }

    #[test]
    fn what_is_damaged_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("x");
        let boot = BootId::of(&[1]);
        assert!(read(&path, boot).is_ok_and(|state| state.is_none()));
        fs::write(&path, "something else").expect("written");
        assert!(read(&path, boot).is_err());
    }
}
