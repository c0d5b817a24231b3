//! A real QEMU guest of firmware and one boot sector (`boot.asm`), whose RAM
//! is a file that the test shares: the truth that dumps are compared with.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use secmon_memory::{PhysicalMemory, PhysicalReadError};
use secmon_platform::layout::{Machine, RamLayout};

pub const MIB: u64 = 1 << 20;
pub const PAGE: usize = 4096;

const BOOT_SECTOR: &[u8; 512] = include_bytes!("boot.bin");
/// Where the boot sector says that it is done.
const SIGNAL: (u64, &[u8; 8]) = (0x7000, b"SECMON64");
/// As `boot.asm` sets them.
pub const CR3: u64 = 0x1_0000;
pub const KERNEL_GS_BASE: u64 = 0xffff_8880_1234_5000;

/// The guest, stopped, with known pages in its RAM.
pub struct FirmwareGuest {
    process: Child,
    monitor: BufReader<UnixStream>,
    pub directory: tempfile::TempDir,
    pub ram: Ram,
}

/// What a dump is compared with: the guest's RAM in a file.
pub struct Ram {
    pub file: File,
    pub layout: RamLayout,
}

impl Drop for FirmwareGuest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl FirmwareGuest {
    /// Boots a guest, waits for its boot sector, stops it, and writes pages of
    /// all kinds into its RAM.
    pub fn start(machine: Machine, ram_size: u64, vcpus: u32) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        let disk = File::create(path("disk")).expect("the disk");
        disk.write_all_at(BOOT_SECTOR, 0).expect("the disk");
        disk.set_len(MIB).expect("the disk");
        let ram = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path("ram"))
            .expect("the RAM file");
        ram.set_len(ram_size).expect("the RAM file");
        let machine_name = match machine {
            Machine::Q35 => "q35",
            Machine::I440fx => "pc",
            Machine::Microvm => "microvm",
        };
        let show = |name: &str| path(name).display().to_string();
        let process = Command::new("qemu-system-x86_64")
            .args(["-machine", &format!("{machine_name},memory-backend=mem")])
            .args([
                "-object",
                &format!(
                    "memory-backend-file,id=mem,size={ram_size},mem-path={},share=on",
                    show("ram")
                ),
            ])
            .args(["-m", &format!("{}M", ram_size / MIB)])
            .args(["-smp", &vcpus.to_string(), "-accel", "tcg"])
            .args(["-nodefaults", "-display", "none", "-device", "vmcoreinfo"])
            .args(["-drive", &format!("file={},format=raw", show("disk"))])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", show("qmp"))])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 runs (install qemu-system-x86)");
        let mut guest = Self {
            process,
            monitor: BufReader::new(connect(&path("qmp"))),
            directory,
            ram: Ram {
                file: ram,
                layout: RamLayout::for_machine(machine, ram_size).expect("a layout"),
            },
        };
        guest.greeting();
        guest.command("qmp_capabilities", "{}");
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut signal = [0; 8];
        while &signal != SIGNAL.1 {
            assert!(Instant::now() < deadline, "the guest did not boot");
            std::thread::sleep(Duration::from_millis(20));
            guest
                .ram
                .file
                .read_exact_at(&mut signal, SIGNAL.0)
                .expect("the RAM file");
        }
        guest.command("stop", "{}");
        guest.fill();
        guest
    }

    /// Writes random, repetitive and sparse pages in the guest's free memory.
    fn fill(&self) {
        let mut noise = Noise(0x5ec_0de);
        let mut write = |start: u64, count: u64| {
            for page in 0..count {
                let bytes = match page % 5 {
                    0 => noise.page(),
                    1 => b"The quick brown fox. "
                        .iter()
                        .copied()
                        .cycle()
                        .take(PAGE)
                        .collect(),
                    2 => vec![0x11; PAGE],
                    3 => {
                        let mut bytes = vec![0; PAGE];
                        bytes[page as usize % PAGE] = 1;
                        bytes
                    }
                    _ => continue,
                };
                self.ram
                    .file
                    .write_all_at(&bytes, start + page * PAGE as u64)
                    .expect("the RAM file");
            }
        };
        write(2 * MIB, 1024);
        write(9 * MIB + PAGE as u64, 700);
        // The last pages below the hole and the first and last above it.
        for (region, offset) in self.ram.layout.entries() {
            if region.start.as_u64() > 0 {
                write(*offset, 100);
                write(offset + region.length - 64 * PAGE as u64, 64);
            }
        }
    }

    fn greeting(&mut self) {
        let mut line = String::new();
        self.monitor.read_line(&mut line).expect("QMP's greeting");
        assert!(line.contains("QMP"), "{line}");
    }

    /// Runs a QMP command; its whole answer.
    pub fn command(&mut self, name: &str, arguments: &str) -> String {
        let command = format!("{{\"execute\":\"{name}\",\"arguments\":{arguments}}}\n");
        self.monitor
            .get_mut()
            .write_all(command.as_bytes())
            .expect("QMP takes the command");
        loop {
            let mut line = String::new();
            let count = self.monitor.read_line(&mut line).expect("QMP's answer");
            assert!(count > 0, "QEMU went away");
            assert!(
                !line.starts_with("{\"error\""),
                "{name} {arguments}: {line}"
            );
            if line.starts_with("{\"return\"") {
                return line;
            }
        }
    }

    /// Lets QEMU write a dump; `more` are further arguments.
    pub fn dump(&mut self, name: &str, paging: bool, more: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        self.command(
            "dump-guest-memory",
            &format!(
                "{{\"paging\":{paging},\"protocol\":\"file:{}\"{more}}}",
                path.display()
            ),
        );
        path
    }
}

