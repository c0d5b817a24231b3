//! User memory of a process: its pages through its own page tables, and the
//! arguments and environment that lie there.
//!
//! A page that is not there stays away: nothing here can make the guest load
//! one, as a reader of `/proc` inside it would. What is missing and why is
//! part of every answer.

use secmon_memory::{
    AddressSpace, NotPresent, PAGE_SIZE, PhysicalReadError, ReadError, TableLevel,
    TranslationError, VirtualAddress, Volatility,
};

use super::list::is_object_address;
use crate::{Guest, TableError, Text, Value, layout};

/// The most bytes of arguments or environment that are read: execve allows
/// three quarters of 8 MiB (`fs/exec.c`), both together.
const STRINGS_LIMIT: u64 = 8 << 20;

/// What a title set by setproctitle can have, `get_mm_proctitle` in
/// `fs/proc/base.c`.
const TITLE_LIMIT: u64 = PAGE_SIZE;

/// How often what changed during the read is read again.
const ATTEMPTS: usize = 8;

/// How much of what could be read is shown beside the reason why the rest
/// could not.
const EXCERPT: usize = 256;

/// Swap areas are numbered from 0; numbers from here on mean pages on the
/// move, poisoned, or owned by a device (`include/linux/swap.h`, with all
/// options on).
pub(crate) const FIRST_SPECIAL_SWAP: u8 = 23;

layout! {
    /// `include/linux/mm_types.h`
    struct UserLayout: "mm_struct" {
        pgd: "pgd",
        users: "mm_users",
        arg_start: "arg_start",
        arg_end: "arg_end",
        env_start: "env_start",
        env_end: "env_end",
    }
}

/// Why user memory could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// The process has given its memory up, or never had any.
    #[error("the process has no memory of its own any more")]
    NoMemory,
    /// `mm_struct.pgd` leads nowhere.
    #[error("mm_struct.pgd is {pgd}, which leads to no page table: {source}")]
    PageTable {
        /// Its value.
        pgd: VirtualAddress,
        /// Why not.
        source: TranslationError,
    },
    /// The page was written out.
    #[error("the page at {address} is swapped out (swap area {area}, slot {slot:#x})")]
    Swapped {
        /// The first address that could not be read.
        address: VirtualAddress,
        /// The number of the swap area.
        area: u8,
        /// Its place there, in pages.
        slot: u64,
    },
    /// The page is on the move or out of use.
    #[error("the page at {address} is being moved or is out of use (swap type {kind})")]
    Special {
        /// The first address that could not be read.
        address: VirtualAddress,
        /// The number that stands where a swap area would.
        kind: u8,
    },
    /// No page is mapped: never touched, or a file's page that was dropped.
    #[error("the page at {address} is not present (no {level} entry)")]
    NotPresent {
        /// The first address that could not be read.
        address: VirtualAddress,
        /// The table whose entry is empty.
        level: TableLevel,
    },
    /// The page tables are damaged, or the address is none.
    #[error(transparent)]
    Translation(TranslationError),
    /// The page is not in the image.
    #[error("the page at {address}: {source}")]
    Physical {
        /// The first address that could not be read.
        address: VirtualAddress,
        /// Why not.
        source: PhysicalReadError,
    },
    /// The kernel's own structure could not be read.
    #[error("mm_struct at {mm}: {source}")]
    Kernel {
        /// Its address.
        mm: VirtualAddress,
        /// Why not.
        source: ReadError,
    },
    /// A range that no process has.
    #[error("{what} is said to lie from {start} to {end}")]
    Range {
        /// What lies there.
        what: &'static str,
        /// Its start.
        start: VirtualAddress,
        /// Its end.
        end: VirtualAddress,
    },
    /// It changed each time it was read.
    #[error("it changed during each of {attempts} reads")]
    Changing {
        /// How often it was read.
        attempts: usize,
    },
    /// The kernel's types are not known.
    #[error("{0}")]
    Types(String),
}

impl From<TableError> for UserError {
    fn from(error: TableError) -> Self {
        Self::Types(error.to_string())
    }
}

/// The user memory of one process.
#[derive(Clone)]
pub struct UserMemory {
    space: AddressSpace,
    live: bool,
}

impl UserMemory {
    /// The memory described by the `mm_struct` at `mm`.
    ///
    /// # Errors
    /// [`UserError`] if there is none.
    pub fn new(guest: &Guest, mm: VirtualAddress) -> Result<Self, UserError> {
        let layout = guest.layout::<UserLayout>("processes")?;
        Self::with(guest, &layout, mm)
    }

