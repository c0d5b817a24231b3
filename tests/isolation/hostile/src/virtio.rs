//! A driver of the virtio-serial device in user space, that puts queues and
//! buffers where it likes (Virtual I/O Device 1.2, sections 2.7, 4.1 and 5.3).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::memory::Window;
use crate::pci::{self, Device, RED_HAT};

/// `virtio-serial-pci`, transitional and modern.
const SERIAL: [u16; 2] = [0x1003, 0x1043];
/// Features: several ports, and the modern interface.
const MULTIPORT: u32 = 1 << 1;
const VERSION_1: u32 = 1;
/// The queues of control messages, to the driver and to the device.
pub const CONTROL_IN: u16 = 2;
pub const CONTROL_OUT: u16 = 3;
/// Descriptors of a queue.
const SIZE: u16 = 8;

/// Offsets in a queue's page: descriptors, what is offered, what was used, and
/// room for buffers.
const OFFERED: usize = 0x200;
const USED: usize = 0x400;
/// Where a buffer in a queue's own page begins.
pub const BUFFER: usize = 0x800;

/// Offsets in the common configuration.
mod common {
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY: usize = 30;
    pub const QUEUE_DESCRIPTORS: usize = 32;
    pub const QUEUE_OFFERED: usize = 40;
    pub const QUEUE_USED: usize = 48;
}

/// The device, taken away from the kernel; it goes back to it at the end.
pub struct Serial {
    pub device: Device,
    window: Window,
    common: usize,
    notify: usize,
    multiplier: usize,
}

/// A queue in a page of our own.
pub struct Queue {
    number: u16,
    page: Window,
    physical: u64,
    offered: u16,
    notify: usize,
}

impl Serial {
    pub fn take() -> Result<Self> {
        let device = pci::list()?
            .into_iter()
            .find(|device| device.vendor == RED_HAT && SERIAL.contains(&device.device))
            .context("there is no virtio-serial device")?;
        let configuration = device.configuration()?;
        let mut places = [None; 2];
        let mut multiplier = 0;
        for at in configuration.capabilities(9)? {
            let kind = configuration.u8(at + 3)?;
            let bar = configuration.u8(at + 4)?;
            let offset = configuration.u32(at + 8)?;
            // 1 is the common configuration, 2 the notifications.
            if let Some(place) = places.get_mut(usize::from(kind).wrapping_sub(1)) {
                place.get_or_insert((bar, offset));
            }
            if kind == 2 {
                multiplier = configuration.u32(at + 16)?;
            }
        }
        let [Some((bar, common)), Some((other, notify))] = places else {
            anyhow::bail!("no modern interface");
        };
        ensure!(bar == other, "its parts lie in BARs {bar} and {other}");
        device.unbind()?;
        // Memory decoding, and the right to reach memory by itself.
        configuration.set_u16(4, 0x0406)?;
        let window = device.map(usize::from(bar))?;
        let serial = Self {
            device,
            window,
            common: usize::try_from(common)?,
            notify: usize::try_from(notify)?,
            multiplier: usize::try_from(multiplier)?,
        };
        serial.reset()?;
        Ok(serial)
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.window.read(self.common + common::STATUS, &mut status);
        status[0]
    }

    /// As it was when the machine started, and then up to the features.
    pub fn reset(&self) -> Result<()> {
        let at = |register| self.common + register;
        self.window.set_u8(at(common::STATUS), 0);
        wait("the device's reset", || self.status() == 0)?;
        // Acknowledged; driver.
        self.window.set_u8(at(common::STATUS), 1);
        self.window.set_u8(at(common::STATUS), 3);
        for (word, bits) in [(0, MULTIPORT), (1, VERSION_1)] {
            self.window.set_u32(at(common::DRIVER_FEATURE_SELECT), word);
            self.window.set_u32(at(common::DRIVER_FEATURE), bits);
        }
        self.window.set_u8(at(common::STATUS), 0xb);
        ensure!(self.status() == 0xb, "features refused");
        Ok(())
    }

