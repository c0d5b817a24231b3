//! Finds the kernel in a raw memory image and says what was found, and how
//! long each part took.
//!
//! `cargo run --release -p secmon-profile --example find -- FILE [SYMBOLS]`
//! writes the symbols to the file SYMBOLS, as `/proc/kallsyms` shows them.
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use secmon_memory::{MappedMemory, MemoryRegion, PhysicalAddress, PhysicalMemory, Volatility};
use secmon_profile::{Cache, FindOptions, Search, find};

const USAGE: &str =
    "usage: find [--thorough] [--no-cache] [--isf FILE] [--repeat TIMES] FILE [SYMBOLS]";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut options = FindOptions::default();
    let mut repeat = 1;
    let mut paths = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--thorough" => options.search = Search::Thorough,
            "--no-cache" => options.cache = Cache::Off,
            "--isf" => options.isf = arguments.next().map(Into::into),
            "--repeat" => repeat = arguments.next().ok_or("how often?")?.parse()?,
            _ => paths.push(argument),
        }
    }
    let path = paths.first().ok_or(USAGE)?;
    let file = File::open(path)?;
    let region = MemoryRegion::new(PhysicalAddress::new(0), file.metadata()?.len());
    let memory = MappedMemory::map_file(&file, &[(region, 0)], Volatility::Static)?;
    let memory: Arc<dyn PhysicalMemory> = Arc::new(memory);

    let mut times = Vec::new();
    let mut found = None;
    for _ in 0..repeat {
        let start = Instant::now();
        let kernel = find(&memory, &options)?;
        times.push(start.elapsed());
        found = Some(kernel);
    }
    let kernel = found.ok_or("--repeat 0 finds nothing")?;
    times.sort();
    for (name, time) in [
        ("fastest", times.first()),
        ("median", times.get(times.len() / 2)),
    ] {
        let time = time.copied().unwrap_or_default();
        println!("{name} of {repeat}: {:.1} ms", time.as_secs_f64() * 1e3);
    }
    println!("{}", kernel.profile.banner());
    println!("build id {:?}", kernel.profile.build_id());
    println!("{:?}, {:?}", kernel.image, kernel.evidence);
    println!("root {} {:?}", kernel.space.root(), kernel.space.mode());
    println!(
        "direct map {} (slide {:#x}), vmalloc {}, vmemmap {}",
        kernel.direct_map, kernel.direct_map_slide, kernel.vmalloc_base, kernel.vmemmap_base
    );
    let mut lines = Vec::new();
    println!("{} symbols", kernel.profile.symbols().len());
    match kernel.profile.types() {
        Ok(types) => {
            println!(
                "{} types; task_struct {} bytes",
                types.len(),
                types.size_of("task_struct")?
            );
        }
        Err(error) => println!("{error}"),
    }
    if let Some(path) = paths.get(1) {
        for symbol in kernel.profile.symbols().iter() {
            lines.push(format!(
                "{:016x} {} {}",
                symbol.address, symbol.kind, symbol.name
            ));
        }
        std::fs::write(path, lines.join("\n"))?;
    }
    for conflict in &kernel.conflicts {
        println!("conflict: {conflict}");
    }
    Ok(())
}
