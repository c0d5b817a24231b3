//! Opening a guest of the lab the way a user would.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use secmon_guest::Guest;
use secmon_memory::PhysicalMemory;
use secmon_platform::target::{OpenOptions, OpenedTarget, Target};
use secmon_profile::{Cache, FindOptions, Kernel};
use secmon_reference::{Expected, KernelFile};

/// What was opened: memory and the kernel in it.
pub struct Opened {
    /// The target's memory.
    pub memory: Arc<dyn PhysicalMemory>,
    /// The kernel found there.
    pub kernel: Kernel,
    /// The kernel's own file, if it is to be compared with it.
    reference: Option<Arc<KernelFile>>,
    /// What the first look at it saw.
    first_state: Arc<OnceLock<Expected>>,
    /// What keeps the target open.
    target: OpenedTarget,
}

impl Opened {
    /// The guest with no diagnostics yet.
    pub fn guest(&self) -> Guest {
        let registers = self.target.hints.registers.clone();
        let guest = Guest::new(self.kernel.clone()).with_registers(registers);
        match &self.reference {
            Some(file) => guest.with_reference(file.clone()),
            None => guest,
        }
    }

    /// The guest, whose kernel is compared with its state at the first look: at
    /// the first such guest that is checked.
    pub fn guest_by_first_state(&self) -> Guest {
        Guest::new(self.kernel.clone()).with_first_state(self.first_state.clone())
    }

    /// Has the kernel compared with the state that another view of it first saw.
    #[must_use]
    pub fn with_first_state_of(mut self, other: &Self) -> Self {
        self.first_state = other.first_state.clone();
        self
    }

    /// Has the kernel compared with this file.
    #[must_use]
    pub fn with_reference(mut self, file: &Arc<KernelFile>) -> Self {
        self.reference = Some(file.clone());
        self
    }
}

/// Opens `file:…`, `qemu:…` and so on, without a cache of profiles.
///
/// # Errors
/// If the target can't be opened or holds no kernel.
pub fn target(name: &str) -> Result<Opened> {
    target_with(name, None)
}

fn target_with(name: &str, isf: Option<PathBuf>) -> Result<Opened> {
    let target: Target = name.parse().with_context(|| format!("the target {name}"))?;
    let opened = target
        .open(&OpenOptions::default())
        .with_context(|| format!("opening {name}"))?;
    let options = FindOptions {
        cache: Cache::Off,
        isf,
        ..FindOptions::default()
    };
    let kernel = secmon_profile::find(&opened.memory, &options)
        .with_context(|| format!("finding the kernel of {name}"))?;
    Ok(Opened {
        memory: opened.memory.clone(),
        kernel,
        reference: None,
        first_state: Arc::default(),
        target: opened,
    })
}

/// Reads a kernel's own file.
///
/// # Errors
/// If it is none.
pub fn kernel_file(path: &Path) -> Result<Arc<KernelFile>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let file = KernelFile::parse(&bytes).with_context(|| path.display().to_string())?;
    Ok(Arc::new(file))
}

/// Opens a memory image.
///
/// # Errors
/// As [`target`].
pub fn image(path: &Path) -> Result<Opened> {
    target(&format!("file:{}", path.display()))
}

/// Opens a memory image with an ISF file in place of the kernel's own types.
///
/// # Errors
/// As [`target`], or if the file can't be used.
pub fn image_with_isf(path: &Path, isf: &Path) -> Result<Opened> {
    target_with(&format!("file:{}", path.display()), Some(isf.to_owned()))
}
