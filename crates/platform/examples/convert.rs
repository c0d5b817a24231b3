//! Writes an image anew in another format:
//! `cargo run --example convert IMAGE OUTPUT raw|lime|elf [VMCOREINFO]`.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;

use secmon_platform::image::write::{Start, WriteFormat, WriteOptions, write};
use secmon_platform::image::{self, ImageOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: convert IMAGE OUTPUT raw|lime|elf [VMCOREINFO]";
    let mut arguments = std::env::args_os().skip(1);
    let input = PathBuf::from(arguments.next().ok_or(usage)?);
    let output = PathBuf::from(arguments.next().ok_or(usage)?);
    let format = match arguments.next().ok_or(usage)?.to_str() {
        Some("raw") => WriteFormat::Raw,
        Some("lime") => WriteFormat::Lime,
        Some("elf") => WriteFormat::ElfCore,
        _ => return Err(usage.into()),
    };
    let vmcoreinfo = arguments.next().map(std::fs::read).transpose()?;
    let image = image::open(&input, &ImageOptions::default())?;
    let written = write(
        image.memory.as_ref(),
        &output,
        &mut WriteOptions {
            format,
            start: Start::New,
            vmcoreinfo: vmcoreinfo.as_deref().or(image.hints.vmcoreinfo.as_deref()),
            progress: &mut |_| ControlFlow::Continue(()),
        },
    )?;
    println!(
        "{} bytes, {} stored, sha256 {}",
        written.length,
        written.stored,
        written.sha256_hexadecimal()
    );
    for (region, error) in &written.unreadable {
        println!("{}-{}: {error}", region.start, region.end());
    }
    Ok(())
}
