//! Walks over the kernel's linked lists: `list_head` here, `hlist` and
//! `hlist_nulls` in [`chain`] (`include/linux/list.h`,
//! `include/linux/list_nulls.h`).
//!
//! The guest may change a list while it is walked, and may hold anything where
//! a link should be. So each step is validated by the back link that these
//! lists keep, and repeated if the two do not agree; a node that was taken out
//! under the walk is left for its last linked predecessor. What stays wrong is
//! handed out as a [`ListError`] between the nodes, and the walk goes on where
//! that is sound: a `list_head` list that is broken in the middle is finished
//! from its other end. No node is handed out twice, the head never.

pub mod chain;
#[cfg(test)]
mod tests;

use secmon_memory::{AddressSpace, ReadError, VirtualAddress, Volatility};

use crate::linux::hash::AddressSet;
use crate::{Diagnostic, Diagnostics, Guest};

/// More nodes than this are in no list: the kernel's own limit of process
/// ids (`PID_MAX_LIMIT`, `include/linux/threads.h`).
pub const LIMIT: usize = 1 << 22;

/// How often a step that does not agree with itself is repeated on a live
/// guest. The last repetitions yield the processor, as the virtual CPU that
/// was half-way through an update may be waiting for it.
const ATTEMPTS: u32 = 24;
/// From this attempt on the processor is yielded.
const YIELD_FROM: u32 = 8;

/// `list_head.prev`, `hlist_node.pprev`: after the first pointer.
const BACK: u64 = 8;

/// Whether `address` can be that of a kernel object with pointers in it: a
/// canonical address of the upper half, aligned to 8.
pub fn is_object_address(space: &AddressSpace, address: VirtualAddress) -> bool {
    is_kernel_address(space, address) && address.is_aligned(8)
}

/// Whether `address` is a canonical address of the upper half.
pub fn is_kernel_address(space: &AddressSpace, address: VirtualAddress) -> bool {
    address.as_u64() >> 63 == 1 && space.mode().is_canonical(address)
}

/// Something wrong in a list. The walk says by going on or not whether more
/// nodes were found behind it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// A link could not be read.
    #[error("the link at {node} can't be read: {source}")]
    Read {
        /// The node whose link it is.
        node: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
    /// A link leads where no node can be.
    #[error("the link at {node} holds {found}, which is no address of a node")]
    Wild {
        /// The node whose link it is.
        node: VirtualAddress,
        /// What it holds.
        found: VirtualAddress,
    },
    /// Two neighbours do not agree that they are.
    #[error("{node} leads to {next}, whose back link holds {found}")]
    Mismatch {
        /// The node that was left.
        node: VirtualAddress,
        /// The node it leads to.
        next: VirtualAddress,
        /// What the back link of that one holds.
        found: VirtualAddress,
    },
    /// The list leads back into itself.
    #[error("{node} leads back to {next}, which is not the head of the list")]
    Cycle {
        /// The node that was left.
        node: VirtualAddress,
        /// The node it leads to, which was there before.
        next: VirtualAddress,
    },
    /// A list of sockets ends in the mark of another chain, even after the
    /// walk was repeated.
    #[error("the chain that ends at {node} ends as chain {found}, not {expected}")]
    OtherChain {
        /// The last node.
        node: VirtualAddress,
        /// The chain's own number.
        expected: u64,
        /// The number in its end mark.
        found: u64,
    },
    /// There are more nodes than any such list has.
    #[error("the list has more than {limit} nodes")]
    TooLong {
        /// The bound.
        limit: usize,
    },
}

impl ListError {
    /// The address that a diagnostic should name.
    pub fn address(&self) -> Option<VirtualAddress> {
        match self {
            Self::Read { node, .. }
            | Self::Wild { node, .. }
            | Self::Mismatch { node, .. }
            | Self::Cycle { node, .. }
            | Self::OtherChain { node, .. } => Some(*node),
            Self::TooLong { .. } => None,
        }
    }
}

