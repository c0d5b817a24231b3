//! The table `bpf`: programs, maps and links that are loaded
//! (`include/linux/bpf.h`, `kernel/bpf/syscall.c`), by the kernel's own
//! registers of their ids.

use std::ops::ControlFlow;
use std::sync::Arc;

use secmon_memory::{ReadError, VirtualAddress, Volatility};
use secmon_profile::Member;

use super::clock::Clock;
use super::list::is_object_address;
use super::owner::{Behind, Owner, Owners};
use super::per_cpu::PerCpu;
use super::xarray;
use crate::table::Items;
use crate::{
    Column, Cost, Diagnostic, Guest, Kind, Selection, Shown, TableError, TableOf, Text, Value,
    layout,
};

const TABLE: &str = "bpf";

/// More objects of a kind than this are in no guest.
const MOST_OBJECTS: usize = 1 << 20;
/// Bytes of a program's tag.
const TAG_BYTES: usize = 8;
/// Bytes of the name of a function or tracepoint that are read.
const LONGEST_NAME: usize = 512;

layout! {
    /// `include/linux/bpf.h`
    struct ProgramLayout: "bpf_prog" {
        kind: "type",
        attach_kind: "expected_attach_type",
        tag: "tag",
        aux: "aux",
        jited: "jited",
        instructions: "len",
        jited_bytes: "jited_len",
        entry: "bpf_func",
    } optional {
        /// Of each CPU, since 5.12.
        statistics: "stats",
    }
}

layout! {
    /// `include/linux/bpf.h`
    struct ProgramAuxLayout: "bpf_prog_aux" {
        id: "id",
        name: "name",
        load_time: "load_time",
        user: "user",
    } optional {
        function: "attach_func_name",
        /// Of each CPU, until 5.11.
        statistics: "stats",
    }
}

layout! {
    /// `include/linux/filter.h`
    struct StatisticsLayout: "bpf_prog_stats" {
        count: "cnt",
    }
}

layout! {
    /// `include/linux/sched/user.h`
    struct UserLayout: "user_struct" {
        uid: "uid",
    }
}

layout! {
    /// `include/linux/bpf.h`
    struct MapLayout: "bpf_map" {
        id: "id",
        kind: "map_type",
        key_bytes: "key_size",
        value_bytes: "value_size",
        entries: "max_entries",
        flags: "map_flags",
        name: "name",
    } optional {
        /// Until 5.10.
        user: "memory.user",
    }
}

layout! {
    /// `include/linux/bpf.h`
    struct LinkLayout: "bpf_link" {
        id: "id",
        kind: "type",
        program: "prog",
    }
}

layout! {
    /// `kernel/bpf/syscall.c`
    struct RawTracepointLinkLayout: "bpf_raw_tp_link" {
        event: "btp",
    }
}

layout! {
    /// `include/linux/tracepoint-defs.h`
    struct RawEventLayout: "bpf_raw_event_map" {
        tracepoint: "tp",
    }
}

