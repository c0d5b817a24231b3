//! Virtual reads: the same addresses of the same image, by every tool's own
//! page walk. What the reads must give is known from the image alone: the
//! direct map maps physical memory in order.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use secmon_benches::image::{FIRST, Image, SPAN};
use secmon_benches::process::median;
use secmon_memory::{AddressSpace, PagingMode, PhysicalAddress, PhysicalMemory, VirtualAddress};
use secmon_platform::target::{OpenOptions, Target};
use serde_json::Value;

use crate::jobs::Setup;
use crate::runs::ROUNDS;

/// Addresses for tools that take nanoseconds for each.
const MANY: usize = 1 << 20;
/// Addresses for tools that take microseconds for each.
const FEW: usize = 1 << 15;
const PAGE: u64 = 4096;
/// Addresses given to one batched call.
const BATCH: usize = 4096;

/// What is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pattern {
    Scattered,
    Pages,
}

/// One tool's way of reading.
struct Reader {
    tool: &'static str,
    how: &'static str,
    mode: &'static str,
    pattern: Pattern,
}

const READERS: [Reader; 16] = {
    const fn reader(
        tool: &'static str,
        how: &'static str,
        mode: &'static str,
        pattern: Pattern,
    ) -> Reader {
        Reader {
            tool,
            how,
            mode,
            pattern,
        }
    }
    use Pattern::{Pages, Scattered};
    [
        reader("SecMon", "one by one", "single", Scattered),
        reader("SecMon", "one by one, with TLB", "single-tlb", Scattered),
        reader("SecMon", "batches of 4096", "batch", Scattered),
        reader(
            "SecMon",
            "batches of 4096, with TLB",
            "batch-tlb",
            Scattered,
        ),
        reader("memflow", "one by one", "single", Scattered),
        reader("memflow", "one by one, with TLB", "single-tlb", Scattered),
        reader("memflow", "batches of 4096", "batch", Scattered),
        reader(
            "memflow",
            "batches of 4096, with TLB",
            "batch-tlb",
            Scattered,
        ),
        reader("drgn", "`Program.read`", "single", Scattered),
        reader("volatility3", "`layer.read`", "single", Scattered),
        reader("SecMon", "page by page", "pages", Pages),
        reader("SecMon", "page by page, with TLB", "pages-tlb", Pages),
        reader("memflow", "page by page", "pages", Pages),
        reader("memflow", "page by page, with TLB", "pages-tlb", Pages),
        reader("drgn", "`Program.read`", "pages", Pages),
        reader("volatility3", "`layer.read`", "pages", Pages),
    ]
};

/// What one reader did.
pub struct Outcome {
    /// The tool.
    pub tool: &'static str,
    /// How it was asked.
    pub how: &'static str,
    /// Whether it read 4096 bytes from each address in order, rather than 8.
    pub pages: bool,
    /// Nanoseconds for each address, the median of the rounds.
    pub nanoseconds: f64,
    /// Addresses read in each round.
    pub addresses: usize,
    /// Whether the bytes were those of the image.
    pub right: bool,
    /// Reads that failed.
    pub failed: u64,
}

/// What a run of reads gave.
struct Reading {
    nanoseconds: f64,
    sum: u64,
    failed: u64,
}

/// Reads of the whole span by every tool.
///
/// # Errors
/// If a tool can't be run.
pub fn compete(setup: &Setup) -> Result<Vec<Outcome>> {
    let image = Image::open_at(&setup.image)?;
    let bytes = fs::read(&setup.image)?;
    let value = |address: VirtualAddress| -> u64 {
        let offset = address.as_u64().wrapping_sub(image.address(0).as_u64()) + FIRST;
        let bytes = bytes.get(offset as usize..offset as usize + 8);
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    };
    // A few pages are taken out of the direct map, such as those of secrets.
    let mapped = |address: &VirtualAddress| image.space().translate(*address).is_ok();
    let mut scattered = image.scattered(MANY);
    scattered.retain(mapped);
    let mut pages: Vec<_> = (0..SPAN / PAGE)
        .map(|number| image.address(number * PAGE))
        .collect();
    pages.retain(mapped);
    let mut outcomes = Vec::new();
    let mut readings: Vec<Vec<Reading>> = READERS.iter().map(|_| Vec::new()).collect();
    let addresses = |reader: &Reader| {
        let all = match reader.pattern {
            Pattern::Scattered => &scattered,
            Pattern::Pages => &pages,
        };
        match reader.tool {
            "SecMon" | "memflow" => all.as_slice(),
            _ => &all[..all.len().min(FEW)],
        }
    };
    for round in 0..ROUNDS {
        for (reader, readings) in READERS.iter().zip(&mut readings) {
            let addresses = addresses(reader);
            let reading = match reader.tool {
                "SecMon" => own(image.space(), addresses, reader.mode),
                _ => other(setup, image.space().root(), reader, addresses)?,
            };
            eprintln!(
                "reads, round {round}: {} {} {:.0} ns",
                reader.tool, reader.how, reading.nanoseconds
            );
            readings.push(reading);
        }
    }
    for (reader, readings) in READERS.iter().zip(readings) {
        let addresses = addresses(reader);
        let sum = addresses
            .iter()
            .fold(0_u64, |sum, address| sum.wrapping_add(value(*address)));
        let times = readings
            .iter()
            .map(|reading| Duration::from_nanos((reading.nanoseconds * 1000.0) as u64))
            .collect();
        outcomes.push(Outcome {
            tool: reader.tool,
            how: reader.how,
            pages: reader.pattern == Pattern::Pages,
            nanoseconds: median(times).as_nanos() as f64 / 1000.0,
            addresses: addresses.len(),
            right: readings.iter().all(|reading| reading.sum == sum),
            failed: readings
                .iter()
                .map(|reading| reading.failed)
                .max()
                .unwrap_or(0),
        });
    }
    Ok(outcomes)
}

