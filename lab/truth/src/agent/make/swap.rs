//! Compressed swap in memory, and a process whose pages are in it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

use super::report::{Reports, attempt};
use crate::agent::memory::{self, PAGE};
use crate::agent::sys;

/// Size of the swap space.
const SIZE: usize = 16 << 20;

static ON: AtomicBool = AtomicBool::new(false);

/// Makes the swap space.
pub fn on(failures: &mut Vec<String>) {
    let made = attempt(failures, "swap", || {
        // Kernels before 6.12 compress through modules, and the default one
        // may be missing.
        let algorithms = fs::read_to_string("/sys/block/zram0/comp_algorithm")?;
        let size = SIZE.to_string();
        fs::write("/sys/block/zram0/disksize", size).map_err(|error| {
            io::Error::new(error.kind(), format!("{error}; algorithms: {algorithms}"))
        })?;
        // The header of mkswap(8): from byte 1024 version, last page, number
        // of bad pages; the signature at the end of the first page.
        let mut header = vec![0u8; PAGE];
        header[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
        header[1028..1032].copy_from_slice(&((SIZE / PAGE - 1) as u32).to_ne_bytes());
        header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
        OpenOptions::new()
            .write(true)
            .open("/dev/zram0")?
            .write_all(&header)?;
        sys::swap_on("/dev/zram0")
    });
    ON.store(made.is_some(), Ordering::SeqCst);
}

/// A process with 256 known pages, of which the middle half is swapped out.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    if !ON.load(Ordering::SeqCst) {
        return Ok(());
    }
    reports.simple("swapped", |_| {
        let pages = 256;
        let start = memory::map(
            pages * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            None::<&fs::File>,
            0,
        )?;
        for page in 0..pages {
            memory::fill(start + page * PAGE, PAGE, page as u8);
        }
        memory::advise(start + 64 * PAGE, 128 * PAGE, libc::MADV_PAGEOUT)?;
        fs::write("/run/swapped", format!("{start:#x}\n"))
    })?;
    Ok(())
}