layout! {
    /// `include/linux/tracepoint-defs.h`
    struct TracepointLayout: "tracepoint" {
        name: "name",
    }
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Object {
    Program,
    Map,
    Link,
}

/// What all rows of one listing share.
struct Context {
    owners: Owners,
    clock: Result<Clock, String>,
    cpus: Result<PerCpu, String>,
}

/// A program, map or link.
pub struct Loaded {
    object: Object,
    id: u64,
    address: VirtualAddress,
    context: Arc<Context>,
}

const fn column(
    name: &'static str,
    kind: Kind,
    shown: Shown,
    meaning: &'static str,
    value: fn(&Guest, &Loaded) -> Value,
) -> Column<Loaded> {
    Column {
        name,
        kind,
        cost: Cost::Kernel,
        shown,
        meaning,
        value,
    }
}

/// The table `bpf`.
pub static BPF: TableOf<Loaded> = TableOf {
    name: TABLE,
    aliases: &["ebpf"],
    meaning: "BPF programs, maps and links that are loaded.",
    columns: &[
        column(
            "object",
            Kind::Text,
            Shown::Always,
            "program, map or link.",
            |_, loaded| {
                match loaded.object {
                    Object::Program => "program",
                    Object::Map => "map",
                    Object::Link => "link",
                }
                .into()
            },
        ),
        column(
            "id",
            Kind::Unsigned,
            Shown::Always,
            "Its number among its kind.",
            |_, loaded| loaded.id.into(),
        ),
        column(
            "type",
            Kind::Text,
            Shown::Always,
            "What kind of program, map or link it is: kprobe, hash, raw_tracepoint.",
            |guest, loaded| loaded.told(guest, type_name),
        ),
        column(
            "name",
            Kind::Text,
            Shown::Always,
            "Its name, at most 15 bytes; links have none.",
            |guest, loaded| loaded.told(guest, name),
        ),
        column(
            "tag",
            Kind::Text,
            Shown::Always,
            "A checksum over a program's instructions, in hexadecimal.",
            |guest, loaded| loaded.told(guest, tag),
        ),
        column(
            "load_time",
            Kind::Time,
            Shown::Always,
            "When a program was loaded.",
            |guest, loaded| loaded.told(guest, load_time),
        ),
        column(
            "uid",
            Kind::Unsigned,
            Shown::Always,
            "The user that loaded a program.",
            |guest, loaded| loaded.told(guest, user),
        ),
        column(
            "pid",
            Kind::Unsigned,
            Shown::Always,
            "The first process that has it open; null if it lives by being attached or pinned.",
            |_, loaded| loaded.owners().first().map(|owner| owner.pid).into(),
        ),
        column(
            "pids",
            Kind::List,
            Shown::OnRequest,
            "All processes that have it open, once for each descriptor.",
            |_, loaded| {
                let owners = loaded.owners().iter();
                owners.map(|owner| owner.pid).collect::<Vec<_>>().into()
            },
        ),
        column(
            "attach_type",
            Kind::Text,
            Shown::Always,
            "What a program was made to be attached to, where its type leaves a choice.",
            |guest, loaded| loaded.told(guest, attach_type),
        ),
        column(
            "attach_to",
            Kind::Text,
            Shown::Always,
            "The function that a program traces, the tracepoint that a link leads to.",
            |guest, loaded| loaded.told(guest, attach_to),
        ),
        column(
            "program",
            Kind::Unsigned,
            Shown::Always,
            "The id of a link's program.",
            |guest, loaded| loaded.told(guest, program),
        ),
        column(
            "entry",
            Kind::Address,
            Shown::OnRequest,
            "Where a program's machine code starts; null if it is interpreted.",
            |guest, loaded| loaded.told(guest, entry),
        ),
        column(
            "jited_bytes",
            Kind::Unsigned,
            Shown::OnRequest,
            "Bytes of a program's machine code.",
            |guest, loaded| {
                loaded.told(guest, |guest, loaded| {
                    program_number(guest, loaded, |layout| &layout.jited_bytes)
                })
            },
        ),
        column(
            "instructions",
            Kind::Unsigned,
            Shown::OnRequest,
            "How many instructions a program has.",
            |guest, loaded| {
                loaded.told(guest, |guest, loaded| {
                    program_number(guest, loaded, |layout| &layout.instructions)
                })
            },
        ),
        column(
            "run_count",
            Kind::Unsigned,
            Shown::OnRequest,
            "How often a program ran; 0 unless the kernel was told to count.",
            |guest, loaded| loaded.told(guest, run_count),
        ),
        column(
            "key_bytes",
            Kind::Unsigned,
            Shown::OnRequest,
            "Bytes of a map's keys.",
            |guest, loaded| {
                loaded.told(guest, |guest, loaded| {
                    map_number(guest, loaded, |layout| &layout.key_bytes)
                })
            },
        ),
        column(
            "value_bytes",
            Kind::Unsigned,
            Shown::OnRequest,
            "Bytes of a map's values.",
            |guest, loaded| {
                loaded.told(guest, |guest, loaded| {
                    map_number(guest, loaded, |layout| &layout.value_bytes)
                })
            },
        ),
        column(
            "max_entries",
            Kind::Unsigned,
            Shown::OnRequest,
            "How many entries a map can have.",
            |guest, loaded| {
                loaded.told(guest, |guest, loaded| {
                    map_number(guest, loaded, |layout| &layout.entries)
                })
            },
        ),
        column(
            "map_flags",
            Kind::Unsigned,
            Shown::OnRequest,
            "A map's BPF_F_ flags.",
            |guest, loaded| {
                loaded.told(guest, |guest, loaded| {
                    map_number(guest, loaded, |layout| &layout.flags)
                })
            },
        ),
        column(
            "address",
            Kind::Address,
            Shown::OnRequest,
            "Where its structure lies.",
            |_, loaded| loaded.address.into(),
        ),
    ],
    items,
};

/// Why a value can't be told.
#[derive(Debug, thiserror::Error)]
enum ValueError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("{0}")]
    Clock(String),
}

