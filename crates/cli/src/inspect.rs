//! `read` and `translate`: memory itself, rather than what it means.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use secmon_guest::{ColumnInfo, Kind, TrustLevel, Value};
use secmon_memory::{
    AddressSpace, PAGE_SIZE, PageSize, PhysicalAddress, PhysicalMemory, TableLevel, VirtualAddress,
};

use crate::arguments::Format;
use crate::listing::{self, column};
use crate::output::Rows;

/// Where bytes are read.
pub enum Place {
    /// Guest physical memory.
    Physical(Arc<dyn PhysicalMemory>, u64),
    /// The memory of the kernel or of a process.
    Virtual(Box<AddressSpace>, u64),
    /// Memory that a monitor is asked for.
    Asked(Box<dyn Asked>),
}

/// Memory that somebody else reads.
pub trait Asked {
    /// The address of the first byte.
    fn start(&self) -> u64;

    /// Reads from an address on.
    ///
    /// # Errors
    /// Why it can't be read.
    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), String>;
}

/// The walk of one address, whoever made it.
pub struct Walk {
    /// The address.
    pub address: u64,
    /// The entries read, the top level's first.
    pub steps: Vec<Step>,
    /// Where it led.
    pub end: Result<WalkEnd>,
}

/// One entry of a walk.
pub struct Step {
    /// The table that holds it.
    pub level: TableLevel,
    /// Where it lies.
    pub entry_address: u64,
    /// The entry as it was read.
    pub entry: u64,
}

/// Where a walk led.
pub struct WalkEnd {
    /// The physical address.
    pub physical: u64,
    /// The bytes of the page.
    pub page_size: u64,
    /// Whether all entries allow to write.
    pub writable: bool,
    /// Whether all entries allow user mode.
    pub user: bool,
    /// Whether no entry forbids to execute.
    pub executable: bool,
}

impl Walk {
    /// Walks an address space.
    pub fn of(space: &AddressSpace, address: u64) -> Self {
        let (steps, outcome) = space.trace(VirtualAddress::new(address));
        let step = |step: secmon_memory::WalkStep| Step {
            level: step.level,
            entry_address: step.entry_address.as_u64(),
            entry: step.entry,
        };
        Self {
            address,
            steps: steps.into_iter().map(step).collect(),
            end: match outcome {
                Ok(found) => Ok(WalkEnd {
                    physical: found.physical.as_u64(),
                    page_size: PageSize::bytes(found.page_size),
                    writable: found.rights.writable,
                    user: found.rights.user,
                    executable: found.rights.executable,
                }),
                Err(error) => Err(error.into()),
            },
        }
    }
}

/// What becomes of the bytes.
pub enum Sink {
    /// Lines of 16 bytes with their text, as `xxd` writes them.
    Hex,
    /// Rows, in this format.
    Rows(Format),
    /// The bytes alone, to stdout.
    RawStdout,
    /// The bytes alone, to a file that is open already.
    RawFile(File),
}

impl Place {
    /// How well what is read there was protected.
    fn trust_level(&self) -> TrustLevel {
        match self {
            Self::Asked(_) => TrustLevel::L1,
            Self::Physical(..) | Self::Virtual(..) => TrustLevel::L0,
        }
    }

    fn start(&self) -> u64 {
        match self {
            Self::Physical(_, address) | Self::Virtual(_, address) => *address,
            Self::Asked(asked) => asked.start(),
        }
    }

    fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Physical(memory, _) => memory
                .read(PhysicalAddress::new(address), buffer)
                .map_err(|error| error.to_string()),
            Self::Virtual(space, _) => space
                .read(VirtualAddress::new(address), buffer)
                .map_err(|error| error.to_string()),
            Self::Asked(asked) => asked.read(address, buffer),
        }
    }
}

/// Reads `length` bytes, page by page, up to the first page that can't be
/// read, and hands each piece on.
fn pieces(
    place: &Place,
    length: u64,
    mut each: impl FnMut(u64, Result<&[u8], &str>) -> io::Result<()>,
) -> Result<()> {
    let start = place.start();
    let mut buffer = [0; PAGE_SIZE as usize];
    let mut done = 0;
    while done < length {
        let Some(address) = start.checked_add(done) else {
            bail!("the end of the address space is reached after {done:#x} bytes");
        };
        let left_in_page = PAGE_SIZE - address % PAGE_SIZE;
        let count = left_in_page.min(length - done);
        let piece = &mut buffer[..count as usize];
        match place.read(address, piece) {
            Ok(()) => each(address, Ok(piece))?,
            Err(reason) => {
                each(address, Err(&reason))?;
                return Err(anyhow!(reason).context(format!(
                    "reading stopped at {address:#x} after {done:#x} of {length:#x} bytes"
                )));
            }
        }
        done += count;
    }
    Ok(())
}

