//! Finds the kernel in a raw memory image and says what was found, and how
//! long each part took.
//!
//! `cargo run --release -p secmon-profile --example find -- FILE`
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use secmon_memory::{MappedMemory, MemoryRegion, PhysicalAddress, PhysicalMemory, Volatility};
use secmon_profile::{FindOptions, Search, find};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: find FILE")?;
    let file = File::open(path)?;
    let region = MemoryRegion::new(PhysicalAddress::new(0), file.metadata()?.len());
    let memory = MappedMemory::map_file(&file, &[(region, 0)], Volatility::Static)?;
    let memory: Arc<dyn PhysicalMemory> = Arc::new(memory);

    let start = Instant::now();
    let mut options = FindOptions::default();
    if std::env::args().any(|argument| argument == "--thorough") {
        options.search = Search::Thorough;
    }
    let kernel = find(&memory, &options)?;
    println!("found in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
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
    if let Some(path) = std::env::args_os().nth(2) {
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
