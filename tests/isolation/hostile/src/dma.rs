//! Making devices write the target's memory: each is first shown to write a
//! page of this VM's own, and then pointed at the BAR.

use anyhow::{Context, Result, ensure};
use secmon_hostile::Report;

use crate::bar::{self, MEMORY_BAR};
use crate::memory::{PAGE, Window};
use crate::pci;
use crate::ports::Ports;
use crate::virtio::{BUFFER, CONTROL_IN, CONTROL_OUT, Serial, wait};

/// The target's memory as the BAR shows it, and its address here.
struct Target {
    window: Window,
    start: u64,
    samples: Vec<usize>,
}

impl Target {
    fn open() -> Result<Self> {
        let device = pci::shared_memory()?;
        let window = device.map(MEMORY_BAR)?;
        let (start, _) = device.bar(MEMORY_BAR)?.context("no BAR 2")?;
        // Aligned as rings have to be, the ends among them.
        let mut samples: Vec<usize> = bar::offsets(window.length())
            .into_iter()
            .map(|offset| offset & !0xf)
            .step_by(16)
            .collect();
        samples.push(window.length() - PAGE);
        Ok(Self {
            window,
            start,
            samples,
        })
    }

    /// Whether a page's worth of bytes from `offset` on is as before after
    /// `act`.
    fn unchanged(&self, offset: usize, act: impl FnOnce() -> Result<()>) -> Result<bool> {
        let count = PAGE.min(self.window.length() - offset);
        let before = self.window.bytes(offset, count);
        act()?;
        Ok(self.window.bytes(offset, count) == before)
    }
}

/// Buffers, and rings of used buffers, of the device that carries the ports.
pub fn virtio() -> Result<Report> {
    let target = Target::open()?;
    let serial = Serial::take()?;
    let mut report = Report::new();

    // Into a page of our own.
    let mut input = serial.queue(CONTROL_IN, None, None)?;
    let mut output = serial.queue(CONTROL_OUT, None, None)?;
    serial.start();
    let buffer = input.physical() + BUFFER as u64;
    serial.offer(&mut input, buffer, 64, true);
    serial.greet(&mut output)?;
    wait("a message in our own page", || input.used() > 0)?;
    let written = input.page().bytes(BUFFER, 64);
    ensure!(written != [0; 64], "the device writes nothing anywhere");

    let mut used = 0;
    for (index, offset) in target.samples.iter().copied().enumerate() {
        let address = target.start + offset as u64;
        serial.reset()?;
        let denied = if index % 2 == 0 {
            // A message to us goes into the BAR.
            let mut input = serial.queue(CONTROL_IN, None, None)?;
            let mut output = serial.queue(CONTROL_OUT, None, None)?;
            serial.start();
            target.unchanged(offset, || {
                serial.offer(&mut input, address, 64, true);
                serial.greet(&mut output)?;
                // A device that refuses the buffer says nothing.
                used += u32::from(input.used());
                Ok(())
            })?
        } else {
            // What was used is noted in the BAR.
            let mut input = serial.queue(CONTROL_IN, Some(address), None)?;
            let mut output = serial.queue(CONTROL_OUT, None, None)?;
            serial.start();
            let buffer = input.physical() + BUFFER as u64;
            target.unchanged(offset, || {
                serial.offer(&mut input, buffer, 64, true);
                serial.greet(&mut output)?;
                wait("a message in our own page", || {
                    input.page().bytes(BUFFER, 64) != [0; 64]
                })
            })?
        };
        report.tried(denied, || format!("virtio at {offset:#x}"));
    }
    report.note(format!("{used} buffers in the BAR taken for written"));
    Ok(report)
}

/// Interrupts of a device are writes to an address of the driver's choice.
pub fn msi() -> Result<Report> {
    const DATA: u32 = 0x600d_f00d;
    let target = Target::open()?;
    let serial = Serial::take()?;
    let configuration = serial.device.configuration()?;
    let capability = configuration.capabilities(0x11)?.first().copied();
    let capability = capability.context("the device has no MSI-X")?;
    let place = configuration.u32(capability + 4)?;
    let table = serial.device.map(usize::try_from(place & 7)?)?;
    let entry = usize::try_from(place & !7)?;
    // On, and not masked as a whole.
    configuration.set_u16(capability + 2, 0x8000)?;
    let interrupt = |address: u64| -> Result<()> {
        serial.reset()?;
        table.set_u64(entry, address);
        table.set_u32(entry + 8, DATA);
        table.set_u32(entry + 12, 0);
        let mut output = serial.queue(CONTROL_OUT, None, Some(0))?;
        serial.start();
        serial.greet(&mut output)
    };
    let (page, physical) = Window::page()?;
    interrupt(physical + 0x100)?;
    wait("an interrupt in our own page", || page.u32(0x100) == DATA)?;
    let mut report = Report::new();
    for offset in target.samples.iter().copied() {
        let address = target.start + offset as u64;
        page.set_u32(0x100, 0);
        let denied = target.unchanged(offset, || {
            interrupt(address)?;
            // The next one comes after it.
            interrupt(physical + 0x100)?;
            wait("the next interrupt", || page.u32(0x100) == DATA)
        })?;
        report.tried(denied, || format!("MSI at {offset:#x}"));
    }
    table.set_u32(entry + 12, 1);
    configuration.set_u16(capability + 2, 0)?;
    Ok(report)
}

/// QEMU's own device for handing over files copies them to any address
/// (QEMU `docs/specs/fw_cfg.rst`).
pub fn fw_cfg() -> Result<Report> {
    const FILE_DIRECTORY: u32 = 0x19;
    const ERROR: u32 = 1;
    const READ: u32 = 2;
    const SELECT: u32 = 8;
    let target = Target::open()?;
    let ports = Ports::open()?;
    let (page, physical) = Window::page()?;
    let copy = |address: u64, length: u32| -> Result<u32> {
        let control = FILE_DIRECTORY << 16 | SELECT | READ;
        // Big-endian: control, length, address.
        page.set_u32(0, control.swap_bytes());
        page.set_u32(4, length.swap_bytes());
        page.copy_string(8, &address.to_be_bytes());
        ports.write_u32(0x514, u32::try_from(physical >> 32)?.swap_bytes());
        ports.write_u32(0x518, u32::try_from(physical & 0xffff_ffff)?.swap_bytes());
        wait("the copy", || page.u32(0).swap_bytes() & !ERROR == 0)?;
        Ok(page.u32(0).swap_bytes())
    };
    copy(physical + 0x400, 256)?;
    ensure!(
        page.bytes(0x400, 256) != [0; 256],
        "nothing is copied anywhere"
    );
    let mut report = Report::new();
    let mut errors = 0;
    for offset in target.samples.iter().copied() {
        for length in [1, 4, 256] {
            let denied = target.unchanged(offset, || {
                errors += copy(target.start + offset as u64, length)? & ERROR;
                Ok(())
            })?;
            report.tried(denied, || format!("fw_cfg, {length} bytes at {offset:#x}"));
        }
    }
    report.note(format!("{errors} copies ended with an error"));
    Ok(report)
}