/// Reads and shows memory.
pub fn read(place: &Place, length: u64, sink: Sink) -> Result<()> {
    match sink {
        Sink::Hex => {
            let mut out = listing::stdout()?;
            let mut line = HexLine::default();
            let outcome = pieces(place, length, |address, piece| match piece {
                Ok(bytes) => line.push(address, bytes, &mut out),
                Err(_) => Ok(()),
            });
            line.finish(&mut out)?;
            out.flush()?;
            outcome
        }
        Sink::Rows(format) => {
            let columns = [
                column("address", Kind::Address, "Where the bytes start"),
                column("length", Kind::Unsigned, "How many they are"),
                column(
                    "bytes",
                    Kind::Text,
                    "The bytes, two hexadecimal digits each",
                ),
            ];
            let mut rows = Rows::new(
                listing::stdout()?,
                columns.to_vec(),
                format,
                listing::style_of(place.trust_level()),
            )?;
            let outcome = pieces(place, length, |address, piece| {
                let address = Value::Address(address);
                match piece {
                    Ok(bytes) => {
                        let length = Value::Unsigned(bytes.len() as u64);
                        rows.row(&[address, length, Value::from(hexadecimal(bytes))])
                    }
                    Err(reason) => rows.row(&[address, Value::Null, Value::unreadable(reason)]),
                }
            });
            rows.finish()?;
            outcome
        }
        Sink::RawStdout => {
            if io::stdout().is_terminal() {
                bail!(
                    "raw memory of a guest could act on this terminal; \
                     write it to a file (--output FILE) or into a pipe"
                );
            }
            raw(place, length, listing::stdout()?)
        }
        Sink::RawFile(file) => {
            raw(place, length, io::BufWriter::new(file)).context("writing to the output file")
        }
    }
}

fn raw(place: &Place, length: u64, mut out: impl Write) -> Result<()> {
    let outcome = pieces(place, length, |_, piece| match piece {
        Ok(bytes) => out.write_all(bytes),
        Err(_) => Ok(()),
    });
    out.flush()?;
    outcome
}

fn hexadecimal(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value & 15)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(*byte)])
        .collect()
}

/// Collects bytes until a line of 16 is full.
#[derive(Default)]
struct HexLine {
    address: u64,
    bytes: Vec<u8>,
}

