//! What the kernel does to its text while it starts, in its own order
//! (`alternative_instructions` in `arch/x86/kernel/alternative.c`).
//!
//! What is decided once for the whole kernel by the processor's weaknesses and
//! the kernel's arguments (how returns and calls through registers are made,
//! whether locks are needed) is taken from what most places hold; then each
//! place has to.

mod alternatives;
mod indirect;
mod paravirt;
mod returns;

pub(crate) use indirect::IndirectCall;

use std::collections::BTreeMap;

use crate::Running;
use crate::image::Image;
use crate::instructions::are_same;
use crate::records::Records;

/// `lock`, and what stands in its place on machines with one processor.
const LOCK: [u8; 2] = [0xf0, 0x3e];
/// `endbr64`, and what stands where no pointer leads to a function.
const LANDING: [[u8; 4]; 3] = [
    [0xf3, 0x0f, 0x1e, 0xfa],
    [0x66, 0x0f, 0x1f, 0x00],
    [0x0f, 0x1f, 0x40, 0xd6],
];

/// What came of it beside the text.
#[derive(Debug, Default)]
pub(crate) struct Patched {
    /// Calls through registers that may be made elsewhere.
    pub(crate) indirect: Vec<IndirectCall>,
}

/// Does to the image what the kernel did.
pub(crate) fn patch(image: &mut Image, records: Records<'_>, running: &dyn Running) -> Patched {
    // Places whose instructions count, and not what fills them up.
    let mut loose: Vec<(u64, usize)> = Vec::new();
    let paravirt = paravirt::apply(image, running);
    let indirect = indirect::apply(image, records, running, &mut loose);
    returns::apply(image, records, running);
    alternatives::apply(image, records, running, &mut loose);
    constants(image, records, running);
    vote(
        image,
        records.relative(".ibt_endbr_seal"),
        running,
        &LANDING,
    );
    vote(
        image,
        records.relative(".smp_locks"),
        running,
        &LOCK.map(|byte| [byte]),
    );
    paravirt::choose(image, running, &paravirt);
    for (address, length) in loose {
        adopt(image, running, address, length);
    }
    Patched { indirect }
}

/// Takes over what fills a place up, if its instructions are as expected.
fn adopt(image: &mut Image, running: &dyn Running, address: u64, length: usize) {
    let mut found = vec![0; length];
    if let Some(expected) = image.get(address, length)
        && running.read(address, &mut found)
        && expected != found
        && are_same(address, expected, &found)
    {
        image.set(address, &found);
    }
}

/// Puts the form that most of the places have into all that have one of the
/// forms in the file.
fn vote<const N: usize>(
    image: &mut Image,
    places: Vec<u64>,
    running: &dyn Running,
    forms: &[[u8; N]],
) {
    let mut votes = vec![0_usize; forms.len()];
    for place in &places {
        let mut found = [0; N];
        if image.get(*place, N).is_some() && running.read(*place, &mut found) {
            let form = forms.iter().position(|form| *form == found);
            if let Some(votes) = form.and_then(|form| votes.get_mut(form)) {
                *votes += 1;
            }
        }
    }
    let most = votes
        .iter()
        .enumerate()
        .rev()
        .max_by_key(|(_, votes)| **votes);
    let Some(form) = most.and_then(|(form, _)| forms.get(form)) else {
        return;
    };
    for place in places {
        let known = image
            .get(place, N)
            .is_some_and(|bytes| forms.iter().any(|form| form == bytes));
        if known {
            image.set(place, form);
        }
    }
}

/// Constants that are known only once the kernel runs
/// (`arch/x86/include/asm/runtime-const.h`).
fn constants(image: &mut Image, records: Records<'_>, running: &dyn Running) {
    for (name, places) in records.constants("runtime_ptr_") {
        if let Some(value) = constant(running, name).or_else(|| most(&places, running)) {
            for place in places {
                image.set(place, &value.to_le_bytes());
            }
        }
    }
    for (name, places) in records.constants("runtime_shift_") {
        if let Some(value) = constant(running, name) {
            for place in places {
                image.set(place, &[value as u8]);
            }
        }
    }
}

/// The variable that a constant is made of; of some (caches of objects) there is
/// none once the kernel runs.
fn constant(running: &dyn Running, name: &str) -> Option<u64> {
    const KNOWN: [&str; 3] = ["dentry_hashtable", "d_hash_shift", "USER_PTR_MAX"];
    let known = KNOWN.into_iter().find(|known| *known == name)?;
    running.read_u64(running.symbol(known)?)
}

/// The value that most places hold: it is the same in all.
fn most(places: &[u64], running: &dyn Running) -> Option<u64> {
    let mut votes: BTreeMap<u64, usize> = BTreeMap::new();
    for value in places.iter().filter_map(|place| running.read_u64(*place)) {
        *votes.entry(value).or_default() += 1;
    }
    let most = votes.into_iter().max_by_key(|(_, votes)| *votes);
    most.map(|(value, _)| value)
}
