//! Bits flipped in a memory image, and what the tables then say.
//!
//! A table is a function of the memory that it reads. A flip in memory that it
//! did not read can't change it: up to the first read that touches the flipped
//! byte everything goes as it did on the clean image, so that read never comes.
//! [`Specimen`] therefore notes which lines each table reads of the clean image
//! and tries a flip only on the tables that read its line.
//!
//! Reading a table anew for each flip would take minutes, and most flips
//! change nothing but a value. So many are made at once, and only if the table
//! then has other rows, diagnostics or unreadable cells than on the clean
//! image, the set is halved and each half tried by itself, down to single
//! flips. A set whose outcome is the clean one holds no flip that adds a row:
//! no other flip could take away just that row and say nothing.
//!
//! Flips are written to the image's file, which the tables read through a
//! shared mapping, as they read any other image.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secmon_guest::{Diagnostic, Guest, Request, Selection, Table, Value, member_of};
use secmon_memory::{
    AddressSpace, MemoryRegion, PhysicalAddress, PhysicalMemory, PhysicalReadError, Volatility,
};
use secmon_profile::Kernel;

use crate::open::{self, Opened};

/// Bytes of the unit in which reads are noted.
pub const LINE: u64 = 64;

/// The most flips that are made at once.
const SET_LIMIT: usize = 64;
/// How many are made at once at first; each set that changes nothing doubles
/// the size of the next one, each that does halves it.
const FIRST_SET: usize = 8;

/// Another memory, and which of its lines have been read.
pub(crate) struct RecordingMemory {
    base: Arc<dyn PhysicalMemory>,
    lines: Mutex<HashSet<u64>>,
}

impl RecordingMemory {
    pub(crate) fn new(base: Arc<dyn PhysicalMemory>) -> Self {
        Self {
            base,
            lines: Mutex::default(),
        }
    }

    /// The addresses of the lines read since the last call.
    pub(crate) fn take(&self) -> HashSet<u64> {
        std::mem::take(&mut *self.lines.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PhysicalMemory for RecordingMemory {
    fn regions(&self) -> &[MemoryRegion] {
        self.base.regions()
    }

    fn volatility(&self) -> Volatility {
        self.base.volatility()
    }

    fn read(&self, address: PhysicalAddress, buffer: &mut [u8]) -> Result<(), PhysicalReadError> {
        let first = address.as_u64() / LINE;
        let last = address
            .as_u64()
            .saturating_add(buffer.len() as u64)
            .saturating_sub(1)
            / LINE;
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend((first..=last).map(|line| line * LINE));
        drop(lines);
        self.base.read(address, buffer)
    }
}

/// One flipped bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flip {
    /// The physical address of its byte.
    pub address: u64,
    /// The bit.
    pub mask: u8,
}

/// What a table said of an image.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The objects it has rows of, and how many of each.
    objects: BTreeMap<u64, usize>,
    diagnostics: Vec<Diagnostic>,
    failed: bool,
    unreadable: usize,
    elapsed: Duration,
}

impl Outcome {
    /// Whether it says of the same objects, and as little of what could not
    /// be read.
    fn is_like(&self, clean: &Self) -> bool {
        self.objects == clean.objects && !self.says_more(clean)
    }

    /// Whether something is told that is not told of the clean image.
    fn says_more(&self, clean: &Self) -> bool {
        self.diagnostics.len() > clean.diagnostics.len()
            || self.unreadable > clean.unreadable
            || (self.failed && !clean.failed)
    }

    /// The objects that have more rows than on the clean image.
    fn phantoms(&self, clean: &Self) -> Vec<u64> {
        self.objects
            .iter()
            .filter(|(object, count)| clean.objects.get(object).is_none_or(|was| was < *count))
            .map(|(object, _)| *object)
            .collect()
    }
}

/// Rows that a flip added to a table without a word.
#[derive(Debug)]
pub struct Untold {
    /// The table.
    pub table: &'static str,
    /// What was flipped.
    pub flip: Flip,
    /// The objects of the rows.
    pub phantoms: Vec<u64>,
}

/// The reading that took the most time.
#[derive(Debug, Default)]
pub struct Longest {
    /// How long it took.
    pub elapsed: Duration,
    /// Its table.
    pub table: &'static str,
    /// What was flipped.
    pub flips: Vec<Flip>,
}

/// What became of a number of flips.
#[derive(Debug, Default)]
pub struct Report {
    /// Flips made.
    pub flips: usize,
    /// How many of them lie in lines that no table reads.
    pub unread: usize,
    /// Pairs of a flip and a table that reads its line.
    pub trials: usize,
    /// How many of these pairs changed rows, diagnostics or unreadable cells.
    pub noticed: usize,
    /// How often a table was read.
    pub readings: usize,
    /// The longest of these.
    pub longest: Longest,
    /// Rows of objects that are not there, with nothing said.
    pub untold: Vec<Untold>,
}

/// A small generator of test positions: xorshift64*.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u64 + 1) as usize);
        }
    }

    pub(crate) fn flip_in(&mut self, start: u64, length: u64) -> Flip {
        let bit = self.below(length * 8);
        Flip {
            address: start + bit / 8,
            mask: 1 << (bit % 8),
        }
    }
}

