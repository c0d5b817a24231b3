//! What sound guests do all the time, on command: programs are compiled and
//! packages installed, containers come and go, the kernel patches its own
//! jumps.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::Duration;

use super::specimens::unload;
use crate::agent::sys;

/// Compiles, links and runs programs, and installs and removes a package, with
/// a distribution's own tools.
const BUILDING: &str = include_str!("building.sh");

/// What busybox is called as by the tools.
const APPLETS: &[&str] = &["rm", "cat", "mkdir", "sleep", "head", "sed"];

const OF_A_CONTAINER: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWCGROUP;

/// Switches behind jump labels and static calls of the kernel, as far as it
/// has them.
const SWITCHES: &[&str] = &[
    "/proc/sys/kernel/bpf_stats_enabled",
    "/proc/sys/kernel/sched_schedstats",
    "/sys/kernel/tracing/events/sched/sched_process_exec/enable",
    "/sys/kernel/tracing/events/syscalls/sys_enter_getpgid/enable",
];

/// Starts the load of this role in a child; none if it is no load.
pub fn start(role: &str) -> Option<io::Result<()>> {
    let load: fn() = match role {
        "building" => {
            if let Err(error) = name_applets() {
                return Some(Err(error));
            }
            build
        }
        "reader" => {
            if let Err(error) = name_applets() {
                return Some(Err(error));
            }
            reader
        }
        "containers" => containers,
        "module-loop" => modules,
        "jump-labels" => jump_labels,
        _ => return None,
    };
    // The answer comes from the process that rests; this one works.
    Some(sys::fork(load).map(drop))
}

fn name_applets() -> io::Result<()> {
    if !Path::new("/bin/tcc").exists() {
        return Err(io::Error::other("the guest has no tools"));
    }
    for applet in APPLETS {
        let path = Path::new("/bin").join(applet);
        if !path.exists() {
            fs::hard_link("/bin/busybox", path)?;
        }
    }
    Ok(())
}

fn build() {
    sys::set_name(b"building");
    if let Ok(script) = sys::c_string(BUILDING) {
        let words = [c"sh".to_owned(), c"-c".to_owned(), script];
        let _ = sys::execute(c"/bin/sh", &words, &[c"PATH=/bin".to_owned()]);
    }
}

/// The product's own reader, as it is installed in a guest.
fn reader() {
    let words = [c"sh".to_owned(), c"/etc/secmon-reader".to_owned()];
    let _ = sys::execute(c"/bin/sh", &words, &[]);
}

/// Loads and unloads a module that brings an interface with it.
fn modules() {
    loop {
        let Ok(module) = File::open("/lib/modules/dummy.ko") else {
            return;
        };
        let _ = sys::load_module(module.as_raw_fd(), "");
        let _ = unload("dummy");
    }
}

/// Starts containers that live for some moments each, one after the other.
fn containers() {
    loop {
        let started = sys::clone(OF_A_CONTAINER, || {
            if contain().is_ok() {
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        std::thread::sleep(Duration::from_millis(100));
        if started.is_err() {
            std::thread::sleep(Duration::from_millis(100));
        }
        while sys::reap_one() {}
    }
}

/// What a runtime does before it executes a container's program.
fn contain() -> io::Result<()> {
    sys::set_name(b"container");
    sys::set_host_name(b"container")?;
    sys::mount("", "/", "", libc::MS_REC | libc::MS_PRIVATE, "")?;
    let root = "/run/container";
    fs::create_dir_all(root)?;
    sys::mount("container", root, "tmpfs", 0, "mode=0755")?;
    for folder in ["proc", "old", "bin"] {
        fs::create_dir_all(format!("{root}/{folder}"))?;
    }
    sys::mount("proc", format!("{root}/proc"), "proc", 0, "")?;
    fs::copy("/bin/busybox", format!("{root}/bin/busybox"))?;
    sys::pivot_root(root, &format!("{root}/old"))?;
    std::env::set_current_dir("/")?;
    sys::unmount("/old", libc::MNT_DETACH)?;
    let program = sys::c_string("/bin/busybox")?;
    let arguments = [c"sleep".to_owned(), c"0.4".to_owned()];
    Err(sys::execute(&program, &arguments, &[]))
}

/// Switches what the kernel has behind patched jumps on and off.
fn jump_labels() {
    loop {
        for text in ["1", "0"] {
            for path in SWITCHES {
                let file = OpenOptions::new().write(true).open(path);
                // Not every kernel has every switch.
                let _ = file.and_then(|mut file| file.write_all(text.as_bytes()));
            }
        }
    }
}
