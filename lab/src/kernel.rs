//! A kernel of the archive: its image and its modules, fetched once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use lzma_rust2::XzReader;

use crate::archive::Archive;
use crate::cache;
use crate::suite::Suite;

/// Goes up when what is kept of a package changes.
const LAYOUT: u32 = 1;

/// The package that depends on a suite's newest kernel of the flavour.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    suite: Suite,
    release: String,
    folder: PathBuf,
    /// Module name, with `_` for `-`, to its file.
    modules: BTreeMap<String, PathBuf>,
}

impl Kernel {
    /// The suite's kernel, fetched from the archive if it isn't in the cache.
    pub fn fetch(suite: Suite) -> Result<Self> {
        let folder = cache::entry(&format!("kernel-{}-{LAYOUT}", suite.name()), |draft| {
            unpack(suite, draft)
        })
        .with_context(|| format!("cannot fetch the kernel of {}", suite.name()))?;
        let release = fs::read_to_string(folder.join("release"))?;
        let mut modules = BTreeMap::new();
        list_modules(&folder.join("modules"), &mut modules)?;
        Ok(Self {
            suite,
            release,
            folder,
            modules,
        })
    }

    /// The suite it came from.
    #[must_use]
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// Its release, as `uname -r` says it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The compressed image that a boot loader takes.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The modules named, after those they depend on, each once. One that
    /// isn't there is built in, or this kernel has no such thing: left out.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            self.add_module(&name.replace('-', "_"), &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn add_module(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<Module>,
    ) -> Result<()> {
        let Some(path) = self.modules.get(name) else {
            return Ok(());
        };
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let object = read_module(path)?;
        for dependency in dependencies(&object) {
            self.add_module(&dependency.replace('-', "_"), seen, order)?;
        }
        order.push(Module {
            name: name.to_owned(),
            object,
        });
        Ok(())
    }
}

/// A module, ready to load.
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// The relocatable object, not compressed.
    pub object: Vec<u8>,
}

fn unpack(suite: Suite, draft: &Path) -> Result<()> {
    let scratch = draft.join("scratch");
    let archive = Archive::open(suite.name(), &scratch.join("apt"))?;
    let root = scratch.join("root");
    for package in kernel_packages(&archive)? {
        archive.unpack(&package, &root)?;
    }
    // Since the merge of /usr, packages ship below /usr/lib.
    let libraries = ["lib/modules", "usr/lib/modules"]
        .map(|path| root.join(path))
        .into_iter()
        .find(|path| path.is_dir())
        .context("the package holds no modules")?;
    let mut releases = fs::read_dir(&libraries)?;
    let modules = releases.next().context("the package holds no modules")??;
    ensure!(releases.next().is_none(), "more than one kernel release");
    let release = modules
        .file_name()
        .into_string()
        .ok()
        .context("the kernel's release isn't text")?;
    let image = [
        root.join(format!("boot/vmlinuz-{release}")),
        modules.path().join("vmlinuz"),
    ]
    .into_iter()
    .find(|path| path.is_file())
    .with_context(|| format!("no image of {release} in the package"))?;
    fs::rename(image, draft.join("vmlinuz"))?;
    fs::rename(modules.path().join("kernel"), draft.join("modules"))?;
    fs::write(draft.join("release"), release)?;
    fs::remove_dir_all(scratch)?;
    Ok(())
}

/// The packages that hold the image and the modules: the meta package leads
/// to one image package, and that, in newer suites, to two parts of it.
fn kernel_packages(archive: &Archive) -> Result<Vec<String>> {
    let of_kind = |package: &str, kinds: &[&str]| -> Result<Vec<String>> {
        let mut names = archive.dependencies(package)?;
        names.retain(|name| kinds.iter().any(|kind| name.starts_with(kind)));
        Ok(names)
    };
    let images = of_kind(META_PACKAGE, &["linux-image-"])?;
    let [image] = images.as_slice() else {
        bail!("{META_PACKAGE} depends on {images:?}, not on one kernel");
    };
    let parts = of_kind(image, &["linux-binary-", "linux-modules-"])?;
    Ok(if parts.is_empty() { images } else { parts })
}

fn list_modules(folder: &Path, modules: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            list_modules(&path, modules)?;
        } else if let Some((stem, extension)) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.split_once('.'))
            && matches!(extension, "ko" | "ko.xz")
        {
            modules.insert(stem.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    if path.extension().is_some_and(|extension| extension == "xz") {
        let mut object = Vec::new();
        XzReader::new(bytes.as_slice(), false)
            .read_to_end(&mut object)
            .with_context(|| format!("cannot unpack {}", path.display()))?;
        return Ok(object);
    }
    Ok(bytes)
}

/// What `modinfo` calls `depends`: the string in the object's `.modinfo`
/// section, found by its text because no other string starts so.
fn dependencies(object: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = object.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = &object[at + key.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module_information() {
        let object = b"\x7fELF..\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(dependencies(object), ["virtio", "virtio-ring"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }
}
