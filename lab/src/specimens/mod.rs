//! Specimens: what makes, in a disposable guest, the one state of its kernel or
//! its processes that a detector has to notice.
//!
//! They are stand-ins. None carries anything out: what takes the place of a
//! function calls that function, what is hidden sleeps, nothing stays and
//! nothing leaves the guest. A module loads only in a virtual machine whose
//! kernel was given [`MARK`], which only the lab does, and takes back what it
//! did when it is unloaded. Which there are is data: [`all`].

mod blinking;
mod build;
mod run;
mod table;

pub use blinking::BLINKING;
pub use build::modules;
pub use run::Active;
pub use table::all;

use crate::suite::Suite;

/// The word on the kernel's command line without which no specimen loads.
pub const MARK: &str = "secmon.lab=disposable";

/// What a detector has to notice, or to leave alone.
#[derive(Debug, Clone, Copy)]
pub struct Specimen {
    /// Its name, for people and for the documents.
    pub name: &'static str,
    /// The technique's id in MITRE ATT&CK.
    pub technique: &'static str,
    /// What it does, one sentence without its full stop.
    pub does: &'static str,
    /// The kernels it is for.
    pub suites: &'static [Suite],
    /// How it is made.
    pub how: How,
    /// What has to be found.
    pub expected: Expected,
    /// How the guest itself shows that it does what it says.
    pub shown: Shown,
}

/// How a specimen is made.
#[derive(Debug, Clone, Copy)]
pub enum How {
    /// A module is loaded.
    Module(Module),
    /// A module is loaded, and taken out of the list of modules by another.
    HiddenModule(Module),
    /// Processes are started in a role of the lab's agent.
    Program(&'static str),
    /// A file of the kernel's is written, and later what was in it.
    Setting {
        /// Its path.
        path: &'static str,
        /// What is written.
        text: &'static str,
    },
    /// The lab writes to the memory of a guest that stands still, and writes
    /// back what was there before it goes on.
    MemoryEdit(Edit),
}

/// A module of `lab/specimens/modules`.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    /// Its file without the ending.
    pub file: &'static str,
    /// What it needs to know.
    pub needs: &'static [Need],
}

/// A parameter of a module.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// The address of a symbol, in a parameter of that name.
    Symbol(&'static str),
    /// The same where the kernel has it.
    SymbolIfThere(&'static str),
    /// `pid`: a process started in that role.
    Process(&'static str),
    /// `tid`: the second thread of a process started in that role.
    Thread(&'static str),
    /// Another module that has to be loaded before, `resident`.
    Resident,
    /// These parameters.
    Set(&'static str),
}

/// What the lab writes to the memory of a guest. The pointers that are put in
/// the place of others lead to code of a module that is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edit {
    /// A process out of the list of tasks.
    UnlinkTask,
    /// A process out of the list of tasks, that says of itself that it has
    /// ended.
    DisguiseTask,
    /// A module out of the list of modules.
    UnlinkModule,
    /// A module's object out of the set of modules' objects.
    UnlinkModuleObject,
    /// The entry of getpgid in the table of system calls.
    SystemCallEntry,
    /// The entry or the branch of getpgid for 32-bit programs.
    SystemCall32,
    /// The gate of the overflow exception.
    InterruptGate,
    /// A pointer in a structure at a symbol.
    Pointer {
        /// The structure's symbol.
        symbol: &'static str,
        /// Its type.
        structure: &'static str,
        /// The pointer.
        member: &'static str,
    },
    /// The function of a security module's hook.
    SecurityHook,
    /// The operations of the loopback device.
    DeviceOperations,
    /// A segment that the kernel does not have, for the first CPU.
    SegmentDescriptor,
    /// A jump over the first bytes of a function.
    Jump(&'static str),
    /// One bit of a function.
    CodeBit(&'static str),
    /// The first condition that a function asks is turned round.
    Condition(&'static str),
    /// A function that gives 0 and does nothing.
    ReturnZero(&'static str),
    /// A word of the kernel's constants.
    Constant(&'static str),
    /// A process uses the credentials of process 1.
    ShareCredentials,
    /// A process becomes one of user 0, in its credentials as they are.
    UserZero,
    /// A process gets all capabilities, in its credentials as they are.
    AllCapabilities,
    /// A text of the kernel's.
    Text {
        /// Its symbol.
        symbol: &'static str,
        /// What it becomes.
        text: &'static str,
    },
}

/// What has to be found.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// By which detector.
    pub detector: &'static str,
    /// Under which name; none as long as no detector finds it.
    pub finding: Option<&'static str>,
    /// As what.
    pub verdict: Verdict,
}

/// What a finding says of what was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// An attack, or a suspicion of one.
    Alarm,
    /// A legitimate use that one may want to know of.
    Information,
}

/// How the guest's own programs see that a specimen does what it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// Not otherwise than that it loaded, or stands.
    Stands,
    /// `/proc` no longer has the process.
    NoProcess,
    /// The kernel no longer finds it in its list of tasks.
    NoTask,
    /// Both.
    NeitherProcessNorTask,
    /// `/proc/PID/task` no longer has the thread.
    NoThread,
    /// `/proc/modules` lacks the module that is hidden.
    NoModule,
    /// `/sys/module` lacks it.
    NoModuleFolder,
    /// The process is one of user 0.
    UserZero,
    /// The process has all capabilities.
    AllCapabilities,
    /// `/proc/net/tcp` has nobody that listens at this port.
    NoListener(u16),
    /// `/proc` has a kernel thread of this name.
    KernelThread(&'static str),
}

impl Specimen {
    /// All specimens for a kernel.
    pub fn of(suite: Suite) -> impl Iterator<Item = &'static Specimen> {
        all().filter(move |specimen| specimen.suites.contains(&suite))
    }

    /// Whether a module makes it.
    #[must_use]
    pub fn needs_modules(&self) -> bool {
        matches!(self.how, How::Module(_) | How::HiddenModule(_))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn specimens_are_named_once_and_have_their_files() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("specimens/modules");
        let mut names = BTreeSet::new();
        let mut used = BTreeSet::from(["resident".to_owned(), "module_unlinked".to_owned()]);
        for specimen in all().chain(BLINKING) {
            let name = specimen.name;
            for suite in specimen.suites {
                assert!(names.insert((name, *suite)), "{name} is there twice");
            }
            assert!(specimen.technique.starts_with('T'), "{name}");
            assert!(!specimen.does.ends_with('.'), "{name}");
            if let How::Module(module) | How::HiddenModule(module) = specimen.how {
                used.insert(module.file.to_owned());
            }
        }
        for entry in std::fs::read_dir(folder).expect("the modules") {
            let path = entry.expect("an entry").path();
            let text = std::fs::read_to_string(&path).expect("text");
            if path.extension().is_some_and(|extension| extension == "h") {
                let begins_with_it = text.contains("#include \"specimen.h\"");
                assert!(text.contains(MARK) || begins_with_it);
                continue;
            }
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            let stem = stem.expect("a name");
            assert!(used.remove(stem), "no specimen is made by {stem}");
            assert!(text.contains("specimen_in_lab()"), "{stem} loads anywhere");
        }
        assert!(used.is_empty(), "no file for {used:?}");
    }

    #[test]
    fn there_are_forty_techniques_and_more() {
        let names: BTreeSet<_> = all().map(|specimen| specimen.name).collect();
        assert!(names.len() >= 40, "{}", names.len());
    }
}
