//! The log of Linux 5.4 to 5.9 (`kernel/printk/printk.c` there): one buffer of
//! `printk_log` headers, each followed by its text and its dictionary.
//!
//! `log_first_idx` and `log_next_idx` are the offsets of the oldest record and
//! of the end; a header of length 0 says that the next record lies at the
//! buffer's start. All is guarded by a lock that a reader from outside can't
//! take: the buffer is copied whole and taken as sound if the indices did not
//! move past what was walked meanwhile; the caller checks that.

use super::ring::Record;

/// Where the members of `printk_log` lie, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLayout {
    /// Size of the header; the text follows it.
    pub size: u64,
    /// `ts_nsec`.
    pub time: u64,
    /// `len`: of the whole record.
    pub length: u64,
    /// `text_len`.
    pub text_length: u64,
    /// `dict_len`.
    pub dictionary_length: u64,
    /// `facility`.
    pub facility: u64,
    /// The byte of `flags` (low 5 bits) and `level`.
    pub flags_and_level: u64,
    /// `caller_id`, where the kernel was built with it.
    pub caller: Option<u64>,
}

impl LogLayout {
    /// The layout that all kernels from 5.4 to 5.9 have, which only the
    /// configuration option `PRINTK_CALLER` changes.
    pub const fn standard(with_caller: bool) -> Self {
        Self {
            size: if with_caller { 20 } else { 16 },
            time: 0,
            length: 8,
            text_length: 10,
            dictionary_length: 12,
            facility: 14,
            flags_and_level: 15,
            caller: if with_caller { Some(16) } else { None },
        }
    }
}

/// Where the log begins and ends, as the kernel's variables say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Indices {
    /// `log_first_idx`.
    pub first: u64,
    /// `log_next_idx`.
    pub next: u64,
    /// `log_first_seq`.
    pub first_sequence: u64,
    /// `log_next_seq`.
    pub next_sequence: u64,
}

/// Why the walk over the buffer ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// A record that does not fit in the buffer, or into itself.
    #[error("the record {sequence} at offset {offset:#x} of the log is damaged: {what} {found}")]
    Damaged {
        /// Its number.
        sequence: u64,
        /// Its offset.
        offset: u64,
        /// Which length.
        what: &'static str,
        /// What it holds.
        found: u64,
    },
    /// The records do not end where the kernel says they do.
    #[error("the log ends at offset {offset:#x} after record {sequence}, not at {expected:#x}")]
    End {
        /// The number that was reached.
        sequence: u64,
        /// Where the walk ended.
        offset: u64,
        /// `log_next_idx`.
        expected: u64,
    },
}

fn number<const N: usize>(bytes: &[u8], offset: u64) -> Option<u64> {
    let source = bytes.get(usize::try_from(offset).ok()?..)?.get(..N)?;
    let mut value = [0; 8];
    value.get_mut(..N)?.copy_from_slice(source);
    Some(u64::from_le_bytes(value))
}

fn slice(bytes: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..)?.get(..usize::try_from(length).ok()?)
}