impl Loaded {
    fn told(&self, guest: &Guest, value: fn(&Guest, &Self) -> Result<Value, ValueError>) -> Value {
        value(guest, self).unwrap_or_else(Value::unreadable)
    }

    fn owners(&self) -> &[Owner] {
        self.context.owners.of(self.address)
    }

    /// The program's second half.
    fn aux(&self, guest: &Guest) -> Result<Option<VirtualAddress>, ValueError> {
        if self.object != Object::Program {
            return Ok(None);
        }
        let layout = guest.layout::<ProgramLayout>(TABLE)?;
        Ok(Some(guest.pointer(self.address, &layout.aux)?))
    }
}

/// A number that all objects of one kind have: the id in `structure`, for
/// checks.
fn id_of(guest: &Guest, object: Object, address: VirtualAddress) -> Result<u64, ValueError> {
    Ok(match object {
        Object::Program => {
            let layout = guest.layout::<ProgramLayout>(TABLE)?;
            let aux = guest.layout::<ProgramAuxLayout>(TABLE)?;
            guest.number(guest.pointer(address, &layout.aux)?, &aux.id)?
        }
        Object::Map => guest.number(address, &guest.layout::<MapLayout>(TABLE)?.id)?,
        Object::Link => guest.number(address, &guest.layout::<LinkLayout>(TABLE)?.id)?,
    })
}

/// The enumerator's name without its prefix, in lower case.
fn enumerator(guest: &Guest, enumeration: &str, prefix: &str, value: u64) -> Value {
    let name = guest
        .types(TABLE)
        .ok()
        .and_then(|types| types.enumerators(enumeration).ok())
        .and_then(|values| {
            let wanted = i64::try_from(value).ok()?;
            values.into_iter().find(|(_, known)| *known == wanted)
        });
    match name {
        Some((name, _)) => name
            .strip_prefix(prefix)
            .unwrap_or(&name)
            .to_lowercase()
            .into(),
        None => value.to_string().into(),
    }
}

fn type_name(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    let number = |member: &Member| guest.number(loaded.address, member);
    Ok(match loaded.object {
        Object::Program => {
            let kind = number(&guest.layout::<ProgramLayout>(TABLE)?.kind)?;
            enumerator(guest, "bpf_prog_type", "BPF_PROG_TYPE_", kind)
        }
        Object::Map => {
            let kind = number(&guest.layout::<MapLayout>(TABLE)?.kind)?;
            enumerator(guest, "bpf_map_type", "BPF_MAP_TYPE_", kind)
        }
        Object::Link => {
            let kind = number(&guest.layout::<LinkLayout>(TABLE)?.kind)?;
            enumerator(guest, "bpf_link_type", "BPF_LINK_TYPE_", kind)
        }
    })
}

fn name(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    let text = |base: VirtualAddress, member: &Member| {
        let address = base.wrapping_add(member.offset);
        let length = member.size.min(LONGEST_NAME as u64) as usize;
        guest.space().read_c_string(address, length)
    };
    let bytes = match (loaded.object, loaded.aux(guest)?) {
        (Object::Program, Some(aux)) => text(aux, &guest.layout::<ProgramAuxLayout>(TABLE)?.name)?,
        (Object::Map, _) => text(loaded.address, &guest.layout::<MapLayout>(TABLE)?.name)?,
        _ => return Ok(Value::Null),
    };
    Ok((!bytes.is_empty()).then(|| Text::new(bytes)).into())
}

fn tag(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    if loaded.object != Object::Program {
        return Ok(Value::Null);
    }
    let layout = guest.layout::<ProgramLayout>(TABLE)?;
    let mut bytes = [0; TAG_BYTES];
    let address = loaded.address.wrapping_add(layout.tag.offset);
    guest.space().read(address, &mut bytes)?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(digits.into())
}

