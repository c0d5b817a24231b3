//! What a monitoring VM is made of, by its image.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::sync::Arc;

use secmon_reference::{KernelFile, ReferenceError};

use crate::program::{Program, ProgramError};

/// The program's name in the initial file system.
const PROGRAM: &str = "init";
/// Where modules lie in it.
const MODULES: &str = "lib/modules/";
/// More entries than this no image has.
const MOST_ENTRIES: usize = 4096;
/// The longest file that is taken out.
const LONGEST: u64 = 256 << 20;

/// Why an image can't be compared with.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The kernel.
    #[error("the image's kernel: {0}")]
    Kernel(#[from] ReferenceError),
    /// The initial file system.
    #[error("the image's initial file system: {0}")]
    Archive(#[from] std::io::Error),
    /// It has no program.
    #[error("the image's initial file system has no /{PROGRAM}")]
    NoProgram,
    /// The program.
    #[error("the image's /{PROGRAM}: {0}")]
    Program(#[from] ProgramError),
}

/// What has to be in a monitoring VM's memory.
#[derive(Debug)]
pub struct Reference {
    pub(crate) kernel: Arc<KernelFile>,
    pub(crate) program: Program,
    pub(crate) modules: BTreeSet<String>,
    pub(crate) configuration: Option<Vec<u8>>,
}

impl Reference {
    /// Reads an image's two files.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn of_image(kernel: &[u8], initramfs: &[u8]) -> Result<Self, ImageError> {
        let kernel = Arc::new(KernelFile::parse(kernel)?);
        let mut program = None;
        let mut modules = BTreeSet::new();
        let mut rest = initramfs;
        for _ in 0..MOST_ENTRIES {
            let mut reader = cpio::newc::Reader::new(rest)?;
            if reader.entry().is_trailer() {
                break;
            }
            let name = reader.entry().name().to_owned();
            if name == PROGRAM {
                let mut bytes = Vec::new();
                reader.by_ref().take(LONGEST).read_to_end(&mut bytes)?;
                program = Some(bytes);
            } else if let Some(name) = name.strip_prefix(MODULES) {
                modules.extend(module(name));
            }
            rest = reader.finish()?;
        }
        Ok(Self {
            kernel,
            program: Program::parse(program.ok_or(ImageError::NoProgram)?)?,
            modules,
            configuration: None,
        })
    }

    /// With the bytes of the configuration that the monitor was given.
    #[must_use]
    pub fn with_configuration(mut self, bytes: Vec<u8>) -> Self {
        self.configuration = Some(bytes);
        self
    }
}

/// The kernel's name of the module in a file "03-virtio-pci.ko".
fn module(file: &str) -> Option<String> {
    let (_, name) = file.strip_suffix(".ko")?.split_once('-')?;
    Some(name.replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_have_the_kernels_names() {
        assert_eq!(module("03-virtio-pci.ko").as_deref(), Some("virtio_pci"));
        assert_eq!(module("readme"), None);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(Reference::of_image(b"", b"").is_err());
    }
}
