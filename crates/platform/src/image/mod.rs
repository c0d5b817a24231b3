//! Memory images in files, as guest physical memory.
//!
//! [`open`] tells the format by content, never by name. Uncompressed formats
//! are mapped; nothing of them is copied. What is wrong with a file is an
//! [`ImageError`] if nothing can be read, else an [`ImageNote`], and reads of
//! the memory concerned fail saying why.
//!
//! This module knows nothing of the guest inside; what a format carries about
//! it comes as [`ImageHints`], unjudged: whoever wrote the guest's memory may
//! have written them.

mod avml;
mod bytes;
mod decompress;
mod elf;
mod error;
mod flattened;
mod kdump;
mod kdump_pages;
mod lime;
mod notes;
mod page_cache;
mod pieces;
mod raw;
pub mod write;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use secmon_memory::{CpuRegisters, PhysicalAddress, PhysicalMemory, VirtualAddress, Volatility};

pub use error::{ImageError, ImageNote};
pub use raw::candidate_layouts;

use crate::layout::RamLayout;
use bytes::{ImageBytes, ImageFile};
use flattened::Flattened;

/// The formats that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    /// RAM and nothing else.
    Raw,
    /// An ELF core with physical addresses.
    ElfCore,
    /// A kdump-compressed file, of QEMU or makedumpfile.
    Kdump,
    /// LiME, version 1.
    Lime,
    /// AVML, version 2 (compressed); without compression it writes LiME.
    Avml,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::ElfCore => "ELF core",
            Self::Kdump => "kdump",
            Self::Lime => "LiME",
            Self::Avml => "AVML",
        })
    }
}

/// Judges memory: the higher the better it fits, 0 if it does not.
pub type Judge<'a> = &'a dyn Fn(&Arc<dyn PhysicalMemory>) -> u64;

/// How an image is to be opened; the default suits most.
#[derive(Clone, Copy)]
pub struct ImageOptions<'a> {
    /// The format, where content misleads: a guest writes its own first page,
    /// and may write another format's magic number there.
    pub format: Option<ImageFormat>,
    /// Where a raw image's parts lie, if known.
    pub layout: Option<&'a RamLayout>,
    /// Asked about a raw image under each of several possible layouts.
    pub validate: Option<Judge<'a>>,
    /// Whether a guest may be writing the file now.
    pub volatility: Volatility,
    /// Bytes that may be kept of decoded pages, where the format is compressed.
    pub cache_size: usize,
}

impl Default for ImageOptions<'_> {
    fn default() -> Self {
        Self {
            format: None,
            layout: None,
            validate: None,
            volatility: Volatility::Static,
            cache_size: 16 << 20,
        }
    }
}

/// An open image.
pub struct Image {
    /// Its memory.
    pub memory: Arc<dyn PhysicalMemory>,
    /// What it is.
    pub format: ImageFormat,
    /// What its user should know about it.
    pub notes: Vec<ImageNote>,
    /// What it says about the guest.
    pub hints: ImageHints,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("regions", &self.memory.regions())
            .field("format", &self.format)
            .field("notes", &self.notes)
            .field("hints", &self.hints)
            .finish()
    }
}

/// What an image says about its guest besides memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageHints {
    /// The kernel's VMCOREINFO text.
    pub vmcoreinfo: Option<Vec<u8>>,
    /// The vCPUs in order, where QEMU wrote their states.
    pub vcpus: Vec<VcpuState>,
}

impl ImageHints {
    /// The page-table roots in use when the image was written, without
    /// repetition.
    pub fn page_table_roots(&self) -> Vec<PhysicalAddress> {
        let mut roots: Vec<PhysicalAddress> = Vec::new();
        for vcpu in &self.vcpus {
            // CR0.PG
            if vcpu.cr0 & (1 << 31) != 0 && !roots.contains(&vcpu.cr3) {
                roots.push(vcpu.cr3);
            }
        }
        roots
    }
}

/// Registers of a vCPU when the image was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuState {
    /// RIP.
    pub instruction_pointer: VirtualAddress,
    /// RSP.
    pub stack_pointer: VirtualAddress,
    /// RFLAGS.
    pub flags: u64,
    /// The base of FS.
    pub fs_base: VirtualAddress,
    /// The base of GS: the kernel's per-CPU area if it was in the kernel.
    pub gs_base: VirtualAddress,
    /// The base of the GDT.
    pub gdt_base: VirtualAddress,
    /// The base of the IDT.
    pub idt_base: VirtualAddress,
    /// CR0.
    pub cr0: u64,
    /// CR3, with its PCID bits.
    pub cr3: PhysicalAddress,
    /// CR4; bit 12 is 5-level paging.
    pub cr4: u64,
    /// The other GS base (MSR `IA32_KERNEL_GS_BASE`); older QEMUs lack it.
    pub kernel_gs_base: Option<VirtualAddress>,
}