/// Waits as befits the `attempt`-th repetition of a step.
fn pause_before(attempt: u32) {
    if attempt >= YIELD_FROM {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// How often a step is tried on this memory.
fn attempts(space: &AddressSpace) -> u32 {
    match space.memory().volatility() {
        Volatility::Live => ATTEMPTS,
        Volatility::Static => 1,
    }
}

/// Which of a `list_head`'s pointers is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// `next`.
    Forward,
    /// `prev`.
    Backward,
    /// None: the walk is over.
    Over,
}

impl Direction {
    /// The offsets of the pointer followed and of the one that must agree.
    const fn offsets(self) -> (u64, u64) {
        match self {
            Self::Backward => (BACK, 0),
            Self::Forward | Self::Over => (0, BACK),
        }
    }
}

/// The nodes of a `list_head` list: addresses of the `list_head`s embedded in
/// its members, without the head's own.
pub struct ListNodes<'g> {
    space: &'g AddressSpace,
    diagnostics: &'g Diagnostics,
    head: VirtualAddress,
    limit: usize,
    direction: Direction,
    /// The nodes walked in this direction: where to step back to if the last
    /// one is taken out of the list.
    trail: Vec<VirtualAddress>,
    seen: AddressSet,
    /// Whether the walk has stepped back, so that known nodes come again.
    stepped_back: bool,
    /// A node that was accepted together with an error about its back link.
    pending: Option<VirtualAddress>,
    /// The last node and where it led when it was reached: its two links are
    /// read together. It is only a first guess of the way on.
    ahead: Option<(VirtualAddress, VirtualAddress)>,
    /// Whether nodes are noted in `seen`: from the start on a live guest, on
    /// an image from the first link on that was not as it should be. Where
    /// all links agree, no node can come twice.
    noting: bool,
}

/// What one step found.
enum Step {
    Node(VirtualAddress),
    End,
    Wrong(ListError),
}

/// The nodes of the list whose head is at `head`, at most `limit`.
pub fn nodes<'g>(
    space: &'g AddressSpace,
    diagnostics: &'g Diagnostics,
    head: VirtualAddress,
    limit: usize,
) -> ListNodes<'g> {
    ListNodes {
        space,
        diagnostics,
        head,
        limit,
        direction: Direction::Forward,
        trail: Vec::new(),
        seen: AddressSet::default(),
        stepped_back: false,
        pending: None,
        ahead: None,
        noting: space.memory().volatility() == Volatility::Live,
    }
}

