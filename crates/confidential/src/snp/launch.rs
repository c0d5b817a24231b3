//! The launch measurement of an SEV-SNP guest, computed without a start.
//!
//! The processor hashes each page that QEMU puts into the guest before its
//! first instruction: the firmware, the pages that its metadata asks for (one
//! of them with the hashes of kernel, initial file system and command line),
//! and the first registers of each virtual processor. SHA-384 over a record of
//! each page chains them (SEV-SNP firmware ABI, 56860, section 8.17.2).
//!
//! What `sev`, `virtee/sev-snp-measure` and QEMU compute is computed here
//! again, as that crate's module for it comes only with OpenSSL or with the
//! crate `rsa`, ends the process on some malformed firmware, and strips blanks
//! of the command line that QEMU keeps. Its published values are the tests.

use sha2::{Digest as _, Sha256, Sha384};

use super::firmware::{Firmware, FirmwareError, Section, SectionKind};
use super::save_area;
use crate::Hexadecimal;

/// The bytes of a page.
pub(super) const PAGE: usize = 4096;
/// The address by which pages of registers are counted: all ones, but for what
/// no address has.
const REGISTERS_ADDRESS: u64 = 0xffff_ffff_f000;
/// The most virtual processors that are counted; each costs a hash.
pub const MAX_PROCESSORS: u32 = 4096;

/// What a guest is launched from.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The firmware's file: an OVMF built for SEV-SNP.
    pub firmware: &'a [u8],
    /// What the firmware starts itself, if QEMU hands it over.
    pub kernel: Option<DirectBoot<'a>>,
    /// Virtual processors, 1 to [`MAX_PROCESSORS`].
    pub processors: u32,
    /// Their model.
    pub processor: Processor,
    /// The SEV features that the host's kernel switches on for guests: 1 is
    /// SEV-SNP alone, what Linux does; bit 5 is debug swap, which Linux 6.9 and
    /// 6.10 added.
    pub features: u64,
}

/// A kernel that is handed over by QEMU (`-kernel`, `kernel-hashes=on`).
#[derive(Debug, Clone, Copy)]
pub struct DirectBoot<'a> {
    /// The kernel's file.
    pub kernel: &'a [u8],
    /// The initial file system's, or nothing.
    pub initramfs: &'a [u8],
    /// What the kernel is told.
    pub command_line: &'a str,
}

/// A processor as QEMU's `-cpu` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// `EPYC`, Naples.
    Naples,
    /// `EPYC-Rome`.
    Rome,
    /// `EPYC-Milan`.
    Milan,
    /// `EPYC-Genoa`.
    Genoa,
    /// `EPYC-Turin`.
    Turin,
}

impl Processor {
    /// The one whose name is QEMU's, in any version of it (`EPYC-Milan-v2`).
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let lower = name.to_ascii_lowercase();
        let model = match lower.rsplit_once("-v") {
            Some((model, version))
                if !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit()) =>
            {
                model
            }
            _ => &lower,
        };
        Some(match model {
            "epyc" | "epyc-ibpb" => Self::Naples,
            "epyc-rome" => Self::Rome,
            "epyc-milan" => Self::Milan,
            "epyc-genoa" => Self::Genoa,
            "epyc-turin" => Self::Turin,
            _ => return None,
        })
    }

    /// What `cpuid` says in leaf 1, register EAX: stepping in bits 0 to 3,
    /// model, family 15, the model's high half, what the family has over 15
    /// (AMD 25481).
    #[must_use]
    pub const fn signature(self) -> u32 {
        let (family, model, stepping): (u32, u32, u32) = match self {
            Self::Naples => (23, 1, 2),
            Self::Rome => (23, 49, 0),
            Self::Milan => (25, 1, 1),
            Self::Genoa => (25, 17, 0),
            Self::Turin => (26, 0, 0),
        };
        (family - 15) << 20 | (model >> 4) << 16 | 15 << 8 | (model & 15) << 4 | stepping
    }
}

/// Why there is no measurement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// The firmware is none for SEV-SNP.
    #[error("the firmware: {0}")]
    Firmware(#[from] FirmwareError),
    /// The firmware has no place for the hashes.
    #[error(
        "the firmware has no page for the hashes of a kernel: use the OVMF that is built for it (OvmfPkg/AmdSev)"
    )]
    NoPlaceForHashes,
    /// A number of processors that no guest has.
    #[error("{processors} virtual processors, 1 to {MAX_PROCESSORS} are possible")]
    Processors {
        /// How many.
        processors: u32,
    },
}

