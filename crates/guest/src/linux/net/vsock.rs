//! Sockets between a virtual machine and its host (`net/vmw_vsock/af_vsock.c`),
//! which belong to a module as a rule.

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::Types;

use super::sock::{AF_VSOCK, SockModel};
use crate::linux::list::entries;
use crate::linux::module::knowledge::{KnowledgeError, module_named, symbols_of, types_of};
use crate::{Diagnostic, Guest};

/// `VSOCK_HASH_SIZE`; the table of bound sockets has one more, for those that
/// are not bound.
const BUCKETS: u64 = 251;
/// Bytes of a `list_head`.
const BUCKET_BYTES: u64 = 16;
/// More sockets than this are in no list.
const MOST_SOCKETS: usize = 1 << 20;

/// In `sockaddr_vm` (`include/uapi/linux/vm_sockets.h`).
const PORT_OFFSET: u64 = 4;
const CONTEXT_OFFSET: u64 = 8;
/// `VMADDR_CID_ANY` and `VMADDR_PORT_ANY`.
const ANY: u32 = u32::MAX;

/// Where the members of `vsock_sock` lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Offsets {
    local: u64,
    remote: u64,
    bound: u64,
    connected: u64,
}

/// How a guest's vsock sockets are read.
#[derive(Clone, Debug)]
pub struct Vsock {
    offsets: Offsets,
    bound: Option<VirtualAddress>,
    connected: Option<VirtualAddress>,
}

/// One end of a vsock connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockAddress {
    /// The context id: which machine; none for any.
    pub context: Option<u32>,
    /// The port; none if it has none yet.
    pub port: Option<u32>,
}

fn offsets_of(types: &Types) -> Option<Offsets> {
    let offset = |path| {
        types
            .member("vsock_sock", path)
            .ok()
            .map(|member| member.offset)
    };
    Some(Offsets {
        local: offset("local_addr")?,
        remote: offset("remote_addr")?,
        bound: offset("bound_table")?,
        connected: offset("connected_table")?,
    })
}

/// The layout that every kernel from 5.5 on has so far, for those that keep no
/// types of modules (before 5.11): `transport` follows the `struct sock`. It
/// is believed only where the family stands in the addresses.
fn known_offsets(types: &Types) -> Option<Offsets> {
    let local = types.size_of("sock").ok()?.checked_add(8)?;
    Some(Offsets {
        local,
        remote: local + 16,
        bound: local + 32,
        connected: local + 48,
    })
}

impl Vsock {
    /// Looks for the family; none if the guest has it not.
    pub fn find(guest: &Guest, table: &'static str) -> Option<Self> {
        let kernel = guest.types(table).ok()?;
        if let Some(offsets) = offsets_of(kernel) {
            return Some(Self {
                offsets,
                bound: guest.address("vsock_bind_table"),
                connected: guest.address("vsock_connected_table"),
            });
        }
        let module = module_named(guest, table, b"vsock").ok().flatten()?;
        let complain = |what: &str, reason: &dyn std::fmt::Display| {
            guest.diagnostics().record(Diagnostic {
                table,
                subject: format!("{what} of module vsock"),
                address: Some(module.address),
                reason: format!("vsock sockets may be missing: {reason}"),
            });
        };
        let types = types_of(guest, table, &module).unwrap_or_else(|error| {
            // Then it is with modules as before 5.11.
            if !matches!(error, KnowledgeError::OtherTypes) {
                complain("types", &error);
            }
            None
        });
        let symbols = symbols_of(guest, table, &module).unwrap_or_else(|error| {
            complain("symbols", &error);
            None
        });
        let address = |name| symbols.as_ref().and_then(|symbols| symbols.address(name));
        Some(Self {
            offsets: types
                .as_ref()
                .and_then(offsets_of)
                .or_else(|| known_offsets(kernel))?,
            bound: address("vsock_bind_table"),
            connected: address("vsock_connected_table"),
        })
    }

    /// The sockets in the family's tables.
    pub fn sockets(&self, guest: &Guest, table: &'static str) -> Vec<VirtualAddress> {
        let Ok(model) = guest.layout::<SockModel>(table) else {
            return Vec::new();
        };
        let tables = [
            (
                "vsock_bind_table",
                self.bound,
                BUCKETS + 1,
                self.offsets.bound,
            ),
            (
                "vsock_connected_table",
                self.connected,
                BUCKETS,
                self.offsets.connected,
            ),
        ];
        let mut found = Vec::new();
        for (subject, first, count, offset) in tables {
            let Some(first) = first else {
                continue;
            };
            for bucket in 0..count {
                let head = first.wrapping_add(bucket * BUCKET_BYTES);
                let members = entries(guest, table, subject, head, offset);
                found.extend(members.take(MOST_SOCKETS).filter(|address| {
                    // Only where the offsets are right is the family there.
                    guest.number(*address, &model.layout.family) == Ok(AF_VSOCK.into())
                }));
            }
        }
        found
    }

    fn address(guest: &Guest, at: VirtualAddress) -> Result<Option<VsockAddress>, ReadError> {
        if guest.space().read_u16(at)? != AF_VSOCK {
            return Ok(None);
        }
        let known = |value: u32| (value != ANY).then_some(value);
        Ok(Some(VsockAddress {
            context: known(guest.space().read_u32(at.wrapping_add(CONTEXT_OFFSET))?),
            port: known(guest.space().read_u32(at.wrapping_add(PORT_OFFSET))?),
        }))
    }

    /// The local end of the socket at `sock`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn local(
        &self,
        guest: &Guest,
        sock: VirtualAddress,
    ) -> Result<Option<VsockAddress>, ReadError> {
        Self::address(guest, sock.wrapping_add(self.offsets.local))
    }

    /// The remote end of the socket at `sock`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn remote(
        &self,
        guest: &Guest,
        sock: VirtualAddress,
    ) -> Result<Option<VsockAddress>, ReadError> {
        Self::address(guest, sock.wrapping_add(self.offsets.remote))
    }
}
