//! What an OVMF for SEV-SNP says of itself: a table of GUIDs that ends 32
//! bytes before its end, and the metadata to which one entry leads
//! (`OvmfPkg/ResetVector` in EDK II).

use super::launch::PAGE;

/// The bytes of a table entry's end: its length and its GUID.
const ENTRY: usize = 18;
/// The bytes behind the table.
const BEHIND: usize = 32;
/// The largest firmware: QEMU's own bound.
const MAX_BYTES: usize = 64 << 20;
/// The most memory that sections may name, all together.
const MAX_SECTIONS: u64 = 1 << 30;

/// GUIDs as their bytes lie in the file.
const FOOTER: [u8; 16] = *b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d";
const HASHES: [u8; 16] = *b"\x1f\x37\x55\x72\x3b\x3a\x04\x4b\x92\x7b\x1d\xa6\xef\xa8\xd4\x54";
const RESET: [u8; 16] = *b"\xde\x71\xf7\x00\x7e\x1a\xcb\x4f\x89\x0e\x68\xc7\x7e\x2f\xb4\x4e";
const METADATA: [u8; 16] = *b"\x66\x65\x88\xdc\x4a\x98\x98\x47\xa7\x5e\x55\x85\xa7\xbf\x67\xcc";

/// Why a file is no firmware for SEV-SNP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FirmwareError {
    /// A size that no firmware has.
    #[error("{bytes} bytes; whole pages of 4096, at most {MAX_BYTES} bytes are possible")]
    Size {
        /// Its bytes.
        bytes: usize,
    },
    /// Not an OVMF, or its table is damaged.
    #[error("it has no table of GUIDs that ends {BEHIND} bytes before its end: it is no OVMF")]
    NoTable,
    /// An OVMF that knows nothing of SEV-SNP.
    #[error("its table has no entry {what}: it was built without SEV-SNP")]
    NoEntry {
        /// Which.
        what: &'static str,
    },
    /// The metadata are not what they should be.
    #[error("its SEV metadata: {what}")]
    Metadata {
        /// What is wrong.
        what: &'static str,
    },
    /// A section of an unknown kind, which would be measured in a way that is
    /// not known.
    #[error("its SEV metadata have a section of the unknown kind {kind:#x}")]
    Kind {
        /// The number.
        kind: u32,
    },
}

/// What the measurement needs of a firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Firmware {
    /// Where it lies: its end is that of the first 4 GiB.
    pub address: u64,
    /// Where processors but the first start.
    pub reset: u32,
    /// Where the table of hashes lies, if there is a place for it.
    pub hashes: Option<u64>,
    /// The pages that it wants.
    pub sections: Vec<Section>,
}

/// Memory that is prepared before the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Section {
    /// Its address.
    pub address: u64,
    /// Its bytes.
    pub size: u32,
    /// What for.
    pub kind: SectionKind,
}

/// What a section is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SectionKind {
    /// Memory that is used before the guest accepts any itself.
    Memory,
    /// Secrets of the SEV firmware.
    Secrets,
    /// What `cpuid` says.
    Cpuid,
    /// The calling area of a secure VM service module.
    Calling,
    /// Hashes of the kernel.
    KernelHashes,
}

impl Firmware {
    /// Reads a firmware's file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, FirmwareError> {
        if bytes.is_empty() || bytes.len() > MAX_BYTES || !bytes.len().is_multiple_of(PAGE) {
            return Err(FirmwareError::Size { bytes: bytes.len() });
        }
        let table = table(bytes).ok_or(FirmwareError::NoTable)?;
        let entry = |guid: &[u8; 16]| {
            let found = entries(table).find(|(found, _)| *found == guid);
            found.and_then(|(_, data)| number(data, 0))
        };
        let reset = entry(&RESET).ok_or(FirmwareError::NoEntry {
            what: "of where further processors start",
        })?;
        let metadata = entry(&METADATA).ok_or(FirmwareError::NoEntry {
            what: "of SEV metadata",
        })?;
        Ok(Self {
            address: (1_u64 << 32).saturating_sub(bytes.len() as u64),
            reset,
            hashes: entry(&HASHES).filter(|at| *at != 0).map(u64::from),
            sections: sections(bytes, metadata)?,
        })
    }
}

/// The table's entries, without its own.
fn table(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.len().checked_sub(BEHIND)?;
    let start = end.checked_sub(ENTRY)?;
    let footer = bytes.get(start..end)?;
    if footer.get(2..)? != FOOTER {
        return None;
    }
    let length = usize::from(u16::from_le_bytes(footer.get(..2)?.try_into().ok()?));
    bytes.get(end.checked_sub(length)?..start)
}

