//! A monitoring VM beside guests of the lab, started by a QEMU command line
//! written out here: what the appliance needs, and nothing of the launcher.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use secmon_channel::{Descriptor, KeyPair, Peer, Stream};
use secmon_monitor::appliance::{self, Image, KernelSource};
use secmon_monitor::protocol::{
    CHANNEL_PORT, CONFIGURATION_NAME, Client, Configuration, Limits, TargetConfiguration,
};

use crate::emulator::Emulator;
use crate::guest::Guest;
use crate::kernel::Kernel;
use crate::suite::Suite;
use crate::{agent, spawn};

/// The RAM that a monitoring VM gets, in MiB.
pub const MONITOR_MEMORY_MIB: u32 = 128;

/// A running monitoring VM; it ends with this value.
pub struct MonitorVm {
    child: Child,
    folder: tempfile::TempDir,
    client: KeyPair,
    monitor: KeyPair,
    /// When QEMU was started.
    pub started: Instant,
}

impl Drop for MonitorVm {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The appliance's image, of the suite's kernel and the present program, built
/// once a process.
///
/// # Errors
/// If the kernel can't be fetched or the program does not build.
pub fn appliance_image(suite: Suite) -> Result<Image> {
    static BUILT: Mutex<Vec<(Suite, Image, tempfile::TempDir)>> = Mutex::new(Vec::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, image, _)) = built.iter().find(|(of, ..)| *of == suite) {
        return Ok(image.clone());
    }
    let folder = tempfile::tempdir()?;
    let image = build_appliance(suite, folder.path())?;
    built.push((suite, image.clone(), folder));
    Ok(image)
}

/// Builds the appliance's image into a folder.
///
/// # Errors
/// As [`appliance_image`].
pub fn build_appliance(suite: Suite, folder: &Path) -> Result<Image> {
    let kernel = Kernel::fetch(suite)?;
    let source = KernelSource::Files {
        image: kernel.image(),
        modules: kernel.module_folder(),
    };
    let program = agent::static_secmon()?;
    appliance::build(&source, &program, folder).context("building the appliance")
}

/// A file that a monitoring VM is shown as a target's RAM.
#[derive(Debug, Clone)]
pub struct WatchedRam {
    /// The target's name.
    pub name: String,
    /// The file.
    pub file: PathBuf,
    /// Its length, a power of two.
    pub bytes: u64,
}

impl WatchedRam {
    fn of(guest: &Guest) -> Result<Self> {
        Ok(Self {
            name: guest.name().to_owned(),
            file: guest.ram_file().context("the guest's RAM is in no file")?,
            bytes: u64::from(guest.memory_mib()) << 20,
        })
    }
}

