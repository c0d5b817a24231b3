//! The kernel's own file, given or found, to compare the guest's kernel with.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use secmon_guest::Guest;
use secmon_profile::{BuildId, Kernel};
use secmon_reference::KernelFile;

use crate::report::{Advise as _, Reporter};

/// A longer file is no kernel.
const LONGEST: u64 = 1 << 30;
/// More files than this of one folder are not looked at.
const MOST_FILES: usize = 64;
/// Where kernels and their files with symbols lie.
const FOLDERS: [&str; 4] = [
    "/boot",
    "/usr/lib/modules",
    "/lib/modules",
    "/usr/lib/debug",
];

/// What has to be readable to find a kernel's file.
pub fn places(given: Option<&Path>) -> Vec<PathBuf> {
    match given {
        Some(path) => vec![path.to_owned()],
        None => FOLDERS.iter().map(PathBuf::from).collect(),
    }
}

/// Gives the guest its kernel's own file: the one at `given`, or one that lies
/// where kernels do. Without one the guest stays as it is.
///
/// # Errors
/// If the given file is not the guest's kernel.
pub fn attach(guest: Guest, given: Option<&Path>, reporter: Reporter) -> Result<Guest> {
    Ok(match find(guest.kernel(), given, reporter)? {
        Some(file) => guest.with_reference(Arc::new(file)),
        None => guest,
    })
}

/// The kernel's own file: the one at `given`, or one that lies where kernels do.
///
/// # Errors
/// If the given file is not this kernel.
pub fn find(
    kernel: &Kernel,
    given: Option<&Path>,
    reporter: Reporter,
) -> Result<Option<KernelFile>> {
    let Some(build_id) = kernel.profile.build_id().cloned() else {
        if let Some(path) = given {
            return Err(anyhow!(
                "--kernel {}: the guest's kernel has no build id to know its file by",
                path.display()
            ));
        }
        return Ok(None);
    };
    let release = release(kernel.profile.banner());
    let (candidates, required) = match given {
        Some(path) if path.is_dir() => (kernels_in(path, release), true),
        Some(path) => (vec![path.to_owned()], true),
        None => (usual(release, &build_id), false),
    };
    let mut others = Vec::new();
    for path in candidates {
        match open(&path, &build_id) {
            Ok(Ok(file)) => {
                reporter.note(format_args!(
                    "{}: the guest's kernel, build id {build_id}",
                    path.display()
                ));
                return Ok(Some(file));
            }
            Ok(Err(other)) => others.push(format!("{} is {other}", path.display())),
            Err(error) if required && Some(path.as_path()) == given => return Err(error),
            Err(error) => reporter.note(format_args!("{error:#}")),
        }
    }
    match given {
        Some(given) => {
            let found = match others.as_slice() {
                [] => "there is no kernel's file in it".to_owned(),
                others => others.join(", "),
            };
            let path = given.display();
            Err(anyhow!(
                "--kernel {path}: the guest runs the kernel with build id {build_id}, and {found}"
            ))
            .advise("give the vmlinuz that the guest was started with")
        }
        None => Ok(None),
    }
}

/// The kernel's file at `path`, whichever kernel's it is.
///
/// # Errors
/// If it can't be read or is none.
pub fn read(path: &Path) -> Result<KernelFile> {
    let shown = || format!("reading the kernel's file {}", path.display());
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST).read_to_end(&mut bytes))
        .with_context(shown)?;
    KernelFile::parse(&bytes).with_context(shown)
}

/// The kernel's file at `path`, or which kernel's it is instead.
fn open(path: &Path, build_id: &BuildId) -> Result<Result<KernelFile, String>> {
    let file = read(path)?;
    Ok(match &file.build_id {
        Some(other) if other == build_id => Ok(file),
        Some(other) => Err(format!("the one with build id {other}")),
        None => Err("one without a build id".to_owned()),
    })
}

/// The release in a banner: "Linux version 6.1.0-50-cloud-amd64 (…". It is a
/// guest's word, and becomes a part of paths.
fn release(banner: &str) -> Option<&str> {
    let release = banner.strip_prefix("Linux version ")?.split(' ').next()?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".+~_-".contains(&byte);
    let fit = !release.is_empty() && release.len() < 128 && !release.starts_with('.');
    (fit && release.bytes().all(plain)).then_some(release)
}

/// Where the file of a release, or of a build id, usually lies.
fn usual(release: Option<&str>, build_id: &BuildId) -> Vec<PathBuf> {
    let mut usual = Vec::new();
    if let Some(release) = release {
        usual.extend([
            format!("/boot/vmlinuz-{release}"),
            format!("/usr/lib/modules/{release}/vmlinuz"),
            format!("/lib/modules/{release}/vmlinuz"),
            format!("/usr/lib/debug/boot/vmlinux-{release}"),
            format!("/usr/lib/debug/lib/modules/{release}/vmlinux"),
        ]);
    }
    usual.extend(debug_file(build_id));
    let paths = usual.into_iter().map(PathBuf::from);
    paths.filter(|path| path.is_file()).collect()
}

/// Where debuggers look for a file of this build id.
fn debug_file(build_id: &BuildId) -> Option<String> {
    let digits = build_id.to_string();
    let (first, rest) = digits.split_at_checked(2)?;
    (!rest.is_empty()).then(|| format!("/usr/lib/debug/.build-id/{first}/{rest}.debug"))
}

/// Kernels in a folder, those that are named after the release first.
fn kernels_in(folder: &Path, release: Option<&str>) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            let fits = |name: &str| {
                name.starts_with("vmlinu")
                    || name.starts_with("linux-image-") && name.ends_with(".deb")
            };
            name.is_some_and(fits) && path.is_file()
        })
        .take(MOST_FILES)
        .collect();
    let is_named = |path: &PathBuf| {
        let name = path.to_str().zip(release);
        name.is_some_and(|(name, release)| {
            name.ends_with(release) || name.contains(&format!("/linux-image-{release}_"))
        })
    };
    found.sort_by_key(|path| (!is_named(path), path.clone()));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_a_plain_word() {
        let banner = "Linux version 6.1.0-50-cloud-amd64 (debian-kernel@…) #1 SMP";
        assert_eq!(release(banner), Some("6.1.0-50-cloud-amd64"));
        for bad in [
            "Linux version ../../etc/shadow (x",
            "Linux version  (x",
            "Linux",
            "Linux version .. x",
        ] {
            assert_eq!(release(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_file_is_looked_for_by_its_build_id() {
        let build_id = BuildId::from_hex("abcdef0123").expect("a build id");
        let path = debug_file(&build_id);
        assert_eq!(
            path.as_deref(),
            Some("/usr/lib/debug/.build-id/ab/cdef0123.debug")
        );
    }

    #[test]
    fn kernels_of_a_folder_are_tried_the_likeliest_first() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in [
            "vmlinuz-5.10",
            "vmlinuz-6.1",
            "config-6.1",
            "linux-image-6.1_6.1.1-1_amd64.deb",
            "linux-headers-6.1_6.1.1-1_amd64.deb",
        ] {
            fs::write(folder.path().join(name), "").expect("a file");
        }
        let found = kernels_in(folder.path(), Some("6.1"));
        let names: Vec<_> = found.iter().filter_map(|path| path.file_name()).collect();
        assert_eq!(
            names,
            [
                "linux-image-6.1_6.1.1-1_amd64.deb",
                "vmlinuz-6.1",
                "vmlinuz-5.10"
            ]
        );
    }
}
