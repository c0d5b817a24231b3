//! Notes that a kernel carries: its build id, and VMCOREINFO.
//!
//! Sources: the ELF specification's note section; the kernel's
//! `Documentation/admin-guide/kdump/vmcoreinfo.rst`.

use secmon_memory::VirtualAddress;

use crate::{BuildId, VmcoreInfo};

/// More than any VMCOREINFO (the kernel gives it a page).
pub(crate) const MAXIMUM_VMCOREINFO: usize = 64 << 10;

/// The build ids (`NT_GNU_BUILD_ID` notes of "GNU") in a run of ELF notes.
pub fn build_ids(notes: &[u8]) -> Vec<BuildId> {
    const NT_GNU_BUILD_ID: u32 = 3;
    let mut found = Vec::new();
    let mut rest = notes;
    while let Some((header, after)) = rest.split_first_chunk::<12>() {
        let word = |at: usize| {
            let bytes = header[at..].first_chunk::<4>();
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        let (name_length, length, kind) = (word(0) as usize, word(4) as usize, word(8));
        let padded = |length: usize| length.checked_next_multiple_of(4);
        let Some(start) = padded(name_length) else {
            break;
        };
        let name = after.get(..name_length);
        let description = after.get(start..).and_then(|after| after.get(..length));
        let (Some(name), Some(description)) = (name, description) else {
            break;
        };
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" {
            found.extend(BuildId::new(description));
        }
        let next = padded(length).and_then(|length| start.checked_add(length));
        rest = next.and_then(|next| after.get(next..)).unwrap_or_default();
    }
    found
}

impl VmcoreInfo {
    /// Reads the lines that are used here; unknown ones stay in
    /// [`text`](Self::text). Text that is not UTF-8 ends there.
    pub fn parse(bytes: &[u8]) -> Self {
        let end = memchr::memchr(0, bytes).unwrap_or(bytes.len());
        let bytes = &bytes[..end.min(MAXIMUM_VMCOREINFO)];
        let text = match str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default(),
        };
        let value = |key: &str| {
            text.lines().find_map(|line| {
                let rest = line.strip_prefix(key)?;
                rest.strip_prefix('=')
            })
        };
        let hex = |key: &str| value(key).and_then(|value| u64::from_str_radix(value, 16).ok());
        let number = |key: &str| value(key).and_then(|value| value.parse::<i64>().ok());
        Self {
            text: text.to_owned(),
            release: value("OSRELEASE").map(ToOwned::to_owned),
            build_id: value("BUILD-ID").and_then(BuildId::from_hex),
            kernel_offset: hex("KERNELOFFSET"),
            physical_base: number("NUMBER(phys_base)"),
            text_start: hex("SYMBOL(_stext)").map(VirtualAddress::new),
            page_table_root: hex("SYMBOL(init_top_pgt)")
                .or_else(|| hex("SYMBOL(swapper_pg_dir)"))
                .map(VirtualAddress::new),
            five_levels: number("NUMBER(pgtable_l5_enabled)").map(|value| value != 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, description.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        for part in [name, description] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn finds_the_build_id_among_notes() {
        let notes = [
            note(b"Xen\0", 3, b"xen-3.0\0"),
            note(b"GNU\0", 1, b"abc"),
            note(b"GNU\0", 3, &[7; 20]),
        ]
        .concat();
        assert_eq!(
            build_ids(&notes),
            [BuildId::new(&[7; 20]).expect("20 bytes")]
        );
        assert_eq!(build_ids(&notes[..notes.len() - 1]), []);
    }

    #[test]
    fn reads_vmcoreinfo() {
        let info = VmcoreInfo::parse(
            b"OSRELEASE=6.1.0-50-cloud-amd64\nBUILD-ID=00ff\nNUMBER(phys_base)=-12345\n\
              SYMBOL(init_top_pgt)=ffffffffbe210000\nKERNELOFFSET=3b800000\n\0garbage",
        );
        assert_eq!(info.release.as_deref(), Some("6.1.0-50-cloud-amd64"));
        assert_eq!(info.build_id, BuildId::new(&[0, 0xff]));
        assert_eq!(info.physical_base, Some(-12345));
        assert_eq!(info.kernel_offset, Some(0x3b80_0000));
        let root = VirtualAddress::new(0xffff_ffff_be21_0000);
        assert_eq!(info.page_table_root, Some(root));
        assert_eq!(info.five_levels, None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = build_ids(&bytes);
            let _ = VmcoreInfo::parse(&bytes);
        }

        #[test]
        fn notes_are_read_wherever_they_are_cut(cut in 0_usize..64, kind in 0_u32..5) {
            let notes = [note(b"A", kind, b"xyz"), note(b"GNU\0", 3, &[1; 20])].concat();
            let _ = build_ids(&notes[..cut.min(notes.len())]);
        }
    }
}
