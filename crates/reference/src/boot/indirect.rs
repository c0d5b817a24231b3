//! Calls and jumps through registers that the compiler made calls of a common
//! place for each register (`apply_retpolines`).

use crate::Running;
use crate::image::Image;
use crate::instructions::{BREAKPOINT, are_same, branch};
use crate::records::Records;

/// Bytes between the common places of two registers (`RETPOLINE_THUNK_SIZE`).
const THUNK: u64 = 32;

/// How many of the calls decide how they are made; all have to be made so.
const ASKED: usize = 512;

/// A call or jump through a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndirectCall {
    /// Where it stands.
    pub(crate) address: u64,
    /// Its length, 5 or 6 bytes.
    pub(crate) length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// As the compiler made it.
    Kept,
    /// Through the register, in place.
    Direct,
    /// That, behind a barrier.
    Fenced,
}

struct Site {
    call: IndirectCall,
    kept: Vec<u8>,
    register: u8,
}

impl Site {
    fn code(&self, way: Way) -> Vec<u8> {
        if way == Way::Kept {
            return self.kept.clone();
        }
        let length = self.call.length;
        let mut code = Vec::with_capacity(length + 4);
        let conditional = match self.kept.as_slice() {
            [0x0f, condition, ..] => Some(condition & 0xf),
            _ => None,
        };
        if let Some(condition) = conditional {
            code.extend([0x70 + (condition ^ 1), length as u8 - 2]);
        }
        if way == Way::Fenced {
            code.extend([0x0f, 0xae, 0xe8]);
        }
        if self.register >= 8 {
            code.push(0x41);
        }
        let is_call = conditional.is_none() && self.kept.contains(&0xe8) && {
            let opcode = self.kept.iter().find(|byte| **byte != 0x2e);
            opcode == Some(&0xe8)
        };
        let (form, filling) = match is_call {
            true => (0xd0, 0x90),
            false => (0xe0, BREAKPOINT),
        };
        code.extend([0xff, form + (self.register & 7)]);
        code.resize(code.len().max(length), filling);
        code
    }
}

pub(super) fn apply(
    image: &mut Image,
    records: Records<'_>,
    running: &dyn Running,
    loose: &mut Vec<(u64, usize)>,
) -> Vec<IndirectCall> {
    let Some(thunks) = running.symbol("__x86_indirect_thunk_array") else {
        return Vec::new();
    };
    let sites: Vec<Site> = records
        .relative(".retpoline_sites")
        .into_iter()
        .filter_map(|address| {
            let code = image.get(address, 6).or_else(|| image.get(address, 5))?;
            let (target, length) = branch(address, code)?;
            let register = target.checked_sub(thunks)? / THUNK;
            Some(Site {
                call: IndirectCall { address, length },
                kept: code.get(..length)?.to_vec(),
                register: u8::try_from(register).ok().filter(|number| *number < 16)?,
            })
        })
        .collect();
    let ways = [Way::Kept, Way::Direct, Way::Fenced];
    let mut votes = [0_usize; 3];
    for site in sites.iter().step_by((sites.len() / ASKED).max(1)) {
        let mut found = vec![0; site.call.length];
        if !running.read(site.call.address, &mut found) {
            continue;
        }
        for (way, votes) in ways.iter().zip(&mut votes) {
            *votes += usize::from(are_same(site.call.address, &site.code(*way), &found));
        }
    }
    let most = votes
        .iter()
        .enumerate()
        .rev()
        .max_by_key(|(_, votes)| **votes);
    let way = most.map_or(Way::Kept, |(way, _)| ways[way]);
    for site in &sites {
        let code = site.code(way);
        // Too short for the barrier: it stays as it is.
        if code.len() == site.call.length {
            image.set(site.call.address, &code);
        }
        loose.push((site.call.address, site.call.length));
    }
    match way {
        Way::Kept => Vec::new(),
        Way::Direct | Way::Fenced => sites.into_iter().map(|site| site.call).collect(),
    }
}