/// An image, what the tables say of it, and which of its lines they read.
pub struct Specimen {
    file: File,
    pub(crate) opened: Opened,
    tables: Vec<(&'static dyn Table, Outcome)>,
    /// The tables that read a line, by their place in `tables`.
    readers: BTreeMap<u64, Vec<usize>>,
}

impl Specimen {
    /// Opens a raw image, whose bytes lie at their physical addresses, and
    /// reads all tables once. The file must be nobody else's: it is changed.
    ///
    /// # Errors
    /// If it can't be opened, or a table can't be read.
    pub fn new(image: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(image)?;
        let opened = open::image(image)?;
        let recorder = Arc::new(RecordingMemory::new(opened.memory.clone()));
        let mut specimen = Self {
            file,
            opened,
            tables: Vec::new(),
            readers: BTreeMap::new(),
        };
        // The table of diagnostics only reads all others once more.
        for table in secmon_guest::tables() {
            if table.name() == "diagnostics" {
                continue;
            }
            let outcome = read(&specimen.opened.kernel, recorder.clone(), *table);
            ensure!(!outcome.failed, "{} of the clean image", table.name());
            for line in recorder.take() {
                let readers = specimen.readers.entry(line).or_default();
                readers.push(specimen.tables.len());
            }
            specimen.tables.push((*table, outcome));
        }
        Ok(specimen)
    }

    /// How many lines some table reads.
    pub fn lines(&self) -> usize {
        self.readers.len()
    }

    /// `count` flips in lines that some table reads.
    pub fn flips_in_read_lines(&self, seed: u64, count: usize) -> Vec<Flip> {
        let lines: Vec<u64> = self.readers.keys().copied().collect();
        let mut random = Random(seed);
        (0..count)
            .map(|_| {
                let line = lines[random.below(lines.len() as u64) as usize];
                random.flip_in(line, LINE)
            })
            .collect()
    }

    /// `count` flips anywhere in memory.
    pub fn flips_anywhere(&self, seed: u64, count: usize) -> Vec<Flip> {
        let region = self.opened.memory.regions()[0];
        let mut random = Random(seed);
        (0..count)
            .map(|_| random.flip_in(region.start.as_u64(), region.length))
            .collect()
    }

    /// Each bit of a number: the member of a structure that lies at a symbol.
    ///
    /// # Errors
    /// If this kernel has no such symbol or member.
    pub fn flips_of(
        &self,
        symbol: &'static str,
        structure: &str,
        member: &str,
    ) -> Result<Vec<Flip>> {
        let guest = guest_of(&self.opened.kernel, self.opened.memory.clone());
        let start = guest.symbol("sockets", symbol)?;
        let member = member_of(guest.types("sockets")?, structure, &[member])?;
        let address = guest
            .space()
            .translate(start.wrapping_add(member.offset))?
            .physical
            .as_u64();
        Ok((0..member.size * 8)
            .map(|bit| Flip {
                address: address + bit / 8,
                mask: 1 << (bit % 8),
            })
            .collect())
    }

    /// Makes the flips and reads the tables that they can change.
    ///
    /// # Errors
    /// If the image can't be written.
    pub fn try_flips(&self, flips: &[Flip]) -> Result<Report> {
        let mut report = Report {
            flips: flips.len(),
            ..Report::default()
        };
        let mut random = Random(flips.len() as u64 + 1);
        let mut by_table = vec![Vec::new(); self.tables.len()];
        for flip in flips {
            let readers = self.readers.get(&(flip.address / LINE * LINE));
            report.unread += usize::from(readers.is_none());
            for index in readers.into_iter().flatten() {
                by_table[*index].push(*flip);
            }
        }
        for ((table, clean), mut flips) in self.tables.iter().zip(by_table) {
            report.trials += flips.len();
            // The same flip twice would be none. Neighbours go to different
            // sets, so that a set is spread over all that the table reads.
            flips.sort_unstable();
            flips.dedup();
            random.shuffle(&mut flips);
            let mut size = if lists_objects(*table) {
                FIRST_SET
            } else {
                SET_LIMIT
            };
            while !flips.is_empty() {
                let set = flips.split_off(flips.len().saturating_sub(size));
                let noticed = report.noticed;
                self.try_set(*table, clean, set, &mut report)?;
                if report.noticed == noticed {
                    size = (size * 2).min(SET_LIMIT);
                } else {
                    size = (size / 2).max(1);
                }
            }
        }
        Ok(report)
    }

