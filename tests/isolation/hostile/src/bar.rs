//! Writing the target's memory through the device that shows it.
//!
//! The target stands still meanwhile, so that whatever changes was changed
//! here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use secmon_hostile::Report;

use crate::memory::{Atomic, PAGE, Store, Window};
use crate::pci::{self, Device};

/// The BAR with the memory.
pub const MEMORY_BAR: usize = 2;
/// Where its address stands in configuration space.
const BAR_REGISTER: u64 = 0x18;

/// The device, its memory, and the address of that.
fn open() -> Result<(Device, Window, u64)> {
    let device = pci::shared_memory()?;
    let window = device.map(MEMORY_BAR)?;
    let (start, _) = device.bar(MEMORY_BAR)?.context("no BAR 2")?;
    Ok((device, window, start))
}

/// Offsets all over the memory: the ends, the edges of pages, odd ones.
pub fn offsets(length: usize) -> Vec<usize> {
    let mut offsets = vec![
        0,
        1,
        3,
        PAGE - 1,
        PAGE,
        PAGE + 7,
        length / 2 - 3,
        length - 64,
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..300 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        offsets.push(usize::try_from(state).unwrap_or(0) % (length - 64));
    }
    offsets
}

/// Whether the bytes are as before after `write`, which is told one that they
/// are not.
fn unchanged(window: &Window, offset: usize, write: impl FnOnce(u8)) -> bool {
    let before = window.bytes(offset, 64);
    write(!before[0]);
    window.bytes(offset, 64) == before
}

pub fn widths() -> Result<Report> {
    let (_, window, _) = open()?;
    // The same stores on a page of our own show that they are made.
    let (page, _) = Window::page()?;
    let mut report = Report::new();
    for store in Store::all() {
        ensure!(
            !unchanged(&page, 5, |byte| page.store(5, store, byte)),
            "{store:?} changes nothing anywhere"
        );
        for offset in offsets(window.length()) {
            let denied = unchanged(&window, offset, |byte| window.store(offset, store, byte));
            report.tried(denied, || format!("{store:?} at {offset:#x}"));
        }
    }
    Ok(report)
}

pub fn strings() -> Result<Report> {
    let (_, window, _) = open()?;
    let (page, _) = Window::page()?;
    ensure!(
        !unchanged(&page, 5, |byte| page.copy_string(5, &[byte; 100])),
        "rep movsb changes nothing anywhere"
    );
    let mut report = Report::new();
    for count in [1, 63, PAGE, 3 * PAGE + 1, 1 << 18] {
        for at in [0, 4093, window.length() / 3, window.length() - count] {
            let before = window.bytes(at, count);
            window.copy_string(at, &vec![!before[0]; count]);
            let denied = window.bytes(at, count) == before;
            report.tried(denied, || format!("rep movsb of {count} at {at:#x}"));
            window.store_string(at, count, !before[0]);
            let denied = window.bytes(at, count) == before;
            report.tried(denied, || format!("rep stosb of {count} at {at:#x}"));
        }
    }
    Ok(report)
}

pub fn atomics() -> Result<Report> {
    let (_, window, _) = open()?;
    let (page, _) = Window::page()?;
    let mut report = Report::new();
    for atomic in Atomic::ALL {
        ensure!(
            !unchanged(&page, 8, |_| page.atomic(8, atomic)),
            "{atomic:?} changes nothing anywhere"
        );
        for offset in offsets(window.length()) {
            // Aligned, and split over two lines of the cache.
            for offset in [offset & !3, (offset & !63) + 62] {
                let offset = offset.min(window.length() - 64);
                let denied = unchanged(&window, offset, |_| window.atomic(offset, atomic));
                report.tried(denied, || format!("{atomic:?} at {offset:#x}"));
            }
        }
    }
    Ok(report)
}

pub fn by_kernel() -> Result<Report> {
    let (_, window, start) = open()?;
    let mut report = Report::new();
    let physical = File::options().read(true).write(true).open("/dev/mem")?;
    let own = File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    for offset in [0, 4000, window.length() / 2 + 1, window.length() - 4096] {
        let denied = unchanged(&window, offset, |byte| {
            let _ = window.write_by_pipe(offset, &[byte; 64]);
        });
        report.tried(denied, || format!("read(2) into {offset:#x}"));
        let denied = unchanged(&window, offset, |byte| {
            let _ = physical.write_all_at(&[byte; 64], start + offset as u64);
        });
        report.tried(denied, || format!("write(2) to /dev/mem at {offset:#x}"));
        let denied = unchanged(&window, offset, |byte| {
            let _ = own.write_all_at(&[byte; 64], window.address(offset));
        });
        report.tried(denied, || format!("/proc/self/mem at {offset:#x}"));
        let page = offset / PAGE * PAGE;
        match Window::map(&physical, start + page as u64, PAGE) {
            Ok(again) => {
                let denied = unchanged(&window, page, |byte| again.store(0, Store::Quad, byte));
                report.tried(denied, || format!("another mapping of {page:#x}"));
            }
            Err(error) => report.note(format!("/dev/mem at the BAR: {error}")),
        }
    }
    Ok(report)
}