    fn with(guest: &Guest, layout: &UserLayout, mm: VirtualAddress) -> Result<Self, UserError> {
        if !is_object_address(guest.space(), mm) {
            return Err(UserError::NoMemory);
        }
        let kernel = |source| UserError::Kernel { mm, source };
        let pgd = guest.pointer(mm, &layout.pgd).map_err(kernel)?;
        // With page-table isolation this is the kernel's copy, which maps all
        // user memory as well.
        let root = guest
            .space()
            .translate(pgd)
            .map_err(|source| UserError::PageTable { pgd, source })?
            .physical;
        let space = guest.space().with_root(root);
        let live = space.memory().volatility() == Volatility::Live;
        Ok(Self { space, live })
    }

    /// The page tables over the guest's memory.
    pub fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// Copies what lies from `address` on to `buffer`. Pages that only the
    /// hardware must not touch (`PROT_NONE`, NUMA balancing) are read.
    ///
    /// # Errors
    /// [`UserError`] for the first page that is not there, with the number of
    /// bytes before it, which `buffer` then holds.
    pub fn read(
        &self,
        address: VirtualAddress,
        buffer: &mut [u8],
    ) -> Result<(), (usize, UserError)> {
        let mut done = 0;
        while done < buffer.len() {
            let position = address.wrapping_add(done as u64);
            let left = (PAGE_SIZE - position.page_offset()) as usize;
            let end = buffer.len().min(done + left);
            let Some(page) = buffer.get_mut(done..end) else {
                break;
            };
            self.read_in_page(position, page)
                .map_err(|error| (done, error))?;
            done = end;
        }
        Ok(())
    }

    /// Copies bytes of one page. A page of a running guest that was given
    /// away meanwhile is read again at its new place.
    fn read_in_page(&self, address: VirtualAddress, page: &mut [u8]) -> Result<(), UserError> {
        let mut physical = self.physical(address)?;
        for _ in 0..ATTEMPTS {
            self.space
                .memory()
                .read(physical, page)
                .map_err(|source| UserError::Physical { address, source })?;
            if !self.live {
                return Ok(());
            }
            let again = self.physical(address)?;
            if again == physical {
                return Ok(());
            }
            physical = again;
        }
        Err(UserError::Changing { attempts: ATTEMPTS })
    }

    fn physical(
        &self,
        address: VirtualAddress,
    ) -> Result<secmon_memory::PhysicalAddress, UserError> {
        let error = match self.space.translate(address) {
            Ok(translation) => return Ok(translation.physical),
            Err(error) => error,
        };
        let TranslationError::NotPresent { level, meaning, .. } = error else {
            return Err(UserError::Translation(error));
        };
        Err(match meaning {
            NotPresent::ProtNone { physical } => return Ok(physical),
            NotPresent::Zero => UserError::NotPresent { address, level },
            NotPresent::Swap { kind, .. } if kind >= FIRST_SPECIAL_SWAP => {
                UserError::Special { address, kind }
            }
            NotPresent::Swap { kind, offset } => UserError::Swapped {
                address,
                area: kind,
                slot: offset,
            },
        })
    }

    /// The bytes from `start` to `end`, which bound `what`: as many as there
    /// are, and why there are not more.
    fn strings(
        &self,
        what: &'static str,
        start: VirtualAddress,
        end: VirtualAddress,
    ) -> (Vec<u8>, Option<UserError>) {
        let length = end.as_u64().wrapping_sub(start.as_u64());
        if length > STRINGS_LIMIT || start.as_u64() >> 63 == 1 {
            return (Vec::new(), Some(UserError::Range { what, start, end }));
        }
        let mut bytes = vec![0; length as usize];
        match self.read(start, &mut bytes) {
            Ok(()) => (bytes, None),
            Err((done, error)) => {
                bytes.truncate(done);
                (bytes, Some(error))
            }
        }
    }
}

/// Where the strings lie that execve put on the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bounds {
    users: u64,
    arg_start: VirtualAddress,
    arg_end: VirtualAddress,
    env_start: VirtualAddress,
    env_end: VirtualAddress,
}

fn bounds(guest: &Guest, layout: &UserLayout, mm: VirtualAddress) -> Result<Bounds, UserError> {
    let kernel = |source| UserError::Kernel { mm, source };
    let pointer = |member| guest.pointer(mm, member).map_err(kernel);
    Ok(Bounds {
        users: guest.number(mm, &layout.users).map_err(kernel)?,
        arg_start: pointer(&layout.arg_start)?,
        arg_end: pointer(&layout.arg_end)?,
        env_start: pointer(&layout.env_start)?,
        env_end: pointer(&layout.env_end)?,
    })
}

