//! The kernel's log, as `/dev/kmsg` shows it: the table `kmsg`.
//!
//! It needs no types: without them VMCOREINFO says where the members lie, and
//! without that the data does (see [`layout`]).

pub mod layout;
pub mod log_buffer;
pub mod ring;

use std::ops::ControlFlow;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress};

use crate::linux::clock::Clock;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
};
use layout::Origin;
use log_buffer::{Indices, LogLayout};
use ring::{Found, Record, RingLayout};

const TABLE: &str = "kmsg";

/// `LOG_BUF_LEN_MAX` is 2 GiB; of the old log, whose buffer is copied whole,
/// at most this much is taken.
const MOST_LOG_BYTES: u64 = 64 << 20;
/// How often the old log is copied again because it moved meanwhile.
const LOG_ATTEMPTS: u32 = 8;

/// Bit 31 of `caller_id` says that the rest is a CPU's number.
const CALLER_IS_CPU: u32 = 1 << 31;

/// A record and what tells its wall-clock time.
pub struct Message {
    record: Record,
    clock: Arc<Result<Clock, String>>,
}

/// The table `kmsg`.
pub static KMSG: TableOf<Message> = TableOf {
    name: TABLE,
    aliases: &["dmesg"],
    meaning: "The records in the kernel's log, oldest first, as /dev/kmsg shows them.",
    columns: &[
        Column {
            name: "sequence",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "The kernel's number of the record, from 0 at boot. A gap means records \
                      that were overwritten or never found room.",
            value: |_, message| message.record.sequence.into(),
        },
        Column {
            name: "nanoseconds",
            kind: Kind::Unsigned,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Time since boot, in nanoseconds of the kernel's own clock.",
            value: |_, message| message.record.nanoseconds.into(),
        },
        Column {
            name: "time",
            kind: Kind::Time,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "The same as wall-clock time. The log's clock and the wall clock drift \
                      apart by up to some milliseconds an hour.",
            value: |_, message| match message.clock.as_ref() {
                Ok(clock) => Value::time(clock.of_monotonic(message.record.nanoseconds)),
                Err(reason) => Value::unreadable(reason),
            },
        },
        Column {
            name: "level",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "Severity: emerg, alert, crit, err, warn, notice, info or debug.",
            value: |_, message| level_name(message.record.level).into(),
        },
        Column {
            name: "facility",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "The syslog facility: kern for the kernel's own records, user for what \
                      was written to /dev/kmsg.",
            value: |_, message| facility_name(message.record.facility),
        },
        Column {
            name: "caller",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Who logged: T and the thread's id, or C and the number of the CPU.",
            value: |_, message| message.record.caller.map(caller_name).into(),
        },
        Column {
            name: "caller_comm",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "The name of the thread that logged, where the kernel keeps it.",
            value: |_, message| text_or_null(&message.record.command),
        },
        Column {
            name: "subsystem",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "The subsystem of the device that the record is about.",
            value: |_, message| text_or_null(&message.record.subsystem),
        },
        Column {
            name: "device",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "The device that the record is about.",
            value: |_, message| text_or_null(&message.record.device),
        },
        Column {
            name: "complete",
            kind: Kind::Boolean,
            cost: Cost::Kernel,
            shown: Shown::OnRequest,
            meaning: "Whether the record is final. One that may still be continued is not \
                      shown by /dev/kmsg yet.",
            value: |_, message| message.record.complete.into(),
        },
        Column {
            name: "text",
            kind: Kind::Text,
            cost: Cost::Kernel,
            shown: Shown::Always,
            meaning: "The text, without the line's end.",
            value: |_, message| Value::text(message.record.text.as_slice()),
        },
    ],
    items,
};

fn text_or_null(bytes: &[u8]) -> Value {
    (!bytes.is_empty()).then(|| Text::new(bytes)).into()
}

/// The name of a severity as `dmesg` writes it.
pub fn level_name(level: u8) -> &'static str {
    const NAMES: [&str; 8] = [
        "emerg", "alert", "crit", "err", "warn", "notice", "info", "debug",
    ];
    NAMES
        .get(usize::from(level & 7))
        .copied()
        .unwrap_or("debug")
}

/// The name of a syslog facility as `dmesg` writes it; its number if it has
/// none.
fn facility_name(facility: u8) -> Value {
    const NAMES: [&str; 12] = [
        "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron",
        "authpriv", "ftp",
    ];
    match NAMES.get(usize::from(facility)) {
        Some(name) => (*name).into(),
        None => facility.to_string().into(),
    }
}

fn caller_name(caller: u32) -> String {
    if caller & CALLER_IS_CPU == 0 {
        format!("T{caller}")
    } else {
        format!("C{}", caller & !CALLER_IS_CPU)
    }
}

fn record_diagnostic(guest: &Guest, address: Option<VirtualAddress>, reason: String) {
    guest.diagnostics().record(Diagnostic {
        table: TABLE,
        subject: "printk log".to_owned(),
        address,
        reason,
    });
}

fn items(
    guest: &Guest,
    _selection: &Selection,
    sink: &mut Items<'_, Message>,
) -> Result<(), TableError> {
    let clock = Clock::read(guest, TABLE).map_err(|error| error.to_string());
    let clock = Arc::new(clock);
    let mut give = |record| {
        sink(Message {
            record,
            clock: clock.clone(),
        }) == ControlFlow::Continue(())
    };
    match guest.address("prb") {
        Some(pointer) => ring_records(guest, pointer, &mut give),
        None => log_records(guest, &mut give),
    }
}