/// The entries of a table, from its last on: GUID and data.
fn entries(table: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = table;
    std::iter::from_fn(move || {
        let end = rest.len().checked_sub(ENTRY)?;
        let tail = rest.get(end..)?;
        let length = usize::from(u16::from_le_bytes(tail.get(..2)?.try_into().ok()?));
        let start = rest.len().checked_sub(length.max(ENTRY))?;
        let data = rest.get(start..end)?;
        rest = rest.get(..start)?;
        Some((tail.get(2..)?, data))
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

/// The sections of the metadata that begin so many bytes before the end.
fn sections(bytes: &[u8], from_end: u32) -> Result<Vec<Section>, FirmwareError> {
    /// Signature, length, version, count.
    const HEADER: usize = 16;
    /// Address, size, kind.
    const ITEM: usize = 12;
    let wrong = |what| FirmwareError::Metadata { what };
    let start = usize::try_from(from_end)
        .ok()
        .and_then(|from_end| bytes.len().checked_sub(from_end));
    let metadata = start.and_then(|start| bytes.get(start..));
    let metadata = metadata.ok_or(wrong("they begin before the file"))?;
    if metadata.get(..4) != Some(b"ASEV") {
        return Err(wrong("they don't begin with ASEV"));
    }
    let field = |at| number(metadata, at).ok_or(wrong("they are cut off"));
    if field(8)? != 1 {
        return Err(wrong("they are not of version 1"));
    }
    let (length, count) = (field(4)? as usize, field(12)? as usize);
    let items = metadata
        .get(HEADER..length)
        .and_then(|items| items.get(..count.checked_mul(ITEM)?))
        .ok_or(wrong("their items are cut off"))?;
    let mut sections = Vec::new();
    let mut total = 0_u64;
    for item in items.chunks_exact(ITEM) {
        let field = |at| number(item, at).ok_or(wrong("an item is cut off"));
        let (address, size) = (field(0)?, field(4)?);
        if size == 0 || !(size as usize).is_multiple_of(PAGE) {
            return Err(wrong("a section is no whole pages"));
        }
        total = total.saturating_add(u64::from(size));
        if total > MAX_SECTIONS {
            return Err(wrong("the sections are larger than any firmware's"));
        }
        let kind = match field(8)? {
            1 => SectionKind::Memory,
            2 => SectionKind::Secrets,
            3 => SectionKind::Cpuid,
            4 => SectionKind::Calling,
            0x10 => SectionKind::KernelHashes,
            kind => return Err(FirmwareError::Kind { kind }),
        };
        if kind != SectionKind::Memory && kind != SectionKind::Calling && size as usize != PAGE {
            return Err(wrong("a section that is one page is larger"));
        }
        sections.push(Section {
            address: u64::from(address),
            size,
            kind,
        });
    }
    Ok(sections)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AMD_SEV: &[u8] = include_bytes!("../../tests/data/snp/ovmf_AmdSev_suffix.bin");

    #[test]
    fn a_firmware_says_what_it_needs() {
        let firmware = Firmware::parse(AMD_SEV).expect("a firmware");
        assert_eq!(firmware.address, 0xffff_f000);
        assert!(firmware.hashes.is_some());
        for kind in [
            SectionKind::Secrets,
            SectionKind::Cpuid,
            SectionKind::KernelHashes,
        ] {
            let count = firmware.sections.iter().filter(|s| s.kind == kind).count();
            assert_eq!(count, 1, "{kind:?}");
        }
    }

    #[test]
    fn files_that_are_none_are_refused() {
        assert_eq!(Firmware::parse(&[]), Err(FirmwareError::Size { bytes: 0 }));
        assert_eq!(
            Firmware::parse(&[0; 100]),
            Err(FirmwareError::Size { bytes: 100 })
        );
        assert_eq!(Firmware::parse(&[0; PAGE]), Err(FirmwareError::NoTable));
    }

    proptest! {
        #[test]
        fn damage_ends_in_words(changes in prop::collection::vec((0..PAGE, any::<u8>()), 1..24)) {
            let mut bytes = AMD_SEV.to_vec();
            for (at, value) in changes {
                bytes[at] = value;
            }
            if let Ok(firmware) = Firmware::parse(&bytes) {
                let total: u64 = firmware.sections.iter().map(|s| u64::from(s.size)).sum();
                prop_assert!(total <= MAX_SECTIONS);
            }
        }
    }
}
