//! kprobes (`kernel/kprobes.c`): the hash table of those that are registered.

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::list::chain::{ChainEnd, chain_entries};
use crate::linux::list::entries;
use crate::{Diagnostic, Guest, TableError, layout};

/// `KPROBE_TABLE_SIZE`.
const BUCKETS: u64 = 64;
/// More kprobes than this have no address in common.
const MOST_SHARING: usize = 1 << 12;

layout! {
    /// `include/linux/kprobes.h`
    struct KprobeLayout: "kprobe" {
        chain: "hlist",
        list: "list",
        address: "addr",
        opcode: "opcode",
        before: "pre_handler",
        after: "post_handler",
        flags: "flags",
    }
}

layout! {
    /// `include/linux/kprobes.h`: a kprobe that also calls when the function
    /// returns.
    struct ReturnLayout: "kretprobe" {
        kprobe: "kp",
        handler: "handler",
        entry: "entry_handler",
    }
}

/// A registered kprobe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kprobe {
    /// Where its `struct kprobe` lies.
    pub object: VirtualAddress,
    /// The instruction that it stands at.
    pub address: VirtualAddress,
    /// The first byte of that instruction, which a breakpoint replaces.
    pub opcode: u8,
    /// Called before that instruction, or null.
    pub before: VirtualAddress,
    /// Called after it, or null.
    pub after: VirtualAddress,
    /// `KPROBE_FLAG_` flags.
    pub flags: u64,
    /// Of a kretprobe: called when the function returns, or null.
    pub on_return: VirtualAddress,
    /// Of a kretprobe: called when the function is entered, or null.
    pub on_entry: VirtualAddress,
}

impl Kprobe {
    /// All functions that it calls.
    pub fn functions(&self) -> impl Iterator<Item = VirtualAddress> {
        [self.before, self.after, self.on_entry, self.on_return]
            .into_iter()
            .filter(|function| !function.is_null())
    }
}

/// All registered kprobes; of those that share an address each, with the one
/// that stands for them. None in a kernel without kprobes.
///
/// # Errors
/// [`TableError`] if the kernel's types lack them.
pub fn kprobes(guest: &Guest, table: &'static str) -> Result<Vec<Kprobe>, TableError> {
    let Some(buckets) = guest.address("kprobe_table") else {
        return Ok(Vec::new());
    };
    let layout = guest.layout::<KprobeLayout>(table)?;
    let aggregate = guest.address("aggr_pre_handler");
    let returns = guest.layout::<ReturnLayout>(table).ok();
    let of_returns = guest.address("pre_handler_kretprobe");
    let read = |object: VirtualAddress| -> Result<Kprobe, ReadError> {
        let before = guest.pointer(object, &layout.before)?;
        let (mut on_return, mut on_entry) = Default::default();
        if let Some(returns) = &returns
            && Some(before) == of_returns
        {
            let whole = object.wrapping_sub(returns.kprobe.offset);
            on_return = guest.pointer(whole, &returns.handler)?;
            on_entry = guest.pointer(whole, &returns.entry)?;
        }
        Ok(Kprobe {
            object,
            address: guest.pointer(object, &layout.address)?,
            opcode: guest.number(object, &layout.opcode)? as u8,
            before,
            on_return,
            on_entry,
            after: guest.pointer(object, &layout.after)?,
            flags: guest.number(object, &layout.flags)? & 0xffff_ffff,
        })
    };
    let mut found = Vec::new();
    let mut take = |object| match read(object) {
        Ok(kprobe) => {
            found.push(kprobe);
            Some(kprobe)
        }
        Err(error) => {
            guest.diagnostics().record(Diagnostic {
                table,
                subject: "kprobe".to_owned(),
                address: Some(object),
                reason: error.to_string(),
            });
            None
        }
    };
    for bucket in 0..BUCKETS {
        let head = buckets.wrapping_add(bucket * 8);
        for object in chain_entries(
            guest,
            table,
            "kprobe_table",
            head,
            layout.chain.offset,
            ChainEnd::Null,
        ) {
            let kprobe = take(object);
            if kprobe.is_some_and(|kprobe| Some(kprobe.before) == aggregate) {
                let head = object.wrapping_add(layout.list.offset);
                for member in entries(guest, table, "kprobe.list", head, layout.list.offset)
                    .take(MOST_SHARING)
                {
                    take(member);
                }
            }
        }
    }
    Ok(found)
}
