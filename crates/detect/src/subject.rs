//! What a finding is about, and when two findings are about the same thing.

use std::fmt;

use secmon_guest::{Text, Value};
use secmon_memory::VirtualAddress;
use serde::ser::{Serialize, Serializer};

use crate::finding::Columns;

/// What a finding is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A process.
    Process {
        /// Its first thread's `task_struct`.
        task: VirtualAddress,
        /// Its id in the initial pid namespace.
        pid: u32,
        /// When it was started: nanoseconds since the guest's boot.
        started: u64,
        /// Its name (`comm`).
        name: Text,
    },
    /// A thread that is not the first of its process.
    Thread {
        /// Its `task_struct`.
        task: VirtualAddress,
        /// Its own id in the initial pid namespace.
        tid: u32,
        /// Its process's id.
        pid: u32,
        /// When it was started: nanoseconds since the guest's boot.
        started: u64,
        /// Its name (`comm`).
        name: Text,
    },
    /// A module of the kernel.
    Module {
        /// Its `struct module`, or what else is left of it.
        address: VirtualAddress,
        /// Its name; empty if it has none any more.
        name: Text,
    },
    /// Instructions of the kernel.
    KernelCode {
        /// The first of them.
        address: VirtualAddress,
        /// The symbol that they belong to.
        symbol: Option<String>,
    },
    /// A pointer in the kernel's data.
    KernelPointer {
        /// Where it lies.
        location: VirtualAddress,
        /// Where it leads.
        target: VirtualAddress,
        /// The symbol that it belongs to, and the member.
        symbol: Option<String>,
    },
    /// Another object of the kernel.
    KernelObject {
        /// What it is, in `snake_case`: `ftrace_ops`.
        kind: &'static str,
        /// Where it lies.
        address: VirtualAddress,
        /// What it is called.
        name: Text,
    },
    /// A register of a CPU.
    Register {
        /// The CPU's number.
        cpu: u32,
        /// The register's name: `cr4`.
        name: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A socket.
    Socket {
        /// Its `struct sock`.
        address: VirtualAddress,
        /// Its protocol and ends, as `sockets` shows them.
        name: String,
    },
    /// A file.
    File {
        /// Its `struct inode`.
        inode: VirtualAddress,
        /// Its path.
        path: Text,
    },
    /// A setting of the kernel: `core_pattern`.
    Setting {
        /// Its name.
        name: &'static str,
        /// What it is set to.
        value: Text,
    },
    /// A network interface.
    Interface {
        /// Its `struct net_device`.
        address: VirtualAddress,
        /// Its name.
        name: Text,
    },
}