/// Looks at the first and the last byte of the arguments, and so at the page
/// tables that lead there, for whoever reads them soon.
pub(crate) fn touch_arguments(guest: &Guest, mm: VirtualAddress) {
    let Ok(layout) = guest.layout::<UserLayout>("processes") else {
        return;
    };
    let (Ok(memory), Ok(bounds)) = (
        UserMemory::with(guest, &layout, mm),
        bounds(guest, &layout, mm),
    ) else {
        return;
    };
    for address in [bounds.arg_start, bounds.arg_end.wrapping_sub(1)] {
        let _ = memory.read_in_page(address, &mut [0]);
    }
}

/// Strings, and why there are not more of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings {
    /// Those that could be read; the last one may be cut if there is an
    /// error.
    pub strings: Vec<Text>,
    /// What ended the read early.
    pub error: Option<UserError>,
}

impl Strings {
    fn failed(error: UserError) -> Self {
        Self {
            strings: Vec::new(),
            error: Some(error),
        }
    }

    /// Splits what `/proc` would show; a zero ends each string, if only the
    /// last one may lack it.
    fn split(bytes: &[u8], error: Option<UserError>) -> Self {
        let strings = if bytes.is_empty() {
            Vec::new()
        } else {
            let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
            bytes.split(|byte| *byte == 0).map(Text::new).collect()
        };
        Self { strings, error }
    }
}

impl From<Strings> for Value {
    /// The list, or what is missing of it with an excerpt of what is not.
    fn from(strings: Strings) -> Self {
        let list = Self::from(strings.strings);
        match strings.error {
            None => list,
            Some(error) => {
                let text = list.to_string();
                if text.is_empty() {
                    return Self::unreadable(error);
                }
                let excerpt: String = text.chars().take(EXCERPT).collect();
                Self::unreadable(format_args!("{error}; before that: {excerpt}"))
            }
        }
    }
}

/// Reads strings through `read` until their bounds stayed the same meanwhile.
fn settled(
    guest: &Guest,
    mm: VirtualAddress,
    read: impl Fn(&UserMemory, &Bounds) -> Strings,
) -> Result<Strings, UserError> {
    if mm.is_null() {
        return Ok(Strings::default());
    }
    let layout = guest.layout::<UserLayout>("processes")?;
    let memory = UserMemory::with(guest, &layout, mm)?;
    for _ in 0..ATTEMPTS {
        let before = bounds(guest, &layout, mm)?;
        if before.users == 0 {
            return Err(UserError::NoMemory);
        }
        let strings = read(&memory, &before);
        if !memory.live {
            return Ok(strings);
        }
        let after = bounds(guest, &layout, mm)?;
        let users = before.users;
        if after.users != 0 && before == (Bounds { users, ..after }) {
            return Ok(strings);
        }
        guest.diagnostics().count_torn_read();
    }
    Err(UserError::Changing { attempts: ATTEMPTS })
}

/// The arguments of the process with the `mm_struct` at `mm`, as
/// `/proc/PID/cmdline` holds them; none for a process without memory.
pub fn read_arguments(guest: &Guest, mm: VirtualAddress) -> Strings {
    settled(guest, mm, arguments_between).unwrap_or_else(Strings::failed)
}

/// `get_mm_cmdline` of `fs/proc/base.c`.
fn arguments_between(memory: &UserMemory, bounds: &Bounds) -> Strings {
    let (start, end) = (bounds.arg_start, bounds.arg_end);
    if start >= end {
        return Strings::default();
    }
    let (bytes, error) = memory.strings("the argument list", start, end);
    let overwritten = match (&error, bytes.last()) {
        (None, Some(last)) => *last != 0,
        // The last byte is what counts, whatever is missing before it.
        _ => {
            let mut last = [0];
            memory.read(end.wrapping_sub(1), &mut last).is_ok() && last != [0]
        }
    };
    if !overwritten {
        return Strings::split(&bytes, error);
    }
    // A title was written over the arguments and ends where its zero is,
    // perhaps in the environment.
    let environment = bounds.env_start == end && bounds.env_end >= bounds.env_start;
    let end = if environment { bounds.env_end } else { end };
    let limit = start.wrapping_add(TITLE_LIMIT).min(end);
    let (bytes, error) = memory.strings("the process title", start, limit);
    match bytes.iter().position(|byte| *byte == 0) {
        Some(zero) => Strings::split(bytes.get(..=zero).unwrap_or_default(), None),
        None => Strings::split(&bytes, error),
    }
}

