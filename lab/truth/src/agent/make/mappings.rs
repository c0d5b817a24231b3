//! A process with mappings of all sorts, one with very many, and one whose
//! memory has a known content.

use std::fs::{self, OpenOptions};
use std::io;

use super::report::{Reports, attempt};
use crate::agent::memory::{self, PAGE};
use crate::agent::sys;

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const NO_FILE: Option<&fs::File> = None;

/// The three processes.
pub fn processes(reports: &mut Reports) -> io::Result<()> {
    reports.simple("maps-kinds", |failures| {
        kinds(failures);
        Ok(())
    })?;
    reports.simple("maps-many", |_| {
        // Alternating protections keep the kernel from merging neighbours.
        let pages = 1200;
        let start = memory::map(pages * PAGE, libc::PROT_READ, ANONYMOUS, NO_FILE, 0)?;
        for page in (0..pages).step_by(2) {
            memory::protect(start + page * PAGE, PAGE, READ_WRITE)?;
        }
        Ok(())
    })?;
    reports.simple("maps-pattern", |_| {
        // 64 pages, each filled with its number; every fourth never touched.
        let pages = 64;
        let start = memory::map(pages * PAGE, READ_WRITE, ANONYMOUS, NO_FILE, 0)?;
        for page in (0..pages).filter(|page| page % 4 != 3) {
            memory::fill(start + page * PAGE, PAGE, page as u8 + 1);
        }
        fs::write("/run/maps-pattern", format!("{start:#x}\n"))
    })?;
    Ok(())
}

fn kinds(failures: &mut Vec<String>) {
    fs::create_dir_all("/tmp/maps").ok();
    attempt(failures, "shared file", || {
        let file = sized_file("/tmp/maps/shared file", 3 * PAGE)?;
        memory::map(3 * PAGE, READ_WRITE, libc::MAP_SHARED, Some(&file), 0)
    });
    attempt(failures, "private file at an offset", || {
        let file = sized_file("/tmp/maps/private", 4 * PAGE)?;
        memory::map(
            2 * PAGE,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            Some(&file),
            2 * PAGE as i64,
        )
    });
    attempt(failures, "deleted file", || {
        let file = sized_file("/tmp/maps/gone", PAGE)?;
        memory::map(PAGE, READ_WRITE, libc::MAP_SHARED, Some(&file), 0)?;
        fs::remove_file("/tmp/maps/gone")
    });
    attempt(failures, "odd name", || {
        let file = sized_file("/tmp/maps/new\nline \\012 日本", PAGE)?;
        memory::map(PAGE, libc::PROT_READ, libc::MAP_PRIVATE, Some(&file), 0)
    });
    attempt(failures, "memfd", || {
        let file = fs::File::from(sys::memfd(b"mapped", 0)?);
        file.set_len(PAGE as u64)?;
        memory::map(PAGE, READ_WRITE, libc::MAP_SHARED, Some(&file), 0)
    });
    attempt(failures, "device", || {
        let file = fs::File::open("/dev/zero")?;
        memory::map(PAGE, libc::PROT_READ, libc::MAP_PRIVATE, Some(&file), 0)
    });
    attempt(failures, "System V", || memory::system_v(2 * PAGE));
    for (name, protection, flags) in [
        (
            "shared anonymous",
            READ_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        ),
        ("guard", libc::PROT_NONE, ANONYMOUS),
        ("write only", libc::PROT_WRITE, ANONYMOUS),
        ("executable", libc::PROT_READ | libc::PROT_EXEC, ANONYMOUS),
        ("all rights", READ_WRITE | libc::PROT_EXEC, ANONYMOUS),
        ("growing down", READ_WRITE, ANONYMOUS | libc::MAP_GROWSDOWN),
        ("no reserve", READ_WRITE, ANONYMOUS | libc::MAP_NORESERVE),
    ] {
        attempt(failures, name, || {
            memory::map(PAGE, protection, flags, NO_FILE, 0)
        });
    }
    attempt(failures, "once written, now closed", || {
        let start = memory::map(2 * PAGE, READ_WRITE, ANONYMOUS, NO_FILE, 0)?;
        memory::fill(start, 2 * PAGE, 0x5a);
        memory::protect(start, 2 * PAGE, libc::PROT_NONE)
    });
    attempt(failures, "locked", || {
        let start = memory::map(PAGE, READ_WRITE, ANONYMOUS, NO_FILE, 0)?;
        memory::lock(start, PAGE)
    });
    attempt(failures, "with a hole", || {
        let start = memory::map(3 * PAGE, READ_WRITE, ANONYMOUS, NO_FILE, 0)?;
        memory::unmap(start + PAGE, PAGE)
    });
    attempt(failures, "transparent huge page", || {
        let huge = 2 << 20;
        let start = memory::map(2 * huge, READ_WRITE, ANONYMOUS, NO_FILE, 0)?;
        memory::advise(start, 2 * huge, libc::MADV_HUGEPAGE)?;
        memory::fill(start, 2 * huge, 0x48);
        Ok(())
    });
    attempt(failures, "hugetlb page", || {
        fs::write("/proc/sys/vm/nr_hugepages", "2")?;
        let start = memory::map(
            2 << 20,
            READ_WRITE,
            ANONYMOUS | libc::MAP_HUGETLB,
            NO_FILE,
            0,
        )?;
        memory::fill(start, 2 << 20, 0x47);
        Ok(())
    });
    attempt(failures, "not for children", || {
        let start = memory::map(PAGE, READ_WRITE, ANONYMOUS, NO_FILE, 0)?;
        memory::advise(start, PAGE, libc::MADV_DONTFORK)
    });
    attempt(failures, "named anonymous memory", || {
        let start = memory::map(PAGE, READ_WRITE, ANONYMOUS, NO_FILE, 0)?;
        memory::name(start, PAGE, "lab heap")
    });
}

fn sized_file(path: &str, size: usize) -> io::Result<fs::File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(size as u64)?;
    Ok(file)
}