impl From<&VcpuState> for CpuRegisters {
    fn from(state: &VcpuState) -> Self {
        Self {
            cr0: state.cr0,
            cr3: state.cr3.as_u64(),
            cr4: state.cr4,
            gdt_base: Some(state.gdt_base),
            idt_base: Some(state.idt_base),
            // QEMU writes no MSRs.
            efer: None,
        }
    }
}

/// Opens the image at `path`.
///
/// # Errors
/// [`ImageError`] if no memory can be read from it.
pub fn open(path: &Path, options: &ImageOptions<'_>) -> Result<Image, ImageError> {
    let file = ImageFile::open(path)?;
    let first = first_bytes(&file)?;
    // A flattened file may hold a dump of any kind, but never RAM alone.
    if first.starts_with(flattened::SIGNATURE) && options.format != Some(ImageFormat::Raw) {
        let mut notes = Vec::new();
        let file = Flattened::open(file, &mut notes)?;
        let first = first_bytes(&file)?;
        if recognise(&first)?.is_none() {
            return Err(ImageError::Unsupported {
                what: "a flattened file whose content is no dump".to_owned(),
                advice: "flattened are kdump and ELF files; unfold others yourself",
            });
        }
        return open_bytes(&into_bytes(file), &first, options, notes);
    }
    open_bytes(&into_bytes(file), &first, options, Vec::new())
}

fn into_bytes(bytes: impl ImageBytes + 'static) -> Arc<dyn ImageBytes> {
    Arc::new(bytes)
}

fn open_bytes(
    file: &Arc<dyn ImageBytes>,
    first: &[u8],
    options: &ImageOptions<'_>,
    notes: Vec<ImageNote>,
) -> Result<Image, ImageError> {
    let format = match options.format {
        Some(ImageFormat::Raw) => ImageFormat::Raw,
        asked => match (recognise(first)?, asked) {
            (found, None) => found.unwrap_or(ImageFormat::Raw),
            (Some(found), Some(asked)) if found == asked => found,
            (_, Some(asked)) => return Err(ImageError::OtherFormat { asked }),
        },
    };
    match format {
        ImageFormat::Raw => raw::open(file, options, notes),
        ImageFormat::ElfCore => elf::open(file, options, notes),
        ImageFormat::Kdump => kdump::open(file, options, notes),
        ImageFormat::Lime => lime::open(file, options, notes),
        ImageFormat::Avml => avml::open(file, options, notes),
    }
}

/// The bytes that tell the format, fewer if the file is smaller.
fn first_bytes(file: &dyn ImageBytes) -> Result<Vec<u8>, ImageError> {
    let count = file.len().min(FIRST_BYTES as u64) as usize;
    file.read_vec(0, count, "first bytes")
}

/// As many bytes as tell the formats apart.
const FIRST_BYTES: usize = 16;

/// The format that these first bytes of a file announce, `None` for RAM.
///
/// # Errors
/// [`ImageError::Unsupported`] for known formats that are not read.
fn recognise(first: &[u8]) -> Result<Option<ImageFormat>, ImageError> {
    const READ: [(&[u8], ImageFormat); 4] = [
        (b"\x7fELF", ImageFormat::ElfCore),
        (kdump::SIGNATURE, ImageFormat::Kdump),
        (b"EMiL\x01\0\0\0", ImageFormat::Lime),
        (b"AVML\x02\0\0\0", ImageFormat::Avml),
    ];
    const WINDOWS: &str = "write the memory as ELF core, raw or LiME for now";
    const COMPRESSED: &str = "decompress it first";
    const NOT_READ: [(&[u8], &str, &str); 12] = [
        (b"PAGEDU64", "a Windows crash dump (64-bit)", WINDOWS),
        (b"PAGEDUMP", "a Windows crash dump (32-bit)", WINDOWS),
        (b"MDMP", "a Windows minidump", WINDOWS),
        (b"HIBR", "a Windows hibernation file", WINDOWS),
        (b"hibr", "a Windows hibernation file", WINDOWS),
        (
            b"DISKDUMP",
            "a diskdump file of Linux 2.4",
            "only Linux from 5.4 on is understood",
        ),
        (
            b"QEVM",
            "a QEMU migration stream",
            "use `dump-guest-memory` instead",
        ),
        (
            b"LibvirtQemudSave",
            "a libvirt save file",
            "use `virsh dump --memory-only` instead",
        ),
        (
            b"QFI\xfb",
            "a qcow2 disk image",
            "give an image of memory, not of a disk",
        ),
        (b"\x1f\x8b\x08", "a gzip file", COMPRESSED),
        (b"\xfd7zXZ\0", "an xz file", COMPRESSED),
        (b"\x28\xb5\x2f\xfd", "a zstd file", COMPRESSED),
    ];
    for (magic, format) in READ {
        if first.starts_with(magic) {
            return Ok(Some(format));
        }
    }
    for (magic, what, advice) in NOT_READ {
        if first.starts_with(magic) {
            return Err(ImageError::Unsupported {
                what: what.to_owned(),
                advice,
            });
        }
    }
    Ok(None)
}