/// The arguments as a value: a list of texts, or why there is none.
pub fn arguments(guest: &Guest, mm: VirtualAddress) -> Value {
    read_arguments(guest, mm).into()
}

/// The environment of the process with the `mm_struct` at `mm`, as
/// `/proc/PID/environ` holds it: what execve was given, with what the process
/// wrote over it since. None for a process without memory.
pub fn read_environment(guest: &Guest, mm: VirtualAddress) -> Strings {
    let read = |memory: &UserMemory, bounds: &Bounds| {
        if bounds.env_start >= bounds.env_end {
            return Strings::default();
        }
        let (bytes, error) = memory.strings("the environment", bounds.env_start, bounds.env_end);
        Strings::split(&bytes, error)
    };
    settled(guest, mm, read).unwrap_or_else(Strings::failed)
}

/// The environment as a value: a list of texts, or why there is none.
pub fn environment(guest: &Guest, mm: VirtualAddress) -> Value {
    read_environment(guest, mm).into()
}

#[cfg(test)]
mod tests {
    use secmon_memory::Volatility;

    use super::*;
    use crate::synthetic::Synthetic;

    /// A page that reads; arguments lie at its end, the environment behind.
    fn memory(place: u64, text: &[u8]) -> UserMemory {
        let memory = Synthetic::new(Volatility::Static);
        memory.map_user(0x7000_0000, &[Some(0x1000), Some(0x2000), None]);
        memory.write(place, text);
        UserMemory {
            space: memory.space(),
            live: false,
        }
    }

    fn bounds(arg_start: u64, arg_end: u64, env_end: u64) -> Bounds {
        let at = |offset| VirtualAddress::new(0x7000_0000 + offset);
        Bounds {
            users: 1,
            arg_start: at(arg_start),
            arg_end: at(arg_end),
            env_start: at(arg_end),
            env_end: at(env_end),
        }
    }

    fn texts(strings: &Strings) -> Vec<&[u8]> {
        strings.strings.iter().map(Text::as_bytes).collect()
    }

    #[test]
    fn splits_arguments_across_pages() {
        let memory = memory(0x1ff8, b"/bin/cat\0\0a b\n\0");
        let found = arguments_between(&memory, &bounds(0xff8, 0x1007, 0x1007));
        assert_eq!(texts(&found), [&b"/bin/cat"[..], b"", b"a b\n"]);
        assert_eq!(found.error, None);
    }

    #[test]
    fn a_title_ends_at_its_zero() {
        // "/bin/cat a" was overwritten with a longer title.
        let text = b"cat: reading from here\0HOME=/\0";
        let memory = memory(0x1800, text);
        let found = arguments_between(&memory, &bounds(0x800, 0x80b, 0x81e));
        assert_eq!(texts(&found), [&b"cat: reading from here"[..]]);
        // Where no environment follows, the title ends with the arguments.
        let mut bounds = bounds(0x800, 0x80b, 0x81e);
        bounds.env_start = bounds.env_end;
        let found = arguments_between(&memory, &bounds);
        assert_eq!(texts(&found), [&b"cat: readin"[..]]);
    }

    #[test]
    fn says_what_is_missing() {
        let memory = memory(0x2ff0, b"0123456789\0abcde");
        let found = arguments_between(&memory, &bounds(0x1ff0, 0x2004, 0x2004));
        assert_eq!(texts(&found), [&b"0123456789"[..], b"abcde"]);
        let address = VirtualAddress::new(0x7000_2000);
        let level = TableLevel::Pt;
        assert_eq!(found.error, Some(UserError::NotPresent { address, level }));
        assert!(matches!(
            Value::from(found),
            Value::Unreadable(reason) if reason.contains("0x70002000") && reason.contains("0123")
        ));
    }

    #[test]
    fn refuses_ranges_that_no_process_has() {
        let memory = memory(0x1000, b"");
        let mut wide = bounds(0, 0x1000, 0x1000);
        wide.arg_end = VirtualAddress::new(u64::MAX - 1);
        let found = arguments_between(&memory, &wide);
        assert!(matches!(found.error, Some(UserError::Range { .. })));
        let found = arguments_between(&memory, &bounds(0x10, 0x10, 0x10));
        assert_eq!(found, Strings::default());
    }
}
