//! The kernel's text, its constants and its interrupt table.
//!
//! What they have to be is worked out by the detector `kernel_image` from the
//! kernel's file, which takes some milliseconds. So a copy is kept of what it
//! found right, and each look compares with that copy; only what differs is
//! looked at by the detector again, which knows what a kernel may change.

use std::ops::Range;

use secmon_detect::{Confirmation, Detector};
use secmon_guest::linux::code::image::ImageSections;
use secmon_guest::{Guest, TableError};
use secmon_memory::VirtualAddress;

use crate::changes::changes;
use crate::finding::digits;
use crate::{Finding, Kind, TABLE};

/// Bytes that are compared at a time.
const BLOCK: usize = 1 << 16;
/// Bytes of the interrupt table.
const INTERRUPT_TABLE: u64 = 256 * 16;
/// No kernel's sections are longer.
const LONGEST: u64 = 256 << 20;
/// The detector that knows what the kernel may change.
const DETECTOR: &str = "kernel_image";

/// A piece of the kernel as it was found right.
#[derive(Debug)]
struct Piece {
    start: u64,
    bytes: Vec<u8>,
    kind: Kind,
}

/// Copies of what must not change.
#[derive(Debug)]
pub struct Copies {
    pieces: Vec<Piece>,
    /// Written while the kernel starts, and by its file's word unknown.
    late: Range<u64>,
    buffer: Vec<u8>,
}

/// The symbol before an address, and how far it is.
pub fn symbol(guest: &Guest, address: u64) -> String {
    match guest.symbols().nearest(VirtualAddress::new(address)) {
        Some((symbol, 0)) => symbol.name.to_owned(),
        Some((symbol, distance)) => format!("{}+{distance:#x}", symbol.name),
        None => format!("{address:#x}"),
    }
}

impl Copies {
    /// Takes the copies.
    ///
    /// # Errors
    /// [`TableError`] if the kernel's symbols are missing or what they name
    /// can't be read.
    pub fn take(guest: &Guest) -> Result<Self, TableError> {
        let image = ImageSections::of(guest, TABLE)?;
        let interrupts = guest.symbol(TABLE, "idt_table")?;
        let mut pieces = Vec::new();
        for (what, range, kind) in [
            ("the text", image.text, Kind::ChangedKernel),
            ("the constants", image.rodata, Kind::ChangedKernel),
            (
                "the interrupt table",
                interrupts..interrupts.wrapping_add(INTERRUPT_TABLE),
                Kind::ChangedInterrupts,
            ),
        ] {
            let (start, end) = (range.start.as_u64(), range.end.as_u64());
            let length = end.saturating_sub(start).min(LONGEST);
            let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
            let read = guest.space().read(range.start, &mut bytes);
            read.map_err(|source| TableError::Read {
                table: TABLE,
                what,
                source,
            })?;
            pieces.push(Piece { start, bytes, kind });
        }
        let bound = |name| guest.address(name).map(VirtualAddress::as_u64);
        let late = bound("__start_ro_after_init").zip(bound("__end_ro_after_init"));
        Ok(Self {
            pieces,
            late: late.map_or(0..0, |(start, end)| start..end),
            buffer: vec![0; BLOCK],
        })
    }

    /// Compares; what the kernel had reason to change is taken over.
    pub fn look(&mut self, guest: &Guest, findings: &mut Vec<Finding>) {
        let mut judge = Judge::default();
        for piece in &mut self.pieces {
            for (index, known) in piece.bytes.chunks_mut(BLOCK).enumerate() {
                let start = piece.start.saturating_add((index * BLOCK) as u64);
                let found = self.buffer.get_mut(..known.len()).unwrap_or_default();
                if let Err(error) = guest.space().read(VirtualAddress::new(start), found) {
                    let place = symbol(guest, start);
                    let finding =
                        Finding::new(Kind::Unreadable, place, "memory", error.to_string());
                    findings.push(finding.at(start));
                    continue;
                }
                if known == found {
                    continue;
                }
                for run in changes(known, found) {
                    let address = start.saturating_add(run.start as u64);
                    let kind = match piece.kind {
                        Kind::ChangedKernel if self.late.contains(&address) => {
                            Kind::ChangedConstant
                        }
                        kind => kind,
                    };
                    let (Some(before), Some(after)) =
                        (known.get_mut(run.clone()), found.get(run.clone()))
                    else {
                        continue;
                    };
                    if kind == Kind::ChangedKernel && judge.allows(guest, address, after.len()) {
                        before.copy_from_slice(after);
                        continue;
                    }
                    let place = match kind {
                        Kind::ChangedInterrupts => {
                            format!("gate {:#x}", (index * BLOCK + run.start) / 16)
                        }
                        _ => symbol(guest, address),
                    };
                    let finding = Finding::new(kind, place, digits(before), digits(after));
                    findings.push(finding.at(address));
                }
            }
        }
    }
}

/// What the detector says of the kernel now, asked once a look and only if
/// something differs.
#[derive(Default)]
struct Judge {
    /// Where it found something wrong; none if it could not look to its end.
    wrong: Option<Option<Vec<u64>>>,
}

impl Judge {
    fn allows(&mut self, guest: &Guest, address: u64, length: usize) -> bool {
        let wrong = self.wrong.get_or_insert_with(|| {
            let detector: &'static dyn Detector = secmon_detect::detector(DETECTOR)?;
            let report = secmon_detect::check(guest, &[detector], Confirmation::ONCE);
            let found = report.findings.iter();
            let places = found.filter_map(|finding| finding.subject.address());
            report
                .is_complete()
                .then(|| places.map(VirtualAddress::as_u64).collect())
        });
        let covered = matches!(guest.expected_image(TABLE), Ok(Some(Ok(expected)))
            if expected.bytes(address, length).is_some_and(|bytes| bytes.len() == length));
        let near = address.saturating_sub(16)..address.saturating_add(length as u64 + 16);
        covered
            && wrong
                .as_ref()
                .is_some_and(|wrong| !wrong.iter().any(|place| near.contains(place)))
    }
}