/// The measurement.
///
/// # Errors
/// If the firmware is none for SEV-SNP guests, or has no place for a kernel's
/// hashes.
pub fn measurement(launch: &Launch<'_>) -> Result<Hexadecimal<48>, LaunchError> {
    let processors = launch.processors;
    if !(1..=MAX_PROCESSORS).contains(&processors) {
        return Err(LaunchError::Processors { processors });
    }
    let firmware = Firmware::parse(launch.firmware)?;
    let mut digest = Digest::default();
    digest.normal(firmware.address, launch.firmware);
    let hashes = match &launch.kernel {
        Some(kernel) => {
            let place = firmware.hashes.ok_or(LaunchError::NoPlaceForHashes)?;
            Some(hashes_page(kernel, place).ok_or(LaunchError::NoPlaceForHashes)?)
        }
        None => None,
    };
    let mut placed = false;
    for section in &firmware.sections {
        let Section {
            address,
            size,
            kind,
        } = *section;
        match (kind, &hashes) {
            (SectionKind::Secrets, _) => digest.add(PageKind::Secrets, address, &[0; 48]),
            (SectionKind::Cpuid, _) => digest.add(PageKind::Cpuid, address, &[0; 48]),
            (SectionKind::KernelHashes, Some(page)) => {
                placed = true;
                digest.normal(address, page);
            }
            (SectionKind::Memory | SectionKind::Calling | SectionKind::KernelHashes, _) => {
                digest.zero(address, size);
            }
        }
    }
    if hashes.is_some() && !placed {
        return Err(LaunchError::NoPlaceForHashes);
    }
    let page = |entry| save_area::page(entry, launch.processor.signature(), launch.features);
    let first: [u8; 48] = Sha384::digest(page(save_area::RESET)).into();
    let others: [u8; 48] = Sha384::digest(page(firmware.reset)).into();
    for number in 0..processors {
        let contents = if number == 0 { &first } else { &others };
        digest.add(PageKind::Registers, REGISTERS_ADDRESS, contents);
    }
    Ok(Hexadecimal(digest.0))
}

/// Kinds of pages, by the firmware ABI's numbers.
#[derive(Clone, Copy)]
enum PageKind {
    Normal = 1,
    Registers = 2,
    Zero = 3,
    Secrets = 5,
    Cpuid = 6,
}

/// The measurement so far.
struct Digest([u8; 48]);

impl Default for Digest {
    fn default() -> Self {
        Self([0; 48])
    }
}

impl Digest {
    /// Chains one page's record.
    fn add(&mut self, kind: PageKind, address: u64, contents: &[u8; 48]) {
        /// The record's own length.
        const LENGTH: u16 = 0x70;
        let mut hash = Sha384::new();
        hash.update(self.0);
        hash.update(contents);
        hash.update(LENGTH.to_le_bytes());
        // No migration image, and no rights for the guest's other levels.
        hash.update([kind as u8, 0, 0, 0, 0, 0]);
        hash.update(address.to_le_bytes());
        self.0 = hash.finalize().into();
    }

    /// Whole pages with their contents.
    fn normal(&mut self, address: u64, bytes: &[u8]) {
        for (page, at) in bytes.chunks(PAGE).zip((address..).step_by(PAGE)) {
            self.add(PageKind::Normal, at, &Sha384::digest(page).into());
        }
    }

    /// Pages of zeros.
    fn zero(&mut self, address: u64, size: u32) {
        let pages = size as usize / PAGE;
        for at in (address..).step_by(PAGE).take(pages) {
            self.add(PageKind::Zero, at, &[0; 48]);
        }
    }
}

/// GUIDs of the table of hashes as their bytes lie in memory (QEMU,
/// `target/i386/sev.c`).
const TABLE: [u8; 16] = *b"\x06\xd6\x38\x94\x22\x4f\xc9\x4c\xb4\x79\xa7\x93\xd4\x11\xfd\x21";
const KERNEL: [u8; 16] = *b"\x37\x94\xe7\x4d\xd2\xab\x7f\x42\xb8\x35\xd5\xb1\x72\xd2\x04\x5b";
const INITRAMFS: [u8; 16] = *b"\x31\xf7\xba\x44\x2f\x3a\xd7\x4b\x9a\xf1\x41\xe2\x91\x69\x78\x1d";
const COMMAND_LINE: [u8; 16] = *b"\xd8\x2d\xd0\x97\x20\xbd\x94\x4c\xaa\x78\xe7\x71\x4d\x36\xab\x2a";

