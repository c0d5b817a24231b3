//! The first look at a kernel whose own file is not at hand.

use std::ops::Range;
use std::thread;
use std::time::{Duration, SystemTime};

use secmon_guest::Guest;
use secmon_guest::linux::code::image::ImageSections;
use secmon_guest::linux::tracing::ftrace_sites;
use secmon_memory::{VirtualAddress, Volatility};
use secmon_reference::{Expected, FirstState, Piece};

use super::patches::KernelPatches;
use super::{NAME, has_started};
use crate::DetectError;

/// How often one looks while kprobes come and go.
const LOOKS: u32 = 8;
/// What passes between two such looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks at the kernel's text and constants, to compare later looks with it.
///
/// # Errors
/// [`DetectError`] if they can't be read, or the kernel's records of what it
/// writes there.
pub fn first_state(guest: &Guest) -> Result<FirstState, DetectError> {
    has_started(guest)?;
    let pieces = pieces(guest)?;
    let sites = ftrace_sites(guest, NAME)?;
    let traced: Vec<u64> = sites.iter().map(|site| site.address.as_u64()).collect();
    let mut patches = KernelPatches::of(guest, NAME)?;
    for _ in 0..LOOKS {
        let taken = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        let probes = patches.probes().iter();
        let state = FirstState::take(
            patches.kernel(),
            guest.kernel().profile.build_id().cloned(),
            taken.as_secs(),
            &pieces,
            traced.clone(),
            probes.map(|(address, byte)| (*address, *byte)),
        );
        let Some(state) = state else {
            return Err(DetectError::Incomplete {
                view: "the kernel's image",
                reason: "it could not be read for the first time".to_owned(),
            });
        };
        let after = KernelPatches::of(guest, NAME)?;
        if after.probes() == patches.probes() {
            return Ok(state);
        }
        patches = after;
        if guest.space().memory().volatility() != Volatility::Static {
            thread::sleep(PAUSE);
        }
    }
    Err(DetectError::Incomplete {
        view: "the kernel's kprobes",
        reason: "they changed each time while the kernel's text was read for the first time"
            .to_owned(),
    })
}

/// What later looks have to agree with.
///
/// # Errors
/// [`DetectError`] if the kernel's records can't be read.
pub fn expected(guest: &Guest, state: FirstState) -> Result<Expected, DetectError> {
    let patches = KernelPatches::of(guest, NAME)?;
    Ok(Expected::of_first_state(state, patches.kernel()))
}

/// What stays as it is once the kernel has started.
fn pieces(guest: &Guest) -> Result<Vec<Piece>, DetectError> {
    let sections = ImageSections::of(guest, NAME)?;
    let piece = |name, range: Range<VirtualAddress>| Piece {
        name,
        range: range.start.as_u64()..range.end.as_u64(),
    };
    let mut pieces = vec![
        piece(".text", sections.text),
        piece(".rodata", sections.rodata),
    ];
    // How the kernel unwinds stacks: sorted while it starts at the latest.
    for (name, start, end) in [
        (
            ".orc_unwind_ip",
            "__start_orc_unwind_ip",
            "__stop_orc_unwind_ip",
        ),
        (".orc_unwind", "__start_orc_unwind", "__stop_orc_unwind"),
        (".orc_lookup", "orc_lookup", "orc_lookup_end"),
    ] {
        if let Some(range) = guest.address(start).zip(guest.address(end)) {
            pieces.push(piece(name, range.0..range.1.max(range.0)));
        }
    }
    Ok(pieces)
}
