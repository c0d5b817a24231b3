//! Opens a memory image and says what it is: `cargo run --example image FILE`.

use std::error::Error;
use std::path::PathBuf;

use secmon_platform::image::{self, ImageOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let path = PathBuf::from(std::env::args_os().nth(1).ok_or("usage: image FILE")?);
    let image = image::open(&path, &ImageOptions::default())?;
    println!("{}, {} bytes of RAM", image.format, image.memory.size());
    for region in image.memory.regions() {
        println!("  {}-{}", region.start, region.end());
    }
    for note in &image.notes {
        println!("note: {note}");
    }
    for vcpu in &image.hints.vcpus {
        println!("{vcpu:x?}");
    }
    if let Some(text) = &image.hints.vmcoreinfo {
        println!("VMCOREINFO of {} bytes", text.len());
    }
    Ok(())
}
