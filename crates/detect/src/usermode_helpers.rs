//! The detector `usermode_helpers`: programs that the kernel itself starts as
//! user 0.

use secmon_guest::{Guest, Text};

use crate::{Class, DetectError, Detector, Evidence, Finding, Severity, Subject, Technique};

const NAME: &str = "usermode_helpers";

/// Event-triggered execution.
const TRIGGERED: Technique = Technique::new("T1546");

/// The kernel's texts are arrays of 128 or 256 bytes (`kernel/sysctl.c`,
/// `fs/coredump.c`, `kernel/module/kmod.c`, `lib/kobject_uevent.c`).
const LONGEST: usize = 256;

/// Folders that only user 0 writes to on a system as distributions make it.
const SYSTEM_FOLDERS: &[&str] = &[
    "/usr/",
    "/bin/",
    "/sbin/",
    "/lib/",
    "/lib64/",
    "/opt/",
    "/nix/store/",
    "/run/current-system/",
];

/// A text that names a program.
struct Helper {
    symbol: &'static str,
    /// What the kernel does with it.
    when: &'static str,
    /// The names that the program has; none: any.
    programs: &'static [&'static str],
    /// Whether the text names a program only behind a `|`.
    piped: bool,
}

const HELPERS: &[Helper] = &[
    Helper {
        symbol: "core_pattern",
        when: "when a process crashes",
        programs: &[],
        piped: true,
    },
    Helper {
        symbol: "modprobe_path",
        when: "when a module is wanted",
        programs: &["modprobe", "true", "false"],
        piped: false,
    },
    Helper {
        symbol: "poweroff_cmd",
        when: "when the machine is to be switched off",
        programs: &["poweroff"],
        piped: false,
    },
    Helper {
        symbol: "reboot_cmd",
        when: "when the machine is to be started again",
        programs: &["reboot"],
        piped: false,
    },
    Helper {
        symbol: "uevent_helper",
        when: "at every event of a device",
        programs: &["hotplug", "mdev"],
        piped: false,
    },
];

/// Looks at the programs that the kernel starts.
pub(crate) struct UsermodeHelpers;

impl Detector for UsermodeHelpers {
    fn name(&self) -> &'static str {
        NAME
    }

    fn meaning(&self) -> &'static str {
        "Programs that the kernel starts as user 0 at some event (core_pattern, modprobe_path and \
         the like), where they are not what systems set them to."
    }

    fn compares(&self) -> &'static str {
        "The kernel's texts with the programs' usual names and with the folders that only user 0 \
         writes to."
    }

    fn evaded_by(&self) -> &'static str {
        "Exchanging the program itself, or one of the usual name in a system folder."
    }

    fn techniques(&self) -> &'static [Technique] {
        &[TRIGGERED]
    }

    fn cost(&self) -> &'static str {
        "Five reads of at most 256 bytes."
    }

    fn run(&self, guest: &Guest, findings: &mut dyn FnMut(Finding)) -> Result<(), DetectError> {
        let mut found = 0;
        for helper in HELPERS {
            let Some(address) = guest.address(helper.symbol) else {
                continue;
            };
            found += 1;
            let text = guest
                .space()
                .read_c_string(address, LONGEST)
                .map_err(|source| DetectError::Read {
                    what: helper.symbol,
                    address,
                    source,
                })?;
            let text = Text::new(text);
            let Some(reason) = helper.objection(&text.to_display()) else {
                continue;
            };
            let summary = format!("the kernel starts a program {}: {reason}", helper.when);
            let subject = Subject::Setting {
                name: helper.symbol,
                value: text.clone(),
            };
            findings(
                Finding::new(
                    NAME,
                    "usermode_helper_changed",
                    Class::Suspicion,
                    Severity::High,
                    subject,
                    summary,
                )
                .technique(TRIGGERED)
                .evidence(
                    Evidence::new("memory", "the kernel's text")
                        .with("symbol", helper.symbol)
                        .with("address", address)
                        .with("text", text),
                ),
            );
        }
        if found == 0 {
            return Err(DetectError::Missing {
                what: "core_pattern",
            });
        }
        Ok(())
    }
}

impl Helper {
    /// What is wrong with `text`; none if it is as systems set it.
    fn objection(&self, text: &str) -> Option<String> {
        let command = if self.piped {
            text.strip_prefix('|')?
        } else {
            text
        };
        let program = command.split_whitespace().next()?;
        let climbs = program.split('/').any(|part| part == "..");
        if climbs
            || !SYSTEM_FOLDERS
                .iter()
                .any(|folder| program.starts_with(folder))
        {
            return Some(format!("{program} is in no folder of the system's"));
        }
        let name = program.rsplit('/').next().unwrap_or_default();
        if !self.programs.is_empty() && !self.programs.contains(&name) {
            return Some(format!("{program} is not what it is on other systems"));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(symbol: &str, text: &str) -> bool {
        let helper = HELPERS.iter().find(|helper| helper.symbol == symbol);
        helper.expect("a helper").objection(text).is_some()
    }

    #[test]
    fn what_distributions_set_is_left_alone() {
        for (symbol, text) in [
            ("core_pattern", "core"),
            ("core_pattern", "/var/crash/core.%p"),
            ("core_pattern", "|/usr/share/apport/apport -p%p -s%s"),
            ("core_pattern", "|/lib/systemd/systemd-coredump %P %u"),
            ("core_pattern", "|/bin/false"),
            ("modprobe_path", "/sbin/modprobe"),
            ("modprobe_path", "/run/current-system/sw/bin/modprobe"),
            ("modprobe_path", "/bin/true"),
            ("modprobe_path", ""),
            ("uevent_helper", ""),
            ("poweroff_cmd", "/sbin/poweroff"),
        ] {
            assert!(!objects(symbol, text), "{symbol} {text}");
        }
    }

    #[test]
    fn programs_elsewhere_and_of_other_names_are_found() {
        for (symbol, text) in [
            ("core_pattern", "|/tmp/x %p"),
            ("core_pattern", "|/dev/shm/x"),
            ("core_pattern", "|/usr/../tmp/x"),
            ("modprobe_path", "/tmp/modprobe"),
            ("modprobe_path", "/usr/bin/nc"),
            ("modprobe_path", "modprobe"),
            ("poweroff_cmd", "/usr/bin/sh"),
        ] {
            assert!(objects(symbol, text), "{symbol} {text}");
        }
    }
}
