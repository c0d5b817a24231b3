//! A distribution's kernel: its image, its release, and the modules that
//! something needs, in the order in which they load.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;

use super::ApplianceError;
use super::archive::{Archive, PackageName, unpack_file};

/// The package that depends on a suite's newest kernel of the flavour for
/// virtual machines.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// The largest module that is unpacked.
const MAX_MODULE: u64 = 64 << 20;

/// The kernel's files, wherever they lie.
#[derive(Debug, Clone)]
pub struct KernelFiles {
    /// The compressed image that a boot loader takes.
    pub image: PathBuf,
    /// The folder with the modules: `kernel` of `/lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// The list of what would be a module elsewhere and is built in here, where
    /// there is one: `modules.builtin`.
    pub built_in: Option<PathBuf>,
    /// Its release, as `uname -r` says it.
    pub release: String,
}

/// A module, ready to load.
#[derive(Debug, Clone)]
pub struct Module {
    /// Its name, with `_` for `-`.
    pub name: String,
    /// The relocatable object, not compressed.
    pub object: Vec<u8>,
}

/// The modules of a kernel, by name.
#[derive(Debug, Clone)]
pub struct Modules {
    release: String,
    files: BTreeMap<String, PathBuf>,
    /// Names of what is built in, where that is known.
    built_in: Option<BTreeSet<String>>,
}

/// Fetches a suite's kernel from the archive and unpacks it below `folder`.
///
/// # Errors
/// If it can't be fetched, or its packages hold no kernel.
pub fn fetch(
    suite: &str,
    folder: &Path,
) -> Result<(KernelFiles, Vec<PackageName>), ApplianceError> {
    let archive = Archive::open(suite, &folder.join("apt"))?;
    let root = folder.join("root");
    let mut packages = Vec::new();
    for package in kernel_packages(&archive)? {
        packages.push(archive.unpack(&package, &root)?);
    }
    Ok((find_files(&root, META_PACKAGE)?, packages))
}

/// Unpacks a kernel's package below `folder`.
///
/// # Errors
/// If it is no package, or holds no kernel.
pub fn unpack(package: &Path, folder: &Path) -> Result<(KernelFiles, PackageName), ApplianceError> {
    let root = folder.join("root");
    let name = unpack_file(package, &root)?;
    Ok((find_files(&root, &name.name)?, name))
}

/// The kernel's files in a tree into which all packages of one kernel were
/// unpacked.
///
/// # Errors
/// If it holds no kernel, or several.
pub fn unpacked(root: &Path) -> Result<KernelFiles, ApplianceError> {
    find_files(root, &root.display().to_string())
}

/// The kernel's files in the unpacked tree of its packages.
fn find_files(root: &Path, package: &str) -> Result<KernelFiles, ApplianceError> {
    let wrong = |what: String| ApplianceError::Package {
        package: package.to_owned(),
        what,
    };
    // Since the merge of /usr, packages ship below /usr/lib.
    let libraries = ["lib/modules", "usr/lib/modules"]
        .map(|path| root.join(path))
        .into_iter()
        .find(|path| path.is_dir())
        .ok_or_else(|| wrong("it holds no modules".to_owned()))?;
    let reading = ApplianceError::file(&libraries, "listing it");
    let releases: Result<Vec<_>, _> = fs::read_dir(&libraries)
        .and_then(Iterator::collect)
        .map_err(reading);
    let releases: Vec<fs::DirEntry> = releases?;
    let [folder] = releases.as_slice() else {
        return Err(wrong(format!(
            "it holds {} kernel releases",
            releases.len()
        )));
    };
    let release = folder
        .file_name()
        .into_string()
        .map_err(|_| wrong("its kernel's release isn't text".to_owned()))?;
    let folder = folder.path();
    let image = [
        root.join(format!("boot/vmlinuz-{release}")),
        folder.join("vmlinuz"),
    ]
    .into_iter()
    .find(|path| path.is_file())
    .ok_or_else(|| wrong(format!("it holds no image of {release}")))?;
    Ok(KernelFiles {
        image,
        modules: folder.join("kernel"),
        built_in: Some(folder.join("modules.builtin")).filter(|path| path.is_file()),
        release,
    })
}