/// All of configuration space and of the registers, with ones and with zeros;
/// what the kernel needs is put back.
pub fn configuration() -> Result<Report> {
    let (device, window, _) = open()?;
    let configuration = device.configuration()?;
    let samples = offsets(window.length());
    let seen = |window: &Window| -> Vec<Vec<u8>> {
        samples.iter().map(|at| window.bytes(*at, 64)).collect()
    };
    let before = seen(&window);
    let registers = device.map(0).context("the registers in BAR 0")?;
    let mut report = Report::new();
    for offset in (0..registers.length()).step_by(4) {
        for value in [u32::MAX, 0, 1, 0x10000] {
            registers.set_u32(offset, value);
            report.tries += 1;
        }
        registers.set_u8(offset, 0xff);
        registers.set_u16(offset, 0xffff);
        report.tries += 2;
    }
    let size = device.bar(MEMORY_BAR)?;
    let saved: Vec<u32> = (0..64)
        .map(|index| configuration.u32(index * 4))
        .collect::<io::Result<_>>()?;
    for (offset, saved) in (0..).step_by(4).zip(saved) {
        for value in [u32::MAX, 0, 0x5555_5555] {
            configuration.set_u32(offset, value)?;
            report.tries += 1;
        }
        configuration.set_u32(offset, saved)?;
    }
    // Command last: memory decoding on, and as master of the bus.
    configuration.set_u16(4, 0x0407)?;
    report.tried(device.bar(MEMORY_BAR)? == size, || "another BAR".to_owned());
    report.tried(seen(&window) == before, || "other bytes".to_owned());
    let denied = unchanged(&window, 64, |byte| window.store(64, Store::Quad, byte));
    report.tried(denied, || "stores are taken afterwards".to_owned());
    Ok(report)
}

/// Puts the BAR at other addresses and writes it there.
pub fn moved() -> Result<Report> {
    let (device, window, start) = open()?;
    let configuration = device.configuration()?;
    let length = window.length() as u64;
    let probe = window.bytes(0x10_0000, 64);
    let mut report = Report::new();
    let flags = configuration.u32(BAR_REGISTER)? & 0xf;
    let place = |address: u64| -> Result<()> {
        configuration.set_u32(BAR_REGISTER, u32::try_from(address & 0xffff_fff0)? | flags)?;
        configuration.set_u32(BAR_REGISTER + 4, u32::try_from(address >> 32)?)?;
        Ok(())
    };
    let physical = File::options().read(true).write(true).open("/dev/mem")?;
    let mut reached = 0;
    let tried = (|| -> Result<()> {
        for address in [
            start + length,
            start + 2 * length,
            start + 8 * length,
            0x1_0000_0000,
            0,
        ] {
            place(address)?;
            let Ok(there) = Window::map(&physical, address + 0x10_0000, PAGE) else {
                report.note(format!("{address:#x}: the kernel maps nothing there"));
                report.tries += 1;
                continue;
            };
            // RAM and the way to it come before the BAR.
            if there.bytes(0, 64) != probe {
                report.tries += 1;
                continue;
            }
            reached += 1;
            for store in Store::all() {
                let denied = unchanged(&there, 0, |byte| there.store(0, store, byte));
                report.tried(denied, || format!("{store:?} with the BAR at {address:#x}"));
            }
        }
        Ok(())
    })();
    place(start)?;
    tried?;
    ensure!(reached > 0, "the BAR could not be moved at all");
    report.note(format!("read at {reached} other addresses"));
    report.tried(window.bytes(0x10_0000, 64) == probe, || {
        "other bytes at the old address".to_owned()
    });
    Ok(report)
}

/// More of the file than the BAR's length: by a longer mapping, by a larger
/// BAR, behind its end.
pub fn enlarged() -> Result<Report> {
    let (device, window, start) = open()?;
    let configuration = device.configuration()?;
    let length = window.length() as u64;
    let mut report = Report::new();
    let file = device.resource(MEMORY_BAR)?;
    for (offset, more) in [(0, PAGE), (0, window.length()), (length, PAGE)] {
        let whole = if offset == 0 { window.length() } else { 0 };
        let mapped = Window::map(&file, offset, whole + more);
        report.tried(mapped.is_err(), || {
            format!("{more} bytes beyond the end are mapped from {offset:#x} on")
        });
    }
    // The size that the device tells: ones in the bits of an address.
    let saved = [
        configuration.u32(BAR_REGISTER)?,
        configuration.u32(BAR_REGISTER + 4)?,
    ];
    configuration.set_u32(BAR_REGISTER, u32::MAX)?;
    configuration.set_u32(BAR_REGISTER + 4, u32::MAX)?;
    let told = [
        configuration.u32(BAR_REGISTER)?,
        configuration.u32(BAR_REGISTER + 4)?,
    ];
    configuration.set_u32(BAR_REGISTER, saved[0])?;
    configuration.set_u32(BAR_REGISTER + 4, saved[1])?;
    let mask = u64::from(told[1]) << 32 | u64::from(told[0] & !0xf);
    report.tried(mask.wrapping_neg() == length, || {
        format!("size mask {mask:#x}")
    });
    let capabilities = configuration.extended_capabilities();
    // 0x15 is resizable BARs, 0x24 their kind for virtual functions.
    report.tried(
        !capabilities.iter().any(|id| [0x15, 0x24].contains(id)),
        || "the BAR can be resized".to_owned(),
    );
    let physical = File::options().read(true).write(true).open("/dev/mem")?;
    for behind in [0, length, 7 * length] {
        match Window::map(&physical, start + length + behind, PAGE) {
            Ok(there) => {
                there.store(0, Store::Quad, 0x5a);
                // What nothing answers reads as zeros under emulation.
                let seen = there.bytes(0, 64);
                let denied = seen == [0; 64] || seen == [0xff; 64];
                report.tried(denied, || {
                    format!("something is {behind:#x} behind the BAR")
                });
            }
            Err(_) => report.tries += 1,
        }
    }
    Ok(report)
}
