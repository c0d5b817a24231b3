//! Plugging targets' RAM into a running monitoring VM, and taking it out.
//!
//! A target's file travels to QEMU as an open descriptor, because QEMU's user
//! can enter no folder; QEMU opens it once more, for reading, through its own
//! `/proc/self/fd`. Measured with QEMU 7.2 and 10.0: the file is open
//! `O_RDONLY` and mapped `r--s`, and a device that was taken out and plugged in
//! again has the same PCI address and BAR.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use secmon_platform::qemu::{QemuDescriptor, QmpClient, QmpError, RunState};
use serde_json::{Value, json};

use super::command_line::{descriptor_path, port_id};

/// How long a guest may take to let go of a device; one that is still booting
/// does not answer.
const UNPLUG_PATIENCE: Duration = Duration::from_secs(5);

/// How long an answer of QEMU may take; mapping gigabytes takes its time on a
/// loaded machine.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why RAM could not be plugged in or taken out.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// QEMU refused, or doesn't answer.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The guest does not let go of the device.
    #[error("the monitoring VM did not let go of slot {slot} within {UNPLUG_PATIENCE:?}")]
    Held {
        /// The slot.
        slot: u32,
    },
}

/// QEMU's control connection.
#[derive(Debug)]
pub struct Plug {
    qmp: QmpClient,
    /// Goes up with each backend, so that no id is used twice: QEMU keeps a
    /// backend for a moment after its device has gone.
    generation: u64,
    /// The VM runs. Before that QEMU does not close what it is told to close.
    running: bool,
    /// Descriptors that QEMU opened again and needs no more.
    spent: Vec<QemuDescriptor>,
}

impl Plug {
    /// Connects to the monitor's QEMU.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn connect(socket: &Path) -> Result<Self, QmpError> {
        let mut qmp = QmpClient::connect(socket, TIMEOUT)?;
        Ok(Self {
            running: qmp.status()?.running,
            qmp,
            generation: 0,
            spent: Vec::new(),
        })
    }

    /// Connects anew, after a command that was not answered.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn reconnect(&mut self, socket: &Path) -> Result<(), QmpError> {
        let generation = self.generation;
        *self = Self::connect(socket)?;
        self.generation = generation;
        Ok(())
    }

    /// What the VM does.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn run_state(&mut self) -> Result<RunState, QmpError> {
        self.qmp.status()
    }

    /// Lets the VM run that was set up.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn start(&mut self) -> Result<(), QmpError> {
        self.qmp.resume()?;
        self.running = true;
        self.close_spent()
    }

    /// Lets QEMU close what it needs no more: an open RAM file would stay
    /// allocated after its target has gone.
    fn close_spent(&mut self) -> Result<(), QmpError> {
        if self.running {
            for descriptor in std::mem::take(&mut self.spent) {
                self.qmp.remove_descriptor(descriptor)?;
            }
        }
        Ok(())
    }

    /// Ends the VM.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn quit(&mut self) -> Result<(), QmpError> {
        self.qmp.execute("quit", &json!({})).map(drop)
    }

    /// Plugs a RAM file of `size` bytes into a slot, to be read only.
    ///
    /// # Errors
    /// [`PlugError`]; nothing is left of a failed attempt.
    pub fn plug(&mut self, slot: u32, ram: &File, size: u64) -> Result<(), PlugError> {
        // A VM that was booting when it was asked to let go of what is there may
        // not have heard it: it is asked again.
        self.unplug(slot)?;
        self.generation += 1;
        let backend = format!("ram{slot}-{}-{}", std::process::id(), self.generation);
        let descriptor = self.qmp.add_descriptor(ram.as_fd())?;
        let number = i32::try_from(descriptor.number).unwrap_or(-1);
        let made = self.qmp.execute(
            "object-add",
            &json!({
                "qom-type": "memory-backend-file",
                "id": backend,
                "size": size,
                "mem-path": descriptor_path(number),
                "share": true,
                "readonly": true,
            }),
        );
        self.spent.push(descriptor);
        self.close_spent()?;
        made?;
        let added = self.qmp.execute(
            "device_add",
            &json!({
                "driver": "ivshmem-plain",
                "id": device_id(slot),
                "memdev": backend,
                "bus": port_id(slot),
            }),
        );
        if let Err(error) = added {
            let _ = self.qmp.execute("object-del", &json!({"id": backend}));
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes a slot's RAM out.
    ///
    /// # Errors
    /// [`PlugError`].
    pub fn unplug(&mut self, slot: u32) -> Result<(), PlugError> {
        let Some(backend) = self.backend(slot)? else {
            return Ok(());
        };
        self.qmp
            .execute("device_del", &json!({"id": device_id(slot)}))?;
        let deadline = Instant::now() + UNPLUG_PATIENCE;
        while self.is_plugged(slot)? {
            if Instant::now() > deadline {
                return Err(PlugError::Held { slot });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.qmp.execute("object-del", &json!({"id": backend}))?;
        Ok(())
    }

    /// Whether there is a device in a slot.
    fn is_plugged(&mut self, slot: u32) -> Result<bool, PlugError> {
        let listed = self
            .qmp
            .execute("qom-list", &json!({"path": "/machine/peripheral"}))?;
        let id = device_id(slot);
        Ok(listed.as_array().is_some_and(|entries| {
            entries
                .iter()
                .any(|entry| entry.get("name").and_then(Value::as_str) == Some(&id))
        }))
    }

    /// The id of the backend of a slot's device; `None` if it is empty.
    fn backend(&mut self, slot: u32) -> Result<Option<String>, PlugError> {
        if !self.is_plugged(slot)? {
            return Ok(None);
        }
        let path = format!("/machine/peripheral/{}", device_id(slot));
        let memdev = self
            .qmp
            .execute("qom-get", &json!({"path": path, "property": "memdev"}))?;
        let backend = memdev.as_str().and_then(|path| path.rsplit('/').next());
        Ok(backend.map(str::to_owned))
    }
}

fn device_id(slot: u32) -> String {
    format!("target{slot}")
}