/// The packages that hold the image and the modules: the meta package leads
/// to one image package, and that, in newer suites, to two parts of it.
fn kernel_packages(archive: &Archive) -> Result<Vec<String>, ApplianceError> {
    let of_kind = |package: &str, kinds: &[&str]| -> Result<Vec<String>, ApplianceError> {
        let mut names = archive.dependencies(package)?;
        names.retain(|name| kinds.iter().any(|kind| name.starts_with(kind)));
        Ok(names)
    };
    let images = of_kind(META_PACKAGE, &["linux-image-"])?;
    let [image] = images.as_slice() else {
        return Err(ApplianceError::Package {
            package: META_PACKAGE.to_owned(),
            what: format!("it depends on {images:?}, not on one kernel"),
        });
    };
    let parts = of_kind(image, &["linux-binary-", "linux-modules-"])?;
    Ok(if parts.is_empty() { images } else { parts })
}

/// The release that a kernel image itself says it is, as the boot protocol
/// has it (Linux `Documentation/arch/x86/boot.rst`, `kernel_version`).
///
/// # Errors
/// If the file is no such image.
pub fn image_release(path: &Path) -> Result<String, ApplianceError> {
    let mut head = vec![0; 32 << 10];
    let file = fs::File::open(path).map_err(ApplianceError::file(path, "opening it"))?;
    let mut filled = Vec::new();
    file.take(head.len() as u64)
        .read_to_end(&mut filled)
        .map_err(ApplianceError::file(path, "reading it"))?;
    if let Some(start) = head.get_mut(..filled.len()) {
        start.copy_from_slice(&filled);
    }
    parse_release(&head).map_err(|what| ApplianceError::Kernel {
        path: path.to_owned(),
        what,
    })
}

fn parse_release(head: &[u8]) -> Result<String, &'static str> {
    if head.get(0x202..0x206) != Some(b"HdrS") {
        return Err("it has no header of the boot protocol");
    }
    let pointer = match head.get(0x20e..0x210) {
        Some([low, high]) => usize::from(u16::from_le_bytes([*low, *high])),
        _ => 0,
    };
    let text = head
        .get(pointer.saturating_add(0x200)..)
        .filter(|_| pointer != 0)
        .ok_or("its header names no release")?;
    let release: Vec<u8> = text
        .iter()
        .copied()
        .take(256)
        .take_while(u8::is_ascii_graphic)
        .collect();
    String::from_utf8(release)
        .ok()
        .filter(|release| !release.is_empty())
        .ok_or("its header names no release")
}

impl Modules {
    /// Lists the modules of a kernel.
    ///
    /// # Errors
    /// If the folder can't be read.
    pub fn list(
        release: &str,
        folder: &Path,
        built_in: Option<&Path>,
    ) -> Result<Self, ApplianceError> {
        let mut files = BTreeMap::new();
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            let listing = |source| ApplianceError::File {
                path: folder.clone(),
                what: "listing it",
                source,
            };
            for entry in fs::read_dir(&folder).map_err(listing)? {
                let entry = entry.map_err(listing)?;
                let path = entry.path();
                if entry.file_type().map_err(listing)?.is_dir() {
                    folders.push(path);
                } else if let Some((stem, extension)) = entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.split_once('.'))
                    && matches!(extension, "ko" | "ko.xz" | "ko.zst")
                {
                    files.insert(canonical(stem), path);
                }
            }
        }
        let built_in = match built_in {
            None => None,
            Some(path) => {
                let text =
                    fs::read_to_string(path).map_err(ApplianceError::file(path, "reading it"))?;
                Some(text.lines().filter_map(module_of_line).collect())
            }
        };
        Ok(Self {
            release: release.to_owned(),
            files,
            built_in,
        })
    }

    /// The modules named, after those they depend on, each once. One that
    /// isn't there is built in, or this kernel has no such thing: left out.
    ///
    /// # Errors
    /// If one can't be read.
    pub fn with_dependencies(&self, names: &[&str]) -> Result<Vec<Module>, ApplianceError> {
        let mut order: Vec<Module> = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            // A stack of what is open, each with the dependencies left to do.
            let mut open: Vec<(Module, Vec<String>)> = Vec::new();
            let mut next = Some(canonical(name));
            loop {
                if let Some(name) = next.take()
                    && seen.insert(name.clone())
                    && let Some(path) = self.files.get(&name)
                {
                    let object = read_module(path)?;
                    let mut needed = dependencies(&object);
                    needed.reverse();
                    open.push((Module { name, object }, needed));
                }
                let Some((_, needed)) = open.last_mut() else {
                    break;
                };
                next = needed.pop();
                if next.is_none()
                    && let Some((module, _)) = open.pop()
                {
                    order.push(module);
                }
            }
        }
        Ok(order)
    }

    /// As [`with_dependencies`](Self::with_dependencies), but each must be
    /// there, as a module or built in.
    ///
    /// # Errors
    /// If one is neither.
    pub fn required(&self, names: &[&str]) -> Result<Vec<Module>, ApplianceError> {
        for name in names.iter().map(|name| canonical(name)) {
            let built_in = self
                .built_in
                .as_ref()
                .is_none_or(|built_in| built_in.contains(&name));
            if !self.files.contains_key(&name) && !built_in {
                return Err(ApplianceError::NoModule {
                    release: self.release.clone(),
                    module: name,
                });
            }
        }
        self.with_dependencies(names)
    }
}

