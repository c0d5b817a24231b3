//! What a guest is made of, and the command line that makes it.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use secmon_truth::{PORT_NAME, Workload};

use crate::acceleration::Acceleration;
use crate::emulator::Emulator;
use crate::guest::{Folder, Guest, NotReady, Running};
use crate::initramfs::Contents;
use crate::kernel::Kernel;
use crate::specimens::MARK;
use crate::suite::Suite;
use crate::{initramfs, spawn};

/// How often a guest is booted whose kernel panics on the way.
const ATTEMPTS: u32 = 3;

/// The machine QEMU emulates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// `q35`.
    Q35,
    /// `pc`, the i440FX.
    I440fx,
}

/// How many levels the guest's page tables have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paging {
    /// Four; the processor is made without LA57.
    FourLevel,
    /// Five, where the kernel is built with it.
    FiveLevel,
}

/// What QEMU keeps the guest's memory in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Whatever QEMU does without any option.
    Plain,
    /// A shared file: `memory-backend-file,share=on`.
    File,
    /// A shared anonymous file: `memory-backend-memfd,share=on`.
    Memfd,
}

/// Whether the guest has a QMP socket that others can connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QmpAccess {
    /// None. The lab's own monitor has no name to find it by.
    None,
    /// A UNIX socket, [`Guest::qmp_socket`].
    Socket,
}

/// What a guest boots from, where it is not the lab that starts it.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The compressed image of its kernel.
    pub kernel: PathBuf,
    /// Its kernel's command line.
    pub command_line: String,
}

/// Describes a guest, then boots it.
#[derive(Debug, Clone)]
pub struct GuestBuilder {
    suite: Suite,
    kernel: Option<Kernel>,
    emulator: Emulator,
    name: Option<String>,
    memory_mib: u32,
    machine: Machine,
    paging: Paging,
    processor: String,
    vcpus: u32,
    backing: Backing,
    qmp: QmpAccess,
    kernel_arguments: Vec<String>,
    qemu_arguments: Vec<String>,
    workload: Workload,
    specimens: Option<PathBuf>,
    tools: bool,
    marked: bool,
    acceleration: Option<Acceleration>,
    boot_timeout: Duration,
}

impl GuestBuilder {
    /// A q35 machine with 512 MiB in a shared file, one vCPU, four-level
    /// paging, a QMP socket and the small workload.
    #[must_use]
    pub fn new(suite: Suite) -> Self {
        Self {
            suite,
            kernel: None,
            emulator: Emulator::Installed,
            name: None,
            memory_mib: 512,
            machine: Machine::Q35,
            paging: Paging::FourLevel,
            // QEMU 7.2 loses the flags in CMPXCHG16B when an interrupt comes
            // at the wrong moment; kernels from 6.12 on then die of it in
            // one boot of ten or twenty. Without the instruction they take
            // another way.
            processor: "max,cx16=off".to_owned(),
            vcpus: 1,
            backing: Backing::File,
            qmp: QmpAccess::Socket,
            kernel_arguments: Vec::new(),
            qemu_arguments: Vec::new(),
            workload: Workload::small(),
            specimens: None,
            tools: false,
            marked: true,
            acceleration: None,
            boot_timeout: Duration::from_secs(300),
        }
    }

    /// The QEMU that runs it; the installed one unless told.
    #[must_use]
    pub fn emulator(mut self, emulator: Emulator) -> Self {
        self.emulator = emulator;
        self
    }

    /// Another kernel than the suite's.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// The name QEMU gets (`-name`); one of the lab's own otherwise.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The size of its memory in MiB.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// The machine.
    #[must_use]
    pub fn machine(mut self, machine: Machine) -> Self {
        self.machine = machine;
        self
    }

    /// The depth of its page tables.
    #[must_use]
    pub fn paging(mut self, paging: Paging) -> Self {
        self.paging = paging;
        self
    }

    /// The processor as in `-cpu`, without `la57`, which
    /// [`GuestBuilder::paging`] sets; `max,cx16=off` unless told.
    #[must_use]
    pub fn processor(mut self, processor: impl Into<String>) -> Self {
        self.processor = processor.into();
        self
    }

    /// How many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Where its memory is kept.
    #[must_use]
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Whether it has a QMP socket for others.
    #[must_use]
    pub fn qmp(mut self, qmp: QmpAccess) -> Self {
        self.qmp = qmp;
        self
    }

    /// One more argument on the kernel's command line (`nokaslr`, `pti=on`).
    #[must_use]
    pub fn kernel_argument(mut self, argument: impl Into<String>) -> Self {
        self.kernel_arguments.push(argument.into());
        self
    }

