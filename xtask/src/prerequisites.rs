//! What a fresh Debian machine lacks, and its installation.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::run;

/// A file that must be there, and the Debian package that brings it.
struct Prerequisite {
    /// Programs are looked for in the usual folders.
    file: &'static str,
    package: &'static str,
    needed_for: &'static str,
}

/// For booting guests.
const LAB: &[Prerequisite] = &[
    Prerequisite {
        file: "qemu-system-x86_64",
        package: "qemu-system-x86",
        needed_for: "booting guests",
    },
    Prerequisite {
        file: "busybox",
        package: "busybox-static",
        needed_for: "the guests' programs",
    },
    Prerequisite {
        file: "cpio",
        package: "cpio",
        needed_for: "the guests' file systems",
    },
    Prerequisite {
        file: "xz",
        package: "xz-utils",
        needed_for: "unpacking kernel modules",
    },
    Prerequisite {
        file: "dpkg-deb",
        package: "dpkg",
        needed_for: "unpacking kernels",
    },
    Prerequisite {
        file: "setpriv",
        package: "util-linux",
        needed_for: "ending guests",
    },
    Prerequisite {
        file: "cc",
        package: "gcc",
        needed_for: "linking",
    },
    Prerequisite {
        file: "make",
        package: "make",
        needed_for: "the specimens' modules",
    },
    Prerequisite {
        file: "/usr/lib/x86_64-linux-gnu/libelf.so.1",
        package: "libelf1",
        needed_for: "the specimens' modules",
    },
    Prerequisite {
        file: "/usr/lib/x86_64-linux-gnu/libc.a",
        package: "libc6-dev",
        needed_for: "the guests' static first program",
    },
];

/// For the whole test suite besides.
const TESTS: &[Prerequisite] = &[
    Prerequisite {
        file: "/usr/sbin/rsyslogd",
        package: "rsyslog",
        needed_for: "a syslog server that others wrote",
    },
    Prerequisite {
        file: "makedumpfile",
        package: "makedumpfile",
        needed_for: "compressed dumps to test with",
    },
    Prerequisite {
        file: "virt-xml-validate",
        package: "libvirt-clients",
        needed_for: "checking libvirt domains",
    },
    Prerequisite {
        file: "libvirtd",
        package: "libvirt-daemon",
        needed_for: "a guest that libvirt runs",
    },
    Prerequisite {
        file: "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so",
        package: "libvirt-daemon-driver-qemu",
        needed_for: "a guest that libvirt runs",
    },
    Prerequisite {
        file: "xmllint",
        package: "libxml2-utils",
        needed_for: "checking libvirt domains",
    },
    Prerequisite {
        file: "bpftool",
        package: "bpftool",
        needed_for: "another reading of kernels' types",
    },
    Prerequisite {
        file: "c++",
        package: "g++",
        needed_for: "the fuzzer's driver",
    },
];

/// Makes sure that guests can be booted.
///
/// # Errors
/// What is missing, why it can't be installed from here, and what to type.
pub fn for_guests() -> Result<()> {
    install(LAB.iter())
}

/// Makes sure that every test can run.
///
/// # Errors
/// As [`for_guests`].
pub fn for_tests() -> Result<()> {
    install(LAB.iter().chain(TESTS))
}

fn is_there(file: &str) -> bool {
    if file.starts_with('/') {
        return Path::new(file).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into);
    std::env::split_paths(&path)
        .chain(usual)
        .any(|folder| folder.join(file).is_file())
}

fn install<'a>(wanted: impl Iterator<Item = &'a Prerequisite>) -> Result<()> {
    let missing: Vec<_> = wanted
        .filter(|prerequisite| !is_there(prerequisite.file))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    for prerequisite in &missing {
        println!(
            "missing: {} ({})",
            prerequisite.package, prerequisite.needed_for
        );
    }
    let packages: Vec<_> = missing
        .iter()
        .map(|prerequisite| prerequisite.package)
        .collect();
    let by_hand = format!(
        "apt-get install --no-install-recommends {}",
        packages.join(" ")
    );
    if !is_there("apt-get") {
        bail!(
            "this machine has no apt-get; install what Debian calls: {}",
            packages.join(" ")
        );
    }
    let Some(prefix) = root_prefix() else {
        bail!("not root, and sudo would ask for a password; run this first: sudo {by_hand}");
    };
    let apt = |arguments: &[&str]| {
        let mut words: Vec<&str> = prefix.to_vec();
        words.extend(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q"]);
        words.extend(arguments);
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        run::run(&mut command)
    };
    apt(&["update"])?;
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(&packages);
    apt(&arguments)?;
    let still: Vec<_> = missing
        .iter()
        .filter(|prerequisite| !is_there(prerequisite.file))
        .map(|prerequisite| prerequisite.file)
        .collect();
    if !still.is_empty() {
        bail!(
            "installed {}, yet there is still no {}",
            packages.join(" "),
            still.join(", ")
        );
    }
    Ok(())
}

/// The words before a command that make root run it, if that can be had
/// without a question.
fn root_prefix() -> Option<&'static [&'static str]> {
    let is_root = run::output(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    if is_root {
        return Some(&[]);
    }
    let sudo = Command::new("sudo").args(["-n", "true"]).output();
    sudo.is_ok_and(|output| output.status.success())
        .then_some(&["sudo", "-n"])
}
