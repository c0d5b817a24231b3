//! The requests a guest answers and the frame they travel in.
//!
//! One line of JSON each way over a virtio-serial port: a [`Request`] down, a
//! [`Reply`] up. The guest answers in order, one request at a time.

use serde::{Deserialize, Serialize};

/// The virtio-serial port's name, as `/sys/class/virtio-ports/*/name` has it.
pub const PORT_NAME: &str = "org.secmon.truth";

/// What PID 1 prints on the console once the workload stands.
pub const READY_MARK: &str = "secmon-truth: ready";

/// One part of the guest's truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Section {
    /// [`crate::Info`].
    Info,
    /// A list of [`crate::Process`].
    Processes,
    /// A list of [`crate::Thread`].
    Threads,
    /// A list of [`crate::Module`].
    Modules,
    /// A list of [`crate::Mapping`].
    Maps,
    /// A list of [`crate::OpenFile`].
    Files,
    /// A list of [`crate::Socket`].
    Sockets,
    /// A list of [`crate::Mount`].
    Mounts,
    /// A list of [`crate::Namespace`].
    Namespaces,
    /// A list of [`crate::KernelMessage`].
    Kmsg,
    /// A list of [`crate::Interface`].
    Interfaces,
    /// [`crate::Bpf`].
    Bpf,
    /// A list of [`crate::Symbol`].
    Kallsyms,
}

impl Section {
    /// All sections, in the order in which a full truth is taken: what
    /// changes least comes first.
    pub const ALL: [Section; 13] = [
        Section::Kallsyms,
        Section::Modules,
        Section::Bpf,
        Section::Interfaces,
        Section::Mounts,
        Section::Namespaces,
        Section::Maps,
        Section::Files,
        Section::Sockets,
        Section::Threads,
        Section::Processes,
        Section::Kmsg,
        Section::Info,
    ];

    /// The name in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Section::Info => "info",
            Section::Processes => "processes",
            Section::Threads => "threads",
            Section::Modules => "modules",
            Section::Maps => "maps",
            Section::Files => "files",
            Section::Sockets => "sockets",
            Section::Mounts => "mounts",
            Section::Namespaces => "namespaces",
            Section::Kmsg => "kmsg",
            Section::Interfaces => "interfaces",
            Section::Bpf => "bpf",
            Section::Kallsyms => "kallsyms",
        }
    }
}

/// What the host can ask of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "operation")]
pub enum Request {
    /// Tell one section.
    Truth {
        /// Which.
        section: Section,
    },
    /// Start the busy mode.
    ResumeBusy,
    /// End the busy mode; answered once its last process is gone.
    PauseBusy,
    /// Make the sockets anew that the kernel forgets after a minute
    /// (`TIME_WAIT`, `FIN_WAIT2`, `SYN_SENT`).
    RefreshSockets,
    /// Write to every page of an anonymous mapping of PID 1.
    TouchMemory {
        /// Size of the mapping in MiB.
        mebibytes: u32,
        /// The byte to fill it with.
        fill: u8,
    },
    /// Read a process's memory through `/proc/<pid>/mem`, as hex.
    ReadMemory {
        /// Process id in the initial namespace.
        pid: i32,
        /// First virtual address.
        address: u64,
        /// How many bytes, at most 1 MiB.
        length: u32,
    },
    /// Read a whole file of the guest, at most 16 MiB.
    ReadFile {
        /// Its path.
        path: String,
    },
    /// Work for a while; the answer is how often.
    Work {
        /// At what.
        work: Work,
        /// How long, in milliseconds of the guest's own clock.
        milliseconds: u32,
    },
    /// Read memory from one end to the other, several times; the answer is how
    /// many nanoseconds the fastest time took.
    ReadThrough {
        /// A file to be mapped, such as the memory of a PCI device; none for
        /// memory of the process's own.
        path: Option<String>,
        /// How much of it.
        mebibytes: u32,
        /// How often.
        rounds: u32,
    },
    /// Load a module of `/lib/specimens`.
    LoadModule {
        /// Its file's name without the ending.
        name: String,
        /// Its parameters, separated by spaces.
        parameters: String,
        /// Kernel symbols whose addresses it gets as parameters of their
        /// names.
        symbols: Vec<String>,
    },
    /// Unload a module.
    UnloadModule {
        /// Its name.
        name: String,
    },
    /// Start processes that look like something; the answer is the ids of the
    /// first one's threads, its own at first.
    StartRole {
        /// Like what.
        role: String,
    },
    /// End them.
    StopRole {
        /// The role that was started.
        role: String,
    },
    /// Write to a file.
    WriteFile {
        /// Its path.
        path: String,
        /// What is written, at once.
        text: String,
    },
    /// Whether there is such a file or folder.
    Exists {
        /// Its path.
        path: String,
    },
    /// Whether the kernel has a symbol.
    HasSymbol {
        /// Its name.
        name: String,
    },
    /// Whether the kernel, asked for the priority of a user's processes, finds
    /// one: it looks through the list of tasks, where `/proc` does not.
    UserHasProcess {
        /// The user.
        uid: u32,
    },
    /// Switch the guest off; there is no reply.
    Exit,
}

/// Something to be done over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Arithmetic: no memory, no kernel.
    Compute,
    /// `getppid(2)`: the way into the kernel and out again.
    SystemCalls,
}

/// The guest's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    /// What was asked for.
    Ok(T),
    /// Why it couldn't be told.
    Error(String),
}