    /// One more argument on QEMU's command line.
    #[must_use]
    pub fn qemu_argument(mut self, argument: impl Into<String>) -> Self {
        self.qemu_arguments.push(argument.into());
        self
    }

    /// What the guest does once it is up.
    #[must_use]
    pub fn workload(mut self, workload: Workload) -> Self {
        self.workload = workload;
        self
    }

    /// Lets it load the specimens' modules that lie in a folder, which
    /// [`specimens::modules`](crate::specimens::modules) builds. It has one
    /// processor, as they count on it.
    #[must_use]
    pub fn specimens(mut self, folder: impl Into<PathBuf>) -> Self {
        self.specimens = Some(folder.into());
        self.vcpus = 1;
        self
    }

    /// Gives it ordinary programs of a distribution: those that tell what there
    /// is, a compiler, a package manager.
    #[must_use]
    pub fn tools(mut self) -> Self {
        self.tools = true;
        self
    }

    /// Leaves away the word on the kernel's command line without which no
    /// specimen loads, to see that none does.
    #[must_use]
    pub fn unmarked(mut self) -> Self {
        self.marked = false;
        self
    }

    /// KVM or emulation, instead of what is usable.
    #[must_use]
    pub fn acceleration(mut self, acceleration: Acceleration) -> Self {
        self.acceleration = Some(acceleration);
        self
    }

    /// How long the boot and the making of the workload may take.
    #[must_use]
    pub fn boot_timeout(mut self, boot_timeout: Duration) -> Self {
        self.boot_timeout = boot_timeout;
        self
    }

    /// Boots it and waits until its workload stands.
    ///
    /// Emulation does not keep what the architecture promises for code that
    /// one processor changes while another runs it: a kernel that patches
    /// itself dies of it in one boot of some hundred. A guest whose kernel
    /// panicked is therefore booted again, and standard error says so.
    ///
    /// # Errors
    /// If it never comes up; the console's text is in the error.
    pub fn boot(self) -> Result<Guest> {
        let mut attempt = 1;
        loop {
            let error = match self.boot_once() {
                Ok(guest) => return Ok(guest),
                Err(error) => error,
            };
            let panicked = error
                .downcast_ref::<NotReady>()
                .is_some_and(|not_ready| not_ready.panicked);
            if !panicked {
                return Err(error);
            }
            if attempt == ATTEMPTS {
                return Err(error.context(format!("attempt {attempt} to boot a guest")));
            }
            eprintln!("attempt {attempt} to boot a guest, made again: {error}");
            attempt += 1;
        }
    }

    /// What somebody else who starts the guest has to load: its initial file
    /// system is written to the file `initramfs`. Its truth then is at the
    /// virtio-serial port [`truth::PORT_NAME`](crate::truth::PORT_NAME), for
    /// [`TruthChannel::connect`](crate::TruthChannel::connect).
    ///
    /// # Errors
    /// If the kernel can't be fetched.
    pub fn prepare(&self, initramfs: &Path) -> Result<Prepared> {
        let kernel = self.fetch_kernel()?;
        self.write_initramfs(initramfs, &kernel)?;
        Ok(Prepared {
            kernel: kernel.image(),
            command_line: self.kernel_command_line(),
        })
    }

    fn write_initramfs(&self, to: &Path, kernel: &Kernel) -> Result<()> {
        let contents = Contents {
            kernel,
            workload: &self.workload,
            specimens: self.specimens.as_deref(),
            tools: self.tools,
        };
        initramfs::write(to, &contents)
    }

    fn fetch_kernel(&self) -> Result<Kernel> {
        if let Some(kernel) = &self.kernel {
            return Ok(kernel.clone());
        }
        ensure!(
            self.paging == Paging::FourLevel || self.suite.has_five_level_paging(),
            "Debian's kernel {} is built without five-level paging",
            self.suite
        );
        Kernel::fetch(self.suite)
    }

