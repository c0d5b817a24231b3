//! Mounts of the initial namespace: odd names, bind mounts, propagation,
//! covered and detached ones.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::mem::forget;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use super::report::{attempt, child_that_stands};
use crate::agent::sys;

/// Makes them all.
pub fn mounts(failures: &mut Vec<String>) {
    for name in [
        &b"with space"[..],
        b"new\nline",
        b"tab\there",
        b"back\\slash",
        b"#hash",
        "日本".as_bytes(),
        b"\xff\xfe",
    ] {
        attempt(failures, "mount of an odd name", || {
            let target = Path::new("/mnt").join(OsStr::from_bytes(name));
            fs::create_dir_all(&target)?;
            sys::mount(
                OsStr::from_bytes(name),
                &target,
                "tmpfs",
                libc::MS_NODEV,
                "size=64k",
            )
        });
    }
    attempt(failures, "covered mount", || {
        fs::create_dir_all("/mnt/covered")?;
        sys::mount("below", "/mnt/covered", "tmpfs", 0, "size=64k")?;
        sys::mount(
            "above",
            "/mnt/covered",
            "tmpfs",
            libc::MS_RDONLY,
            "size=64k",
        )
    });
    attempt(failures, "bind mounts", || {
        fs::create_dir_all("/mnt/bind")?;
        fs::create_dir_all("/tmp/source/inner")?;
        fs::write("/tmp/source/file", "bound")?;
        fs::write("/mnt/bound file", "")?;
        sys::mount("/tmp/source/inner", "/mnt/bind", "", libc::MS_BIND, "")?;
        let read_only = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOEXEC;
        sys::mount("", "/mnt/bind", "", read_only, "")?;
        sys::mount("/tmp/source/file", "/mnt/bound file", "", libc::MS_BIND, "")
    });
    attempt(failures, "propagation", || {
        for (name, kind) in [
            ("shared", libc::MS_SHARED),
            ("unbindable", libc::MS_UNBINDABLE),
            ("slave", libc::MS_SHARED),
        ] {
            let target = format!("/mnt/{name}");
            fs::create_dir_all(&target)?;
            sys::mount(name, &target, "tmpfs", 0, "size=64k")?;
            sys::mount("", &target, "", kind, "")?;
        }
        fs::create_dir_all("/mnt/slave-of")?;
        sys::mount("/mnt/slave", "/mnt/slave-of", "", libc::MS_BIND, "")?;
        sys::mount("", "/mnt/slave-of", "", libc::MS_SLAVE, "")
    });
    attempt(failures, "deleted root of a bind mount", || {
        fs::create_dir_all("/tmp/source/short-lived")?;
        fs::create_dir_all("/mnt/of deleted")?;
        sys::mount(
            "/tmp/source/short-lived",
            "/mnt/of deleted",
            "",
            libc::MS_BIND,
            "",
        )?;
        fs::remove_dir("/tmp/source/short-lived")
    });
    attempt(failures, "detached mount", || {
        fs::create_dir_all("/mnt/detached")?;
        sys::mount("detached", "/mnt/detached", "tmpfs", 0, "size=64k")?;
        fs::create_dir_all("/mnt/detached/inner")?;
        fs::write("/mnt/detached/inner/file", "held")?;
        child_that_stands(|| {
            sys::set_name(b"holds-detached");
            forget(File::open("/mnt/detached/inner/file")?);
            std::env::set_current_dir("/mnt/detached/inner")
        })?;
        sys::unmount("/mnt/detached", libc::MNT_DETACH)
    });
    attempt(failures, "own mount namespace", || {
        child_that_stands(|| {
            sys::set_name(b"own-mounts");
            sys::unshare(libc::CLONE_NEWNS)?;
            sys::mount("", "/", "", libc::MS_REC | libc::MS_PRIVATE, "")?;
            fs::create_dir_all("/mnt/only here")?;
            sys::mount("only here", "/mnt/only here", "tmpfs", 0, "size=64k")?;
            fs::write("/mnt/only here/file", "")?;
            forget(File::open("/mnt/only here/file")?);
            Ok(())
        })
        .map(drop)
    });
}
