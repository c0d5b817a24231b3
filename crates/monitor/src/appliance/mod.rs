//! Builds the image of the monitoring VM: a distribution's kernel, and an
//! initial file system that holds the `secmon` program and the few modules
//! that the kernel does not have built in. Nothing else: no shell, no
//! libraries, no configuration.
//!
//! The same kernel and program give the same bytes. The initial file system
//! is not compressed: unpacking costs more of a start than reading a few MiB
//! from a file that the host has in its cache.

pub mod archive;
mod bill;
mod error;
mod initramfs;
pub mod kernel;
mod program;

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use archive::PackageName;
use bill::Materials;
pub use error::ApplianceError;
pub use initramfs::{Entry, Initramfs};
use kernel::{KernelFiles, Modules};

/// The modules that the monitor needs where they are not built in: its ports,
/// its configuration.
const MODULES: &[&str] = &["virtio_pci", "virtio_console", "qemu_fw_cfg"];

/// What the kernel is told: the console; that it starts again at once if it
/// or process 1 fails.
pub const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet panic=-1 oops=panic";

/// Where modules lie in the initial file system, numbered in their order.
pub(crate) const MODULE_FOLDER: &str = "lib/modules";

/// The largest image, kernel and initial file system together.
pub const SIZE_LIMIT: u64 = 25 << 20;

/// The suite whose kernel is used if none is named: Debian's present stable
/// release.
const DEFAULT_SUITE: &str = "stable";

/// Where the kernel comes from.
#[derive(Debug, Clone)]
pub enum KernelSource {
    /// An image and the folder of its modules (`/lib/modules/RELEASE`, or
    /// `kernel` in it).
    Files {
        /// The image.
        image: PathBuf,
        /// The folder.
        modules: PathBuf,
    },
    /// A Debian package of a kernel.
    Package(PathBuf),
    /// The archive that this machine's apt uses.
    Archive,
}

/// A file of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name in the image's folder.
    pub file: String,
    /// Its bytes.
    pub bytes: u64,
    /// Their SHA-256 in hexadecimal.
    pub sha256: String,
}

/// What an image is: the file `manifest.json` in its folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of this document, 1.
    pub version: u32,
    /// The version of the program in it.
    pub secmon: String,
    /// The release of its kernel.
    pub kernel_release: String,
    /// What the kernel is to be told.
    pub kernel_arguments: String,
    /// The kernel.
    pub kernel: Part,
    /// The initial file system.
    pub initramfs: Part,
    /// The modules in it, in the order in which they load.
    pub modules: Vec<String>,
    /// The bill of materials.
    pub bill_of_materials: Part,
}

/// A built image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its folder.
    pub folder: PathBuf,
    /// What it is.
    pub manifest: Manifest,
    /// The SHA-256 of `manifest.json`, which holds those of all else: the
    /// image's own.
    pub digest: String,
}

impl Image {
    /// The kernel's file.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.folder.join(&self.manifest.kernel.file)
    }

    /// The initial file system's file.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.folder.join(&self.manifest.initramfs.file)
    }

    /// Both files.
    #[must_use]
    pub fn into_files(self) -> (PathBuf, PathBuf) {
        (self.kernel(), self.initramfs())
    }

    /// The bytes of kernel and initial file system.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let Manifest {
            kernel, initramfs, ..
        } = &self.manifest;
        kernel.bytes.saturating_add(initramfs.bytes)
    }

    /// Opens an image and checks that its files are those of its manifest.
    ///
    /// # Errors
    /// If a file is missing or another one.
    pub fn open(folder: &Path) -> Result<Self, ApplianceError> {
        let path = folder.join("manifest.json");
        let bytes = fs::read(&path).map_err(ApplianceError::file(&path, "reading it"))?;
        let manifest: Manifest = serde_json::from_slice(&bytes)?;
        for part in [
            &manifest.kernel,
            &manifest.initramfs,
            &manifest.bill_of_materials,
        ] {
            let plain = Path::new(&part.file).file_name() == Some(part.file.as_ref());
            let path = folder.join(&part.file);
            let found = if plain {
                fs::read(&path).map_err(ApplianceError::file(&path, "reading it"))?
            } else {
                Vec::new()
            };
            if hexadecimal(&found) != part.sha256 {
                return Err(ApplianceError::Package {
                    package: folder.display().to_string(),
                    what: format!(
                        "{} is not the file of the manifest: build it anew with `secmon monitor build`",
                        part.file
                    ),
                });
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            manifest,
            digest: hexadecimal(&bytes),
        })
    }
}

