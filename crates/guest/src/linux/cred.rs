//! Credentials: whose rights a task acts with (`struct cred`,
//! `include/linux/cred.h`; `include/uapi/linux/capability.h`).

use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};
use secmon_profile::{TypeError, Types};

use crate::linux::snapshot::Spans;
use crate::{Guest, Layout, TableError, Value, layout};

/// The names of the capabilities, by number.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// The capabilities that every kernel from 5.4 on has: 0 to `audit_read`.
const OLDEST_SET: u64 = (1 << 38) - 1;

/// The most supplementary groups that are read; the kernel's `NGROUPS_MAX`.
const MOST_GROUPS: u32 = 65536;

layout! {
    /// `include/linux/cred.h`
    pub struct CredLayout: "cred" {
        /// `atomic_long_t` since 6.6, `atomic_t` before.
        usage: "usage",
        uid: "uid",
        gid: "gid",
        suid: "suid",
        sgid: "sgid",
        euid: "euid",
        egid: "egid",
        fsuid: "fsuid",
        fsgid: "fsgid",
        securebits: "securebits",
        /// 8 bytes in each kernel: two `u32` until 6.2, one `u64` since, which
        /// is the same on a little-endian machine.
        inheritable: "cap_inheritable",
        permitted: "cap_permitted",
        effective: "cap_effective",
        bounding: "cap_bset",
        ambient: "cap_ambient",
        user_namespace: "user_ns",
        /// The account that is charged for what they use.
        user: "user",
    } optional {
        groups: "group_info",
    }
}

layout! {
    /// `include/linux/sched/user.h`
    pub(crate) struct UserLayout: "user_struct" {
        uid: "uid",
    }
}

layout! {
    /// `include/linux/cred.h`
    struct GroupLayout: "group_info" {
        count: "ngroups",
        list: "gid",
    }
}

/// How credentials of a guest are read.
#[derive(Debug)]
pub struct CredModel {
    /// The members.
    pub layout: CredLayout,
    spans: Spans,
}

impl Layout for CredModel {
    fn resolve(types: &Types) -> Result<Self, TypeError> {
        let layout = CredLayout::resolve(types)?;
        let required = [
            &layout.usage,
            &layout.uid,
            &layout.gid,
            &layout.suid,
            &layout.sgid,
            &layout.euid,
            &layout.egid,
            &layout.fsuid,
            &layout.fsgid,
            &layout.securebits,
            &layout.inheritable,
            &layout.permitted,
            &layout.effective,
            &layout.bounding,
            &layout.ambient,
            &layout.user_namespace,
            &layout.user,
        ];
        let spans = Spans::covering(required.into_iter().chain(&layout.groups));
        Ok(Self { layout, spans })
    }
}

/// A copy of a `cred`. Ids are those of the initial user namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cred {
    /// Where it lies.
    pub address: VirtualAddress,
    /// How many references there are to it, by its own count.
    pub usage: u64,
    /// Real user id.
    pub uid: u32,
    /// Real group id.
    pub gid: u32,
    /// Saved user id.
    pub suid: u32,
    /// Saved group id.
    pub sgid: u32,
    /// Effective user id.
    pub euid: u32,
    /// Effective group id.
    pub egid: u32,
    /// User id for file access.
    pub fsuid: u32,
    /// Group id for file access.
    pub fsgid: u32,
    /// `SECBIT_…`.
    pub securebits: u32,
    /// The capability sets, bits by number.
    pub capabilities: Capabilities,
    /// `user_namespace`.
    pub user_namespace: VirtualAddress,
    /// `user`: the `struct user_struct` of the real user.
    pub user: VirtualAddress,
    /// `group_info`, null if the kernel has none.
    pub groups: VirtualAddress,
}

/// The five capability sets of a `cred`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Kept over `execve`.
    pub inheritable: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// What counts.
    pub effective: u64,
    /// What can ever be gained.
    pub bounding: u64,
    /// Gained by ordinary programs.
    pub ambient: u64,
}

