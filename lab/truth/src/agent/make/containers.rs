//! Containers as runtimes make them: new namespaces of every kind, a root of
//! their own, a cgroup of their own, a first process that is number 1 inside.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::mem::forget;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixListener;

use super::report::{self, Reporter, Reports, attempt};
use super::{WORKER, network, programs, threads};
use crate::agent::sys;

const ALL_BUT_USER: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWCGROUP;

/// `CLONE_NEWTIME` of `include/uapi/linux/sched.h`.
const NEW_TIME: libc::c_int = 0x80;

/// The variable that tells a container's first process its outer id.
const OUTER_PID: &str = "LAB_OUTER_PID";

/// The container's network, by name: the veth's outer and inner address.
const ADDRESSES: &[(&str, &str, &str)] = &[
    ("overlay", "10.50.0.1", "10.50.0.2"),
    ("user", "10.51.0.1", "10.51.0.2"),
];

/// The containers, each with a process outside that started it, and pid
/// namespaces three deep.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    for (name, user) in [("overlay", false), ("user", true)] {
        // Two reports come: from outside and from inside.
        reports.expect_another();
        reports.piece(&format!("container-{name}-shim"), |reporter| {
            let error = shim(name, user).err();
            let failures: Vec<_> = error.iter().map(ToString::to_string).collect();
            if error.is_some() {
                // The inner one won't come.
                Reporter::new(&format!("container-{name}")).send(0, &failures);
            }
            reporter.done(&failures);
        })?;
    }
    reports.simple("pid-namespaces", |_| {
        report::child_that_stands(|| nest(3)).map(drop)
    })?;
    reports.simple("ipc-namespace", |_| {
        sys::unshare(libc::CLONE_NEWIPC | libc::CLONE_NEWUTS)?;
        sys::set_host_name("höst-\u{1F980}".as_bytes())
    })?;
    Ok(())
}

/// A process in a pid namespace in a pid namespace …
fn nest(depth: u32) -> io::Result<()> {
    sys::set_name(format!("nested-{depth}").as_bytes());
    if depth == 0 {
        return Ok(());
    }
    sys::unshare(libc::CLONE_NEWPID)?;
    report::child_that_stands(|| nest(depth - 1)).map(drop)
}

/// Starts a container and stays as its parent.
fn shim(name: &str, user: bool) -> io::Result<()> {
    let cgroup = format!("/sys/fs/cgroup/lab/{name}-0123456789abcdef");
    fs::create_dir_all(&cgroup)?;
    fs::write(format!("{cgroup}/cgroup.procs"), "0")?;
    // Its children's clock is a day ahead.
    if sys::unshare(NEW_TIME).is_ok() {
        fs::write("/proc/self/timens_offsets", "boottime 86400 0\n")?;
    }
    let (mut go, mut tell) = io::pipe()?;
    let flags = ALL_BUT_USER | if user { libc::CLONE_NEWUSER } else { 0 };
    let pid = sys::clone(flags, || {
        let mut outer = [0; 16];
        let count = go.read(&mut outer).unwrap_or(0);
        let outer = String::from_utf8_lossy(&outer[..count]).into_owned();
        let error = enter(name, user, &outer).err();
        let failures: Vec<_> = error.iter().map(ToString::to_string).collect();
        Reporter::new(&format!("container-{name}")).done_as(outer.parse().unwrap_or(0), &failures);
    })?;
    if user {
        fs::write(format!("/proc/{pid}/uid_map"), "0 100000 65536\n")?;
        fs::write(format!("/proc/{pid}/gid_map"), "0 100000 65536\n")?;
    }
    if let Some((_, outer, _)) = ADDRESSES.iter().find(|entry| entry.0 == name) {
        let interface = format!("lab-{name}");
        network::veth(&interface, "eth0", Some(pid))?;
        network::address(&interface, outer, 30, None)?;
        network::up(&interface)?;
    }
    tell.write_all(pid.to_string().as_bytes())
}

/// In the new namespaces: makes the root and executes the first process.
fn enter(name: &str, user: bool, outer: &str) -> io::Result<()> {
    if user {
        sys::set_ids([0; 3], [0; 3], &[])?;
    }
    sys::set_host_name(format!("container-{name}").as_bytes())?;
    let recursive = if user {
        libc::MS_SLAVE
    } else {
        libc::MS_PRIVATE
    };
    sys::mount("", "/", "", libc::MS_REC | recursive, "")?;
    let place = format!("/run/containers-{name}");
    fs::create_dir_all(format!("/tmp/containers-{name}"))?;
    let place = if user {
        format!("/tmp/containers-{name}")
    } else {
        fs::create_dir_all(&place)?;
        place
    };
    sys::mount("container", &place, "tmpfs", 0, "mode=0755")?;
    let root = if user {
        fill(&place)?;
        place
    } else {
        overlay(&place)?
    };
    for folder in ["proc", "dev", "old", "data"] {
        fs::create_dir_all(format!("{root}/{folder}"))?;
    }
    sys::mount("proc", format!("{root}/proc"), "proc", 0, "")?;
    sys::mount(
        "data",
        format!("{root}/data"),
        "tmpfs",
        libc::MS_NOEXEC,
        "size=1m",
    )?;
    fs::write(format!("{root}/dev/null"), "")?;
    sys::mount(
        "/dev/null",
        format!("{root}/dev/null"),
        "",
        libc::MS_BIND,
        "",
    )?;
    sys::pivot_root(&root, &format!("{root}/old"))?;
    env::set_current_dir("/")?;
    sys::unmount("/old", libc::MNT_DETACH)?;
    fs::remove_dir("/old")?;
    let arguments = [b"/bin/app".to_vec(), b"--serve".to_vec(), name.into()];
    let environment = [
        format!("{OUTER_PID}={outer}").into_bytes(),
        b"container=lab".to_vec(),
        format!("HOSTNAME=container-{name}").into_bytes(),
    ];
    let role = format!("container:{name}");
    Err(programs::execute(
        &role,
        OsStr::new("/bin/app"),
        &arguments,
        &environment,
    ))
}