/// File names use `-`, the kernel `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The module's name in a line of `modules.builtin`:
/// `kernel/drivers/virtio/virtio-ring.ko`.
fn module_of_line(line: &str) -> Option<String> {
    let (_, file) = line.rsplit_once('/')?;
    file.split_once(".ko").map(|(stem, _)| canonical(stem))
}

fn read_module(path: &Path) -> Result<Vec<u8>, ApplianceError> {
    let bytes = fs::read(path).map_err(ApplianceError::file(path, "reading it"))?;
    let unpacked = |reader: &mut dyn io::Read| {
        let mut object = Vec::new();
        reader
            .take(MAX_MODULE)
            .read_to_end(&mut object)
            .map_err(ApplianceError::file(path, "unpacking it"))?;
        Ok(object)
    };
    match path.extension().and_then(OsStr::to_str) {
        Some("xz") => unpacked(&mut XzReader::new(bytes.as_slice(), false)),
        Some("zst") => {
            let reader = StreamingDecoder::new(bytes.as_slice())
                .map_err(io::Error::other)
                .map_err(ApplianceError::file(path, "unpacking it"))?;
            unpacked(&mut { reader })
        }
        _ => Ok(bytes),
    }
}

/// What `modinfo` calls `depends`: the string in the object's `.modinfo`
/// section, found by its text because no other string starts so.
fn dependencies(object: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = object.windows(key.len()).position(|window| window == key) else {
        return Vec::new();
    };
    let value = object
        .get(at.saturating_add(key.len())..)
        .unwrap_or_default();
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(value.get(..end).unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(canonical)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_the_module_information() {
        let object = b"\x7fELF..\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(dependencies(object), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }

    fn module(folder: &Path, file: &str, depends: &str) {
        let object = format!("\u{7f}ELF\0depends={depends}\0");
        fs::write(folder.join(file), object).expect("a file");
    }

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let deep = folder.path().join("drivers");
        fs::create_dir(&deep).expect("a folder");
        module(&deep, "virtio_console.ko", "virtio,virtio_ring");
        module(&deep, "virtio-ring.ko", "virtio");
        module(&deep, "virtio.ko", "");
        module(folder.path(), "circle.ko", "circle");
        let list = deep.join("modules.builtin");
        fs::write(&list, "kernel/drivers/firmware/qemu_fw_cfg.ko\n").expect("a file");
        let modules = Modules::list("1", folder.path(), Some(&list)).expect("modules");
        let names = |wanted: &[&str]| -> Vec<String> {
            let modules = modules.required(wanted).expect("modules");
            modules.into_iter().map(|module| module.name).collect()
        };
        assert_eq!(
            names(&["virtio-console", "virtio_ring", "qemu_fw_cfg", "circle"]),
            ["virtio", "virtio_ring", "virtio_console", "circle"]
        );
        let error = modules.required(&["vfio"]).expect_err("not there");
        assert!(error.to_string().contains("vfio"), "{error}");
        assert!(
            modules
                .with_dependencies(&["vfio"])
                .expect("none")
                .is_empty()
        );
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let folder = tempfile::tempdir().expect("a folder");
        let object = b"\x7fELF\0depends=\0".repeat(100);
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let packed = ruzstd::encoding::compress_to_vec(object.as_slice(), level);
        fs::write(folder.path().join("packed.ko.zst"), packed).expect("a file");
        fs::write(folder.path().join("cut.ko.zst"), b"\x28\xb5").expect("a file");
        let modules = Modules::list("1", folder.path(), None).expect("modules");
        let found = modules.required(&["packed"]).expect("a module");
        assert_eq!(found[0].object, object);
        assert!(modules.required(&["cut"]).is_err());
    }

    #[test]
    fn an_image_says_its_release() {
        let mut head = vec![0; 0x1000];
        assert!(parse_release(&head).is_err());
        head[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(parse_release(&head).is_err());
        head[0x20e] = 0x40;
        head[0x240..0x24e].copy_from_slice(b"6.1.0-9-x (a@b");
        assert_eq!(parse_release(&head).as_deref(), Ok("6.1.0-9-x"));
        assert!(parse_release(&head[..0x100]).is_err());
    }
}
