//! Returns that the compiler made jumps to a common place
//! (`apply_returns`).

use crate::Running;
use crate::image::Image;
use crate::instructions::{BREAKPOINT, branch, branch_to};
use crate::records::Records;

/// How returns are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Return {
    /// By the jumps as they are.
    Kept,
    /// In place.
    Direct,
    /// By jumps to another place.
    Thunk(u64),
    /// By such jumps in the lower half of a cache line, in place in the upper.
    LowerHalf(u64),
}

impl Return {
    fn code(self, place: u64, kept: [u8; 5]) -> [u8; 5] {
        const DIRECT: [u8; 5] = [0xc3, BREAKPOINT, BREAKPOINT, BREAKPOINT, BREAKPOINT];
        match self {
            Self::Kept => kept,
            Self::LowerHalf(_) if place & 0x20 != 0 => DIRECT,
            Self::Direct => DIRECT,
            Self::Thunk(thunk) | Self::LowerHalf(thunk) => branch_to(0xe9, place, thunk),
        }
    }
}

pub(super) fn apply(image: &mut Image, records: Records<'_>, running: &dyn Running) {
    let places: Vec<(u64, [u8; 5])> = records
        .relative(".return_sites")
        .into_iter()
        .filter_map(|place| {
            let kept = image.get(place, 5)?.first_chunk::<5>()?;
            branch(place, kept).map(|_| (place, *kept))
        })
        .collect();
    let mut ways = vec![Return::Kept, Return::Direct];
    let thunk = running.symbol("x86_return_thunk");
    if let Some(thunk) = thunk.and_then(|variable| running.read_u64(variable)) {
        ways.extend([Return::Thunk(thunk), Return::LowerHalf(thunk)]);
    }
    let mut votes = vec![0_usize; ways.len()];
    for (place, kept) in &places {
        let mut found = [0; 5];
        if !running.read(*place, &mut found) {
            continue;
        }
        for (way, votes) in ways.iter().zip(&mut votes) {
            *votes += usize::from(way.code(*place, *kept) == found);
        }
    }
    let most = votes
        .iter()
        .enumerate()
        .rev()
        .max_by_key(|(_, votes)| **votes);
    let Some(way) = most.and_then(|(way, _)| ways.get(way)) else {
        return;
    };
    for (place, kept) in places {
        image.set(place, &way.code(place, kept));
    }
}
