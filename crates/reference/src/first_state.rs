//! A kernel's text and constants as they were when they were first looked at,
//! for kernels whose own file is not at hand.
//!
//! What was changed before is taken as it is, but for the places that the
//! kernel writes anew while it runs: of these its records say what they have to
//! hold (see [`Expected::of_first_state`](crate::Expected::of_first_state)).

use std::ops::Range;

use secmon_profile::BuildId;

use crate::instructions::branch;
use crate::running::Kernel;
use crate::{KernelFile, Relocations, Section};

/// Bytes that an optimised kprobe writes over.
const JUMP: usize = 5;

/// A piece of the kernel's image that stays as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// As the section is called.
    pub name: &'static str,
    /// Where it lies.
    pub range: Range<u64>,
}

/// What the first look saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FirstState {
    /// The pieces, at the addresses where the kernel runs.
    pub(crate) file: KernelFile,
    /// When, in seconds since 1970-01-01T00:00:00Z.
    pub(crate) taken: u64,
    /// Places for tracing.
    pub(crate) traced: Vec<u64>,
    /// What could not be seen, as a kprobe had written over it.
    pub(crate) unknown: Vec<Range<u64>>,
}

impl FirstState {
    /// Copies the pieces; `None` if one can't be read, or is longer than any
    /// kernel's.
    ///
    /// `traced` are the places for tracing, `probes` the addresses of kprobes
    /// with the bytes that they took away.
    pub fn take(
        kernel: Kernel<'_>,
        build_id: Option<BuildId>,
        taken: u64,
        pieces: &[Piece],
        traced: Vec<u64>,
        probes: impl IntoIterator<Item = (u64, u8)>,
    ) -> Option<Self> {
        let mut sections = Vec::new();
        let mut left = crate::boot_image::LONGEST;
        for piece in pieces {
            let length = piece.range.end.checked_sub(piece.range.start)?;
            let length = usize::try_from(length).ok()?;
            left = left.checked_sub(length)?;
            let mut bytes = vec![0; length];
            if !kernel.running.read(piece.range.start, &mut bytes) {
                return None;
            }
            sections.push(Section {
                name: piece.name.to_owned(),
                address: piece.range.start,
                bytes,
                writable: false,
            });
        }
        let mut unknown = Vec::new();
        for (address, byte) in probes {
            unknown.extend(take_back(&mut sections, kernel, address, byte));
        }
        Some(Self {
            file: KernelFile {
                build_id,
                sections,
                relocations: Relocations::default(),
            },
            taken,
            traced,
            unknown,
        })
    }

    /// When it was seen, in seconds since 1970-01-01T00:00:00Z.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// The kernel's build id, where it has one.
    #[must_use]
    pub fn build_id(&self) -> Option<&BuildId> {
        self.file.build_id.as_ref()
    }
}

/// Puts the byte back that a kprobe took; gives what lies below a jump that
/// stands for the kprobe.
fn take_back(
    sections: &mut [Section],
    kernel: Kernel<'_>,
    address: u64,
    byte: u8,
) -> Option<Range<u64>> {
    let section = sections
        .iter_mut()
        .find(|section| (section.address..section.end()).contains(&address))?;
    let offset = usize::try_from(address.checked_sub(section.address)?).ok()?;
    let code = section.bytes.get_mut(offset..)?;
    let jumps = code.first() == Some(&0xe9)
        && branch(address, code.get(..JUMP)?)
            .is_some_and(|(target, _)| kernel.patches.is_probe_slot(target));
    *code.first_mut()? = byte;
    jumps.then(|| address.saturating_add(1)..address.saturating_add(JUMP as u64))
}
