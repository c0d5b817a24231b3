//! Bits flipped all over the memory that tables are made from: no panic, no
//! run over the bounds, no row of an object that is not there without a
//! diagnostic.
//!
//! A flipped pointer may lead to another real object of the same type, such as
//! a file that is only mapped, or that was closed a moment ago and not yet
//! overwritten. That is no garbage and can't be told from the truth by what
//! the objects say; such rows are counted and have a bound of their own.
//!
//! A table that did not read a line of memory gives the same rows whatever is
//! in it, so each flip is tried on the tables that read its line, and flips
//! are only made in lines that some table reads.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use secmon_guest::{Guest, Request, Selection, Table, Value};
use secmon_memory::{AddressSpace, PhysicalMemory};
use secmon_profile::Kernel;
use secmon_tests::flips::{FlippedMemory, LINE, RecordingMemory};
use secmon_tests::images;

/// Flips on each kernel.
const FLIPS: u64 = 10_000;
/// How many of the flips may show another object without a diagnostic.
const UNTOLD_LIMIT: u64 = FLIPS / 1000;
/// What one table may take on a damaged image, in a test build on a busy
/// machine. A clean one takes milliseconds.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// What the whole test may hold in memory of its own, in KiB.
const MEMORY_LIMIT_KIB: u64 = 512 * 1024;

/// A small generator of test positions: xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// What a table said of an image.
struct Reading {
    /// The objects it has rows of.
    addresses: BTreeSet<u64>,
    rows: usize,
    diagnostics: usize,
    unreadable: usize,
    elapsed: Duration,
}

fn read(kernel: &Kernel, memory: Arc<dyn PhysicalMemory>, table: &dyn Table) -> Reading {
    let space = AddressSpace::new(memory, kernel.space.root(), kernel.space.mode());
    let guest = Guest::new(Kernel {
        space,
        ..kernel.clone()
    });
    // In the table of symbols the address is what the symbol says, as any other
    // value is, and not the place of the object.
    let address = table
        .columns()
        .iter()
        .position(|column| column.name == "address" && table.name() != "symbols");
    let mut reading = Reading {
        addresses: BTreeSet::new(),
        rows: 0,
        diagnostics: 0,
        unreadable: 0,
        elapsed: Duration::ZERO,
    };
    let start = Instant::now();
    let request = Request {
        columns: None,
        selection: Selection::default(),
    };
    let outcome = table.read(&guest, &request, &mut |row| {
        reading.rows += 1;
        if let Some(Value::Address(address)) = address.and_then(|index| row.values.get(index)) {
            reading.addresses.insert(*address);
        }
        let unreadable = |value: &&Value| matches!(value, Value::Unreadable(_));
        reading.unreadable += row.values.iter().filter(unreadable).count();
        ControlFlow::Continue(())
    });
    reading.elapsed = start.elapsed();
    reading.diagnostics = guest.diagnostics().list().len() + usize::from(outcome.is_err());
    reading
}

fn own_memory_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc/self/status");
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .expect("a line RssAnon");
    line.split_whitespace()
        .nth(1)
        .and_then(|number| number.parse().ok())
        .expect("a number")
}

fn flip_bits(suite: secmon_lab::Suite) {
    let image = images::quiet(suite).expect("an image");
    let (memory, kernel) = (image.memory, image.kernel);

    // What each table reads of the clean image.
    let recorder = Arc::new(RecordingMemory::new(memory.clone()));
    let mut clean = BTreeMap::new();
    let mut readers: BTreeMap<u64, Vec<&dyn Table>> = BTreeMap::new();
    // The table of diagnostics only reads all others once more.
    let tables = secmon_guest::tables()
        .iter()
        .filter(|table| table.name() != "diagnostics");
    for table in tables {
        let reading = read(&kernel, recorder.clone(), *table);
        for line in recorder.take() {
            readers.entry(line).or_default().push(*table);
        }
        assert!(
            reading.elapsed < TIME_LIMIT,
            "{} on the clean image",
            table.name()
        );
        clean.insert(table.name(), reading);
    }
    let lines: Vec<(&u64, &Vec<&dyn Table>)> = readers.iter().collect();
    assert!(
        lines.len() > 1000,
        "the tables read only {} lines of memory",
        lines.len()
    );

    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ lines.len() as u64);
    let mut noticed = 0;
    let mut untold = 0_u64;
    let mut read_tables = HashSet::new();
    for _ in 0..FLIPS {
        let (line, tables) = lines[(random.next() % lines.len() as u64) as usize];
        let bit = random.next() % (LINE * 8);
        let (byte, mask) = (line + bit / 8, 1 << (bit % 8));
        let flipped: Arc<dyn PhysicalMemory> =
            Arc::new(FlippedMemory::new(memory.clone(), vec![(byte, mask)]));
        for table in tables {
            let name = table.name();
            let reading = read(&kernel, flipped.clone(), *table);
            let clean = &clean[name];
            read_tables.insert(name);
            let context = format!("{suite:?}: {name} with bits {mask:#x} of {byte:#x} flipped");
            assert!(
                reading.elapsed < TIME_LIMIT,
                "{context}: took {:?}",
                reading.elapsed
            );
            let phantoms: Vec<_> = reading.addresses.difference(&clean.addresses).collect();
            // A row of the table of diagnostics is one.
            let said = reading.diagnostics > clean.diagnostics
                || reading.unreadable > clean.unreadable
                || (name == "diagnostics" && reading.rows > clean.rows);
            if !phantoms.is_empty() && !said {
                println!("{context}: rows of other objects, and no diagnostic: {phantoms:x?}");
                untold += 1;
            }
            noticed += u64::from(said || reading.rows != clean.rows);
        }
    }
    assert!(
        untold <= UNTOLD_LIMIT,
        "{suite:?}: {untold} rows of other objects without a diagnostic"
    );
    println!(
        "{suite:?}: {untold} untold; {FLIPS} flips in {} lines, {} tables, noticed {noticed} times",
        lines.len(),
        read_tables.len()
    );
    assert!(
        noticed > 0,
        "flips that nobody notices are not where tables look"
    );
    assert!(
        own_memory_kib() < MEMORY_LIMIT_KIB,
        "{} KiB of memory",
        own_memory_kib()
    );
}

#[test]
fn linux_5_10() {
    flip_bits(secmon_lab::Suite::Bullseye);
}

#[test]
fn linux_6_1() {
    flip_bits(secmon_lab::Suite::Bookworm);
}

#[test]
fn linux_6_12() {
    flip_bits(secmon_lab::Suite::Trixie);
}

#[test]
fn linux_7_2() {
    flip_bits(secmon_lab::Suite::Sid);
}
