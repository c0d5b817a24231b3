//! What has to be there before the workload: file systems, modules, sysctls,
//! the port to the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use secmon_truth::{PORT_NAME, Workload};

use super::sys;

/// Moves from the initial file system to a tmpfs and starts anew there, as
/// every distribution's initramfs does: nothing can pivot away from the
/// initial one, and containers must. Does nothing the second time.
pub fn switch_root() -> io::Result<()> {
    const MARK: &str = "/etc/switched";
    if Path::new(MARK).exists() {
        return Ok(());
    }
    let new = Path::new("/new");
    fs::create_dir(new)?;
    sys::mount("root", new, "tmpfs", 0, "mode=0755")?;
    for name in ["init", "bin", "etc", "lib", "lib64", "dev"] {
        let from = Path::new("/").join(name);
        // Only a guest with a distribution's programs has their loader.
        if from.exists() {
            move_tree(&from, &new.join(name))?;
        }
    }
    fs::write(new.join(MARK.trim_start_matches('/')), "")?;
    std::env::set_current_dir(new)?;
    sys::mount(".", "/", "", libc::MS_MOVE, "")?;
    sys::chroot(".")?;
    std::env::set_current_dir("/")?;
    let program = sys::c_string("/init")?;
    Err(sys::execute(
        &program,
        std::slice::from_ref(&program),
        &[sys::c_string("HOME=/root")?],
    ))
}

fn move_tree(from: &Path, to: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_dir() {
        fs::create_dir(to)?;
        for entry in fs::read_dir(from)? {
            let name = entry?.file_name();
            move_tree(&from.join(&name), &to.join(&name))?;
        }
        return fs::remove_dir(from);
    }
    if metadata.is_file() {
        fs::copy(from, to)?;
    }
    // What is left is the console's node, which devtmpfs has as well.
    fs::remove_file(from)
}

/// Mounts `/proc`, `/sys`, `/dev` and what belongs beneath them.
pub fn mount_basics() -> io::Result<()> {
    for folder in [
        "/proc", "/sys", "/dev", "/run", "/tmp", "/root", "/mnt", "/var",
    ] {
        fs::create_dir_all(folder)?;
    }
    sys::mount("proc", "/proc", "proc", 0, "")?;
    sys::mount("sysfs", "/sys", "sysfs", 0, "")?;
    sys::mount("devtmpfs", "/dev", "devtmpfs", 0, "mode=0755")?;
    sys::mount(
        "tmpfs",
        "/run",
        "tmpfs",
        libc::MS_NOSUID | libc::MS_NODEV,
        "mode=0755",
    )?;
    sys::mount("tmpfs", "/tmp", "tmpfs", libc::MS_NOSUID, "mode=1777")?;
    for folder in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(folder)?;
    }
    sys::mount("devpts", "/dev/pts", "devpts", 0, "mode=0620,ptmxmode=0666")?;
    sys::mount(
        "tmpfs",
        "/dev/shm",
        "tmpfs",
        libc::MS_NOSUID | libc::MS_NODEV,
        "",
    )?;
    sys::mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "nsdelegate")?;
    // Not in every kernel, or not switched on: the workload says later what
    // it couldn't do without them.
    let _ = sys::mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700");
    let _ = sys::mount("securityfs", "/sys/kernel/security", "securityfs", 0, "");
    let _ = sys::mount("debugfs", "/sys/kernel/debug", "debugfs", 0, "");
    let _ = sys::mount("tracefs", "/sys/kernel/tracing", "tracefs", 0, "");
    let _ = sys::mount("mqueue", "/dev/mqueue", "mqueue", 0, "");
    Ok(())
}

/// Loads the modules that the lab packed, in its order (dependencies first).
///
/// `/etc/modules` has a line for each: `<set> <file> [parameters]`, the set
/// being `base` or `extra`. A module that this kernel has built in isn't
/// packed; one that doesn't load is reported, not fatal, unless the port
/// stays away for it.
pub fn load_modules(workload: &Workload) -> io::Result<Vec<String>> {
    let mut failures = Vec::new();
    for line in fs::read_to_string("/etc/modules")?.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(set), Some(file)) = (words.next(), words.next()) else {
            continue;
        };
        let wanted = match set {
            "base" => true,
            "rich" => workload.rich,
            _ => workload.extra_modules,
        };
        if !wanted {
            continue;
        }
        let parameters = words.next().unwrap_or("");
        let path = format!("/lib/modules/{file}");
        let module = File::open(&path)?;
        match sys::load_module(module.as_raw_fd(), parameters) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => failures.push(format!("module {file}: {error}")),
        }
    }
    Ok(failures)
}

/// Sets the kernel's switches that let the guest tell its whole truth.
pub fn set_switches() {
    for (path, value) in [
        ("/proc/sys/kernel/kptr_restrict", "0"),
        ("/proc/sys/kernel/dmesg_restrict", "0"),
        ("/proc/sys/kernel/hostname", "lab"),
        ("/proc/sys/kernel/domainname", "example.org"),
        ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
    ] {
        if let Err(error) = fs::write(path, value) {
            super::console(&format!("secmon-truth: {path}: {error}"));
        }
    }
}

/// Opens the virtio-serial port named [`PORT_NAME`] once it is there.
pub fn open_port() -> io::Result<File> {
    let start = Instant::now();
    loop {
        if let Some(name) = port_device() {
            let path = Path::new("/dev").join(name);
            match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(port) => return Ok(port),
                Err(error) if start.elapsed() > Duration::from_secs(10) => return Err(error),
                Err(_) => {}
            }
        } else if start.elapsed() > Duration::from_secs(10) {
            return Err(io::Error::other(format!("no virtio port {PORT_NAME}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn port_device() -> Option<std::ffi::OsString> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find(|entry| {
            fs::read_to_string(entry.path().join("name"))
                .is_ok_and(|name| name.trim_end() == PORT_NAME)
        })
        .map(|entry| entry.file_name())
}