impl Cred {
    /// Copies the `cred` at `address`.
    ///
    /// # Errors
    /// [`ReadError`] of the memory.
    pub fn read(
        guest: &Guest,
        model: &CredModel,
        address: VirtualAddress,
    ) -> Result<Self, ReadError> {
        let layout = &model.layout;
        model.spans.with(guest.space(), address, |spans, copy| {
            let number = |member| spans.number(copy, member);
            let id = |member| number(member) as u32;
            Self {
                address,
                usage: number(&layout.usage),
                uid: id(&layout.uid),
                gid: id(&layout.gid),
                suid: id(&layout.suid),
                sgid: id(&layout.sgid),
                euid: id(&layout.euid),
                egid: id(&layout.egid),
                fsuid: id(&layout.fsuid),
                fsgid: id(&layout.fsgid),
                securebits: id(&layout.securebits),
                capabilities: Capabilities {
                    inheritable: number(&layout.inheritable),
                    permitted: number(&layout.permitted),
                    effective: number(&layout.effective),
                    bounding: number(&layout.bounding),
                    ambient: number(&layout.ambient),
                },
                user_namespace: spans.pointer(copy, &layout.user_namespace),
                user: spans.pointer(copy, &layout.user),
                groups: layout
                    .groups
                    .as_ref()
                    .map_or_else(VirtualAddress::default, |groups| {
                        spans.pointer(copy, groups)
                    }),
            }
        })
    }
}

/// Reads lists of supplementary groups.
pub struct Groups {
    layout: Arc<GroupLayout>,
}

impl Groups {
    /// A reader for `table`.
    ///
    /// # Errors
    /// [`TableError`] if the types lack groups.
    pub fn new(guest: &Guest, table: &'static str) -> Result<Self, TableError> {
        let layout = guest.layout(table)?;
        Ok(Self { layout })
    }

    /// The supplementary group ids of `cred`, as a list.
    pub fn of(&self, guest: &Guest, cred: &Cred) -> Value {
        if cred.groups.is_null() {
            return Value::List(Box::default());
        }
        Value::from_read(read_groups(guest, &self.layout, cred.groups), Value::List)
    }
}

fn read_groups(
    guest: &Guest,
    layout: &GroupLayout,
    groups: VirtualAddress,
) -> Result<Box<[Value]>, String> {
    let count = guest
        .number(groups, &layout.count)
        .map_err(|error| error.to_string())? as u32;
    if count > MOST_GROUPS {
        return Err(format!("group_info at {groups} counts {count} groups"));
    }
    if count == 0 {
        return Ok(Box::default());
    }
    let mut bytes = vec![0; count as usize * 4];
    guest
        .space()
        .read(groups.wrapping_add(layout.list.offset), &mut bytes)
        .map_err(|error| error.to_string())?;
    let (ids, _) = bytes.as_chunks();
    let ids = ids.iter().map(|id| u32::from_le_bytes(*id).into());
    Ok(ids.collect())
}

/// A capability set as the names of what is in it, or `all` if nothing that
/// the kernel has is missing (`full` is the set of the first process).
/// Capabilities without a name are numbers.
pub fn capability_names(set: u64, full: u64) -> Value {
    if set != 0 && set & OLDEST_SET == OLDEST_SET && set & full == full {
        return Value::List(Box::new([Value::word("all")]));
    }
    if set == 0 {
        return Value::List(Box::default());
    }
    let names = (0..64).filter(|number| set >> number & 1 == 1);
    let names = names.map(|number: usize| match CAPABILITIES.get(number) {
        Some(name) => Value::word(name),
        None => Value::from(number.to_string()),
    });
    Value::List(names.collect())
}

/// A capability set as in `/proc/PID/status`: 16 hexadecimal digits.
pub fn capability_digits(set: u64) -> Value {
    // Nothing and everything, which are nearly all sets there are.
    match set {
        0 => return Value::word("0000000000000000"),
        0x3f_ffff_ffff => return Value::word("0000003fffffffff"),
        0x1ff_ffff_ffff => return Value::word("000001ffffffffff"),
        _ => {}
    }
    let mut text = vec![0; 16];
    for (index, digit) in text.iter_mut().enumerate() {
        let value = (set >> (60 - 4 * index)) as u8 & 0xf;
        *digit = if value < 10 {
            b'0' + value
        } else {
            b'a' + value - 10
        };
    }
    Value::text(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_of_capabilities() {
        let full = (1 << 41) - 1;
        let all = Value::List(Box::new(["all".into()]));
        assert_eq!(capability_names(full, full), all);
        assert_eq!(capability_names(OLDEST_SET, OLDEST_SET), all);
        assert_ne!(capability_names(OLDEST_SET, full), all);
        assert_eq!(capability_names(0, full), Value::List(Box::default()));
        assert_eq!(
            capability_names(1 << 21 | 1 << 12 | 1 << 63, full),
            Value::List(Box::new([
                "net_admin".into(),
                "sys_admin".into(),
                "63".into()
            ]))
        );
    }

    proptest! {
        #[test]
        fn digits_are_hexadecimal(set in prop_oneof![
            any::<u64>(),
            Just(0),
            (0_u32..64).prop_map(|bits| (1 << bits) - 1),
        ]) {
            prop_assert_eq!(capability_digits(set), Value::from(format!("{set:016x}")));
        }
    }
}
