//! A kernel: its image and its modules, of the archive and fetched once, or
//! of packages that somebody unpacked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use secmon_monitor::appliance::kernel::{self, KernelFiles, Module, Modules};

use crate::cache;
use crate::suite::Suite;

/// Goes up when what is kept of a package changes.
const LAYOUT: u32 = 1;

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    release: String,
    image: PathBuf,
    module_folder: PathBuf,
    modules: Modules,
}

impl Kernel {
    /// The suite's kernel, fetched from the archive if it isn't in the cache.
    pub fn fetch(suite: Suite) -> Result<Self> {
        let folder = cache::entry(&format!("kernel-{}-{LAYOUT}", suite.name()), |draft| {
            unpack(suite, draft)
        })
        .with_context(|| format!("cannot fetch the kernel of {}", suite.name()))?;
        let release = fs::read_to_string(folder.join("release"))?;
        Self::of_files(release, folder.join("vmlinuz"), folder.join("modules"))
    }

    /// The kernel whose packages were unpacked below `root`
    /// (`dpkg-deb --extract`), whichever distribution's they are.
    pub fn unpacked(root: &Path) -> Result<Self> {
        let files = kernel::unpacked(root)?;
        Self::of_files(files.release, files.image, files.modules)
    }

    fn of_files(release: String, image: PathBuf, module_folder: PathBuf) -> Result<Self> {
        let modules = Modules::list(&release, &module_folder, None)?;
        Ok(Self {
            release,
            image,
            module_folder,
            modules,
        })
    }

    /// Its release, as `uname -r` says it.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The compressed image that a boot loader takes.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.image.clone()
    }

    /// The folder of its modules.
    #[must_use]
    pub fn module_folder(&self) -> PathBuf {
        self.module_folder.clone()
    }

    /// The modules named, after those they depend on, each once. One that
    /// isn't there is built in, or this kernel has no such thing: left out.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        Ok(self.modules.with_dependencies(names)?)
    }
}

fn unpack(suite: Suite, draft: &Path) -> Result<()> {
    let scratch = draft.join("scratch");
    let (files, _) = kernel::fetch(suite.name(), &scratch)?;
    let KernelFiles {
        image,
        modules,
        release,
        ..
    } = files;
    fs::rename(image, draft.join("vmlinuz"))?;
    fs::rename(modules, draft.join("modules"))?;
    fs::write(draft.join("release"), release)?;
    fs::remove_dir_all(scratch)?;
    Ok(())
}