/// Builds an image of `kernel` and the static program `binary` into `output`,
/// a folder that is made if need be; files of an earlier image in it are
/// replaced.
///
/// # Errors
/// [`ApplianceError`] says what was missing or too large.
pub fn build(kernel: &KernelSource, binary: &Path, output: &Path) -> Result<Image, ApplianceError> {
    let program = program::read(binary)?;
    let scratch = std::env::temp_dir();
    let scratch = tempfile::Builder::new()
        .prefix("secmon-appliance-")
        .tempdir_in(&scratch)
        .map_err(ApplianceError::file(&scratch, "making a folder in it"))?;
    let (files, packages) = locate(kernel, scratch.path())?;
    let modules = Modules::list(&files.release, &files.modules, files.built_in.as_deref())?
        .required(MODULES)?;

    let mut initramfs = Initramfs::new();
    for folder in ["dev", "lib", MODULE_FOLDER, "proc", "sys"] {
        initramfs.add(folder, Entry::Folder)?;
    }
    // The console is opened before anything is mounted.
    initramfs.add("dev/console", Entry::CharacterDevice(5, 1))?;
    initramfs.add("init", Entry::Program(&program))?;
    for (index, module) in modules.iter().enumerate() {
        let name = format!("{MODULE_FOLDER}/{index:02}-{}.ko", module.name);
        initramfs.add(&name, Entry::File(&module.object))?;
    }
    let initramfs = initramfs.finish()?;
    let image = fs::read(&files.image).map_err(ApplianceError::file(&files.image, "reading it"))?;

    fs::create_dir_all(output).map_err(ApplianceError::file(output, "making it"))?;
    let kernel = write(output, "vmlinuz", &image)?;
    let initramfs = write(output, "initramfs.cpio", &initramfs)?;
    let bytes = kernel.bytes.saturating_add(initramfs.bytes);
    if bytes > SIZE_LIMIT {
        return Err(ApplianceError::TooLarge {
            what: "the image".to_owned(),
            bytes,
            limit: SIZE_LIMIT,
        });
    }
    let sums: Vec<(String, String)> = modules
        .iter()
        .map(|module| (module.name.clone(), hexadecimal(&module.object)))
        .collect();
    let bill = bill::bill(&Materials {
        release: &files.release,
        packages: &packages,
        kernel: &kernel,
        initramfs: &initramfs,
        program: &hexadecimal(&program),
        modules: &sums,
    });
    let bill_of_materials = write(output, "bom.cdx.json", &document(&bill)?)?;
    let manifest = Manifest {
        version: 1,
        secmon: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: files.release,
        kernel_arguments: KERNEL_ARGUMENTS.to_owned(),
        kernel,
        initramfs,
        modules: modules.into_iter().map(|module| module.name).collect(),
        bill_of_materials,
    };
    let part = write(output, "manifest.json", &document(&manifest)?)?;
    Ok(Image {
        folder: output.to_owned(),
        manifest,
        digest: part.sha256,
    })
}

fn locate(
    kernel: &KernelSource,
    scratch: &Path,
) -> Result<(KernelFiles, Vec<PackageName>), ApplianceError> {
    match kernel {
        KernelSource::Archive => kernel::fetch(DEFAULT_SUITE, scratch),
        KernelSource::Package(package) => {
            let (files, name) = kernel::unpack(package, scratch)?;
            Ok((files, vec![name]))
        }
        KernelSource::Files { image, modules } => {
            let inner = modules.join("kernel");
            let built_in = Some(modules.join("modules.builtin")).filter(|path| path.is_file());
            let files = KernelFiles {
                release: kernel::image_release(image)?,
                image: image.clone(),
                modules: if inner.is_dir() {
                    inner
                } else {
                    modules.clone()
                },
                built_in,
            };
            Ok((files, Vec::new()))
        }
    }
}

/// A JSON document as it stands in a file.
fn document(content: &impl Serialize) -> Result<Vec<u8>, ApplianceError> {
    let mut bytes = serde_json::to_vec_pretty(content)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn write(folder: &Path, file: &str, content: &[u8]) -> Result<Part, ApplianceError> {
    let path = folder.join(file);
    fs::write(&path, content).map_err(ApplianceError::file(&path, "writing it"))?;
    Ok(Part {
        file: file.to_owned(),
        bytes: content.len() as u64,
        sha256: hexadecimal(content),
    })
}

/// The SHA-256 of the bytes.
fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in Sha256::digest(bytes) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