/// The layout of the ring, and how it was found. None has a diagnostic.
fn ring_layout(guest: &Guest, ring: VirtualAddress) -> Result<(RingLayout, Origin), TableError> {
    let missing = match guest.types(TABLE) {
        Ok(types) => match layout::ring_from_types(types) {
            Ok(layout) => return Ok((layout, Origin::Types)),
            Err(source) => TableError::Type {
                table: TABLE,
                source,
            },
        },
        Err(error) => error,
    };
    let notes = guest.kernel().vmcoreinfo.as_ref();
    if let Some(layout) =
        notes.and_then(|notes| layout::ring_from_core_information(notes.text.as_bytes()))
    {
        return Ok((layout, Origin::CoreInformation));
    }
    let read = |address, buffer: &mut [u8]| guest.space().read(address, buffer);
    layout::ring_by_proof(ring, &read)
        .map(|layout| (layout, Origin::Proof))
        .ok_or(missing)
}

fn ring_records(
    guest: &Guest,
    pointer: VirtualAddress,
    give: &mut dyn FnMut(Record) -> bool,
) -> Result<(), TableError> {
    let ring = guest
        .space()
        .read_pointer(pointer)
        .map_err(|source| TableError::Read {
            table: TABLE,
            what: "prb",
            source,
        })?;
    let (layout, origin) = ring_layout(guest, ring)?;
    let unsure = match origin {
        Origin::Types => None,
        Origin::CoreInformation => Some(
            "without types, VMCOREINFO tells the ring's layout, but not whether records name \
             their callers (caller_comm)",
        ),
        Origin::Proof => Some(
            "neither types nor VMCOREINFO tell the ring's layout; it was found by what fits \
             its data",
        ),
    };
    if let Some(unsure) = unsure {
        record_diagnostic(guest, Some(ring), unsure.to_owned());
    }
    let read = |address, buffer: &mut [u8]| guest.space().read(address, buffer);
    let mut expected: Option<u64> = None;
    let outcome = ring::records(&layout, ring, &read, &mut |found| match found {
        Found::Record(record) => {
            if let Some(expected) = expected
                && record.sequence < expected
            {
                record_diagnostic(
                    guest,
                    Some(ring),
                    format!(
                        "record {} follows one with number {}",
                        record.sequence,
                        expected.wrapping_sub(1)
                    ),
                );
            }
            expected = Some(record.sequence.wrapping_add(1));
            give(record)
        }
        Found::Lost(loss) => {
            if matches!(loss, ring::Loss::Overwritten { .. }) {
                guest.diagnostics().count_torn_read();
            }
            record_diagnostic(guest, Some(ring), loss.to_string());
            true
        }
    });
    if let Err(error) = outcome {
        record_diagnostic(guest, Some(ring), error.to_string());
    }
    Ok(())
}

fn log_layout(guest: &Guest) -> LogLayout {
    let by_types = guest
        .types(TABLE)
        .ok()
        .and_then(|types| layout::log_from_types(types).ok());
    let notes = guest.kernel().vmcoreinfo.as_ref();
    by_types
        .or_else(|| {
            notes.and_then(|notes| layout::log_from_core_information(notes.text.as_bytes()))
        })
        .unwrap_or(LogLayout::standard(false))
}

/// The old log's variables and a copy of its buffer.
fn copy_log(guest: &Guest) -> Result<(Indices, Vec<u8>), TableError> {
    let space = guest.space();
    let error = |what| {
        move |source: ReadError| TableError::Read {
            table: TABLE,
            what,
            source,
        }
    };
    let number = |name: &'static str, wide: bool| {
        let address = guest.symbol(TABLE, name)?;
        if wide {
            space.read_u64(address).map_err(error(name))
        } else {
            space.read_u32(address).map(u64::from).map_err(error(name))
        }
    };
    let indices = Indices {
        first: number("log_first_idx", false)?,
        next: number("log_next_idx", false)?,
        first_sequence: number("log_first_seq", true)?,
        next_sequence: number("log_next_seq", true)?,
    };
    let length = number("log_buf_len", false)?.min(MOST_LOG_BYTES);
    let buffer = VirtualAddress::new(number("log_buf", true)?);
    let mut bytes = vec![0; length as usize];
    space.read(buffer, &mut bytes).map_err(error("log_buf"))?;
    Ok((indices, bytes))
}

fn log_records(guest: &Guest, give: &mut dyn FnMut(Record) -> bool) -> Result<(), TableError> {
    let layout = log_layout(guest);
    let first = |guest: &Guest| copy_log(guest).map(|(indices, _)| indices.first_sequence);
    let (mut indices, mut buffer) = copy_log(guest)?;
    for _ in 0..LOG_ATTEMPTS {
        // Records are only ever dropped at the front: if the first is still
        // there, nothing that was copied had been written over.
        if first(guest)? == indices.first_sequence {
            break;
        }
        guest.diagnostics().count_torn_read();
        (indices, buffer) = copy_log(guest)?;
    }
    if let Err(error) = log_buffer::records(&layout, &buffer, indices, give) {
        record_diagnostic(guest, None, error.to_string());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(level_name(0), "emerg");
        assert_eq!(level_name(7), "debug");
        assert_eq!(facility_name(1), Value::from("user"));
        assert_eq!(facility_name(23), Value::from("23"));
        assert_eq!(caller_name(12), "T12");
        assert_eq!(caller_name(0x8000_0003), "C3");
    }
}