/// The page with the table of hashes at `place`; none if it does not fit.
fn hashes_page(boot: &DirectBoot<'_>, place: u64) -> Option<Vec<u8>> {
    /// GUID, length, SHA-256.
    const ENTRY: u16 = 16 + 2 + 32;
    const LENGTH: u16 = 16 + 2 + 3 * ENTRY;
    let mut command_line = Sha256::new();
    command_line.update(boot.command_line);
    command_line.update([0]);
    let entries: [([u8; 16], [u8; 32]); 3] = [
        (COMMAND_LINE, command_line.finalize().into()),
        (INITRAMFS, Sha256::digest(boot.initramfs).into()),
        (KERNEL, Sha256::digest(boot.kernel).into()),
    ];
    let mut table = Vec::with_capacity(PAGE);
    table.extend_from_slice(&TABLE);
    table.extend_from_slice(&LENGTH.to_le_bytes());
    for (guid, hash) in entries {
        table.extend_from_slice(&guid);
        table.extend_from_slice(&ENTRY.to_le_bytes());
        table.extend_from_slice(&hash);
    }
    let offset = usize::try_from(place & (PAGE as u64 - 1)).ok()?;
    let mut page = vec![0; PAGE];
    page.get_mut(offset..offset.checked_add(table.len())?)?
        .copy_from_slice(&table);
    Some(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last page of an OVMF, which is all that the values below need.
    const AMD_SEV: &[u8] = include_bytes!("../../tests/data/snp/ovmf_AmdSev_suffix.bin");
    const X64: &[u8] = include_bytes!("../../tests/data/snp/ovmf_OvmfX64_suffix.bin");

    fn launch(firmware: &[u8], processors: u32, features: u64) -> Launch<'_> {
        Launch {
            firmware,
            kernel: None,
            processors,
            processor: Processor::Naples,
            features,
        }
    }

    fn with_kernel(processors: u32, features: u64, command_line: &str) -> Launch<'_> {
        let kernel = DirectBoot {
            kernel: &[],
            initramfs: &[],
            command_line,
        };
        Launch {
            kernel: Some(kernel),
            ..launch(AMD_SEV, processors, features)
        }
    }

    /// Values that the tests of `sev` 8 hold, which are those of
    /// sev-snp-measure.
    #[test]
    fn published_measurements_are_computed() {
        let words = "console=ttyS0 loglevel=7";
        let cases = [
            (
                with_kernel(1, 0x1, words),
                "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa",
            ),
            (
                with_kernel(1, 0x21, words),
                "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977",
            ),
            (
                with_kernel(4, 0x1, ""),
                "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5",
            ),
            (
                with_kernel(4, 0x21, ""),
                "4953b1fb416fa874980e8442b3706d345926d5f38879134e00813c5d7abcbe78eafe7b422907be0b4698e2414a631942",
            ),
            (
                launch(AMD_SEV, 1, 0x1),
                "19358ba9a7615534a9a1e2f0dfc29384dcd4dcb7062ff9c6013b26869a5fc6ecabe033c48dd6f6db5d6d76e7c5df632d",
            ),
            (
                launch(AMD_SEV, 1, 0x21),
                "e1e1ca029dd7973ab9513295be68198472dcd4fc834bd9af9b63f6e8a1674dbf281a9278a4a2ebe0eed9f22adbcd0e2b",
            ),
            (
                launch(X64, 1, 0x1),
                "da0296de8193586a5512078dcd719eccecbd87e2b825ad4148c44f665dc87df21e5b49e21523a9ad993afdb6a30b4005",
            ),
            (
                launch(X64, 1, 0x21),
                "28797ae0afaba4005a81e629acebfb59e6687949d6be44007cd5506823b0dd66f146aaae26ff291eed7b493d8a64c385",
            ),
        ];
        for (launch, expected) in cases {
            let computed = measurement(&launch).expect("a measurement");
            assert_eq!(computed.to_string(), expected);
        }
    }

    #[test]
    fn everything_that_is_launched_counts() {
        let base = with_kernel(2, 1, "a");
        let expected = measurement(&base).expect("a measurement");
        let boot = base.kernel.expect("a kernel");
        let mut firmware = AMD_SEV.to_vec();
        firmware[0] ^= 1;
        let others = [
            with_kernel(3, 1, "a"),
            with_kernel(2, 0x21, "a"),
            // QEMU hashes blanks as well.
            with_kernel(2, 1, "a "),
            Launch {
                processor: Processor::Milan,
                ..base
            },
            Launch {
                firmware: &firmware,
                ..base
            },
            Launch {
                kernel: Some(DirectBoot {
                    kernel: b"k",
                    ..boot
                }),
                ..base
            },
            Launch {
                kernel: Some(DirectBoot {
                    initramfs: b"i",
                    ..boot
                }),
                ..base
            },
            Launch {
                kernel: None,
                ..base
            },
        ];
        for other in others {
            assert_ne!(measurement(&other).expect("a measurement"), expected);
        }
    }

    #[test]
    fn what_can_not_be_launched_is_refused() {
        let kernel = with_kernel(1, 1, "").kernel;
        let no_place = Launch {
            kernel,
            ..launch(X64, 1, 1)
        };
        assert_eq!(measurement(&no_place), Err(LaunchError::NoPlaceForHashes));
        for processors in [0, MAX_PROCESSORS + 1] {
            let error = measurement(&launch(X64, processors, 1));
            assert_eq!(error, Err(LaunchError::Processors { processors }));
        }
    }

    #[test]
    fn processors_have_the_names_of_qemu() {
        assert_eq!(Processor::named("EPYC-Milan-v2"), Some(Processor::Milan));
        assert_eq!(Processor::named("epyc-v4"), Some(Processor::Naples));
        assert_eq!(Processor::named("EPYC-IBPB"), Some(Processor::Naples));
        for unknown in ["host", "max", "EPYC-v", "EPYC-Milan-vx", ""] {
            assert_eq!(Processor::named(unknown), None, "{unknown}");
        }
        assert_eq!(Processor::Milan.signature(), 0x00a0_0f11);
        assert_eq!(Processor::Naples.signature(), 0x0080_0f12);
    }
}