impl MonitorVm {
    /// Starts a monitoring VM with the memory of these guests, which must be
    /// in files; each is a target of its own name.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn start(emulator: Emulator, image: &Image, guests: &[&Guest]) -> Result<Self> {
        let targets: Vec<WatchedRam> = guests
            .iter()
            .map(|guest| WatchedRam::of(guest))
            .collect::<Result<_>>()?;
        Self::start_with(emulator, image, &targets, None)
    }

    /// As [`start`](Self::start), with a policy by which it watches the guests.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn start_watching(
        emulator: Emulator,
        image: &Image,
        guests: &[&Guest],
        policy: &str,
    ) -> Result<Self> {
        let targets: Vec<WatchedRam> = guests
            .iter()
            .map(|guest| WatchedRam::of(guest))
            .collect::<Result<_>>()?;
        Self::start_as(emulator, image, &targets, None, Some(policy))
    }

    /// Starts a monitoring VM with these files as its targets' RAM; its own RAM
    /// is in the file `own`, if one is named, for another monitor to watch.
    ///
    /// # Errors
    /// If QEMU does not start.
    pub fn start_with(
        emulator: Emulator,
        image: &Image,
        watched: &[WatchedRam],
        own: Option<&Path>,
    ) -> Result<Self> {
        Self::start_as(emulator, image, watched, own, None)
    }

    fn start_as(
        emulator: Emulator,
        image: &Image,
        watched: &[WatchedRam],
        own: Option<&Path>,
        policy: Option<&str>,
    ) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let (client, monitor) = (KeyPair::generate()?, KeyPair::generate()?);
        let mut targets = Vec::new();
        let mut command = Command::new(emulator.program()?);
        command
            .args(["-accel", "tcg", "-cpu", "max"])
            .args(["-m", &MONITOR_MEMORY_MIB.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .arg("-serial")
            .arg(format!("file:{}", folder.path().join("console").display()))
            .arg("-kernel")
            .arg(image.kernel())
            .arg("-initrd")
            .arg(image.initramfs())
            .args(["-append", &image.manifest.kernel_arguments])
            .args(["-device", "virtio-serial-pci", "-chardev"])
            .arg(format!(
                "socket,id=channel,path={},server=on,wait=off",
                folder.path().join("channel").display()
            ))
            .arg("-device")
            .arg(format!(
                "virtserialport,chardev=channel,name={CHANNEL_PORT}"
            ));
        match own {
            None => command.args(["-machine", "q35"]),
            Some(file) => command
                .args(["-machine", "q35,memory-backend=own", "-object"])
                .arg(format!(
                    "memory-backend-file,id=own,size={MONITOR_MEMORY_MIB}M,mem-path={},share=on",
                    file.display()
                )),
        };
        for (index, ram) in watched.iter().enumerate() {
            let slot = 0x10 + index;
            let size = ram.bytes;
            command
                .arg("-object")
                .arg(format!(
                    "memory-backend-file,id=ram{index},size={size},mem-path={},share=on,readonly=on",
                    ram.file.display()
                ))
                .arg("-device")
                .arg(format!("ivshmem-plain,memdev=ram{index},addr={slot:#x}"));
            targets.push(TargetConfiguration {
                name: ram.name.clone(),
                pci: Some(format!("0000:00:{slot:02x}.0").parse()?),
                ram_size: Some(size),
                layout: None,
                gate: None,
            });
        }
        let configuration = Configuration {
            version: 1,
            name: "lab".to_owned(),
            secret_key: monitor.secret().clone(),
            clients: vec![Peer {
                name: "lab".to_owned(),
                key: client.public(),
            }],
            targets,
            channels: 1,
            policy: policy.map(str::to_owned),
            limits: Limits {
                poll_ms: 200,
                ..Limits::default()
            },
        };
        let file = folder.path().join("configuration.json");
        fs::write(&file, serde_json::to_vec(&configuration)?)?;
        command
            .arg("-fw_cfg")
            .arg(format!("name={CONFIGURATION_NAME},file={}", file.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let started = Instant::now();
        let child = spawn::start(command, Vec::new()).context("starting the monitor's QEMU")?;
        Ok(Self {
            child,
            folder,
            client,
            monitor,
            started,
        })
    }

    /// Begins a conversation, with all the time that a slow machine needs.
    ///
    /// # Errors
    /// If the monitor does not answer.
    pub fn connect(&self) -> Result<Client> {
        self.connect_as(&self.client)
    }

    /// Begins a conversation with another key.
    ///
    /// # Errors
    /// If the monitor does not answer, or refuses.
    pub fn connect_as(&self, client: &KeyPair) -> Result<Client> {
        let deadline = Instant::now() + Duration::from_secs(180);
        let path = self.folder.path().join("channel");
        let socket = loop {
            match UnixStream::connect(&path) {
                Ok(socket) => break socket,
                Err(error) if Instant::now() >= deadline => {
                    bail!(
                        "no socket of QEMU after three minutes: {error}\n{}",
                        self.console()
                    )
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let stream: Arc<dyn Stream> = Arc::new(Descriptor::new(socket)?);
        Client::connect(&stream, client, &self.monitor.public(), Some(deadline))
            .with_context(|| format!("the monitor's console:\n{}", self.console()))
    }

    /// What the monitor was told, byte by byte.
    ///
    /// # Errors
    /// If the file can't be read.
    pub fn configuration(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.folder.path().join("configuration.json"))?)
    }

    /// The process id of its QEMU.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the monitor wrote on its console.
    #[must_use]
    pub fn console(&self) -> String {
        let path: PathBuf = self.folder.path().join("console");
        fs::read(path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}