impl Subject {
    /// What kind of thing it is, in `snake_case`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Process { .. } => "process",
            Self::Thread { .. } => "thread",
            Self::Module { .. } => "module",
            Self::KernelCode { .. } => "kernel_code",
            Self::KernelPointer { .. } => "kernel_pointer",
            Self::KernelObject { .. } => "kernel_object",
            Self::Register { .. } => "register",
            Self::Socket { .. } => "socket",
            Self::File { .. } => "file",
            Self::Setting { .. } => "setting",
            Self::Interface { .. } => "interface",
        }
    }

    /// The address that it is at, if it is at one.
    #[must_use]
    pub const fn address(&self) -> Option<VirtualAddress> {
        match self {
            Self::Process { task: address, .. }
            | Self::Thread { task: address, .. }
            | Self::Module { address, .. }
            | Self::KernelCode { address, .. }
            | Self::KernelPointer {
                location: address, ..
            }
            | Self::KernelObject { address, .. }
            | Self::Socket { address, .. }
            | Self::File { inode: address, .. }
            | Self::Interface { address, .. } => Some(*address),
            Self::Register { .. } | Self::Setting { .. } => None,
        }
    }

    /// What makes it the same thing when it is looked at again: where it lies
    /// and what tells it from another that lay there before; never its text,
    /// which the guest can change.
    #[must_use]
    pub fn key(&self) -> String {
        let kind = self.kind();
        match self {
            Self::Process {
                task, pid, started, ..
            } => format!("{kind} {task} {pid} {started}"),
            Self::Thread {
                task, tid, started, ..
            } => format!("{kind} {task} {tid} {started}"),
            Self::KernelPointer {
                location, target, ..
            } => format!("{kind} {location} {target}"),
            Self::KernelObject {
                kind: object,
                address,
                ..
            } => format!("{kind} {object} {address}"),
            Self::Register { cpu, name, value } => format!("{kind} {cpu} {name} {value:#x}"),
            Self::Setting { name, .. } => format!("{kind} {name}"),
            Self::Module { address, .. }
            | Self::KernelCode { address, .. }
            | Self::Socket { address, .. }
            | Self::File { inode: address, .. }
            | Self::Interface { address, .. } => format!("{kind} {address}"),
        }
    }

    /// Its parts, as columns.
    #[must_use]
    pub fn columns(&self) -> Vec<(&'static str, Value)> {
        match self {
            Self::Process {
                task,
                pid,
                started,
                name,
            } => vec![
                ("task", (*task).into()),
                ("pid", (*pid).into()),
                ("started", (*started).into()),
                ("name", name.clone().into()),
            ],
            Self::Thread {
                task,
                tid,
                pid,
                started,
                name,
            } => vec![
                ("task", (*task).into()),
                ("tid", (*tid).into()),
                ("pid", (*pid).into()),
                ("started", (*started).into()),
                ("name", name.clone().into()),
            ],
            Self::Module { address, name } | Self::Interface { address, name } => {
                vec![
                    ("address", (*address).into()),
                    ("name", name.clone().into()),
                ]
            }
            Self::KernelCode { address, symbol } => vec![
                ("address", (*address).into()),
                ("symbol", symbol.clone().into()),
            ],
            Self::KernelPointer {
                location,
                target,
                symbol,
            } => vec![
                ("location", (*location).into()),
                ("target", (*target).into()),
                ("symbol", symbol.clone().into()),
            ],
            Self::KernelObject {
                kind,
                address,
                name,
            } => vec![
                ("object", Value::word(kind)),
                ("address", (*address).into()),
                ("name", name.clone().into()),
            ],
            Self::Register { cpu, name, value } => vec![
                ("cpu", (*cpu).into()),
                ("name", Value::word(name)),
                ("value", Value::Address(*value)),
            ],
            Self::Socket { address, name } => vec![
                ("address", (*address).into()),
                ("name", name.clone().into()),
            ],
            Self::File { inode, path } => {
                vec![("inode", (*inode).into()), ("path", path.clone().into())]
            }
            Self::Setting { name, value } => {
                vec![("name", Value::word(name)), ("value", value.clone().into())]
            }
        }
    }
}

impl fmt::Display for Subject {
    /// In a few words, for people. Control characters are not escaped here.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = |symbol: &Option<String>, address: &VirtualAddress| match symbol {
            Some(symbol) => format!("{symbol} ({address})"),
            None => address.to_string(),
        };
        match self {
            Self::Process { pid, name, .. } => {
                write!(f, "process {pid} ({})", name.to_display())
            }
            Self::Thread { tid, pid, name, .. } => {
                write!(f, "thread {tid} of process {pid} ({})", name.to_display())
            }
            Self::Module { address, name } if name.as_bytes().is_empty() => {
                write!(f, "module at {address}")
            }
            Self::Module { name, .. } => write!(f, "module {}", name.to_display()),
            Self::KernelCode { address, symbol } => {
                write!(f, "kernel code {}", named(symbol, address))
            }
            Self::KernelPointer {
                location, symbol, ..
            } => write!(f, "kernel pointer {}", named(symbol, location)),
            Self::KernelObject {
                kind,
                address,
                name,
            } => write!(f, "{kind} {} at {address}", name.to_display()),
            Self::Register { cpu, name, .. } => write!(f, "{name} of CPU {cpu}"),
            Self::Socket { name, .. } => write!(f, "socket {name}"),
            Self::File { path, .. } => write!(f, "file {}", path.to_display()),
            Self::Setting { name, .. } => write!(f, "setting {name}"),
            Self::Interface { name, .. } => write!(f, "interface {}", name.to_display()),
        }
    }
}

impl Serialize for Subject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut columns = vec![("kind", Value::word(self.kind()))];
        columns.extend(self.columns());
        Columns(&columns).serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(started: u64, name: &str) -> Subject {
        Subject::Process {
            task: VirtualAddress::new(0xffff_8880_0000_1000),
            pid: 7,
            started,
            name: name.into(),
        }
    }

    #[test]
    fn a_process_is_the_same_whatever_it_calls_itself() {
        assert_eq!(process(1, "sh").key(), process(1, "bash").key());
        assert_ne!(process(1, "sh").key(), process(2, "sh").key());
    }

    #[test]
    fn one_address_can_be_two_things() {
        let address = VirtualAddress::new(0xffff_8880_0000_1000);
        let module = Subject::Module {
            address,
            name: "".into(),
        };
        let code = Subject::KernelCode {
            address,
            symbol: None,
        };
        assert_ne!(module.key(), code.key());
        assert_eq!(module.address(), code.address());
        assert_eq!(module.to_string(), "module at 0xffff888000001000");
    }
}
