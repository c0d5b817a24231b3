//! The cache folder: what is fetched or built once and kept.
//!
//! An entry is a folder that appears complete or not at all: it is made
//! beside its place and renamed there, while a lock keeps a second process
//! from making the same one.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};

/// `$XDG_CACHE_HOME/secmon-lab`, or `~/.cache/secmon-lab`.
pub fn folder() -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .filter(|path| Path::new(path).is_absolute())
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .context("neither XDG_CACHE_HOME nor HOME is set: no place for fetched kernels")?;
    let folder = base.join("secmon-lab");
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
    Ok(folder)
}

/// The entry `name`, made by `make` in an empty folder if it isn't there.
pub fn entry(name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let folder = folder()?;
    let place = folder.join(name);
    if place.is_dir() {
        return Ok(place);
    }
    let lock_path = folder.join(format!("{name}.lock"));
    let lock = File::create(&lock_path)
        .with_context(|| format!("cannot make the lock file {}", lock_path.display()))?;
    flock(&lock, FlockOperation::LockExclusive)
        .with_context(|| format!("cannot lock {}", lock_path.display()))?;
    // Another process may have made it while this one waited.
    if place.is_dir() {
        return Ok(place);
    }
    let draft = tempfile::Builder::new()
        .prefix(&format!("{name}.draft-"))
        .tempdir_in(&folder)?;
    make(draft.path())?;
    let draft = draft.keep();
    fs::rename(&draft, &place)
        .with_context(|| format!("cannot move the new entry to {}", place.display()))?;
    Ok(place)
}
