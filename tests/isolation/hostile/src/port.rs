//! The virtio-serial ports, by their names.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const PORTS: &str = "/sys/class/virtio-ports";
/// How long the driver may take to find its ports.
const PATIENCE: Duration = Duration::from_secs(60);

/// Opens the port of this name, once the driver has found it.
pub fn open(name: &str) -> Result<File> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for entry in fs::read_dir(PORTS).into_iter().flatten().flatten() {
            let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let path = std::path::Path::new("/dev").join(entry.file_name());
            // Somebody who is about to close it may still have it open.
            if found.trim_end() == name
                && let Ok(file) = File::options().read(true).write(true).open(path)
            {
                return Ok(file);
            }
        }
        if Instant::now() > deadline {
            bail!("there is no port {name}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