    fn boot_once(&self) -> Result<Guest> {
        let kernel = self.fetch_kernel()?;
        let acceleration = self
            .acceleration
            .unwrap_or_else(|| self.usable_acceleration());
        let folder = Folder::make(self.memory_mib)?;
        self.write_initramfs(&folder.path().join("initramfs"), &kernel)?;
        let name = self.name.clone().unwrap_or_else(|| {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            format!(
                "secmon-lab-{}-{}-{}",
                self.suite,
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            )
        });
        let (truth, truth_end) = UnixStream::pair()?;
        let (control, control_end) = UnixStream::pair()?;
        let inherited = [OwnedFd::from(truth_end), OwnedFd::from(control_end)];
        let program = self.emulator.program()?;
        let mut command = self.command(
            &program,
            &name,
            &kernel,
            acceleration,
            folder.path(),
            &inherited,
        );
        let errors = fs::File::create(folder.path().join("qemu.log"))?;
        command
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors);
        let child = spawn::start(command, inherited.into())
            .context("cannot start qemu-system-x86_64: is qemu-system-x86 installed?")?;
        Guest::wait_until_ready(
            Running {
                child,
                folder,
                name,
                kernel,
                acceleration,
                memory_mib: self.memory_mib,
                backing: self.backing,
                qmp: self.qmp,
            },
            truth,
            control,
            self.boot_timeout,
        )
    }

    /// KVM can't make up LA57 on a processor without it.
    fn usable_acceleration(&self) -> Acceleration {
        let host_has_la57 = || {
            fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| {
                text.lines()
                    .find(|line| line.starts_with("flags"))
                    .is_some_and(|line| line.split_whitespace().any(|flag| flag == "la57"))
            })
        };
        if self.paging == Paging::FiveLevel && !host_has_la57() {
            return Acceleration::Tcg;
        }
        Acceleration::usable()
    }

    fn command(
        &self,
        program: &Path,
        name: &str,
        kernel: &Kernel,
        acceleration: Acceleration,
        folder: &Path,
        inherited: &[OwnedFd; 2],
    ) -> Command {
        let file = |name: &str| folder.join(name).display().to_string();
        let size = self.memory_mib;
        let machine = match self.machine {
            Machine::Q35 => "q35",
            Machine::I440fx => "pc",
        };
        let mut command = Command::new(program);
        command.args(["-name", name, "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-no-reboot"]);
        command.args(["-accel", acceleration.name()]);
        let backend = match self.backing {
            Backing::Plain => None,
            Backing::File => Some(format!(
                "memory-backend-file,id=ram,size={size}M,mem-path={},share=on",
                file(RAM_FILE)
            )),
            Backing::Memfd => Some(format!("memory-backend-memfd,id=ram,size={size}M,share=on")),
        };
        match backend {
            Some(backend) => {
                command.args(["-machine", &format!("{machine},memory-backend=ram")]);
                command.args(["-object", &backend]);
            }
            None => {
                command.args(["-machine", machine]);
            }
        }
        let la57 = match self.paging {
            Paging::FourLevel => "off",
            Paging::FiveLevel => "on",
        };
        command.args(["-cpu", &format!("{},la57={la57}", self.processor)]);
        command.args(["-m", &format!("{size}M")]);
        command.args(["-smp", &self.vcpus.to_string()]);
        command.args(["-kernel", &kernel.image().display().to_string()]);
        command.args(["-initrd", &file("initramfs")]);
        command.args(["-append", &self.kernel_command_line()]);
        command.args(["-serial", &format!("file:{}", file(SERIAL_LOG))]);
        let [truth, control] = inherited;
        command.args([
            "-chardev",
            &format!("socket,id=truth,fd={}", truth.as_raw_fd()),
            "-device",
            "virtio-serial-pci",
            "-device",
            &format!("virtserialport,chardev=truth,name={PORT_NAME}"),
            "-chardev",
            &format!("socket,id=control,fd={}", control.as_raw_fd()),
            "-mon",
            "chardev=control,mode=control",
        ]);
        if self.workload.rich {
            // An interface whose network ends in QEMU.
            command.args(["-netdev", "user,id=network,restrict=on"]);
            command.args(["-device", "virtio-net-pci,netdev=network,romfile="]);
        }
        if self.qmp == QmpAccess::Socket {
            let socket = file(QMP_SOCKET);
            command.args(["-qmp", &format!("unix:{socket},server=on,wait=off")]);
        }
        command.args(&self.qemu_arguments);
        command
    }

    fn kernel_command_line(&self) -> String {
        // A panic ends QEMU at once (with -no-reboot), instead of the wait.
        // The timer's check counts interrupts against the processor's speed
        // and fails, with a panic, when the machine is too loaded to emulate
        // both evenly.
        let mut words = vec!["console=ttyS0", "quiet", "panic=-1", "no_timer_check"];
        if self.specimens.is_some() && self.marked {
            words.push(MARK);
        }
        words.extend(self.kernel_arguments.iter().map(String::as_str));
        words.join(" ")
    }
}

/// The file with the guest's memory, in its folder.
pub(crate) const RAM_FILE: &str = "ram";
/// The console's text.
pub(crate) const SERIAL_LOG: &str = "serial.log";
/// The public monitor.
pub(crate) const QMP_SOCKET: &str = "qmp.sock";
