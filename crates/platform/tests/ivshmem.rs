//! The whole way of an ivshmem target: a machine with its RAM in a shared
//! file, a monitoring VM that has the file as a device, and inside of that VM
//! this very program, which finds the device and reads the machine's memory
//! while it runs.
//!
//! This test has a `main` of its own: as process 1 it is the inside.

mod machine;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use machine::Machine;
use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};
use secmon_lab::{Kernel, Suite};
use secmon_memory::{PhysicalAddress, Volatility};
use secmon_platform::ivshmem;
use secmon_platform::target::{OpenOptions, Target};

const RAM: u64 = 64 << 20;
/// The machine's firmware counts time here, 18 times a second.
const TICKS: PhysicalAddress = PhysicalAddress::new(0x46c);
const PATIENCE: Duration = Duration::from_secs(240);

fn main() {
    if std::process::id() == 1 {
        if let Err(error) = inside() {
            println!("failed {error}");
        }
        // The end of process 1 would be a panic of the kernel.
        let _ = reboot(RebootCommand::PowerOff);
        return;
    }
    a_monitoring_vm_reads_a_live_machine();
    println!("test a_monitoring_vm_reads_a_live_machine ... ok");
}

/// A number that depends on every byte but those of the window of video
/// memory, which the guest sees in place of its RAM.
fn digest(bytes: impl Iterator<Item = (u64, Vec<u8>)>) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    for (start, chunk) in bytes {
        for (index, word) in chunk.chunks_exact(8).enumerate() {
            let address = start + index as u64 * 8;
            if !(0xa_0000..0xc_0000).contains(&address) {
                let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
                digest = (digest ^ word)
                    .wrapping_mul(0x0000_0100_0000_01b3)
                    .rotate_left(23);
            }
        }
    }
    digest
}

/// What runs in the monitoring VM: answers each line on the console.
fn inside() -> Result<(), Box<dyn std::error::Error>> {
    let none = None::<&std::ffi::CStr>;
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), none)?;
    mount("proc", "/proc", "proc", MountFlags::empty(), none)?;
    let devices = ivshmem::list(Path::new(ivshmem::PCI_DEVICES))?;
    let device = devices.first().ok_or("there is no device")?;
    let target: Target = format!("ivshmem:{}", device.address).parse()?;
    let opened = target.open(&OpenOptions::default())?;
    let memory = &*opened.memory;
    let live = memory.volatility() == Volatility::Live && memory.mapped().is_some();
    println!(
        "ready devices={} size={} live={live} problem={:?}",
        devices.len(),
        memory.size(),
        device.problem
    );
    for line in std::io::stdin().lines() {
        match line?.trim() {
            "digest" => {
                let chunks = (0..memory.size() >> 20).map(|chunk| {
                    let mut bytes = vec![0; 1 << 20];
                    let start = PhysicalAddress::new(chunk << 20);
                    memory.read(start, &mut bytes).expect("memory");
                    (start.as_u64(), bytes)
                });
                println!("digest={:#x}", digest(chunks));
            }
            "ticks" => {
                let mut bytes = [0; 4];
                memory.read(TICKS, &mut bytes)?;
                println!("ticks={}", u32::from_le_bytes(bytes));
            }
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// An initial file system with this program as its first, and the libraries
/// that it needs.
fn initramfs(folder: &Path) -> PathBuf {
    let root = folder.join("root");
    for empty in ["sys", "proc", "dev"] {
        fs::create_dir_all(root.join(empty)).expect("a folder");
    }
    let program = std::env::current_exe().expect("this program");
    fs::copy(&program, root.join("init")).expect("a copy");
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(root.join("init"), executable).expect("permissions");
    let output = Command::new("ldd").arg(&program).output().expect("ldd");
    let text = String::from_utf8(output.stdout).expect("text");
    let libraries = text
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/'));
    for library in libraries {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().expect("a folder")).expect("a folder");
        fs::copy(library, to).expect("a copy");
    }
    let archive = folder.join("initramfs");
    let status = Command::new("sh")
        .args(["-c", "find . | cpio --quiet -o -H newc > \"$0\""])
        .arg(&archive)
        .current_dir(&root)
        .status()
        .expect("sh");
    assert!(status.success(), "cpio (package cpio)");
    archive
}

/// The monitoring VM and its console.
struct Monitor {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Monitor {
    fn start(ram: &Path, folder: &Path) -> Self {
        let kernel = Kernel::fetch(Suite::Bookworm).expect("a kernel").image();
        let backend = format!(
            "memory-backend-file,id=target,size={RAM},mem-path={},share=on,readonly=on",
            ram.display()
        );
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args([
                "-m", "256", "-cpu", "max", "-display", "none", "-nic", "none",
            ])
            .args([
                "-no-reboot",
                "-serial",
                "stdio",
                "-monitor",
                "none",
                "-kernel",
            ])
            .arg(kernel)
            .args([OsStr::new("-initrd"), initramfs(folder).as_os_str()])
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1",
                "-object",
                &backend,
            ])
            .args(["-device", "ivshmem-plain,memdev=target"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect(
                "setpriv (package util-linux) and qemu-system-x86_64 (package qemu-system-x86)",
            );
        let output = BufReader::new(child.stdout.take().expect("its console"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            input: child.stdin.take().expect("its console"),
            child,
            lines,
            seen: Vec::new(),
        }
    }

    /// The rest of the next line that starts so.
    fn wait_for(&mut self, start: &str) -> String {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("no line {start:?} from the monitoring VM: {:#?}", self.seen);
            };
            if let Some(rest) = line.strip_prefix(start) {
                return rest.to_owned();
            }
            self.seen.push(line);
        }
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.input, "{question}").expect("it listens");
        self.wait_for(&format!("{question}="))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn a_monitoring_vm_reads_a_live_machine() {
    let folder = tempfile::tempdir().expect("a folder");
    let ram = folder.path().join("ram");
    let backend = format!(
        "memory-backend-file,id=m,size={RAM},mem-path={},share=on",
        ram.display()
    );
    let mut machine = Machine::start(&[
        "-m",
        "64",
        "-object",
        &backend,
        "-machine",
        "q35,memory-backend=m",
    ]);
    machine.run_firmware();
    let mut monitor = Monitor::start(&ram, folder.path());
    let ready = monitor.wait_for("ready ");
    let expected = format!("devices=1 size={RAM} live=true problem=None");
    assert_eq!(ready, expected);

    let truth = machine.physical(0, RAM);
    let chunks = truth.chunks(1 << 20).enumerate();
    let truth = digest(chunks.map(|(index, chunk)| ((index as u64) << 20, chunk.to_vec())));
    assert_eq!(monitor.ask("digest"), format!("{truth:#x}"));

    let stopped = [monitor.ask("ticks"), monitor.ask("ticks")];
    assert_eq!(stopped[0], stopped[1], "the machine stands still");
    machine.command("cont");
    std::thread::sleep(Duration::from_secs(1));
    machine.command("stop");
    let later: u32 = monitor.ask("ticks").parse().expect("a number");
    let earlier: u32 = stopped[0].parse().expect("a number");
    assert!(later > earlier, "the machine ran: {earlier} {later}");
}