/// Our own reads, in this process.
fn own(space: &AddressSpace, addresses: &[VirtualAddress], mode: &str) -> Reading {
    let space = AddressSpace::new(space.memory().clone(), space.root(), space.mode());
    let (mode, space) = match mode.strip_suffix("-tlb") {
        Some(mode) => (mode, space.with_tlb()),
        None => (mode, space),
    };
    let mut sum = 0_u64;
    let mut failed = 0;
    let mut page = [0; PAGE as usize];
    let start = Instant::now();
    match mode {
        "batch" => {
            for batch in addresses.chunks(BATCH) {
                for value in space.read_u64_batch(batch) {
                    match value {
                        Ok(value) => sum = sum.wrapping_add(value),
                        Err(_) => failed += 1,
                    }
                }
            }
        }
        "pages" => {
            for address in addresses {
                failed += u64::from(space.read(*address, &mut page).is_err());
                let first = std::hint::black_box(&page).first_chunk::<8>();
                sum = sum.wrapping_add(first.map_or(0, |first| u64::from_le_bytes(*first)));
            }
        }
        _ => {
            for address in addresses {
                match space.read_u64(*address) {
                    Ok(value) => sum = sum.wrapping_add(value),
                    Err(_) => failed += 1,
                }
            }
        }
    }
    Reading {
        nanoseconds: start.elapsed().as_nanos() as f64 / addresses.len().max(1) as f64,
        sum,
        failed,
    }
}

/// Another tool's reads, in a process of its own that times itself.
fn other(
    setup: &Setup,
    root: PhysicalAddress,
    reader: &Reader,
    addresses: &[VirtualAddress],
) -> Result<Reading> {
    let image = match reader.tool {
        "drgn" => &setup.core,
        _ => &setup.image,
    };
    read_with(setup, reader.tool, image, root, addresses, reader.mode)
}

fn read_with(
    setup: &Setup,
    tool: &str,
    image: &Path,
    root: PhysicalAddress,
    addresses: &[VirtualAddress],
    mode: &str,
) -> Result<Reading> {
    let list = setup.scratch.join("addresses");
    let bytes: Vec<u8> = addresses
        .iter()
        .flat_map(|address| address.as_u64().to_le_bytes())
        .collect();
    fs::write(&list, bytes)?;
    let mut command = match tool {
        "memflow" => Command::new(&setup.memflow),
        _ => {
            let mut command = Command::new(&setup.python);
            command.arg(setup.scripts.join("reads.py")).arg(tool);
            command
        }
    };
    command
        .arg(image)
        .arg(format!("{:x}", root.as_u64()))
        .arg(&list)
        .arg(mode);
    let output = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let said: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("the output of {command:?}"))?;
    let number = |name: &str| said[name].as_u64().with_context(|| name.to_owned());
    Ok(Reading {
        nanoseconds: said["nanoseconds"].as_f64().context("nanoseconds")?,
        sum: number("sum")?,
        failed: number("failed")?,
    })
}

/// A page-table case that some tools get wrong.
pub struct Case {
    /// The tool.
    pub tool: &'static str,
    /// What it said.
    pub said: String,
    /// Whether that is right.
    pub right: bool,
}

/// A large page whose entry has the PAT bit set. In that entry, bit 12 is no
/// address bit (Intel SDM volume 3, table 5-18).
///
/// # Errors
/// If a tool can't be run.
pub fn large_page_with_pat(setup: &Setup) -> Result<Vec<Case>> {
    const ROOT: u64 = 0x1000;
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const PAT: u64 = 1 << 12;
    const FRAME: u64 = 8 << 20;
    const OFFSET: u64 = 0x10_0008;
    let mut memory = vec![0_u8; 16 << 20];
    let mut put = |address: u64, value: u64| {
        let address = address as usize;
        memory[address..address + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(ROOT, 0x2000 | PRESENT_WRITABLE);
    put(0x2000, 0x3000 | PRESENT_WRITABLE);
    put(0x3000, FRAME | PAT | LARGE | PRESENT_WRITABLE);
    let right = 0x5ec_0000_0001;
    put(FRAME + OFFSET, right);
    // Where an address with the bit left in leads.
    put(FRAME + PAT + OFFSET, 0xbad);
    let path = setup.scratch.join("pat.raw");
    fs::write(&path, &memory)?;
    let root = PhysicalAddress::new(ROOT);
    let address = VirtualAddress::new(OFFSET);
    let options = OpenOptions {
        format: Some(secmon_platform::image::ImageFormat::Raw),
        ..OpenOptions::default()
    };
    let target: Target = format!("file:{}", path.display()).parse()?;
    let opened = target.open(&options)?;
    let opened: Arc<dyn PhysicalMemory> = opened.memory.clone();
    let space = AddressSpace::new(opened, root, PagingMode::FourLevel);
    let mut cases = Vec::new();
    let mut add = |tool, reading: &Reading| {
        let right = reading.failed == 0 && reading.sum == right;
        let said = match (right, reading.failed) {
            (true, _) => "the right value".to_owned(),
            (false, 0) => format!(
                "{:#x} instead of {:#x}, no error",
                reading.sum, 0x5ec_0000_0001_u64
            ),
            _ => "an error".to_owned(),
        };
        cases.push(Case { tool, said, right });
    };
    add("SecMon", &own(&space, &[address], "single"));
    for tool in ["memflow", "volatility3"] {
        let reading = read_with(setup, tool, &path, root, &[address], "single")?;
        add(tool, &reading);
    }
    Ok(cases)
}
