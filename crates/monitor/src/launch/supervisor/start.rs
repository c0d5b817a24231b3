//! Starts the VM with every target that runs.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use secmon_channel::{KeyPair, Peer};
use secmon_platform::qemu::RamFileKind;

use super::slots::{shape, without};
use super::{Made, Running, Shape, Supervisor, SupervisorError};
use crate::launch::command_line::{Machine, USUAL_TARGET_RAM, guest_name, memory_for, pci_address};
use crate::launch::console::Console;
use crate::launch::hotplug::Plug;
use crate::launch::process::ProcessRecord;
use crate::launch::starter::StartPlan;
use crate::launch::state::{Processes, now};
use crate::launch::target::{RunningTarget, TargetError, TargetName, device_size};
use crate::launch::{START_COMMAND, files, gates};
use crate::protocol::{CHANNELS, Configuration, GateConfiguration, Limits, TargetConfiguration};

/// How long QEMU may take until it speaks QMP.
const START: Duration = Duration::from_secs(60);

impl Supervisor {
    pub(super) fn start_or_wait(&mut self) {
        if self.state.machine_since.is_none() && !self.state.events.is_empty() {
            self.state.restarts += 1;
        }
        match self.start() {
            Ok(machine) => {
                self.state.machine_since = Some(now());
                self.state.note(format!(
                    "the monitoring VM was started: process {}",
                    machine.process.pid
                ));
                self.machine = Some(machine);
            }
            Err(error) => {
                self.state
                    .note(format!("{error}; it is tried again in {:?}", self.back_off));
                self.machine_ended();
            }
        }
    }

    /// Starts the VM with every target that runs.
    fn start(&mut self) -> Result<Running, SupervisorError> {
        let found: Vec<Result<RunningTarget, TargetError>> =
            self.settings.targets.iter().map(TargetName::find).collect();
        let shapes: Vec<Shape> = found
            .iter()
            .map(|target| target.as_ref().ok().map(shape))
            .collect();
        let running = found.iter().filter_map(|target| target.as_ref().ok());
        let sizes = running.map(|target| device_size(target.ram.ram_size));
        let room = sizes.fold(0, u64::saturating_add).max(USUAL_TARGET_RAM);
        self.write_configuration(&shapes)?;
        // An anonymous file lies in no folder, which is all that landlock guards.
        let named = found
            .iter()
            .filter_map(|target| target.as_ref().ok())
            .filter(|target| target.ram.kind == RamFileKind::Named);
        let plan = StartPlan {
            program: self.settings.program.clone(),
            machine: Machine {
                name: guest_name(&self.name),
                accelerator: self.settings.accelerator,
                memory_mib: memory_for(self.settings.memory_mib, room),
                kernel_arguments: self.settings.kernel_arguments.clone(),
                target_slots: u32::try_from(self.settings.targets.len()).unwrap_or(u32::MAX),
                gates: gates::ports(&self.directory, &self.settings.gates),
                reconnect: self.settings.reconnect,
            },
            account: self.settings.account,
            kernel: self.settings.kernel.clone(),
            initramfs: self.settings.initramfs.clone(),
            configuration: self.directory.file(files::CONFIGURATION),
            qmp_socket: self.directory.qmp_socket(),
            channel_sockets: self.directory.channel_sockets(),
            record: self.directory.file(files::MACHINE),
            ram_files: named
                .clone()
                .map(|target| target.ram.path.clone())
                .collect(),
            ends_with_parent: false,
        };
        let made = Made {
            openable: named.map(|target| target.ram.identity).collect(),
            shapes,
            room,
        };
        self.directory.write(files::SHAPES, &made)?;
        let Made {
            shapes, openable, ..
        } = made;
        self.directory.write(files::PLAN, &plan)?;
        let (console, qemu_end) = UnixStream::pair().map_err(SupervisorError::Start)?;
        let end = |stream: &UnixStream| {
            let end = stream.try_clone().map_err(SupervisorError::Start)?;
            Ok::<_, SupervisorError>(Stdio::from(OwnedFd::from(end)))
        };
        let program = std::env::current_exe().map_err(SupervisorError::Start)?;
        let mut child = Command::new(program)
            .arg(START_COMMAND)
            .arg(self.directory.file(files::PLAN))
            .stdin(end(&qemu_end)?)
            .stdout(end(&qemu_end)?)
            .stderr(end(&qemu_end)?)
            .spawn()
            .map_err(SupervisorError::Start)?;
        drop(qemu_end);
        let log = self.directory.file(files::CONSOLE_LOG);
        let mut console = Console::new(console, log).map_err(SupervisorError::Start)?;
        let process = ProcessRecord::of(child.id());
        let mut processes: Processes = self.directory.read(files::PROCESSES)?.unwrap_or_default();
        processes.machine = process;
        self.directory.write(files::PROCESSES, &processes)?;
        let plug = self.connect(&mut child, &mut console);
        let (Ok(mut plug), Some(process)) = (plug, process) else {
            let _ = child.kill();
            let status = child
                .wait()
                .map_or_else(|e| e.to_string(), |s| s.to_string());
            let _ = console.drain();
            let log = self.directory.file(files::CONSOLE_LOG);
            return Err(SupervisorError::Ended { status, log });
        };
        for (slot, target) in found.into_iter().enumerate() {
            let state = match target {
                Ok(target) => self.plug_in(&mut plug, slot, &target),
                Err(error) => without(&error),
            };
            self.set(slot, state);
        }
        plug.start()?;
        Ok(Running {
            process,
            child: Some(child),
            console: Some(console),
            plug,
            since: Instant::now(),
            shapes,
            openable,
            room,
            silent: None,
        })
    }

    /// Waits until QEMU speaks QMP.
    fn connect(&self, child: &mut Child, console: &mut Console) -> Result<Plug, SupervisorError> {
        let deadline = Instant::now() + START;
        loop {
            let _ = console.drain();
            match Plug::connect(&self.directory.qmp_socket()) {
                Ok(plug) => return Ok(plug),
                Err(error) => {
                    let ended = child.try_wait().ok().flatten();
                    if ended.is_some() || Instant::now() > deadline {
                        return Err(error.into());
                    }
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn write_configuration(&self, shapes: &[Shape]) -> Result<(), SupervisorError> {
        let monitor = KeyPair::read(&self.directory.file(files::MONITOR_KEY))?;
        let client = KeyPair::read(&self.directory.file(files::CLIENT_KEY))?;
        let targets = self.settings.targets.iter().zip(shapes).enumerate();
        let configuration = Configuration {
            version: 1,
            name: self.name.to_string(),
            secret_key: monitor.secret().clone(),
            clients: vec![Peer {
                name: "host".into(),
                key: client.public(),
            }],
            targets: targets
                .map(|(slot, (target, shape))| {
                    let slot = u32::try_from(slot).unwrap_or(u32::MAX);
                    let gate = self.settings.gates.get(slot as usize);
                    let layout = shape.as_ref().and_then(|(_, layout)| layout.as_ref());
                    TargetConfiguration {
                        name: target.short(),
                        pci: pci_address(slot).parse().ok(),
                        ram_size: shape.as_ref().map(|(size, _)| *size),
                        layout: layout.and_then(|layout| layout.parse().ok()),
                        gate: gate.map(|gate| GateConfiguration {
                            port: gates::port_name(slot),
                            key: gate.key,
                        }),
                    }
                })
                .collect(),
            channels: CHANNELS,
            policy: self.settings.policy.clone(),
            limits: Limits::default(),
        };
        configuration.check()?;
        let file = files::CONFIGURATION;
        Ok(self.directory.write(file, &configuration)?)
    }
}
