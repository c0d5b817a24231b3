//! Ordinary programs of a distribution for a guest: what an administrator asks
//! (`ps`, `lsmod`, `ss`, `ls`), a compiler and a package manager.
//!
//! They are Debian's own, dynamically linked, from the archive like the
//! kernels; nothing is installed on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use secmon_monitor::appliance::archive::Archive;
use secmon_monitor::appliance::{Entry, Initramfs};

use crate::cache;
use crate::suite::Suite;

/// Goes up when what is kept of packages changes.
const LAYOUT: u32 = 1;

/// The package that is installed and removed in a guest: small, without
/// scripts, and without a program that is needed.
const INSTALLED: &str = "hostname";

/// Packages with programs, and which of their files are taken.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("procps", &["ps"]),
    ("kmod", &["kmod"]),
    ("iproute2", &["ss"]),
    ("coreutils", &["ls"]),
    ("tcc", &["tcc"]),
    ("dpkg", &["dpkg", "dpkg-deb", "dpkg-split"]),
    ("tar", &["tar"]),
    ("dash", &["dash"]),
];

/// Packages with libraries that those need, and which ones.
const LIBRARIES: &[(&str, &[&str])] = &[
    (
        "libc6",
        &[
            "ld-linux-x86-64.so.2",
            "libc.so.6",
            "libm.so.6",
            "libdl.so.2",
            "libpthread.so.0",
            "libresolv.so.2",
        ],
    ),
    ("libproc2-0", &["libproc2.so.0"]),
    ("libsystemd0", &["libsystemd.so.0"]),
    ("liblzma5", &["liblzma.so.5"]),
    ("liblz4-1", &["liblz4.so.1"]),
    ("libzstd1", &["libzstd.so.1"]),
    ("libcap2", &["libcap.so.2"]),
    ("libgcrypt20", &["libgcrypt.so.20"]),
    ("libgpg-error0", &["libgpg-error.so.0"]),
    ("libssl3", &["libcrypto.so.3"]),
    ("libselinux1", &["libselinux.so.1"]),
    ("libpcre2-8-0", &["libpcre2-8.so.0"]),
    ("libtirpc3", &["libtirpc.so.3"]),
    ("libgssapi-krb5-2", &["libgssapi_krb5.so.2"]),
    ("libkrb5-3", &["libkrb5.so.3"]),
    ("libk5crypto3", &["libk5crypto.so.3"]),
    ("libkrb5support0", &["libkrb5support.so.0"]),
    ("libkeyutils1", &["libkeyutils.so.1"]),
    ("libcom-err2", &["libcom_err.so.2"]),
    ("libbsd0", &["libbsd.so.0"]),
    ("libmd0", &["libmd.so.0"]),
    ("libmnl0", &["libmnl.so.0"]),
    ("libacl1", &["libacl.so.1"]),
    ("zlib1g", &["libz.so.1"]),
    ("libbz2-1.0", &["libbz2.so.1.0"]),
];

/// The product's own reader.
const READER: &[u8] = include_bytes!("../../reader/secmon-reader");

/// Where Debian's libraries lie.
const LIBRARY_FOLDER: &str = "lib/x86_64-linux-gnu";

/// The folder with the programs (`bin`), the libraries (`lib`) and the package
/// (`package.deb`).
///
/// # Errors
/// If the archive lacks one of them.
fn fetch() -> Result<PathBuf> {
    cache::entry(&format!("tools-{LAYOUT}"), |draft| {
        let scratch = draft.join("scratch");
        let root = scratch.join("root");
        let archive = Archive::open(Suite::Bookworm.name(), &scratch.join("apt"))?;
        for (package, _) in PROGRAMS.iter().chain(LIBRARIES) {
            archive.unpack(package, &root)?;
        }
        let libraries = [LIBRARY_FOLDER, "usr/lib/x86_64-linux-gnu", "lib64"];
        let kinds = [
            ("bin", PROGRAMS, &["bin", "usr/bin", "usr/sbin"]),
            ("lib", LIBRARIES, &libraries),
        ];
        for (kind, packages, folders) in kinds {
            let to = draft.join(kind);
            fs::create_dir(&to)?;
            for (package, files) in packages {
                for file in *files {
                    let mut places = folders.iter().map(|folder| root.join(folder).join(file));
                    let place = places.find(|place| place.is_file());
                    let place = place.with_context(|| format!("{package} holds no {file}"))?;
                    // A library's name is a link to its file.
                    fs::copy(place, to.join(file))?;
                }
            }
        }
        let package = archive.download(INSTALLED)?;
        fs::rename(package, draft.join("package.deb"))?;
        fs::remove_dir_all(scratch)?;
        Ok(())
    })
    .context("cannot fetch a guest's tools")
}

/// Packs them into an initial file system.
///
/// # Errors
/// If they can't be fetched.
pub fn pack(archive: &mut Initramfs) -> Result<()> {
    let tools = fetch()?;
    for folder in [LIBRARY_FOLDER, "lib64", "etc/packages"] {
        archive.add(folder, Entry::Folder)?;
    }
    for (kind, to) in [("bin", "bin"), ("lib", LIBRARY_FOLDER)] {
        for name in names(&tools.join(kind))? {
            let bytes = fs::read(tools.join(kind).join(&name))?;
            // Programs ask for the loader where the ABI has it.
            let to = if name.starts_with("ld-linux") {
                "lib64"
            } else {
                to
            };
            archive.add(&format!("{to}/{name}"), Entry::Program(&bytes))?;
            // These are what they are called as.
            let called = match name.as_str() {
                "kmod" => "bin/lsmod",
                "dash" => "bin/sh",
                _ => continue,
            };
            archive.add(called, Entry::Program(&bytes))?;
        }
    }
    archive.add("etc/secmon-reader", Entry::Program(READER))?;
    let package = fs::read(tools.join("package.deb"))?;
    archive.add("etc/packages/package.deb", Entry::File(&package))?;
    Ok(())
}

/// The names in a folder, in their order.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}