/// Walks a copy of the buffer. The sink returns whether it wants more.
///
/// # Errors
/// [`LogError`] where the walk can't go on; what came before was given.
pub fn records(
    layout: &LogLayout,
    buffer: &[u8],
    indices: Indices,
    sink: &mut dyn FnMut(Record) -> bool,
) -> Result<(), LogError> {
    let mut offset = indices.first;
    let mut sequence = indices.first_sequence;
    let mut turned = false;
    while sequence < indices.next_sequence {
        let damaged = |what, found| LogError::Damaged {
            sequence,
            offset,
            what,
            found,
        };
        let Some(header) = slice(buffer, offset, layout.size) else {
            return Err(damaged("header beyond the end", layout.size));
        };
        let length = number::<2>(header, layout.length).unwrap_or(0);
        if length == 0 {
            if turned {
                return Err(damaged("second wrap, len", 0));
            }
            turned = true;
            offset = 0;
            continue;
        }
        let text_length = number::<2>(header, layout.text_length).unwrap_or(0);
        let dictionary_length = number::<2>(header, layout.dictionary_length).unwrap_or(0);
        if layout.size + text_length + dictionary_length > length {
            return Err(damaged("text_len", text_length));
        }
        let Some(record) = slice(buffer, offset, length) else {
            return Err(damaged("len", length));
        };
        let text = slice(record, layout.size, text_length).unwrap_or_default();
        let dictionary =
            slice(record, layout.size + text_length, dictionary_length).unwrap_or_default();
        let entry = |key: &[u8]| {
            let found = dictionary
                .split(|byte| *byte == 0)
                .find_map(|line| line.strip_prefix(key));
            found.unwrap_or_default().to_vec()
        };
        let flags_and_level = number::<1>(header, layout.flags_and_level).unwrap_or(0) as u8;
        let caller = layout.caller.and_then(|caller| number::<4>(header, caller));
        let wanted = sink(Record {
            sequence,
            nanoseconds: number::<8>(header, layout.time).unwrap_or(0),
            facility: number::<1>(header, layout.facility).unwrap_or(0) as u8,
            level: flags_and_level >> 5,
            flags: flags_and_level & 0x1f,
            caller: caller.map(|caller| caller as u32),
            command: Vec::new(),
            text: text.to_vec(),
            subsystem: entry(b"SUBSYSTEM="),
            device: entry(b"DEVICE="),
            complete: true,
            truncated: 0,
        });
        if !wanted {
            return Ok(());
        }
        offset += length;
        sequence += 1;
    }
    if offset != indices.next {
        return Err(LogError::End {
            sequence,
            offset,
            expected: indices.next,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Appends a record as the kernel's `log_store` does.
    fn store(buffer: &mut Vec<u8>, text: &[u8], dictionary: &[u8]) {
        let used = 16 + text.len() + dictionary.len();
        let length = used.div_ceil(4) * 4;
        buffer.extend(7_u64.to_le_bytes());
        buffer.extend((length as u16).to_le_bytes());
        buffer.extend((text.len() as u16).to_le_bytes());
        buffer.extend((dictionary.len() as u16).to_le_bytes());
        buffer.extend([3, 6 << 5 | 2]);
        buffer.extend(text);
        buffer.extend(dictionary);
        buffer.resize(buffer.len() + length - used, 0);
    }

    fn walk(buffer: &[u8], indices: Indices) -> (Vec<Record>, Result<(), LogError>) {
        let mut found = Vec::new();
        let result = records(
            &LogLayout::standard(false),
            buffer,
            indices,
            &mut |record| {
                found.push(record);
                true
            },
        );
        (found, result)
    }

    #[test]
    fn reads_across_the_wrap() {
        let mut buffer = Vec::new();
        store(&mut buffer, b"third", b"");
        let next = buffer.len() as u64;
        let first = next;
        store(
            &mut buffer,
            b"first",
            b"SUBSYSTEM=pci\0DEVICE=+pci:0000:00:02.0\0",
        );
        store(&mut buffer, b"second", b"");
        buffer.extend([0; 16]);
        let indices = Indices {
            first,
            next,
            first_sequence: 40,
            next_sequence: 43,
        };
        let (found, result) = walk(&buffer, indices);
        assert_eq!(result, Ok(()));
        let texts: Vec<_> = found.iter().map(|record| record.text.as_slice()).collect();
        assert_eq!(texts, [b"first".as_slice(), b"second", b"third"]);
        assert_eq!(found[0].subsystem, b"pci");
        assert_eq!(found[0].device, b"+pci:0000:00:02.0");
        assert_eq!(
            (found[0].level, found[0].facility, found[0].flags),
            (6, 3, 2)
        );
        assert_eq!(found[2].sequence, 42);
    }

    #[test]
    fn says_where_damage_ended_it() {
        let mut buffer = Vec::new();
        store(&mut buffer, b"one", b"");
        let second = buffer.len();
        store(&mut buffer, b"two", b"");
        let indices = Indices {
            first: 0,
            next: buffer.len() as u64,
            first_sequence: 0,
            next_sequence: 2,
        };
        buffer[second + 8] = 0xff;
        buffer[second + 9] = 0xff;
        let (found, result) = walk(&buffer, indices);
        assert_eq!(found.len(), 1);
        assert!(
            matches!(result, Err(LogError::Damaged { sequence: 1, .. })),
            "{result:?}"
        );
    }

    proptest! {
        #[test]
        fn never_panics_and_always_ends(
            buffer in proptest::collection::vec(any::<u8>(), 0..512),
            first in 0..600_u64, next in any::<u64>(), count in any::<u64>(),
        ) {
            let indices = Indices { first, next, first_sequence: 0, next_sequence: count };
            let (found, _) = walk(&buffer, indices);
            // Each record has at least its header, and the buffer is passed twice at most.
            prop_assert!(found.len() <= 2 * buffer.len() / 16 + 1);
        }
    }
}