fn load_time(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    let Some(aux) = loaded.aux(guest)? else {
        return Ok(Value::Null);
    };
    let since_boot = guest.number(aux, &guest.layout::<ProgramAuxLayout>(TABLE)?.load_time)?;
    match &loaded.context.clock {
        Ok(clock) => Ok(Value::time(clock.of_boot_time(since_boot))),
        Err(reason) => Err(ValueError::Clock(reason.clone())),
    }
}

fn user(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    let user = match (loaded.object, loaded.aux(guest)?) {
        (Object::Program, Some(aux)) => {
            guest.pointer(aux, &guest.layout::<ProgramAuxLayout>(TABLE)?.user)?
        }
        (Object::Map, _) => match &guest.layout::<MapLayout>(TABLE)?.user {
            Some(member) => guest.pointer(loaded.address, member)?,
            None => return Ok(Value::Null),
        },
        _ => return Ok(Value::Null),
    };
    if user.is_null() {
        return Ok(Value::Null);
    }
    let uid = guest.number(user, &guest.layout::<UserLayout>(TABLE)?.uid)?;
    Ok((uid & 0xffff_ffff).into())
}

fn attach_type(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    if loaded.object != Object::Program {
        return Ok(Value::Null);
    }
    let layout = guest.layout::<ProgramLayout>(TABLE)?;
    let kind = guest.number(loaded.address, &layout.attach_kind)?;
    // 0 is a value of its own only for programs of control groups; for all
    // others it says that there is no choice.
    if kind == 0 {
        let program = guest.number(loaded.address, &layout.kind)?;
        let program = enumerator(guest, "bpf_prog_type", "BPF_PROG_TYPE_", program);
        if !program.to_string().starts_with("cgroup") {
            return Ok(Value::Null);
        }
    }
    Ok(enumerator(guest, "bpf_attach_type", "BPF_", kind))
}

fn attach_to(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    let pointer = match (loaded.object, loaded.aux(guest)?) {
        (Object::Program, Some(aux)) => match &guest.layout::<ProgramAuxLayout>(TABLE)?.function {
            Some(member) => guest.pointer(aux, member)?,
            None => return Ok(Value::Null),
        },
        (Object::Link, _) => {
            let layout = guest.layout::<LinkLayout>(TABLE)?;
            let kind = guest.number(loaded.address, &layout.kind)?;
            let kind = enumerator(guest, "bpf_link_type", "BPF_LINK_TYPE_", kind);
            if kind != Value::from("raw_tracepoint") {
                return Ok(Value::Null);
            }
            let link = guest.layout::<RawTracepointLinkLayout>(TABLE)?;
            let event = guest.layout::<RawEventLayout>(TABLE)?;
            let tracepoint = guest.layout::<TracepointLayout>(TABLE)?;
            let at = guest.pointer(loaded.address, &link.event)?;
            let at = guest.pointer(at, &event.tracepoint)?;
            guest.pointer(at, &tracepoint.name)?
        }
        _ => return Ok(Value::Null),
    };
    if pointer.is_null() {
        return Ok(Value::Null);
    }
    Ok(Value::text(
        guest.space().read_c_string(pointer, LONGEST_NAME)?,
    ))
}

fn program(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    if loaded.object != Object::Link {
        return Ok(Value::Null);
    }
    let layout = guest.layout::<LinkLayout>(TABLE)?;
    let program = guest.pointer(loaded.address, &layout.program)?;
    if program.is_null() {
        return Ok(Value::Null);
    }
    Ok(id_of(guest, Object::Program, program)?.into())
}

fn entry(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    if loaded.object != Object::Program {
        return Ok(Value::Null);
    }
    let layout = guest.layout::<ProgramLayout>(TABLE)?;
    if guest.number(loaded.address, &layout.jited)? == 0 {
        return Ok(Value::Null);
    }
    Ok(guest.pointer(loaded.address, &layout.entry)?.into())
}

fn program_number(
    guest: &Guest,
    loaded: &Loaded,
    member: fn(&ProgramLayout) -> &Member,
) -> Result<Value, ValueError> {
    if loaded.object != Object::Program {
        return Ok(Value::Null);
    }
    let layout = guest.layout::<ProgramLayout>(TABLE)?;
    Ok(guest.number(loaded.address, member(&layout))?.into())
}