    /// The driver is ready.
    pub fn start(&self) {
        self.window.set_u8(self.common + common::STATUS, 0xf);
    }

    /// Sets up a queue; `used` says where the device writes what it has used,
    /// in our page unless told, and `vector` which message it sends then.
    pub fn queue(&self, number: u16, used: Option<u64>, vector: Option<u16>) -> Result<Queue> {
        let at = |register| self.common + register;
        let (page, physical) = Window::page()?;
        self.window.set_u16(at(common::QUEUE_SELECT), number);
        self.window.set_u16(at(common::QUEUE_SIZE), SIZE);
        if let Some(vector) = vector {
            self.window.set_u16(at(common::QUEUE_VECTOR), vector);
        }
        for (register, address) in [
            (common::QUEUE_DESCRIPTORS, physical),
            (common::QUEUE_OFFERED, physical + OFFERED as u64),
            (common::QUEUE_USED, used.unwrap_or(physical + USED as u64)),
        ] {
            self.window.set_u64(at(register), address);
        }
        let mut notify = [0; 2];
        self.window.read(at(common::QUEUE_NOTIFY), &mut notify);
        self.window.set_u16(at(common::QUEUE_ENABLE), 1);
        let notify = usize::from(u16::from_le_bytes(notify));
        Ok(Queue {
            number,
            page,
            physical,
            offered: 0,
            notify: self.notify + notify * self.multiplier,
        })
    }

    /// Offers a buffer that the device reads or writes, and says so.
    pub fn offer(&self, queue: &mut Queue, address: u64, length: u32, writable: bool) {
        let slot = usize::from(queue.offered % SIZE);
        let descriptor = slot * 16;
        queue.page.set_u64(descriptor, address);
        queue.page.set_u32(descriptor + 8, length);
        // No next one; 2 for a buffer that the device writes.
        queue
            .page
            .set_u32(descriptor + 12, if writable { 2 } else { 0 });
        let entry = u16::try_from(slot).unwrap_or(0);
        queue.page.set_u16(OFFERED + 4 + slot * 2, entry);
        queue.offered = queue.offered.wrapping_add(1);
        queue.page.set_u16(OFFERED + 2, queue.offered);
        self.window.set_u16(queue.notify, queue.number);
    }

    /// Sends a control message: about a port, what, and a value.
    pub fn control(&self, queue: &mut Queue, port: u32, event: u16, value: u16) -> Result<()> {
        let before = queue.used();
        let at = BUFFER + usize::from(queue.offered % SIZE) * 16;
        queue.page.set_u32(at, port);
        queue.page.set_u16(at + 4, event);
        queue.page.set_u16(at + 6, value);
        let address = queue.physical + at as u64;
        self.offer(queue, address, 8, false);
        wait("a control message being taken", || queue.used() != before)
    }

    /// Tells the device that the driver is there: it answers with a message
    /// for each port, where buffers were offered.
    pub fn greet(&self, queue: &mut Queue) -> Result<()> {
        self.control(queue, 0, 0, 1)
    }
}

impl Queue {
    /// How many buffers the device says it has used.
    pub fn used(&self) -> u16 {
        let mut index = [0; 2];
        self.page.read(USED + 2, &mut index);
        u16::from_le_bytes(index)
    }

    /// The page of the queue, whose upper half is free.
    pub fn page(&self) -> &Window {
        &self.page
    }

    /// The page's physical address.
    pub fn physical(&self) -> u64 {
        self.physical
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        self.window.set_u8(self.common + common::STATUS, 0);
        let _ = wait("the device's reset", || self.status() == 0);
        if let Err(error) = self.device.bind("virtio-pci") {
            eprintln!("hostile: {error:#}");
        }
    }
}

/// Waits for something that the host does in its own time.
pub fn wait(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        ensure!(Instant::now() < deadline, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