/// An overlay of two lower layers and an upper one; its mount point.
fn overlay(place: &str) -> io::Result<String> {
    for folder in [
        "base/etc",
        "base/srv",
        "layer/opt",
        "layer/etc",
        "upper",
        "work",
        "merged",
    ] {
        fs::create_dir_all(format!("{place}/{folder}"))?;
    }
    fill(&format!("{place}/base"))?;
    fs::write(format!("{place}/base/srv/lower only"), "lower")?;
    fs::write(format!("{place}/base/srv/removed"), "removed")?;
    fs::write(format!("{place}/layer/opt/tool"), "tool")?;
    fs::write(format!("{place}/layer/etc/config"), "second layer")?;
    let merged = format!("{place}/merged");
    let options =
        format!("lowerdir={place}/layer:{place}/base,upperdir={place}/upper,workdir={place}/work");
    sys::mount("overlay", &merged, "overlay", 0, &options)?;
    fs::remove_file(format!("{merged}/srv/removed"))?;
    Ok(merged)
}

/// The files of a root.
fn fill(root: &str) -> io::Result<()> {
    for folder in ["bin", "etc", "srv", "tmp", "run"] {
        fs::create_dir_all(format!("{root}/{folder}"))?;
    }
    fs::copy(WORKER, format!("{root}/bin/app"))?;
    fs::write(format!("{root}/etc/config"), "first layer")?;
    fs::write(format!("{root}/etc/passwd"), "root:x:0:0::/:/bin/app\n")
}

/// A container's first process, executed inside.
pub fn inside(name: &str) -> ! {
    let mut failures = Vec::new();
    attempt(&mut failures, "network", || {
        network::up("lo")?;
        if let Some((_, _, inner)) = ADDRESSES.iter().find(|entry| entry.0 == name) {
            network::address("eth0", inner, 30, None)?;
            network::up("eth0")?;
        }
        forget(TcpListener::bind("0.0.0.0:80")?);
        forget(UnixListener::bind("/run/app.sock")?);
        Ok(())
    });
    attempt(&mut failures, "files", || {
        if name == "overlay" {
            forget(File::open("/srv/lower only")?);
            forget(File::open("/opt/tool")?);
            // Folders of one layer, of two lower ones, of all three; and a
            // link, opened itself.
            for folder in ["/opt", "/bin", "/etc", "/srv"] {
                forget(File::open(folder)?);
            }
            std::os::unix::fs::symlink("/opt/tool", "/tmp/link")?;
            let link = libc::O_PATH | libc::O_NOFOLLOW;
            let mut options = OpenOptions::new();
            forget(options.read(true).custom_flags(link).open("/tmp/link")?);
        }
        // Copied up on the first write, in an overlay.
        forget(File::open("/etc/passwd")?);
        forget(OpenOptions::new().append(true).open("/etc/config")?);
        let mut fresh = File::create("/tmp/fresh")?;
        fresh.write_all(b"upper")?;
        forget(fresh);
        forget(File::create("/tmp/gone")?);
        fs::remove_file("/tmp/gone")?;
        forget(File::create("/data/on another mount")?);
        forget(File::open("/dev/null")?);
        Ok(())
    });
    attempt(&mut failures, "mapping", || {
        let file = File::open("/etc/passwd")?;
        crate::agent::memory::map(
            crate::agent::memory::PAGE,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            Some(&file),
            0,
        )
    });
    attempt(&mut failures, "children", || {
        report::child_that_stands(|| {
            sys::set_name(b"app-user");
            sys::set_ids([33; 3], [33; 3], &[33])
        })?;
        report::child_that_stands(|| {
            sys::set_name(b"app-threads");
            for number in 0..4 {
                threads::start(move || {
                    sys::set_name(format!("app-worker-{number}").as_bytes());
                    sys::rest();
                })?;
            }
            env::set_current_dir("/data")
        })?;
        report::child_that_stands(|| {
            sys::set_name(b"app-inner");
            sys::unshare(libc::CLONE_NEWPID)?;
            report::child_that_stands(|| {
                sys::set_name(b"app-innermost");
                Ok(())
            })
            .map(drop)
        })
    });
    let outer = env::var(OUTER_PID)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    Reporter::new(&format!("container-{name}")).done_as(outer, &failures);
    sys::rest()
}