fn map_number(
    guest: &Guest,
    loaded: &Loaded,
    member: fn(&MapLayout) -> &Member,
) -> Result<Value, ValueError> {
    if loaded.object != Object::Map {
        return Ok(Value::Null);
    }
    let layout = guest.layout::<MapLayout>(TABLE)?;
    Ok(guest.number(loaded.address, member(&layout))?.into())
}

fn run_count(guest: &Guest, loaded: &Loaded) -> Result<Value, ValueError> {
    let Some(aux) = loaded.aux(guest)? else {
        return Ok(Value::Null);
    };
    let program = guest.layout::<ProgramLayout>(TABLE)?;
    let older = guest.layout::<ProgramAuxLayout>(TABLE)?;
    let statistics = match (&program.statistics, &older.statistics) {
        (Some(member), _) => guest.pointer(loaded.address, member)?,
        (None, Some(member)) => guest.pointer(aux, member)?,
        (None, None) => return Ok(Value::Null),
    };
    if statistics.is_null() {
        return Ok(Value::Null);
    }
    let layout = guest.layout::<StatisticsLayout>(TABLE)?;
    let cpus = match &loaded.context.cpus {
        Ok(cpus) => cpus,
        Err(reason) => return Err(ValueError::Clock(reason.clone())),
    };
    let mut sum = 0_u64;
    for cpu in cpus.possible() {
        if let Some(copy) = cpus.checked_address(guest, statistics, cpu) {
            sum = sum.wrapping_add(guest.number(copy, &layout.count)?);
        }
    }
    Ok(sum.into())
}

fn items(
    guest: &Guest,
    selection: &Selection,
    sink: &mut Items<'_, Loaded>,
) -> Result<(), TableError> {
    let kinds = [
        (Object::Program, "prog_idr"),
        (Object::Map, "map_idr"),
        (Object::Link, "link_idr"),
    ];
    // The first must be there, or the kernel has no BPF at all.
    guest.symbol(TABLE, "prog_idr")?;
    let others = ["bpf_map_fops", "bpf_link_fops", "bpf_link_fops_poll"];
    let owners = Owners::read(guest, TABLE, Behind::File, "bpf_prog_fops", &others).unwrap_or_else(
        |error| {
            guest.diagnostics().record(Diagnostic {
                table: TABLE,
                subject: "files_struct".to_owned(),
                address: None,
                reason: format!("objects are without their owners: {error}"),
            });
            Owners::default()
        },
    );
    let context = Arc::new(Context {
        owners,
        clock: Clock::read(guest, TABLE).map_err(|error| error.to_string()),
        cpus: PerCpu::read(guest, TABLE).map_err(|error| error.to_string()),
    });
    for (object, symbol) in kinds {
        // Links came later than the others.
        let Some(idr) = guest.address(symbol) else {
            continue;
        };
        let walk = xarray::idr_entries(guest, TABLE, idr, MOST_OBJECTS)?;
        for entry in walk.report(guest, TABLE, symbol) {
            let (id, address) = (entry.index, VirtualAddress::new(entry.word));
            let loaded = Loaded {
                object,
                id,
                address,
                context: context.clone(),
            };
            let wanted = selection.pids.is_none()
                || loaded
                    .owners()
                    .iter()
                    .any(|owner| selection.wants_pid(owner.pid.into()));
            if !wanted || !is_sound(guest, &loaded, symbol) {
                continue;
            }
            if let ControlFlow::Break(()) = sink(loaded) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Whether the object bears the id that it is registered under.
fn is_sound(guest: &Guest, loaded: &Loaded, symbol: &str) -> bool {
    let found = if is_object_address(guest.space(), loaded.address) {
        id_of(guest, loaded.object, loaded.address).map_err(|error| error.to_string())
    } else {
        Err("that is no address of an object".to_owned())
    };
    let live = guest.space().memory().volatility() == Volatility::Live;
    let reason = match found {
        Ok(id) if id == loaded.id => return true,
        // Its id is taken away before it goes.
        Ok(0) if live => {
            guest.diagnostics().count_torn_read();
            return false;
        }
        Ok(id) => format!("it says {id}: left out"),
        Err(error) => format!("left out: {error}"),
    };
    guest.diagnostics().record(Diagnostic {
        table: TABLE,
        subject: format!("{symbol} id {}", loaded.id),
        address: Some(loaded.address),
        reason,
    });
    false
}
