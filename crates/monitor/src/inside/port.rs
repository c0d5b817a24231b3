//! Finds virtio-serial ports by the name that QEMU gave them.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// Where Linux shows the ports.
const PORTS: &str = "/sys/class/virtio-ports";
/// How long the driver may take to find its ports.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Opens the port of this name, once the driver has found it.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] if there is none, or the system's.
pub(super) fn open(name: &str, patience: Duration) -> io::Result<File> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(device) = find(Path::new(PORTS), name)? {
            return File::options()
                .read(true)
                .write(true)
                .open(Path::new("/dev").join(device));
        }
        if Instant::now() >= deadline {
            let text = format!(
                "there is no virtio-serial port {name}: QEMU needs -device virtio-serial-pci \
                 -device virtserialport,chardev=…,name={name}"
            );
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The device of the port with this name.
fn find(folder: &Path, name: &str) -> io::Result<Option<std::ffi::OsString>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim_end() == name {
            return Ok(Some(entry.file_name()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_found_by_name() {
        let folder = tempfile::tempdir().expect("a folder");
        for (device, name) in [
            ("vport1p1", "org.secmon.gate.0\n"),
            ("vport1p2", "org.secmon.channel\n"),
        ] {
            let path = folder.path().join(device);
            fs::create_dir(&path).expect("a folder");
            fs::write(path.join("name"), name).expect("a file");
        }
        let found = |name| find(folder.path(), name).expect("a folder");
        assert_eq!(found("org.secmon.channel"), Some("vport1p2".into()));
        assert_eq!(found("org.secmon"), None);
        assert_eq!(find(&folder.path().join("none"), "x").expect("none"), None);
    }
}
