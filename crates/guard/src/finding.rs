//! What the guard claims.

use std::fmt;

use serde::Serialize;

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The kernel that runs is not the image's.
    OtherKernel,
    /// The kernel's text or constants are not those of its file.
    ChangedKernel,
    /// What the kernel writes only while it starts has changed since.
    ChangedConstant,
    /// The interrupt table has changed.
    ChangedInterrupts,
    /// Code made by the kernel or a module has changed since it was first seen.
    ChangedGeneratedCode,
    /// A page can be written that holds code or constants.
    WritableCode,
    /// A page can be executed that nothing explains.
    UnknownCode,
    /// A process has page tables of its own for the kernel's half.
    ForeignPageTable,
    /// A module that the image does not have.
    UnknownModule,
    /// A process that should not be there.
    UnexpectedProcess,
    /// A process that should be there and is not.
    MissingProcess,
    /// The program's text or constants are not those of the image.
    ChangedProgram,
    /// Pages that were relocated at the program's start have changed.
    ChangedRelocated,
    /// The configuration in process 1 is not the one that was given.
    ChangedConfiguration,
    /// A switch of the kernel is not as the monitor sets it.
    ChangedSetting,
    /// Something that must be readable is not.
    Unreadable,
    /// A detector of `secmon check` raised an alarm.
    Detector,
    /// The monitor does not answer.
    Silent,
    /// The VM's processors or its QEMU were stopped.
    Stopped,
    /// A debugger is attached to the VM's QEMU.
    Traced,
    /// The VM's QEMU has ended.
    Ended,
}

impl Kind {
    /// Its name, as it stands in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::OtherKernel => "other_kernel",
            Self::ChangedKernel => "changed_kernel",
            Self::ChangedConstant => "changed_constant",
            Self::ChangedInterrupts => "changed_interrupts",
            Self::ChangedGeneratedCode => "changed_generated_code",
            Self::WritableCode => "writable_code",
            Self::UnknownCode => "unknown_code",
            Self::ForeignPageTable => "foreign_page_table",
            Self::UnknownModule => "unknown_module",
            Self::UnexpectedProcess => "unexpected_process",
            Self::MissingProcess => "missing_process",
            Self::ChangedProgram => "changed_program",
            Self::ChangedRelocated => "changed_relocated",
            Self::ChangedConfiguration => "changed_configuration",
            Self::ChangedSetting => "changed_setting",
            Self::Unreadable => "unreadable",
            Self::Detector => "detector",
            Self::Silent => "silent",
            Self::Stopped => "stopped",
            Self::Traced => "traced",
            Self::Ended => "ended",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Something that is not as it has to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing.
    pub kind: Kind,
    /// Where: a symbol, a process, a detector's subject. With the kind it
    /// tells one finding from another.
    pub place: String,
    /// The first address that is concerned, where there is one.
    pub address: Option<u64>,
    /// What should be there.
    pub expected: String,
    /// What is there.
    pub seen: String,
}

impl Finding {
    /// A finding without an address.
    pub fn new(
        kind: Kind,
        place: impl Into<String>,
        expected: impl Into<String>,
        seen: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            place: place.into(),
            address: None,
            expected: expected.into(),
            seen: seen.into(),
        }
    }

    /// Adds the first address that is concerned.
    #[must_use]
    pub fn at(mut self, address: u64) -> Self {
        self.address = Some(address);
        self
    }

    /// Whether the other one says the same of the same thing.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.kind == other.kind && self.place == other.place
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.place)?;
        if let Some(address) = self.address {
            write!(f, " at {address:#x}")?;
        }
        write!(f, ": expected {}, seen {}", self.expected, self.seen)
    }
}

/// Bytes as hexadecimal digits, the first sixteen of them.
pub fn digits(bytes: &[u8]) -> String {
    use fmt::Write as _;
    const SHOWN: usize = 16;
    let mut text = String::new();
    for byte in bytes.iter().take(SHOWN) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    if bytes.len() > SHOWN {
        text.push('…');
    }
    text
}