impl HexLine {
    fn push(&mut self, address: u64, bytes: &[u8], out: &mut impl Write) -> io::Result<()> {
        for (index, byte) in bytes.iter().enumerate() {
            if self.bytes.is_empty() {
                self.address = address + index as u64;
            }
            self.bytes.push(*byte);
            if self.bytes.len() == 16 {
                self.finish(out)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut impl Write) -> io::Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        write!(out, "{:016x}:", self.address)?;
        for index in 0..16 {
            if index % 2 == 0 {
                out.write_all(b" ")?;
            }
            match self.bytes.get(index) {
                Some(byte) => write!(out, "{byte:02x}")?,
                None => out.write_all(b"  ")?,
            }
        }
        let shown = |byte: &u8| match byte {
            b' '..=b'~' => char::from(*byte),
            _ => '.',
        };
        let text: String = self.bytes.iter().map(shown).collect();
        self.bytes.clear();
        writeln!(out, "  {text}")
    }
}

const TRANSLATION: [ColumnInfo; 10] = [
    column("address", Kind::Address, "The virtual address"),
    column("level", Kind::Text, "The table that holds the entry"),
    column(
        "entry_address",
        Kind::Address,
        "Where the entry lies in physical memory",
    ),
    column("entry", Kind::Address, "The entry as it was read"),
    column(
        "flags",
        Kind::List,
        "The bits of the entry that have a name",
    ),
    column(
        "physical",
        Kind::Address,
        "Where the address leads; with the last entry",
    ),
    column(
        "page_size",
        Kind::Unsigned,
        "The bytes of the page that maps it",
    ),
    column(
        "writable",
        Kind::Boolean,
        "Whether all entries on the way allow to write",
    ),
    column(
        "user",
        Kind::Boolean,
        "Whether all entries on the way allow user mode",
    ),
    column(
        "executable",
        Kind::Boolean,
        "Whether no entry on the way forbids to execute",
    ),
];

/// The named bits of an entry of `level` (Intel SDM volume 3, "Paging").
fn flags(level: TableLevel, entry: u64) -> Vec<&'static str> {
    let present = entry & 1 != 0;
    if !present {
        return vec!["not-present"];
    }
    let leaf = level == TableLevel::Pt || entry & (1 << 7) != 0;
    let bits: [(bool, &'static str); 10] = [
        (true, "present"),
        (entry & (1 << 1) != 0, "writable"),
        (entry & (1 << 2) != 0, "user"),
        (entry & (1 << 3) != 0, "write-through"),
        (entry & (1 << 4) != 0, "cache-disabled"),
        (entry & (1 << 5) != 0, "accessed"),
        (leaf && entry & (1 << 6) != 0, "dirty"),
        (leaf && level != TableLevel::Pt, "page"),
        (leaf && entry & (1 << 8) != 0, "global"),
        (entry & (1 << 63) != 0, "no-execute"),
    ];
    let set = bits.into_iter().filter(|(set, _)| *set);
    set.map(|(_, name)| name).collect()
}

/// Shows the walk of each address, a row for each entry read; the last one
/// says where it led.
pub fn translate(walks: Vec<Walk>, format: Format, trust: TrustLevel) -> Result<()> {
    let mut rows = Rows::new(
        listing::stdout()?,
        TRANSLATION.to_vec(),
        format,
        listing::style_of(trust),
    )?;
    let mut failed = None;
    for Walk {
        address,
        steps,
        end,
    } in walks
    {
        for (index, step) in steps.iter().enumerate() {
            let last = index + 1 == steps.len();
            let mut row = vec![
                Value::Address(address),
                Value::from(step.level.to_string()),
                Value::Address(step.entry_address),
                Value::Address(step.entry),
                Value::from(flags(step.level, step.entry)),
            ];
            match &end {
                Ok(found) if last => row.extend([
                    Value::Address(found.physical),
                    Value::from(found.page_size),
                    Value::from(found.writable),
                    Value::from(found.user),
                    Value::from(found.executable),
                ]),
                Err(error) if last => {
                    row.push(Value::unreadable(error));
                    row.resize(TRANSLATION.len(), Value::Null);
                }
                _ => row.resize(TRANSLATION.len(), Value::Null),
            }
            rows.row(&row)?;
        }
        if let Err(error) = end {
            failed.get_or_insert(error);
        }
    }
    rows.finish()?;
    match failed {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dump(address: u64, pieces: &[&[u8]]) -> String {
        let mut out = Vec::new();
        let mut line = HexLine::default();
        let mut at = address;
        for piece in pieces {
            line.push(at, piece, &mut out).expect("memory takes all");
            at += piece.len() as u64;
        }
        line.finish(&mut out).expect("memory takes all");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn hex_lines_look_like_those_of_xxd() {
        assert_eq!(
            dump(0x1000, &[b"Linux version 6.", b"1\x1b\n"]),
            "0000000000001000: 4c69 6e75 7820 7665 7273 696f 6e20 362e  Linux version 6.\n\
             0000000000001010: 311b 0a                                  1..\n"
        );
    }

    #[test]
    fn entries_name_their_bits() {
        let leaf = flags(TableLevel::Pd, 0x8000_0000_0000_01e3);
        assert_eq!(
            leaf,
            [
                "present",
                "writable",
                "accessed",
                "dirty",
                "page",
                "global",
                "no-execute"
            ]
        );
        assert_eq!(flags(TableLevel::Pt, 0xfffe), ["not-present"]);
        assert!(!flags(TableLevel::Pml4, 0x167).contains(&"dirty"));
    }

    proptest! {
        #[test]
        fn hex_lines_hold_every_byte(
            pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..5),
        ) {
            let slices: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let text = dump(0, &slices);
            let digits: String = text
                .lines()
                .flat_map(|line| line[17..57].chars().filter(char::is_ascii_hexdigit))
                .collect();
            prop_assert_eq!(digits, hexadecimal(&pieces.concat()));
        }
    }
}
