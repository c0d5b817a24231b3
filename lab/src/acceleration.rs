//! Whether guests run under hardware virtualization or emulated.

use std::env;
use std::fs::{self, OpenOptions};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Result;

use crate::builder::{Backing, QmpAccess};
use crate::cache;
use crate::guest::Guest;
use crate::suite::Suite;

/// How QEMU runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceleration {
    /// Hardware virtualization.
    Kvm,
    /// Emulation.
    Tcg,
}

/// How long the trial guest may take; where KVM works it takes two seconds.
const TRIAL: Duration = Duration::from_secs(10);

impl Acceleration {
    /// QEMU's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Acceleration::Kvm => "kvm",
            Acceleration::Tcg => "tcg",
        }
    }

    /// KVM where a guest really boots with it, emulation elsewhere.
    ///
    /// That `/dev/kvm` opens says little: inside another virtual machine it
    /// may run some instructions and fail at others. So the first call boots
    /// a guest, and its outcome holds until the machine is booted anew (it is
    /// kept in the cache folder). The variable `SECMON_LAB_ACCELERATION`
    /// (`kvm` or `tcg`) decides without a trial.
    #[must_use]
    pub fn usable() -> Self {
        static KNOWN: Mutex<Option<Acceleration>> = Mutex::new(None);
        let mut known = KNOWN
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        *known.get_or_insert_with(|| match env::var("SECMON_LAB_ACCELERATION").as_deref() {
            Ok("kvm") => Acceleration::Kvm,
            Ok("tcg") => Acceleration::Tcg,
            _ if boots_with_kvm() => Acceleration::Kvm,
            _ => Acceleration::Tcg,
        })
    }
}

fn boots_with_kvm() -> bool {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    device.is_ok() && known_outcome().unwrap_or_else(|_| trial())
}

/// The outcome of the trial on this machine since it was booted, from the
/// cache or by making it.
fn known_outcome() -> Result<bool> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let folder = cache::entry(&format!("kvm-{}", boot.trim()), |draft| {
        Ok(fs::write(draft.join("works"), trial().to_string())?)
    })?;
    Ok(fs::read_to_string(folder.join("works"))? == "true")
}

fn trial() -> bool {
    Guest::builder(Suite::Bookworm)
        .name("kvm-trial")
        .acceleration(Acceleration::Kvm)
        .backing(Backing::Plain)
        .qmp(QmpAccess::None)
        .boot_timeout(TRIAL)
        .boot()
        .is_ok()
}
