//! Walks over chains of hash tables: `hlist` and `hlist_nulls`. Each node
//! knows where the pointer to it lies, so that steps are validated as those of
//! a `list_head` list are; but there is no other end to go on from.

use secmon_memory::{AddressSpace, VirtualAddress};

use super::{BACK, LIMIT, ListError, Step, attempts, is_object_address, pause_before, record};
use crate::linux::hash::AddressSet;
use crate::{Diagnostics, Guest};

/// How a chain of `hlist` nodes ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainEnd {
    /// With a null pointer (`hlist`).
    Null,
    /// With an odd value that holds the chain's number (`hlist_nulls`); with
    /// the number given, an end with another one is a walk that was led into
    /// another chain.
    Nulls(Option<u64>),
}

/// The nodes of an `hlist` or `hlist_nulls` chain.
pub struct ChainNodes<'g> {
    space: &'g AddressSpace,
    diagnostics: &'g Diagnostics,
    first: VirtualAddress,
    end: ChainEnd,
    limit: usize,
    trail: Vec<VirtualAddress>,
    seen: AddressSet,
    stepped_back: bool,
    over: bool,
}

/// The nodes of the chain whose first pointer (`hlist_head.first`) is at
/// `first`, at most `limit`.
pub fn chain_nodes<'g>(
    space: &'g AddressSpace,
    diagnostics: &'g Diagnostics,
    first: VirtualAddress,
    end: ChainEnd,
    limit: usize,
) -> ChainNodes<'g> {
    ChainNodes {
        space,
        diagnostics,
        first,
        end,
        limit,
        trail: Vec::new(),
        seen: AddressSet::default(),
        stepped_back: false,
        over: false,
    }
}

impl ChainNodes<'_> {
    fn pointer(&self, node: VirtualAddress, offset: u64) -> Result<VirtualAddress, ListError> {
        self.space
            .read_pointer(node.wrapping_add(offset))
            .map_err(|source| ListError::Read { node, source })
    }

    /// One try to leave `node`: the next one, or none at the end.
    fn try_step(&self, node: VirtualAddress) -> Result<Option<VirtualAddress>, ListError> {
        let next = self.pointer(node, 0)?;
        match self.end {
            ChainEnd::Null if next.is_null() => return Ok(None),
            ChainEnd::Nulls(expected) if next.as_u64() & 1 == 1 => {
                let found = next.as_u64() >> 1;
                return match expected {
                    Some(expected) if expected != found => Err(ListError::OtherChain {
                        node,
                        expected,
                        found,
                    }),
                    _ => Ok(None),
                };
            }
            _ => {}
        }
        if !is_object_address(self.space, next) {
            return Err(ListError::Wild { node, found: next });
        }
        let found = self.pointer(next, BACK).map_err(|error| match error {
            ListError::Read { source, .. } => ListError::Read { node, source },
            other => other,
        })?;
        if found == node {
            return Ok(Some(next));
        }
        Err(ListError::Mismatch { node, next, found })
    }

    /// Whether the pointer at `node`'s `pprev` leads to it.
    fn is_linked(&self, node: VirtualAddress) -> bool {
        let Ok(previous) = self.pointer(node, BACK) else {
            return false;
        };
        is_object_address(self.space, previous) && self.pointer(previous, 0) == Ok(node)
    }

    /// Whether the mismatch is an insertion (the back link skips `node`) or a
    /// removal (it names the removed node) between its two stores.
    fn is_half_done(
        &self,
        node: VirtualAddress,
        next: VirtualAddress,
        found: VirtualAddress,
    ) -> bool {
        let inserted =
            node != self.first && self.pointer(node, BACK) == Ok(found) && self.is_linked(node);
        let removed = is_object_address(self.space, found)
            && self.pointer(found, 0) == Ok(next)
            && self.pointer(found, BACK) == Ok(node);
        inserted || removed
    }

    fn step(&mut self) -> Step {
        let mut attempt = 0;
        let mut known = 0;
        loop {
            let node = self.trail.last().copied().unwrap_or(self.first);
            match self.try_step(node) {
                Ok(None) => return Step::End,
                Ok(Some(next)) if !self.seen.contains(&next) => return Step::Node(next),
                Ok(Some(next)) => {
                    known += 1;
                    if !self.stepped_back || known > self.seen.len() {
                        return Step::Wrong(ListError::Cycle { node, next });
                    }
                    self.trail.push(next);
                }
                Err(error) => {
                    if let ListError::Mismatch { next, found, .. } = error
                        && !self.seen.contains(&next)
                        && self.is_half_done(node, next, found)
                    {
                        self.diagnostics.count_torn_read();
                        return Step::Node(next);
                    }
                    attempt += 1;
                    if attempt >= attempts(self.space) {
                        return Step::Wrong(error);
                    }
                    self.diagnostics.count_torn_read();
                    pause_before(attempt);
                    if matches!(error, ListError::OtherChain { .. }) {
                        // A socket moved and took the walk with it.
                        self.trail.clear();
                        self.stepped_back = true;
                    } else if node != self.first && !self.is_linked(node) {
                        self.trail.pop();
                        self.stepped_back = true;
                    }
                }
            }
        }
    }
}

impl Iterator for ChainNodes<'_> {
    type Item = Result<VirtualAddress, ListError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        match self.step() {
            Step::Node(_) if self.seen.len() >= self.limit => {
                self.over = true;
                Some(Err(ListError::TooLong { limit: self.limit }))
            }
            Step::Node(node) => {
                self.seen.insert(node);
                self.trail.push(node);
                Some(Ok(node))
            }
            Step::End => {
                self.over = true;
                None
            }
            Step::Wrong(error) => {
                self.over = true;
                Some(Err(error))
            }
        }
    }
}

/// The members of the `hlist` or `hlist_nulls` chain whose first pointer is at
/// `first`, as [`entries`](super::entries) gives those of a `list_head` list.
pub fn chain_entries<'g>(
    guest: &'g Guest,
    table: &'static str,
    subject: &'g str,
    first: VirtualAddress,
    offset: u64,
    end: ChainEnd,
) -> impl Iterator<Item = VirtualAddress> + 'g {
    chain_nodes(guest.space(), guest.diagnostics(), first, end, LIMIT).filter_map(move |node| {
        match node {
            Ok(node) => Some(node.wrapping_sub(offset)),
            Err(error) => {
                record(guest, table, subject, &error);
                None
            }
        }
    })
}
