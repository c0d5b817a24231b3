//! The configuration that process 1 keeps: it lies somewhere on its heap, and
//! every worker is given it.

use secmon_guest::linux::user::UserMemory;
use secmon_memory::VirtualAddress;

use crate::changes::changes;
use crate::finding::digits;
use crate::{Finding, Kind};

/// The longest heap that is searched.
const LONGEST_HEAP: u64 = 16 << 20;

/// Where the configuration was found.
#[derive(Debug, Default)]
pub struct Configuration {
    place: Option<u64>,
}

impl Configuration {
    /// Compares the bytes with `expected`; looks for them in `heap` until they
    /// were found once.
    pub fn look(
        &mut self,
        expected: &[u8],
        memory: &UserMemory,
        heap: std::ops::Range<u64>,
        findings: &mut Vec<Finding>,
    ) {
        const PLACE: &str = "the configuration in process 1";
        let mut found = vec![0; expected.len()];
        if let Some(place) = self.place {
            let start = VirtualAddress::new(place);
            if memory.space().read(start, &mut found).is_ok() {
                if found == expected {
                    return;
                }
                // It may have been moved, which process 1 has no reason for.
                if self.search(expected, memory, heap) {
                    return;
                }
                if let Some(run) = changes(expected, &found).into_iter().next() {
                    let at = place.saturating_add(run.start as u64);
                    let shown = |bytes: &[u8]| digits(bytes.get(run.clone()).unwrap_or_default());
                    let (before, after) = (shown(expected), shown(&found));
                    let finding = Finding::new(Kind::ChangedConfiguration, PLACE, before, after);
                    findings.push(finding.at(at));
                    return;
                }
            }
        } else if self.search(expected, memory, heap) {
            return;
        }
        findings.push(Finding::new(
            Kind::ChangedConfiguration,
            PLACE,
            format!("the {} bytes that it was given", expected.len()),
            "they are not in its heap",
        ));
    }

    fn search(&mut self, expected: &[u8], memory: &UserMemory, heap: std::ops::Range<u64>) -> bool {
        const PAGE: usize = 4096;
        let length = heap.end.saturating_sub(heap.start).min(LONGEST_HEAP);
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        for (index, page) in bytes.chunks_mut(PAGE).enumerate() {
            let address = heap.start.saturating_add((index * PAGE) as u64);
            // Pages that were never touched are not there.
            let _ = memory.space().read(VirtualAddress::new(address), page);
        }
        // What was freed and copied over stays behind in parts: all of it counts.
        let found = bytes
            .windows(expected.len().max(1))
            .position(|window| window == expected);
        if let Some(at) = found {
            self.place = Some(heap.start.saturating_add(at as u64));
        }
        found.is_some()
    }
}