impl Ram {
    /// Compares the memory with the guest's RAM, page by page; the number of
    /// pages that were equal. A page that can't be read for a reason that
    /// `excused` accepts is passed over; any other difference fails.
    pub fn compare(
        &self,
        memory: &dyn PhysicalMemory,
        excused: impl Fn(u64, &PhysicalReadError) -> bool,
    ) -> u64 {
        let mut equal = 0;
        let (mut expected, mut found) = (vec![0; PAGE], vec![0; PAGE]);
        for (region, offset) in self.layout.entries() {
            for page in 0..region.length / PAGE as u64 {
                let inside = page * PAGE as u64;
                let address = region.start.wrapping_add(inside);
                self.file
                    .read_exact_at(&mut expected, offset + inside)
                    .expect("the RAM file");
                match memory.read(address, &mut found) {
                    Ok(()) => {
                        assert!(found == expected, "page {address} differs");
                        equal += 1;
                    }
                    Err(error) => assert!(excused(address.as_u64(), &error), "{error}"),
                }
            }
        }
        equal
    }
}

/// AVML's own way to write: 16 MiB at a time, none that holds only zeros.
pub fn write_avml(guest: &FirmwareGuest, path: &Path) {
    const BLOCK: u64 = 16 * MIB;
    let mut file = File::create(path).expect("the image");
    for (region, offset) in guest.ram.layout.entries() {
        for start in (0..region.length).step_by(BLOCK as usize) {
            let mut block = vec![0; BLOCK.min(region.length - start) as usize];
            guest
                .ram
                .file
                .read_exact_at(&mut block, offset + start)
                .expect("the RAM");
            if block.iter().all(|byte| *byte == 0) {
                continue;
            }
            let mut encoder = snap::write::FrameEncoder::new(Vec::new());
            encoder.write_all(&block).expect("into memory");
            let stream = encoder.into_inner().expect("into memory");
            let first = region.start.as_u64() + start;
            let last = first + block.len() as u64 - 1;
            file.write_all(b"AVML\x02\0\0\0").expect("the image");
            for field in [first, last, 0] {
                file.write_all(&field.to_le_bytes()).expect("the image");
            }
            file.write_all(&stream).expect("the image");
            file.write_all(&(stream.len() as u64).to_le_bytes())
                .expect("the image");
        }
    }
}

/// LiME's own way to write: each region of `System RAM`, low memory in two.
pub fn write_lime(guest: &FirmwareGuest, path: &Path) {
    let mut file = File::create(path).expect("the image");
    let mut write = |start: u64, length: u64, offset: u64| {
        file.write_all(b"EMiL\x01\0\0\0").expect("the image");
        for field in [start, start + length - 1, 0] {
            file.write_all(&field.to_le_bytes()).expect("the image");
        }
        let mut bytes = vec![0; length as usize];
        guest
            .ram
            .file
            .read_exact_at(&mut bytes, offset)
            .expect("the RAM");
        file.write_all(&bytes).expect("the image");
    };
    for (region, offset) in guest.ram.layout.entries() {
        let first = region.length.min(MIB);
        write(region.start.as_u64(), first, *offset);
        write(
            region.start.as_u64() + first,
            region.length - first,
            offset + first,
        );
    }
}

/// No page may be missing.
pub fn none_missing(_: u64, _: &PhysicalReadError) -> bool {
    false
}

fn connect(path: &Path) -> UnixStream {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "QMP: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Bytes without pattern, the same in each run.
pub struct Noise(pub u64);

impl Noise {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn page(&mut self) -> Vec<u8> {
        (0..PAGE / 8)
            .flat_map(|_| self.next().to_le_bytes())
            .collect()
    }
}
