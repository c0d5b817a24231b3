//! The QEMU of this host: its version, and whether KVM really runs a guest.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::command_line::{Accelerator, Reconnect};

/// What QEMU is looked for as, in the folders of `PATH`.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// How long the trial may take; where KVM works it takes two seconds.
const TRIAL: Duration = Duration::from_secs(10);

/// The oldest QEMU whose `memory-backend-file` has `readonly`.
const OLDEST: (u32, u32) = (6, 0);

/// Why there is no QEMU for a monitor.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// Not installed.
    #[error(
        "{PROGRAM} was not found in PATH; install it (Debian: apt-get install qemu-system-x86), or name it with --qemu"
    )]
    Missing,
    /// It doesn't run.
    #[error("{program} --version: {source}")]
    Run {
        /// The program.
        program: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It doesn't say its version.
    #[error("{program} --version says {text:?}, which is no version of QEMU")]
    Version {
        /// The program.
        program: PathBuf,
        /// What it said.
        text: String,
    },
    /// It is too old.
    #[error("{program} is QEMU {major}.{minor}; a monitor needs {}.{} or newer, whose memory backends can be read-only", OLDEST.0, OLDEST.1)]
    TooOld {
        /// The program.
        program: PathBuf,
        /// Its version.
        major: u32,
        /// Its version.
        minor: u32,
    },
}

/// A QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulator {
    /// Its program, an absolute path.
    pub program: PathBuf,
    /// Its version's first two numbers.
    pub version: (u32, u32),
}

impl Emulator {
    /// The QEMU at `program`, or the one that is installed.
    ///
    /// # Errors
    /// [`EmulatorError`].
    pub fn find(program: Option<&Path>) -> Result<Self, EmulatorError> {
        let program = match program {
            Some(program) => program.to_owned(),
            None => in_path(PROGRAM).ok_or(EmulatorError::Missing)?,
        };
        let failed = |source| EmulatorError::Run {
            program: program.clone(),
            source,
        };
        let program = fs::canonicalize(&program).map_err(failed)?;
        let output = Command::new(&program)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(failed)?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some((major, minor)) = version(&text) else {
            return Err(EmulatorError::Version {
                text: text.chars().take(80).collect(),
                program,
            });
        };
        if (major, minor) < OLDEST {
            return Err(EmulatorError::TooOld {
                program,
                major,
                minor,
            });
        }
        Ok(Self {
            program,
            version: (major, minor),
        })
    }

    /// How this QEMU is told to connect a socket again.
    #[must_use]
    pub fn reconnect(&self) -> Reconnect {
        if self.version >= (9, 2) {
            Reconnect::Milliseconds
        } else {
            Reconnect::Seconds
        }
    }

    /// KVM where a guest really boots with it, emulation elsewhere.
    ///
    /// That `/dev/kvm` opens says little: inside another virtual machine it may
    /// run some instructions and fail at others. So `kernel` is booted once,
    /// with no file system, until it panics for the lack of one. The outcome
    /// is kept in `cache` until the host is booted anew.
    #[must_use]
    pub fn accelerator(&self, kernel: &Path, cache: &Path) -> Accelerator {
        let device = fs::File::options().read(true).write(true).open("/dev/kvm");
        if device.is_err() {
            return Accelerator::Tcg;
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let kept = cache.join(format!("kvm-{}", boot.trim()));
        let works = match fs::read_to_string(&kept) {
            Ok(text) => text == "works",
            Err(_) => {
                let works = self.boots_with_kvm(kernel);
                let text = if works { "works" } else { "fails" };
                // Without it the next monitor tries again.
                let _ = fs::create_dir_all(cache).and_then(|()| fs::write(&kept, text));
                works
            }
        };
        if works {
            Accelerator::Kvm
        } else {
            Accelerator::Tcg
        }
    }

    fn boots_with_kvm(&self, kernel: &Path) -> bool {
        let child = Command::new(&self.program)
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-machine", "q35", "-accel", "kvm"])
            .args(["-cpu", "host", "-m", "128M", "-serial", "stdio"])
            .args(["-append", "console=ttyS0 panic=-1"])
            .arg("-kernel")
            .arg(kernel)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            return false;
        };
        let deadline = Instant::now() + TRIAL;
        let ended = loop {
            match child.try_wait() {
                Ok(Some(_)) => break true,
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                _ => break false,
            }
        };
        let _ = child.kill();
        let _ = child.wait();
        let mut text = Vec::new();
        if let Some(output) = child.stdout.take() {
            // A console's text; a pipe holds no more than 64 KiB of it.
            let _ = output.take(1 << 20).read_to_end(&mut text);
        }
        ended && String::from_utf8_lossy(&text).contains("Kernel panic")
    }
}

fn in_path(name: &str) -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    std::env::split_paths(&folders)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// `QEMU emulator version 7.2.22 (Debian …)`
fn version(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_distributions_are_understood() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(version(debian), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(version("QEMU emulator version x"), None);
        assert_eq!(version(""), None);
        let emulator = |version| Emulator {
            program: PathBuf::from(PROGRAM),
            version,
        };
        assert_eq!(emulator((9, 1)).reconnect(), Reconnect::Seconds);
        assert_eq!(emulator((10, 0)).reconnect(), Reconnect::Milliseconds);
    }
}