impl ListNodes<'_> {
    fn link(&self, node: VirtualAddress, offset: u64) -> Result<VirtualAddress, ListError> {
        self.space
            .read_pointer(node.wrapping_add(offset))
            .map_err(|source| ListError::Read { node, source })
    }

    fn current(&self) -> VirtualAddress {
        self.trail.last().copied().unwrap_or(self.head)
    }

    /// Whether `node` is still where it says it is: its predecessor leads to
    /// it.
    fn is_linked(&self, node: VirtualAddress) -> bool {
        let (forward, back) = self.direction.offsets();
        let Ok(previous) = self.link(node, back) else {
            return false;
        };
        is_object_address(self.space, previous) && self.link(previous, forward) == Ok(node)
    }

    /// Both links of `node`: the one that is followed, and its back link.
    fn links(&self, node: VirtualAddress) -> Result<(VirtualAddress, VirtualAddress), ReadError> {
        let mut bytes = [[0; 8]; 2];
        self.space.read(node, bytes.as_flattened_mut())?;
        let [next, previous] = bytes.map(|bytes| VirtualAddress::new(u64::from_le_bytes(bytes)));
        Ok(match self.direction {
            Direction::Backward => (previous, next),
            Direction::Forward | Direction::Over => (next, previous),
        })
    }

    /// One try to leave `node`; `first` says whether the step was tried
    /// before.
    fn try_step(&mut self, node: VirtualAddress, first: bool) -> Result<VirtualAddress, ListError> {
        let (forward, _) = self.direction.offsets();
        let next = match self.ahead {
            Some((known, next)) if first && known == node => next,
            _ => self.link(node, forward)?,
        };
        if !is_object_address(self.space, next) {
            return Err(ListError::Wild { node, found: next });
        }
        // A link that leads to memory which is not there is wrong itself.
        let (after, found) = self
            .links(next)
            .map_err(|source| ListError::Read { node, source })?;
        if found == node {
            self.ahead = Some((next, after));
            return Ok(next);
        }
        Err(ListError::Mismatch { node, next, found })
    }

    /// Whether the mismatch is what an insertion or removal looks like between
    /// its two stores: the back link still (or already) skips `node`, which is
    /// linked.
    fn is_half_done(&self, node: VirtualAddress, found: VirtualAddress) -> bool {
        let (_, back) = self.direction.offsets();
        self.link(node, back) == Ok(found) && self.is_linked(node)
    }

    fn step(&mut self) -> Step {
        let mut attempt = 0;
        // Each round ends the step, spends an attempt, shortens the trail, or
        // passes a known node while there are known nodes left.
        let mut known = 0;
        loop {
            let node = self.current();
            match self.try_step(node, attempt == 0) {
                Ok(next) if next == self.head => return Step::End,
                Ok(next) if !self.seen.contains(&next) => return Step::Node(next),
                Ok(next) => {
                    if self.direction == Direction::Backward {
                        // The part that was walked from the other end.
                        return Step::End;
                    }
                    known += 1;
                    if !self.stepped_back || known > self.seen.len() {
                        return Step::Wrong(ListError::Cycle { node, next });
                    }
                    self.trail.push(next);
                }
                Err(error) => {
                    self.start_noting();
                    if let ListError::Mismatch { next, found, .. } = error
                        && self.is_half_done(node, found)
                        && !self.seen.contains(&next)
                    {
                        self.diagnostics.count_torn_read();
                        return if next == self.head {
                            Step::End
                        } else {
                            Step::Node(next)
                        };
                    }
                    attempt += 1;
                    if attempt >= attempts(self.space) {
                        return Step::Wrong(error);
                    }
                    self.diagnostics.count_torn_read();
                    pause_before(attempt);
                    if node != self.head && !self.is_linked(node) {
                        self.trail.pop();
                        self.stepped_back = true;
                    }
                }
            }
        }
    }

    /// Notes the nodes so far: from now on one may come twice.
    fn start_noting(&mut self) {
        if !self.noting {
            self.noting = true;
            self.seen.extend(&self.trail);
        }
    }

    /// Takes a new node in; an error if there are too many.
    fn accept(&mut self, node: VirtualAddress) -> Result<VirtualAddress, ListError> {
        if self.seen.len().max(self.trail.len()) >= self.limit {
            self.direction = Direction::Over;
            return Err(ListError::TooLong { limit: self.limit });
        }
        if self.noting {
            self.seen.insert(node);
        }
        self.trail.push(node);
        Ok(node)
    }

    /// Decides how the walk goes on behind `error`.
    fn go_on_after(&mut self, error: &ListError) {
        if let ListError::Mismatch { next, .. } = *error
            && next != self.head
            && !self.seen.contains(&next)
        {
            let (forward, back) = self.direction.offsets();
            let sound = self
                .link(next, forward)
                .is_ok_and(|after| self.link(after, back) == Ok(next));
            if sound {
                // Only the back link is damaged: the node's other neighbour
                // knows it.
                self.pending = Some(next);
                return;
            }
        }
        self.trail.clear();
        self.direction = match self.direction {
            Direction::Forward => Direction::Backward,
            Direction::Backward | Direction::Over => Direction::Over,
        };
    }
}

impl Iterator for ListNodes<'_> {
    type Item = Result<VirtualAddress, ListError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(node) = self.pending.take() {
            return Some(self.accept(node));
        }
        if self.direction == Direction::Over {
            return None;
        }
        match self.step() {
            Step::Node(node) => Some(self.accept(node)),
            Step::End => {
                self.direction = Direction::Over;
                None
            }
            Step::Wrong(error) => {
                self.go_on_after(&error);
                Some(Err(error))
            }
        }
    }
}

/// Records what is wrong in a list.
fn record(guest: &Guest, table: &'static str, subject: &str, error: &ListError) {
    guest.diagnostics().record(Diagnostic {
        table,
        subject: subject.to_owned(),
        address: error.address(),
        reason: error.to_string(),
    });
}

/// The members of the list whose head is at `head`: the addresses of the
/// structures whose `list_head` lies `offset` bytes inside them. What is wrong
/// in the list becomes a diagnostic of `table` about `subject`, the list by
/// its kernel name.
pub fn entries<'g>(
    guest: &'g Guest,
    table: &'static str,
    subject: &'g str,
    head: VirtualAddress,
    offset: u64,
) -> impl Iterator<Item = VirtualAddress> + 'g {
    nodes(guest.space(), guest.diagnostics(), head, LIMIT).filter_map(move |node| match node {
        Ok(node) => Some(node.wrapping_sub(offset)),
        Err(error) => {
            record(guest, table, subject, &error);
            None
        }
    })
}