    /// Tries a set of flips on a table, and its parts if something differs.
    fn try_set(
        &self,
        table: &'static dyn Table,
        clean: &Outcome,
        flips: Vec<Flip>,
        report: &mut Report,
    ) -> Result<()> {
        let mut waiting = vec![flips];
        while let Some(mut flips) = waiting.pop() {
            let outcome =
                self.with_flips(&flips, |memory| read(&self.opened.kernel, memory, table))?;
            report.readings += 1;
            if outcome.elapsed > report.longest.elapsed {
                report.longest = Longest {
                    elapsed: outcome.elapsed,
                    table: table.name(),
                    flips: flips.clone(),
                };
            }
            if outcome.is_like(clean) || !lists_objects(table) {
                continue;
            }
            if let [flip] = flips[..] {
                report.noticed += 1;
                let phantoms = outcome.phantoms(clean);
                if !phantoms.is_empty() && !outcome.says_more(clean) {
                    report.untold.push(Untold {
                        table: table.name(),
                        flip,
                        phantoms,
                    });
                }
                continue;
            }
            let half = flips.split_off(flips.len() / 2);
            waiting.push(half);
            waiting.push(flips);
        }
        Ok(())
    }

    /// Calls `look` with the flips made, and undoes them.
    pub(crate) fn with_flips<T>(
        &self,
        flips: &[Flip],
        look: impl FnOnce(Arc<dyn PhysicalMemory>) -> T,
    ) -> Result<T> {
        for flip in flips {
            self.flip(*flip)?;
        }
        let found = look(self.opened.memory.clone());
        for flip in flips {
            self.flip(*flip)?;
        }
        Ok(found)
    }

    fn flip(&self, flip: Flip) -> Result<()> {
        let memory = &self.opened.memory;
        let seen = || {
            let mut byte = [0];
            let address = PhysicalAddress::new(flip.address);
            memory.read(address, &mut byte).map(|()| byte)
        };
        let [before] = seen().context("the byte to flip")?;
        self.file
            .write_all_at(&[before ^ flip.mask], flip.address)
            .context("flipping a bit of the image")?;
        ensure!(
            seen()? == [before ^ flip.mask],
            "the image does not show the flip at {:#x}",
            flip.address
        );
        Ok(())
    }
}

/// Whether the rows of a table are objects of the guest. The rows of `types`
/// and `symbols` are the names and numbers of a build, any of which a flipped
/// bit turns into another one; of these tables it is only asked that they end.
/// The rows of `changed_code` are differences between two pages: a flip in a page
/// table makes one, and the row is true.
/// Nor is the number of a process's environment strings one of objects: it is
/// that of the zero bytes in its memory.
fn lists_objects(table: &dyn Table) -> bool {
    !matches!(table.name(), "types" | "symbols" | "changed_code")
}

pub(crate) fn guest_of(kernel: &Kernel, memory: Arc<dyn PhysicalMemory>) -> Guest {
    let space = AddressSpace::new(memory, kernel.space.root(), kernel.space.mode());
    Guest::new(Kernel {
        space,
        ..kernel.clone()
    })
}

fn read(kernel: &Kernel, memory: Arc<dyn PhysicalMemory>, table: &dyn Table) -> Outcome {
    let guest = guest_of(kernel, memory);
    // What has no address is told by its process, if it has one.
    let place = |name| {
        table
            .columns()
            .iter()
            .position(|column| column.name == name)
    };
    let object = place("address").or(place("pid"));
    let mut outcome = Outcome::default();
    let start = Instant::now();
    let request = Request {
        columns: None,
        selection: Selection::default(),
    };
    let result = table.read(&guest, &request, &mut |row| {
        let object = match object.and_then(|index| row.values.get(index)) {
            Some(Value::Address(object) | Value::Unsigned(object)) => *object,
            _ => 0,
        };
        let count = outcome.objects.entry(object).or_default();
        *count = if table.name() == "env" { 1 } else { *count + 1 };
        let unreadable = |value: &&Value| matches!(value, Value::Unreadable(_));
        outcome.unreadable += row.values.iter().filter(unreadable).count();
        ControlFlow::Continue(())
    });
    outcome.elapsed = start.elapsed();
    outcome.failed = result.is_err();
    outcome.diagnostics = guest.diagnostics().list();
    outcome
}
